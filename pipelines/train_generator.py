"""Stage two: train a generator from a latent cache."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from detok_pipe.generators.generator import Generator
from detok_pipe.generators.patch import default_patch_size
from detok_pipe.generators.registry import build_generator
from detok_pipe.latents.cache import LatentCache, open_cache
from detok_pipe.latents.errors import CacheError, ConfigError
from detok_pipe.latents.loader import LatentLoader
from detok_pipe.latents.noise import Noise
from detok_pipe.latents.verify import damaged_files
from detok_pipe.pipelines.accelerators import flushed_denormals
from detok_pipe.pipelines.accumulation import accumulate, largest_micro_batch
from detok_pipe.pipelines.checkpoints import checkpoint_paths, load_weights
from detok_pipe.pipelines.config import (
    Execution,
    GeneratorConfig,
    duration_in_steps,
    to_json,
    unknown_name,
)
from detok_pipe.pipelines.ema import Ema
from detok_pipe.pipelines.generator_inspection import Preview, inspections
from detok_pipe.pipelines.sharding import (
    checkpoint_activations,
    compile_blocks,
    prepared,
    shard,
    whole,
)
from detok_pipe.pipelines.trained import load_generator
from detok_pipe.pipelines.training import Parts, start, train


def split_rows(
    cache: LatentCache, config: GeneratorConfig
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Rows to train on, None for all, and rows held out, None for none; both int64.

    Held out are the last of the classes' rows: rows lie in random order in a cache.

    Raises:
        ConfigError: an unknown class, or nothing is left.
    """
    if config.classes is None and config.limit is None and not config.holdout:
        return None, None
    rows = np.arange(cache.num_rows)
    if config.classes is not None:
        for name in config.classes:
            if name not in cache.class_names:
                raise unknown_name("class", name, cache.class_names)
        wanted = [cache.class_names.index(name) for name in config.classes]
        rows = rows[np.isin(cache.labels, wanted)]
    count = max(0, len(rows) - config.holdout)
    rows, held_out = rows[:count][: config.limit], rows[count:]
    if not len(rows):
        raise ConfigError(
            f"classes {config.classes}, limit {config.limit} and holdout {config.holdout} leave "
            "no row to train on"
        )
    return rows, held_out if config.holdout else None


def fitted_to(config: GeneratorConfig, cache: LatentCache) -> GeneratorConfig:
    """``config`` with the patch size that suits the form of the latents, unless it has one."""
    patch_size = default_patch_size(cache.grid)
    if patch_size == 1 or "patch_size" in config.model:
        return config
    return dataclasses.replace(config, model={"patch_size": patch_size, **config.model})


def describe(config: GeneratorConfig, cache: LatentCache) -> dict[str, Any]:
    """What a run would be and need, for ``--dry-run``: nothing is allocated.

    Raises:
        ConfigError: the generator is too large, or see ``split_rows``.
    """
    config = fitted_to(config, cache)
    with torch.device("meta"):
        model = _build(config, cache)
    parameters = sum(p.numel() for p in model.parameters())
    rows, _ = split_rows(cache, config)
    images = cache.num_rows if rows is None else len(rows)
    return {
        "parameters": parameters,
        "images": images,
        "steps": duration_in_steps(
            config.duration, images=images, global_batch=config.global_batch
        ),
        # fp32 weights, gradients, two Adam moments and the EMA, 4 bytes each.
        "memory for weights and optimizer (bytes)": 20 * parameters,
        "disk a checkpoint (bytes)": 16 * parameters,
    }


@dataclass(frozen=True)
class Beginning:
    """The weights that a training begins with: those of another run.

    Attributes:
        run: a generator's run directory, whose newest checkpoint is taken.
        weights: "ema", the averaged ones, or "model", the last ones.
    """

    run: Path
    weights: Literal["ema", "model"] = "ema"

    def load(self, model: torch.nn.Module, cache: LatentCache) -> dict[str, Any]:
        """Give ``model`` the weights; returns what they were, for the record.

        Raises:
            CheckpointError: no generator run, no checkpoint, or another network.
        """
        other = load_generator(self.run, ema=self.weights == "ema")
        if other.identity["tokenizer"] != cache.tokenizer["fingerprint"]:
            warnings.warn(
                f"{self.run} was trained on latents of another tokenizer than the cache's: its "
                "weights are hardly a better start than random ones",
                stacklevel=2,
            )
        load_weights(model, other.model.state_dict(), self.run)
        return {"run": str(self.run), **other.identity}


def _check_hashes(latents: Path, accelerator: Accelerator) -> None:
    rank, world = accelerator.process_index, accelerator.num_processes
    problems = damaged_files(latents, rank=rank, world=world)
    for problem in problems if world == 1 else gather_object(problems):
        raise CacheError(
            f"{latents} is damaged: {problem}; `detok-pipe verify {latents} --repair` mends it "
            "where the images are at hand"
        )


