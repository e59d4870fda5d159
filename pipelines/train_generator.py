"""Stage two: train a generator from a latent cache."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from detok_pipe.generators.registry import build_generator
from detok_pipe.latents.cache import LatentCache, open_cache
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.loader import LatentLoader
from detok_pipe.latents.noise import Noise
from detok_pipe.pipelines.config import (
    Execution,
    GeneratorConfig,
    duration_in_steps,
    to_json,
    unknown_name,
)
from detok_pipe.pipelines.run_directory import latest_checkpoint
from detok_pipe.pipelines.training import (
    Parts,
    accumulate,
    ema_decay,
    fit,
    flushed_denormals,
    learning_rate,
    opened_run,
    start,
)


def subset(cache: LatentCache, config: GeneratorConfig) -> np.ndarray | None:
    """Rows to train on (int64), or None for all.

    Raises:
        ConfigError: an unknown class, or nothing is left.
    """
    if config.classes is None and config.limit is None:
        return None
    rows = np.arange(cache.num_rows)
    if config.classes is not None:
        for name in config.classes:
            if name not in cache.class_names:
                raise unknown_name("class", name, cache.class_names)
        wanted = [cache.class_names.index(name) for name in config.classes]
        rows = rows[np.isin(cache.labels, wanted)]
    rows = rows[: config.limit]
    if not len(rows):
        raise ConfigError(
            f"classes {config.classes} and limit {config.limit} leave no row to train on"
        )
    return rows


def describe(config: GeneratorConfig, cache: LatentCache) -> dict[str, Any]:
    """What a run would be and need, for ``--dry-run``: nothing is allocated."""
    with torch.device("meta"):
        model = _build(config, cache)
    parameters = sum(p.numel() for p in model.parameters())
    rows = subset(cache, config)
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


def _build(config: GeneratorConfig, cache: LatentCache) -> torch.nn.Module:
    return build_generator(
        config.generator,
        grid=cache.grid,
        channels=cache.channels,
        num_classes=cache.num_classes,
        **config.model,
    )


@flushed_denormals()
def train_generator(
    config: GeneratorConfig, latents: Path, out: Path, execution: Execution
) -> None:
    """Train (or go on training) the generator of ``config`` from the cache ``latents``.

    Writes the run directory ``out``; see ``run_directory.py`` for its form. Works alone or
    as one of many processes started by ``accelerate launch`` or ``torchrun``.

    Raises:
        CacheError: the cache is missing, unfinished or damaged.
        ConfigError, MismatchError, LockedError, NonFiniteError, Interrupted: see ``fit`` and
            ``open_run``.
    """
    cache = open_cache(latents)
    accelerator, config = start(config, execution, out)
    rows = subset(cache, config)
    images = cache.num_rows if rows is None else len(rows)
    steps = duration_in_steps(config.duration, images=images, global_batch=config.global_batch)

    model = _build(config, cache).to(accelerator.device)
    ema = AveragedModel(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    loader = LatentLoader(
        cache,
        config.global_batch,
        config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
        views=config.views,
        sample_posterior=config.sample_posterior,
        subset=rows,
    )
    parts = Parts({"model": model}, {"optimizer": optimizer}, ema, loader)
    trained = accelerator.prepare_model(torch.compile(model) if execution.compile else model)

    def update(batch: Any, step: int) -> dict[str, Tensor]:
        def losses(part: Any) -> dict[str, Tensor]:
            noise = Noise(config.seed, part.ids, step=step, device=accelerator.device)
            return {"loss": trained(part.z, part.condition, noise)}

        values = accumulate(accelerator, trained, batch, execution.micro_batch, losses)
        if config.clip is not None:
            values["gradient_norm"] = torch.nn.utils.clip_grad_norm_(
                model.parameters(), config.clip
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return values

    record = {
        "latents": {
            "path": str(latents),
            "grid": list(cache.grid),
            "channels": cache.channels,
            "class_names": list(cache.class_names),
            "num_classes": cache.num_classes,
            "stats": cache.stats.to_json(),
        },
        "tokenizer": cache.tokenizer,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": sys.argv,
    }
    with opened_run(
        accelerator,
        out,
        kind="generator",
        config=to_json(config),
        inputs={"cache": cache.fingerprint, "tokenizer": cache.tokenizer["fingerprint"]},
        extra=record,
        keep=execution.keep_checkpoints,
    ) as run:
        fit(
            config.generator,
            accelerator=accelerator,
            run=run,
            parts=parts,
            resume=latest_checkpoint(out),
            update=update,
            steps=steps,
            rate=lambda step: learning_rate(
                step, steps=steps, peak=config.lr, warmup=config.warmup, schedule=config.lr_schedule
            ),
            decay=lambda step: ema_decay(step, config.ema, config.ema_warmup),
            global_batch=config.global_batch,
            seed=config.seed,
            execution=execution,
        )
