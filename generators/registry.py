"""Generators by name: one table of sizes, one constructor each.

What each offers is in `generator.Generator`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from detok_pipe.generators.ardiff import ARDiff
from detok_pipe.generators.dit import DiT
from detok_pipe.generators.generator import Generator
from detok_pipe.generators.lightningdit import LightningDiT
from detok_pipe.generators.mar import MAR
from detok_pipe.generators.sampling import Sampling
from detok_pipe.generators.sit import SiT
from detok_pipe.latents.errors import ConfigError

# (width, depth, heads); MAR has so many blocks in the encoder and in the decoder.
SIZES = {
    "s": (512, 8, 8),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
    "h": (1280, 32, 16),
}
MAR_SIZES = {"b": (768, 12, 12), "l": (1024, 16, 16), "h": (1280, 20, 16)}


@dataclass(frozen=True)
class Family:
    """One kind of generator.

    Attributes:
        build: the constructor. sizes: its names' (width, depth, heads).
        sampling: the published sampling options, but for those of `_BEST_SCALES` and
            `_UNGUIDED_TEMPERATURES`.
    """

    build: Callable[..., Generator]
    sizes: Mapping[str, tuple[int, int, int]]
    sampling: Sampling


FAMILIES: dict[str, Family] = {
    "mar": Family(
        MAR,
        MAR_SIZES,
        Sampling(guidance_scale=3.9, guidance_schedule="linear"),
    ),
    "random-ar": Family(
        partial(ARDiff, order="random"),
        SIZES,
        Sampling(guidance_scale=3.9, guidance_schedule="linear"),
    ),
    "raster-ar": Family(
        partial(ARDiff, order="raster"),
        SIZES,
        Sampling(guidance_scale=3.9, guidance_schedule="linear"),
    ),
    # The published sweeps of SiT run from 1.3 to 2.0; none is published for the other two.
    "dit": Family(DiT, SIZES, Sampling(guidance_scale=1.6)),
    "sit": Family(SiT, SIZES, Sampling(guidance_scale=1.6)),
    "lightningdit": Family(
        LightningDiT, SIZES, Sampling(guidance_scale=1.6, guidance_interval=(0.1, 1.0))
    ),
}

_BEST_SCALES = {"mar-b": 3.9, "mar-l": 3.4}
"""Guidance scales of the best published scores."""
_UNGUIDED_TEMPERATURES = {"mar-b": 0.95, "mar-l": 0.97}
"""Published temperatures of samples without guidance; 1 for all others."""


def generator_names() -> list[str]:
    """All names that `build_generator` knows, such as "mar-b"."""
    return [f"{family}-{size}" for family, entry in FAMILIES.items() for size in entry.sizes]


def _family(name: str) -> tuple[Family, tuple[int, int, int]]:
    family, _, size = name.rpartition("-")
    if family in FAMILIES and size in FAMILIES[family].sizes:
        return FAMILIES[family], FAMILIES[family].sizes[size]
    near = difflib.get_close_matches(name, generator_names(), n=3)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(generator_names())}"
    )
    raise ConfigError(f"generator {name!r} is unknown; {hint}")


def generator_size(name: str) -> tuple[int, int, int]:
    """(width, depth, heads) of a name.

    Raises:
        ConfigError: unknown name.
    """
    return _family(name)[1]


def default_sampling(name: str, guidance_scale: float | None = None) -> Sampling:
    """The published sampling options of a generator.

    Args:
        guidance_scale: None: that of the best published score, where one is published. Scale 1
            has its own temperature.

    Raises:
        ConfigError: unknown name, or a scale below 0.
    """
    sampling = _family(name)[0].sampling
    if guidance_scale is None:
        guidance_scale = _BEST_SCALES.get(name, sampling.guidance_scale)
    temperature = _UNGUIDED_TEMPERATURES.get(name, 1.0) if guidance_scale == 1.0 else 1.0
    return replace(sampling, guidance_scale=guidance_scale, temperature=temperature)


def _options(build: Callable[..., Generator]) -> dict[str, str]:
    """Name and type of each constructor argument that may be overridden, of base classes too."""
    given = {"self", "grid", "channels", "num_classes"}
    kind: Any = build
    if isinstance(build, partial):
        given |= set(build.keywords)
        kind = build.func
    types = {}
    for base in kind.__mro__[: kind.__mro__.index(Generator)]:
        for name, parameter in inspect.signature(base.__init__).parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name not in given:
                kind_of = parameter.annotation
                types[name] = kind_of if isinstance(kind_of, str) else kind_of.__name__
    return dict(sorted(types.items()))


# What a value of each type of option must be.
_VALID: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number, at least 1", lambda value: type(value) is int and value >= 1),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "float": (
        "a number from 0 to 1",
        lambda value: type(value) in (int, float) and 0 <= value <= 1,
    ),
}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check overrides of a generator one by one.

    Raises:
        ConfigError: unknown name or option, or a value of another kind or range.
    """
    known = _options(_family(name)[0].build)
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"{name} has no option {key!r}; it has {', '.join(known)}")
        wanted, valid = _VALID[known[key]]
        if not valid(value):
            raise ConfigError(f"{name}: {key} must be {wanted}, got {value!r}")


def build_generator(
    name: str, *, grid: Sequence[int], channels: int, num_classes: int, **overrides: Any
) -> Generator:
    """A freshly initialised generator (from torch's seed), on the CPU.

    Args:
        name: one of `generator_names`.
        grid: the latent grid, (h, w) or (n,). channels: latent channels.
        num_classes: number of labels.
        overrides: the constructor's other arguments: width, depth, heads, patch_size, ...

    Raises:
        ConfigError: unknown name or override, or values that do not fit together.
    """
    family, (width, depth, heads) = _family(name)
    check_options(name, overrides)
    options = {"width": width, "depth": depth, "heads": heads, **overrides}
    if options["width"] % options["heads"]:
        raise ConfigError(
            f"{name}: width {options['width']} is no multiple of heads {options['heads']}; "
            "change one of them"
        )
    return family.build(grid=tuple(grid), channels=channels, num_classes=num_classes, **options)