def _build(config: GeneratorConfig, cache: LatentCache) -> Generator:
    try:
        return build_generator(
            config.generator,
            grid=cache.grid,
            channels=cache.channels,
            num_classes=cache.num_classes,
            **config.model,
        )
    except RuntimeError as error:  # torch has no memory for it, or cannot count its bytes
        given = [f"--set model.{name}={value}" for name, value in config.model.items()]
        raise ConfigError(
            f"{' '.join([config.generator, *given])} is too large to be built; give smaller sizes, "
            f"or a smaller generator: {str(error).splitlines()[0]}"
        ) from error


@flushed_denormals()
def train_generator(
    config: GeneratorConfig,
    latents: Path,
    out: Path,
    execution: Execution,
    *,
    begin: Beginning | None = None,
    preview: Preview | None = None,
    verify: bool = False,
) -> None:
    """Train (or go on training) the generator of ``config`` from the cache ``latents``.

    Writes the run directory ``out``; see ``run_directory.py`` for its form. Works alone or
    as one of many processes started by ``accelerate launch`` or ``torchrun``.

    Args:
        begin: begin with the weights of another run; by default with random ones.
        preview: how the training is looked at; by default not at all.
        verify: first read and hash every file of the cache; the processes share them.

    Raises:
        CacheError: the cache is missing, unfinished or damaged.
        CheckpointError: the run to begin with is missing, or of another network.
        ConfigError, MismatchError, LockedError, NonFiniteError, Interrupted: see ``fit``,
            ``open_run`` and ``Preview``.
    """
    preview = preview or Preview()
    preview.check_keep_best(execution)
    cache = open_cache(latents)
    config = fitted_to(config, cache)
    accelerator, config = start(config, execution, out)
    device = accelerator.device
    if verify:
        _check_hashes(latents, accelerator)
    rows, held_out = split_rows(cache, config)
    images = cache.num_rows if rows is None else len(rows)
    steps = duration_in_steps(config.duration, images=images, global_batch=config.global_batch)

    model = _build(config, cache)
    inputs: dict[str, Any] = {
        "cache": cache.fingerprint,
        "tokenizer": cache.tokenizer["fingerprint"],
    }
    facts: dict[str, Any] = {
        "latents": {
            "path": str(latents),
            "grid": list(cache.grid),
            "channels": cache.channels,
            "class_names": list(cache.class_names),
            "num_classes": cache.num_classes,
            "stats": cache.stats.to_json(),
        },
        "tokenizer": cache.tokenizer,
        "made of": {"cache": cache.manifest.identity()},
    }
    if begin is not None:
        inputs["begin"] = {"run": str(begin.run.resolve()), "weights": begin.weights}
        if not checkpoint_paths(out):
            facts["begun with"] = begin.load(model, cache)
    model.to(device)
    ema = Ema(model)
    if execution.activation_checkpointing:
        checkpoint_activations(model)
    if execution.compile:
        compile_blocks(model, sharded=execution.fsdp)
    if execution.fsdp:
        shard(ema.module)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    trained = prepared(accelerator, model, optimizer)
    loader = LatentLoader(
        cache,
        config.global_batch,
        config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=device,
        views=config.views,
        sample_posterior=config.sample_posterior,
        subset=rows,
    )
    parts = Parts({"model": model}, {"optimizer": optimizer}, ema, loader)

    def losses(part: Any, step: int) -> dict[str, Tensor]:
        noise = Noise(config.seed, part.ids, step=step, device=device)
        with accelerator.autocast():
            return {"loss": trained(part.z, part.condition, noise)}

    micro_batch = execution.micro_batch
    if micro_batch == "auto":
        micro_batch = largest_micro_batch(
            accelerator, trained, loader, lambda part: losses(part, 0)["loss"]
        )

    def update(batch: Any, step: int) -> dict[str, Tensor]:
        values = accumulate(
            accelerator, trained, batch, micro_batch, lambda part: losses(part, step)
        )
        if config.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            values |= whole({"gradient_norm": norm})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return values

    def averaged() -> Generator:
        if not execution.fsdp:
            return cast(Generator, ema.module)
        network = _build(config, cache).to(device).requires_grad_(False).eval()
        network.load_state_dict(whole(ema.module.state_dict()))
        return network

    def describe_ids(ids: Sequence[int]) -> str:
        return f"rows {', '.join(map(str, loader.rows_at(np.asarray(ids))))} of the cache"

    train(
        config.generator,
        config,
        execution,
        out,
        accelerator=accelerator,
        parts=parts,
        update=update,
        steps=steps,
        kind="generator",
        inputs=inputs,
        facts=facts,
        inspections=inspections(
            preview,
            config,
            cache,
            averaged,
            {"config": to_json(config), **facts},
            held_out=held_out,
            accelerator=accelerator,
            latents=latents,
            out=out,
        ),
        describe_ids=describe_ids,
    )
