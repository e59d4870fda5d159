"""Stage one: train an l-DeTok tokenizer on images."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from detok_pipe.latents.noise import Noise
from detok_pipe.pipelines.config import Execution, TokenizerConfig, duration_in_steps, to_json
from detok_pipe.pipelines.image_loader import ImageLoader
from detok_pipe.pipelines.images import ImageSource, open_images
from detok_pipe.pipelines.perceptual import perceptual_term
from detok_pipe.pipelines.run_directory import latest_checkpoint
from detok_pipe.pipelines.trained import build_tokenizer
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
from detok_pipe.tokenizer.losses import reconstruction_losses
from detok_pipe.tokenizer.model import parameter_groups


def describe(config: TokenizerConfig, source: ImageSource) -> dict[str, Any]:
    """What a run would be and need, for ``--dry-run``: nothing is allocated."""
    with torch.device("meta"):
        model = build_tokenizer(config)
    parameters = sum(p.numel() for p in model.parameters())
    images = len(source)
    return {
        "parameters": parameters,
        "images": images,
        "steps": duration_in_steps(
            config.duration, images=images, global_batch=config.global_batch
        ),
        "peak learning rate": config.lr,
        # fp32 weights, gradients, two Adam moments and the EMA, 4 bytes each.
        "memory for weights and optimizer (bytes)": 20 * parameters,
        "disk a checkpoint (bytes)": 16 * parameters,
    }


@flushed_denormals()
def train_tokenizer(
    config: TokenizerConfig,
    data: Path,
    out: Path,
    execution: Execution,
    *,
    weights_dir: Path | None = None,
) -> None:
    """Train (or go on training) the tokenizer of ``config`` on the images of ``data``.

    Writes the run directory ``out``; see ``run_directory.py`` for its form. Works alone or
    as one of many processes started by ``accelerate launch`` or ``torchrun``.

    Args:
        data: class folders, a list file, or a folder of tars; see ``images.open_images``.
        weights_dir: where the perceptual term's published weights lie, if not in a hub's cache.

    Raises:
        InputError: no images. WeightsError: the perceptual term's weights are not to be had.
        ConfigError, MismatchError, LockedError, NonFiniteError, Interrupted: see ``fit`` and
            ``open_run``.
    """
    source = open_images(data)
    accelerator, config = start(config, execution, out)
    steps = duration_in_steps(config.duration, images=len(source), global_batch=config.global_batch)
    device = accelerator.device
    model = build_tokenizer(config).to(device)
    perceptual = perceptual_term(config.perceptual, config.perceptual_size, device, weights_dir)
    ema = AveragedModel(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, fused=True
    )
    loader = ImageLoader(
        source,
        config.image_size,
        config.global_batch,
        config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=device,
        flip=config.flip,
    )
    parts = Parts({"model": model}, {"optimizer": optimizer}, ema, loader)
    trained = accelerator.prepare_model(torch.compile(model) if execution.compile else model)

    def update(batch: Any, step: int) -> dict[str, Tensor]:
        def losses(part: Any) -> dict[str, Tensor]:
            output = trained(
                part.images,
                Noise(config.seed, part.ids, step=step, device=device),
                gamma=config.gamma,
                noise_kind=config.noise,
                mask_ratio=config.mask_ratio,
                mask_kind=config.mask,
            )
            return reconstruction_losses(
                part.images,
                output.reconstruction,
                output.posterior,
                perceptual=perceptual,
                perceptual_weight=config.perceptual_weight,
                kl_weight=config.kl_weight,
            )

        values = accumulate(accelerator, trained, batch, execution.micro_batch, losses)
        values["gradient_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return values

    record = {
        "data": {"path": str(data), "images": len(source)},
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": sys.argv,
    }
    with opened_run(
        accelerator,
        out,
        kind="tokenizer",
        config=to_json(config),
        inputs={"data": source.identity},
        extra=record,
        keep=execution.keep_checkpoints,
    ) as run:
        fit(
            "l-DeTok",
            accelerator=accelerator,
            run=run,
            parts=parts,
            resume=latest_checkpoint(out),
            update=update,
            steps=steps,
            rate=lambda step: learning_rate(
                step, steps=steps, peak=config.lr, warmup=config.warmup, schedule="cosine"
            ),
            decay=lambda step: ema_decay(step, config.ema, config.ema_warmup),
            global_batch=config.global_batch,
            seed=config.seed,
            execution=execution,
        )
