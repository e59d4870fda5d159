"""Stage one: train an l-DeTok tokenizer on images, or tune the decoder of a trained one."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise
from detok_pipe.pipelines.accelerators import flushed_denormals, tensor_float32
from detok_pipe.pipelines.accumulation import accumulate, largest_micro_batch
from detok_pipe.pipelines.adversary import Adversary, Pairs
from detok_pipe.pipelines.config import Execution, TokenizerConfig, duration_in_steps, from_json
from detok_pipe.pipelines.ema import Ema
from detok_pipe.pipelines.image_loader import ImageLoader
from detok_pipe.pipelines.images import ImageSource, open_images
from detok_pipe.pipelines.inspection import check_scores_meet_checkpoints
from detok_pipe.pipelines.perceptual import perceptual_term
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.run_directory import read_config
from detok_pipe.pipelines.sharding import checkpoint_activations, compile_blocks
from detok_pipe.pipelines.tokenizer_inspection import Validation, inspections
from detok_pipe.pipelines.trained import build_tokenizer, load_tokenizer
from detok_pipe.pipelines.training import Parts, start, train
from detok_pipe.tokenizer.discriminator import PatchDiscriminator
from detok_pipe.tokenizer.losses import reconstruction_losses
from detok_pipe.tokenizer.model import LDeTok, parameter_groups

NETWORK = ("image_size", "patch_size", "channels", "encoder", "decoder", "identity_output")
"""Settings that decoder tuning takes from the tokenizer that it begins with."""


def with_network_of(config: TokenizerConfig, run: Path | None) -> TokenizerConfig:
    """``config`` as it is without a ``run``; else with the network of the tokenizer there.

    Raises:
        ConfigError: a recipe for the decoder alone without a run, or another one with a run.
        CheckpointError: no tokenizer run.
    """
    if run is None:
        if config.decoder_only:
            raise ConfigError(
                "this recipe trains a decoder alone (decoder_only): name the run of the tokenizer "
                "that it belongs to with --finetune-decoder"
            )
        return config
    if not config.decoder_only:
        raise ConfigError(
            f"--finetune-decoder {run}: the preset trains the encoder too; use the preset "
            "detok-decoder, or add --set decoder_only=true"
        )
    record = read_config(run, "tokenizer")
    trained = from_json(TokenizerConfig, record["config"], where=str(run / "config.json"))
    return dataclasses.replace(config, **{name: getattr(trained, name) for name in NETWORK})


def begin_tuning(model: LDeTok, run: Path) -> dict[str, str]:
    """Give ``model`` the EMA weights of a tokenizer run, and freeze its encoder.

    Caches are encoded with these weights, and neither a step nor the EMA moves them any more:
    latents of the run are latents of the tuned tokenizer.

    Returns:
        What the tuned tokenizer was made from: fingerprints of encoder and decoder.
    """
    trained = load_tokenizer(run)
    model.load_state_dict(trained.model.state_dict())
    model.encoder.requires_grad_(False)
    return {"encoder": trained.identity["fingerprint"], "decoder": trained.decoder}


def schedule(config: TokenizerConfig, source: ImageSource) -> tuple[int, int | None]:
    """How many steps the training has, and the one (from 0) at which the adversary joins.

    Raises:
        ConfigError: it would join after the last step.
    """

    def in_steps(duration: str, least: int) -> int:
        batch = config.global_batch
        return duration_in_steps(duration, images=len(source), global_batch=batch, least=least)

    steps = in_steps(config.duration, 1)
    if config.adversarial_start is None:
        return steps, None
    start = in_steps(config.adversarial_start, 0)
    if start >= steps:
        raise ConfigError(
            f"adversarial_start {config.adversarial_start!r} is step {start:,}, and the duration "
            f"{config.duration!r} ends after {steps:,}: let it start earlier, or set "
            "adversarial_start=null"
        )
    return steps, start


def describe(config: TokenizerConfig, source: ImageSource) -> dict[str, Any]:
    """What a run would be and need, for ``--dry-run``: nothing is allocated."""
    with torch.device("meta"):
        model = build_tokenizer(config)
        adversary = PatchDiscriminator() if config.adversarial_start is not None else nn.Identity()
    model.encoder.requires_grad_(not config.decoder_only)
    networks = [*model.parameters(), *adversary.parameters()]
    parameters = _count(model.parameters())
    held = _count(networks)
    trained = _count(p for p in networks if p.requires_grad)
    steps, _ = schedule(config, source)
    return {
        "parameters": parameters,
        "images": len(source),
        "steps": steps,
        "peak learning rate": config.lr,
        # fp32 weights, gradients, two Adam moments and the EMA, 4 bytes each.
        "memory for weights and optimizer (bytes)": 4 * (held + 3 * trained + parameters),
        "disk a checkpoint (bytes)": 4 * (held + 2 * trained + parameters),
    }


def _count(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _check_keep_best(execution: Execution, validation: Validation) -> None:
    """Check that there are scores to keep the best checkpoint by, where that is asked for.

    Raises:
        ConfigError: there are none, or they fall between the checkpoints.
    """
    if execution.keep_best != "score":
        return
    if validation.data is None or validation.features == "none":
        missing = "images to score on (--val-data)"
        if validation.data is not None:
            missing = "a Fréchet distance, which --features none leaves out"
        raise ConfigError(f"--keep-best score needs {missing}; give it, or choose --keep-best loss")
    check_scores_meet_checkpoints("--eval-every", validation.every, execution)


@flushed_denormals()
def train_tokenizer(
    config: TokenizerConfig,
    data: Path,
    out: Path,
    execution: Execution,
    *,
    finetune: Path | None = None,
    validation: Validation | None = None,
    weights_dir: Path | None = None,
) -> None:
    """Train (or go on training) the tokenizer of ``config`` on the images of ``data``.

    Writes the run directory ``out``; see ``run_directory.py`` for its form. Works alone or
    as one of many processes started by ``accelerate launch`` or ``torchrun``.

    Args:
        data: class folders, a list file, or a folder of tars; see ``images.open_images``.
        finetune: with a recipe for the decoder alone, the tokenizer run whose decoder it tunes;
            that run is only read.
        validation: how the training is looked at; by default with pictures now and then.
        weights_dir: where the perceptual term's published weights lie, if not in a hub's cache.

    Raises:
        InputError: no images. WeightsError: the perceptual term's weights are not to be had.
        ConfigError, MismatchError, LockedError, NonFiniteError, Interrupted: see ``fit``,
            ``open_run`` and `with_network_of`.
    """
    if execution.fsdp:
        raise ConfigError("--fsdp is for generators: a tokenizer's networks fit on one GPU")
    validation = validation or Validation()
    _check_keep_best(execution, validation)
    source = open_images(data)
    config = with_network_of(config, finetune)
    accelerator, config = start(config, execution, out)
    device = accelerator.device
    steps, adversarial_start = schedule(config, source)
    model = build_tokenizer(config)
    inputs: dict[str, Any] = {"data": source.identity}
    if finetune is not None:
        inputs["tuned from"] = begin_tuning(model, finetune)
    model.to(device)
    ema = Ema(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, fused=True
    )
    adversary = None
    if adversarial_start is not None:
        adversary = Adversary(config, adversarial_start, accelerator)
    with Processes(accelerator).main_first():
        side = config.perceptual_size or config.image_size
        perceptual = perceptual_term(config.perceptual, side, device, weights_dir)
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
    if adversary is not None:
        parts.models["discriminator"] = adversary.discriminator
        parts.optimizers["discriminator_optimizer"] = adversary.optimizer
    if execution.activation_checkpointing:
        checkpoint_activations(model)
    if execution.compile:
        compile_blocks(model)
    trained = accelerator.prepare_model(model)

    def losses(part: Any, step: int, against: Adversary | None) -> tuple[dict[str, Tensor], Tensor]:
        output = trained(
            part.images,
            Noise(config.seed, part.ids, step=step, device=device),
            gamma=config.gamma,
            noise_kind=config.noise,
            mask_ratio=config.mask_ratio,
            mask_kind=config.mask,
        )
        values = reconstruction_losses(
            part.images,
            output.reconstruction,
            output.posterior,
            perceptual=perceptual,
            perceptual_weight=config.perceptual_weight,
            kl_weight=config.kl_weight,
            discriminator=against.discriminator if against is not None else None,
            adversarial_weight=config.adversarial_weight,
        )
        return values, output.reconstruction.detach()

    micro_batch = execution.micro_batch
    if micro_batch == "auto":
        micro_batch = largest_micro_batch(
            accelerator, trained, loader, lambda part: losses(part, 0, None)[0]["loss"]
        )

    def update(batch: Any, step: int) -> dict[str, Tensor]:
        against = adversary if adversary is not None and step >= adversary.start else None
        rebuilt: list[Tensor] = []

        def of_slice(part: Any) -> dict[str, Tensor]:
            values, images = losses(part, step, against)
            if against is not None:
                rebuilt.append(images)
            return values

        values = accumulate(accelerator, trained, batch, micro_batch, of_slice)
        values["gradient_norm"] = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if against is not None:
            pairs = Pairs(batch.images, torch.cat(rebuilt), batch.ids)
            values |= against.update(pairs, micro_batch)
        return values

    with tensor_float32(config.precision == "bf16" and device.type == "cuda"):
        train(
            "l-DeTok",
            config,
            execution,
            out,
            accelerator=accelerator,
            parts=parts,
            update=update,
            steps=steps,
            kind="tokenizer",
            inputs=inputs,
            facts={"data": {"path": str(data), "images": len(source)}},
            inspections=inspections(
                validation,
                config,
                ema.module,
                source,
                accelerator=accelerator,
                out=out,
            ),
            describe_ids=lambda ids: ", ".join(loader.names(ids)),
        )
