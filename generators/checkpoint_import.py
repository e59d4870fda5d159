"""Checkpoints in the published form: reading them without running their code, and writing it back.

A released ``.pth`` is a pickle that holds a dict with "model" and perhaps "model_ema" (name ->
tensor, without non-parameter buffers), or one bare state dict. Run directories are made in
`pipelines` from what this returns.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detok_pipe.generators.patch import token_grid
from detok_pipe.generators.registry import build_generator, check_options, generator_size
from detok_pipe.generators.state_dicts import fitted, state_dict_of, unpickled
from detok_pipe.latents.errors import CheckpointError


@dataclass(frozen=True)
class Released:
    """What a released checkpoint holds.

    Attributes:
        path: where it was read. model: name -> tensor, on the CPU. ema: the same for the
            averaged weights, None where there are none. args: its training options, if any.
    """

    path: Path
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None = None
    args: dict[str, Any] = field(default_factory=dict)


def read_released(path: Path) -> Released:
    """Read a released ``.pth``; no code in it runs.

    Raises:
        CheckpointError: no such file, cut short, no checkpoint, or it holds other objects.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    content = unpickled(path)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    args = content.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if "model" not in content and "model_ema" not in content:
        return Released(path, state_dict_of(path, "the file itself", content))
    ema = content.get("model_ema")
    ema = None if ema is None else state_dict_of(path, "model_ema", ema)
    model = (
        state_dict_of(path, "model", content["model"]) if "model" in content else dict(ema or {})
    )
    return Released(path, model, ema, dict(args) if isinstance(args, Mapping) else {})


@dataclass(frozen=True)
class ImportedGenerator:
    """A released generator in our terms.

    Attributes:
        grid, channels, num_classes: what `build_generator` wants to know.
        options: its overrides. model, ema: complete state dicts (ema is model where the
            checkpoint has none).
    """

    grid: tuple[int, ...]
    channels: int
    num_classes: int
    options: dict[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor]


def import_generator(
    name: str,
    released: Released,
    *,
    grid: Sequence[int] | None = None,
    **overrides: Any,
) -> ImportedGenerator:
    """Fit a released checkpoint to the generator ``name``.

    The head's depth and width, the buffer, q/k normalisation and the numbers of channels,
    classes and tokens come from the shapes.

    Args:
        grid: the latent grid; None: a square one of the checkpoint's number of tokens.
        overrides: options that shapes do not show (heads), or that differ from the named size
            (width, depth); ``patch_size`` for MAR and the autoregressive models.

    Raises:
        CheckpointError: the checkpoint is of another model or size; keys are listed.
        ConfigError: unknown name or option, or a value out of its range.
    """
    check_options(name, overrides)
    state, source = released.model, str(released.path)
    options, tokens, channels, num_classes = _from_shapes(name, state, overrides, source)
    if grid is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise CheckpointError(
                f"{source} has {tokens} tokens, which are no square; give the latent grid"
            )
        grid = (side * options.get("patch_size", 1),) * 2
    # Before a network of that grid is built, which may need more memory than there is.
    wanted = math.prod(token_grid(grid, options.get("patch_size", 1)))
    if wanted != tokens:
        raise CheckpointError(
            f"{source} has {tokens} tokens, the grid {'x'.join(map(str, grid))} makes {wanted}; "
            "give the latent grid that it was trained with"
        )
    with torch.random.fork_rng(devices=[]):
        module = build_generator(
            name, grid=grid, channels=channels, num_classes=num_classes, **options
        )
    model = fitted(module, state, f"{source} (model)")
    ema = model
    if released.ema is not None:
        ema = fitted(module, released.ema, f"{source} (model_ema)", spare=model)
    return ImportedGenerator(tuple(grid), channels, num_classes, options, model, ema)


def _from_shapes(
    name: str, state: Mapping[str, Tensor], overrides: Mapping[str, Any], source: str
) -> tuple[dict[str, Any], int, int, int]:
    """(options, tokens, channels, classes) that the shapes of a state dict tell."""
    family = name.rpartition("-")[0]
    try:
        options: dict[str, Any] = {}
        if family in ("mar", "random-ar", "raster-ar"):
            patch_size = overrides.get("patch_size", 1)
            options["head_depth"] = _count(state, "diffloss.net.res_blocks.")
            options["head_width"] = state["diffloss.net.input_proj.weight"].shape[0]
            num_classes, width = state["class_emb.weight"].shape
            channels = state["diffloss.net.input_proj.weight"].shape[1] // patch_size**2
            if family == "mar":
                tokens, depth_key = state["diffusion_pos_embed_learned"].shape[1], "encoder_blocks."
                options["buffer"] = state["encoder_pos_embed_learned"].shape[1] - tokens
            else:
                tokens, depth_key = state["target_pos_embed"].shape[1], "transformer.blocks."
        else:
            depth_key = "transformer.blocks."
            num_classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
            width, channels, *patch = state["x_embedder.proj.weight"].shape
            options["patch_size"] = patch[0] if patch else 1
            tokens = state["pos_embed"].shape[1]
            if family == "lightningdit":
                options["qk_norm"] = "transformer.blocks.0.attn.q_norm.weight" in state
    except (KeyError, ValueError, IndexError) as error:
        # Of another family: compare with the named model at the published latents.
        with torch.device("meta"):
            module = build_generator(name, grid=(16, 16), channels=16, num_classes=1000)
        fitted(module, state, f"{source}, read as {name},")
        raise CheckpointError(f"{source} is no {name}: {error}") from error
    depth = _count(state, depth_key)
    options |= overrides
    wanted = dict(zip(("width", "depth"), generator_size(name)[:2], strict=True)) | options
    for key, found in (("width", width), ("depth", depth)):
        if wanted[key] != found:
            raise CheckpointError(
                f"{source} has {key} {found}, {name} has {wanted[key]}; name the size it is of"
            )
    return options, tokens, channels, num_classes


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules follow ``prefix``."""
    place = prefix.count(".")
    return len({key.split(".")[place] for key in state if key.startswith(prefix)})


def released_form(
    module: nn.Module,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None = None,
    args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The dict of a released ``.pth``, to be written with ``torch.save``; undoes the import.

    ``model_ema`` leaves out the buffers of ``module`` that hold rotary tables, as the published
    files do. ``args`` become an ``argparse.Namespace``.
    """
    form: dict[str, Any] = {"model": {key: value.cpu() for key, value in model.items()}}
    if ema is not None:
        tables = {name for name, _ in module.named_buffers() if name.startswith("rope.")}
        form["model_ema"] = {key: ema[key].cpu() for key in ema if key not in tables}
    if args:
        form["args"] = argparse.Namespace(**args)
    return form
