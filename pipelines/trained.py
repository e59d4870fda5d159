"""Trained networks with what identifies them, and loading those of run directories."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detok_pipe.generators.generator import Generator
from detok_pipe.generators.packed_linear import pack_linears
from detok_pipe.generators.registry import build_generator
from detok_pipe.latents.errors import CheckpointError, MismatchError
from detok_pipe.latents.stats import LatentStats
from detok_pipe.pipelines.checkpoints import Checkpoint, latest_checkpoint
from detok_pipe.pipelines.config import GeneratorConfig, TokenizerConfig, from_json
from detok_pipe.pipelines.ema import warn_of_early_average
from detok_pipe.pipelines.run_directory import read_config
from detok_pipe.tokenizer.contract import Tokenizer, encoder_keys
from detok_pipe.tokenizer.model import LDeTok

Network = TypeVar("Network", bound=nn.Module)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer ready to encode and decode, in evaluation mode, without gradients.

    Attributes:
        model: the network. image_size: side in pixels of the images that it takes.
        identity: what identifies the encoder (a cache stays valid while this is the same).
        decoder: fingerprint of the decoder's weights.
        path: its run directory, or the file of its weights. step: of its training; 0: unknown.
        stats: the normalisation published with it, or None.
    """

    model: Tokenizer
    image_size: int
    identity: dict[str, Any]
    decoder: str
    path: Path
    step: int
    stats: LatentStats | None = None


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator ready to sample, in evaluation mode, without gradients.

    Attributes:
        stats: normalisation of the latents that it was trained on.
        identity: what identifies its weights and what they were trained from.
        class_names: names of the labels. record: the run's whole ``config.json``.
    """

    model: Generator
    stats: LatentStats
    grid: tuple[int, ...]
    class_names: list[str]
    identity: dict[str, Any]
    record: dict[str, Any]
    path: Path


def build_tokenizer(config: TokenizerConfig) -> LDeTok:
    """The network that a configuration describes, freshly initialised from torch's seed."""
    return LDeTok(
        image_size=config.image_size,
        patch_size=config.patch_size,
        channels=config.channels,
        encoder=config.encoder,
        decoder=config.decoder,
        identity_output=config.identity_output,
    )


def network_of(record: dict[str, Any], where: Path) -> nn.Module:
    """The network that a run's ``config.json`` describes, freshly initialised.

    Raises:
        ConfigError: a key or value is unknown; ``where``, the run, is named.
    """
    file = str(where / "config.json")
    if record["kind"] == "tokenizer":
        return build_tokenizer(from_json(TokenizerConfig, record["config"], where=file))
    return _generator_of(record, file)


def _generator_of(record: dict[str, Any], file: str) -> Generator:
    config = from_json(GeneratorConfig, record["config"], where=file)
    latents = record["latents"]
    return build_generator(
        config.generator,
        grid=tuple(latents["grid"]),
        channels=latents["channels"],
        num_classes=latents["num_classes"],
        **config.model,
    )


def ready(network: Network, device: torch.device | str) -> Network:
    """The same network on ``device``, for computing alone: its weights must not change any more."""
    network = network.to(device).eval().requires_grad_(False)
    pack_linears(network)
    return network


def _newest(run: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint yet; let its training reach the first one")
    return checkpoint


def _load(model: nn.Module, tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the network of its config.json: {error}"
        ) from error


def load_tokenizer(
    run: Path, *, device: torch.device | str = "cpu", ema: bool = True
) -> TrainedTokenizer:
    """The newest whole checkpoint of a tokenizer run.

    Raises:
        CheckpointError: no tokenizer run, no checkpoint, or a checkpoint of another network.
    """
    record = read_config(run, "tokenizer")
    config = from_json(TokenizerConfig, record["config"], where=str(run / "config.json"))
    checkpoint = _newest(run)
    tensors = checkpoint.tensors("ema" if ema else "model")
    model = build_tokenizer(config)
    _load(model, tensors, checkpoint)
    identity, decoder = identified(
        tensors,
        name="l-detok",
        image_size=config.image_size,
        patch_size=config.patch_size,
        channels=config.channels,
        size=config.encoder,
    )
    ready_model = ready(model, device)
    return TrainedTokenizer(ready_model, config.image_size, identity, decoder, run, checkpoint.step)


def identified(
    tensors: Mapping[str, Tensor], *, name: str, **facts: Any
) -> tuple[dict[str, Any], str]:
    """The identity of a tokenizer's encoder, and the fingerprint of its decoder's weights.

    Args:
        tensors: the tokenizer's whole state dict.
        name: of the kind of tokenizer. facts: what the weights alone do not tell (heads, for
            one, leave no trace in their shapes) and what readers want to know.
    """
    encoder = encoder_keys(tensors)
    weights = fingerprint({key: tensors[key] for key in encoder})
    identity = {"name": name, "weights": weights, **facts}
    described = json.dumps(identity, sort_keys=True).encode()
    identity["fingerprint"] = hashlib.sha256(described).hexdigest()
    return identity, fingerprint({key: tensors[key] for key in tensors.keys() - encoder})


def load_generator(
    run: Path, *, device: torch.device | str = "cpu", ema: bool = True
) -> TrainedGenerator:
    """The newest whole checkpoint of a generator run.

    Raises:
        CheckpointError: no generator run, no checkpoint, or a checkpoint of another network.
    """
    record = read_config(run, "generator")
    model = _generator_of(record, str(run / "config.json"))
    checkpoint = _newest(run)
    tensors = checkpoint.tensors("ema" if ema else "model")
    config = record["config"]
    if ema and checkpoint.step:  # imported weights have no step
        warn_of_early_average(checkpoint.step, config["ema"], config["ema_warmup"])
    latents = record["latents"]
    _load(model, tensors, checkpoint)
    identity = {
        "generator": record["config"]["generator"],
        "weights": fingerprint(tensors),
        "ema": ema,
        "step": checkpoint.step,
        "cache": record["inputs"]["cache"],
        "tokenizer": record["inputs"]["tokenizer"],
    }
    return TrainedGenerator(
        model=ready(model, device),
        stats=LatentStats.from_json(latents["stats"]),
        grid=tuple(latents["grid"]),
        class_names=latents["class_names"],
        identity=identity,
        record=record,
        path=run,
    )


def check_tokenizer_fits(tokenizer: TrainedTokenizer, wanted: dict[str, Any], what: str) -> None:
    """Check that latents of ``what`` come from this tokenizer's encoder.

    Raises:
        MismatchError: naming the first field that differs, with both values.
    """
    for key in sorted(wanted, key=lambda key: key in ("weights", "fingerprint")):  # words first
        value = wanted[key]
        if tokenizer.identity.get(key) != value:
            raise MismatchError(
                f"the tokenizer {tokenizer.path} does not belong to {what}: its {key} is "
                f"{tokenizer.identity.get(key)!r}, and the latents were made with {value!r}"
            )
