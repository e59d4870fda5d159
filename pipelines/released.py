"""Released checkpoints to run directories, and back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detok_pipe.generators.checkpoint_import import (
    import_generator,
    read_released,
    released_form,
)
from detok_pipe.generators.registry import generator_names
from detok_pipe.generators.state_dicts import fitted
from detok_pipe.latents import atomic
from detok_pipe.latents.errors import CheckpointError, ConfigError, MismatchError
from detok_pipe.pipelines.checkpoints import latest_checkpoint
from detok_pipe.pipelines.config import (
    GeneratorConfig,
    TokenizerConfig,
    to_json,
    unknown_name,
    with_overrides,
)
from detok_pipe.pipelines.given_stats import read_stats
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice
from detok_pipe.pipelines.run_directory import open_run, read_config
from detok_pipe.pipelines.tokenizer_presets import TOKENIZER_PRESETS
from detok_pipe.pipelines.tokenizers import open_tokenizer
from detok_pipe.pipelines.trained import (
    build_tokenizer,
    fingerprint,
    network_of,
)


def import_checkpoint(
    file: Path,
    name: str,
    out: Path,
    *,
    overrides: tuple[str, ...] = (),
    stats: Path | None = None,
    tokenizer: TokenizerChoice | Path | None = None,
    grid: tuple[int, ...] | None = None,
) -> None:
    """Write the run directory ``out`` from a released ``.pth``; no code in the file runs.

    Args:
        name: a tokenizer preset (detok-bb) or a generator (mar-l): what the file is of.
        overrides: ``key=value`` changes to the named one.
        stats: for a generator, the statistics of its latents, see `read_stats`; None: those
            published with the tokenizer.
        tokenizer: for a generator, its tokenizer.
        grid: of the generator's latents; None: a square one.

    Raises:
        CheckpointError: the file is missing, cut short, hostile or of another model.
        ConfigError: an unknown name, a generator without tokenizer or statistics, or a tokenizer
            with what is only for generators.
        MismatchError: the tokenizer decodes other latents, or ``out`` is of another import.
    """
    if name in TOKENIZER_PRESETS:
        weights_alone = isinstance(tokenizer, TokenizerChoice) and tokenizer.name is None
        for option, value in (
            ("--stats", stats),
            ("--weights" if weights_alone else "--tokenizer", tokenizer),
            ("--grid", grid),
        ):
            if value is not None:
                raise ConfigError(
                    f"{option} is for generators, and {name} is a tokenizer: leave it out"
                )
        _import_tokenizer(file, name, out, overrides)
    elif name in generator_names():
        if tokenizer is None:
            raise ConfigError(
                f"{name} samples normalised latents: name the tokenizer that decodes them with "
                "--tokenizer, and their statistics with --stats"
            )
        _import_generator(file, name, out, overrides, stats, tokenizer, grid)
    else:
        raise unknown_name("model", name, [*TOKENIZER_PRESETS, *generator_names()])


def _import_tokenizer(file: Path, name: str, out: Path, overrides: tuple[str, ...]) -> None:
    config = with_overrides(TOKENIZER_PRESETS[name](), overrides)
    released = read_released(file)
    module = build_tokenizer(config)
    model = fitted(module, released.model, f"{file} (model)")
    ema = model
    if released.ema is not None:
        ema = fitted(module, released.ema, f"{file} (model_ema)", spare=model)
    extra = {"parameters": sum(p.numel() for p in module.parameters())}
    _write(file, out, "tokenizer", to_json(config), {"data": None}, extra, model, ema)


def _import_generator(
    file: Path,
    name: str,
    out: Path,
    overrides: tuple[str, ...],
    stats: Path | None,
    tokenizer: TokenizerChoice | Path,
    grid: tuple[int, ...] | None,
) -> None:
    config = with_overrides(GeneratorConfig(generator=name), overrides)
    found = import_generator(name, read_released(file), grid=grid, **config.model)
    decoder = open_tokenizer(tokenizer)
    if (tuple(decoder.model.grid), decoder.model.channels) != (found.grid, found.channels):
        raise MismatchError(
            f"{file} makes latents {found.grid} x {found.channels}, the tokenizer {decoder.path} "
            f"decodes {tuple(decoder.model.grid)} x {decoder.model.channels}"
        )
    normalisation = decoder.stats
    if stats is not None:
        normalisation = read_stats(stats, found.channels)
    if normalisation is None:
        raise ConfigError(
            f"the latents of {decoder.path} have no published statistics: name those that {file} "
            "was trained with, with --stats"
        )
    extra = {
        "latents": {
            "path": str(file),
            "grid": list(found.grid),
            "channels": found.channels,
            "class_names": [str(label) for label in range(found.num_classes)],
            "num_classes": found.num_classes,
            "stats": normalisation.to_json(),
        },
        "tokenizer": decoder.identity,
        "parameters": sum(value.numel() for value in found.model.values()),
    }
    # The weights do not tell these two apart, and they change every sample.
    inputs = {
        "cache": None,
        "tokenizer": decoder.identity["fingerprint"],
        "grid": list(found.grid),
        "stats": normalisation.to_json(),
    }
    settings = to_json(config) | {"model": found.options}
    _write(file, out, "generator", settings, inputs, extra, found.model, found.ema)


def _write(
    file: Path,
    out: Path,
    kind: str,
    config: dict[str, Any],
    inputs: dict[str, Any],
    extra: dict[str, Any],
    model: dict[str, Tensor],
    ema: dict[str, Tensor],
) -> None:
    inputs = {**inputs, "imported": fingerprint(model)}
    extra = {**extra, "imported_from": str(file)}
    defaults = to_json(TokenizerConfig() if kind == "tokenizer" else GeneratorConfig())
    with open_run(
        out, kind=kind, config=config, defaults=defaults, inputs=inputs, extra=extra, keep=1
    ) as run:
        run.save_checkpoint(0, {"model": model, "ema": ema}, {})


def export_checkpoint(run: Path, out: Path) -> None:
    """Write the newest checkpoint of a run in the released form, a ``.pth`` for ``torch.load``.

    Raises:
        CheckpointError: no run or no whole checkpoint.
        StorageError: the disk is full or read-only.
    """
    record = read_config(run)
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    module = network_of(record, run)
    form = released_form(module, checkpoint.tensors("model"), checkpoint.tensors("ema"))
    with atomic.atomic_file(out) as temporary, temporary.open("wb") as file:
        torch.save(form, file)
