"""Configurations: what a run computes, as typed values that are checked where they enter.

Two frozen dataclasses, one a stage, hold every value that changes a result; they are
written to ``config.json`` after resolution and compared when a run is resumed.
:class:`Execution` holds what may change between two sittings of one run (device,
micro-batch, trackers) without changing the result beyond rounding.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_type_hints

import pydantic

from detok_pipe.latents.errors import ConfigError

Precision = Literal["auto", "bf16", "fp32"]
Perceptual = Literal["lpips+convnext", "lpips", "efficientnet-lite2", "none"]

Config = TypeVar("Config", "TokenizerConfig", "GeneratorConfig")

_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kM]?)\s*(epoch|image|step)s?\s*")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def duration_in_steps(duration: str, *, images: int, global_batch: int, least: int = 1) -> int:
    """Steps of ``duration`` ("100 epochs", "2 Mimages", "5000 steps"), at least ``least``.

    Epochs and images are rounded up to whole global batches, so no image is left out.

    Raises:
        ConfigError: the text is no duration, or one without end.
    """
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ConfigError(
            f"duration {duration!r} is not understood: write a number and a unit, such as "
            "'100 epochs', '5000 steps' or '2 Mimages'"
        )
    amount = float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]
    per_unit = {"step": 1.0, "image": 1 / global_batch, "epoch": images / global_batch}[match[3]]
    steps = amount * per_unit
    _check(math.isfinite(steps), f"duration {duration!r} is no finite number of steps")
    return max(least, math.ceil(steps - 1e-9))


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """One l-DeTok tokenizer and its recipe.

    Defaults are the paper's final setting (BB), but for the adversarial loss.
    """

    # The network.
    image_size: int = 256
    patch_size: int = 16
    channels: int = 16
    encoder: str = "base"
    """A named size (small, base, large, xl) or ``width,depth,heads``; likewise ``decoder``."""
    decoder: str = "base"
    identity_output: bool = False
    """Start the last convolution as the identity: for runs of few steps."""
    # Corruption in training.
    noise: Literal["interpolative", "additive"] = "interpolative"
    gamma: float = 3.0
    mask: Literal["random", "constant"] = "random"
    mask_ratio: float = 0.7
    # Losses.
    perceptual: Perceptual = "lpips+convnext"
    perceptual_weight: float = 1.0
    perceptual_size: int | None = None
    """Side in pixels at which the perceptual term sees the images; None: as they are."""
    kl_weight: float = 1e-6
    adversarial_start: str | None = None
    """When a discriminator joins ("100 epochs", "0 steps"); None: never."""
    adversarial_weight: float = 0.1
    # Optimisation.
    decoder_only: bool = False
    """Tune the decoder of a trained tokenizer, whose encoder stays as it is."""
    global_batch: int = 1024
    duration: str = "200 epochs"
    base_lr: float = 1e-4
    """Learning rate at a global batch of 256; it grows in proportion to the batch."""
    warmup: float = 0.25
    """Share of the steps over which the rate rises linearly; then a cosine to zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    clip: float = 3.0
    ema: float = 0.999
    ema_warmup: bool = False
    flip: bool = True
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.patch_size > 0, f"patch_size must be positive, not {self.patch_size}")
        _check(
            self.image_size > 0 and self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}",
        )
        _check(self.base_lr > 0, f"base_lr must be positive, not {self.base_lr}")
        _check(self.channels > 0, f"channels must be positive, not {self.channels}")
        _check(self.gamma >= 0, f"gamma must not be negative, and is {self.gamma}")
        _check(0 <= self.mask_ratio < 1, f"mask_ratio must be in [0, 1), and is {self.mask_ratio}")
        for name in ("perceptual_weight", "kl_weight", "adversarial_weight"):
            weight = getattr(self, name)
            _check(weight >= 0, f"{name} must not be negative, and is {weight}")
        _check(
            self.perceptual_size is None or self.perceptual_size > 0,
            f"perceptual_size must be positive, or null, and is {self.perceptual_size}",
        )
        if self.adversarial_start is not None:
            duration_in_steps(self.adversarial_start, images=1, global_batch=1)
        _check_recipe(self)

    @property
    def blended_gamma(self) -> float:
        """gamma of interpolative noise; 0 where noise is added, or where there is none."""
        return self.gamma if self.noise == "interpolative" else 0.0

    @property
    def lr(self) -> float:
        """The peak learning rate, by the linear rule."""
        return self.base_lr * self.global_batch / 256

    @property
    def lr_schedule(self) -> Literal["cosine"]:
        """How the rate moves after the warm-up."""
        return "cosine"


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """One generator and its recipe. Defaults are the paper's common recipe for ablations."""

    generator: str = "mar-b"
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to the named generator: ``--set model.width=256``, ``--set model.dropout=0``."""
    global_batch: int = 1024
    duration: str = "100 epochs"
    lr: float = 2e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float | None = None
    ema: float = 0.9999
    ema_warmup: bool = False
    """Let the decay grow as (1 + step) / (10 + step) up to ``ema``: for short runs."""
    views: tuple[str, ...] | None = None
    """Views of the cache to draw from (image, mirror); None: all that it has."""
    sample_posterior: bool = True
    classes: tuple[str, ...] | None = None
    """Train on these classes only (by name); None: all."""
    limit: int | None = None
    """Train on the first ``limit`` rows of the cache only."""
    holdout: int = 0
    """Keep so many rows out of the training, and measure the loss on them (val/loss)."""
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.lr > 0, f"lr must be positive, not {self.lr}")
        _check(self.holdout >= 0, f"holdout must not be negative, and is {self.holdout}")
        _check(self.limit is None or self.limit > 0, f"limit must be positive, and is {self.limit}")
        _check_recipe(self)


def _check_recipe(config: TokenizerConfig | GeneratorConfig) -> None:
    _check(config.global_batch > 0, f"global_batch must be positive, not {config.global_batch}")
    _check(0 <= config.ema < 1, f"ema must be in [0, 1), and is {config.ema}")
    _check(
        config.weight_decay >= 0, f"weight_decay must not be negative, and is {config.weight_decay}"
    )
    _check(
        all(0 <= beta < 1 for beta in config.betas), f"betas must be in [0, 1), not {config.betas}"
    )
    _check(
        config.clip is None or config.clip > 0,
        f"clip must be positive, or null for none, and is {config.clip}",
    )
    _check(config.seed >= 0, f"seed must not be negative, and is {config.seed}")
    _check(0 <= config.warmup <= 1, f"warmup is a share of the steps, and is {config.warmup}")
    duration_in_steps(config.duration, images=1, global_batch=1)
    model = getattr(config, "model", {})
    for name, value in [*vars(config).items(), *((f"model.{k}", v) for k, v in model.items())]:
        large = isinstance(value, int) and value >= 2**63
        _check(not large, f"{name} must be less than 2^63, and is {value}")
        try:
            json.dumps(value, allow_nan=False)  # as the run's config.json will be written
        except ValueError:
            raise ConfigError(f"{name} must be finite, and is {value}") from None


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is carried out here and now; nothing in it changes what is computed."""

    device: str | None = None
    micro_batch: int | Literal["auto"] | None = None
    """Rows that a process computes at once; None: its whole share of the global batch; "auto":
    as many as its GPU has memory for."""
    log_every: int = 20
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    """The newest so many checkpoints stay, and with them those of the next two rules."""
    keep_every: int | None = None
    """Checkpoints of each so many steps stay."""
    keep_best: Literal["loss", "score"] | None = None
    """The checkpoint with the lowest loss or Fréchet distance stays."""
    extend: bool = False
    """Allow a longer duration than the run was started with."""
    compile: bool = False
    activation_checkpointing: bool = False
    deterministic: bool = False
    """Take only kernels and sums over processes that give the same bits each time."""
    fsdp: bool = False
    """Shard weights, gradients, optimizer state and EMA over the GPUs."""
    trackers: tuple[str, ...] = ("tensorboard",)
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in (
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "keep_every",
            "micro_batch",
        ):
            value = getattr(self, name)
            _check(
                value is None or value == "auto" or value > 0,
                f"{name} must be positive, not {value}",
            )
        _check(
            self.keep_every is None or self.keep_every % self.checkpoint_every == 0,
            f"keep_every {self.keep_every} is no multiple of checkpoint_every "
            f"{self.checkpoint_every}, so no checkpoint would fall on it",
        )


def unknown_name(kind: str, name: str, known: Sequence[str]) -> ConfigError:
    """The error for an unknown name, with the nearest known ones, or all if none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
    return ConfigError(f"unknown {kind} {name!r}; {hint}")


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """``config`` with each ``key=value`` applied, typed by the field and checked.

    Lists are written as JSON or with commas (``betas=0.9,0.99``); ``null`` is None; entries
    of a dictionary have a dotted key (``model.width=256``).

    Raises:
        ConfigError: no ``=``, an unknown key (near names are listed), or a bad value.
    """
    hints = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        name, dot, entry = key.strip().partition(".")
        if not equals:
            raise ConfigError(f"--set {override!r}: write it as key=value")
        if name not in hints:
            raise unknown_name(f"{type(config).__name__} key", name, list(hints))
        value = _parse(text)
        if dot:
            current = changes.get(name, getattr(config, name))
            if not isinstance(current, Mapping):
                raise ConfigError(
                    f"--set {override}: {name} has no named entries; write it as {name}=value"
                )
            value = {**current, entry: value}
        changes[name] = _validated(hints[name], value, text, f"--set {override}")
    return dataclasses.replace(config, **changes)


def _parse(text: str) -> Any:
    """JSON where it is JSON that Python can hold, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _validated(hint: Any, value: Any, text: str, where: str) -> Any:
    """``value`` as ``hint`` wants it; else the raw text, or its comma parts where it is no JSON."""
    adapter = pydantic.TypeAdapter(hint)
    failure: pydantic.ValidationError | None = None
    candidates = [value, text]
    if value == text or isinstance(value, int | float):  # a class may be called 12
        candidates.append([part.strip() for part in text.split(",")])
    for candidate in candidates:
        try:
            return adapter.validate_python(candidate)
        except pydantic.ValidationError as error:
            failure = failure or error
    assert failure is not None
    raise ConfigError(f"{where}: {failure.errors()[0]['msg']}")


def to_json(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(kind: type[Config], values: dict[str, Any], *, where: str) -> Config:
    """A configuration read back from ``config.json``.

    Raises:
        ConfigError: a key is unknown or has a bad value; ``where`` is named.
    """
    unknown = set(values) - {f.name for f in dataclasses.fields(kind)}
    if unknown:
        raise ConfigError(
            f"{where} has the keys {sorted(unknown)}, which this version does not know; "
            "it may come from a newer version of detok-pipe"
        )
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
