"""Normalisation of latents: the one object that applies it, undoes it and travels everywhere.

``LatentStats`` is recorded in a cache's manifest, in each generator's checkpoint and in each
sample store. ``StatsAccumulator`` computes it in one pass, in float64, by merging means and
squared deviations (Chan, Golub and LeVeque, 1979), which does not cancel as sums of squares do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from detok_pipe.latents.errors import ConfigError

Source = Literal["dataset", "given", "published"]
Values = TypeVar("Values", Tensor, np.ndarray)

_ROWS_AT_ONCE = 64  # of a 256 x 16 cache 2 MB in float64, which stay in a core's cache


@dataclass(frozen=True, eq=False)
class LatentStats:
    """Per-channel statistics of unnormalised posterior means.

    Args:
        mean, std: (C,) float64.
        count: images that they were computed over; 0 where unknown.
        source: "dataset" (this cache's own rows), "given" (a file), "published" (the tokenizer's
            own normalisation).
        views: the views that they were computed over.

    Raises:
        ConfigError: shapes differ, a value is not finite, or a std is not positive.
    """

    mean: np.ndarray
    std: np.ndarray
    count: int = 0
    source: Source = "given"
    views: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = np.array(getattr(self, name), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        object.__setattr__(self, "views", tuple(self.views))
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape or not self.mean.size:
            raise ConfigError(
                "statistics need a mean and a std of one value a channel, got shapes "
                f"{self.mean.shape} and {self.std.shape}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all()):
            raise ConfigError("statistics hold a value that is not finite")
        if not (self.std > 0).all():
            raise ConfigError(f"statistics hold a std of {self.std.min():g}; each must be positive")
        if self.source not in get_args(Source):
            raise ConfigError(f"statistics have the unknown source {self.source!r}")

    @classmethod
    def identity(cls, channels: int) -> LatentStats:
        """Mean 0, std 1: normalisation that changes nothing."""
        return cls(np.zeros(channels), np.ones(channels))

    @property
    def channels(self) -> int:
        return int(self.mean.size)

    def _like(self, z: Values) -> tuple[Values, Values]:
        if z.shape[-1] != self.channels:
            raise ConfigError(
                f"latents have {z.shape[-1]} channels, their statistics {self.channels}"
            )
        if isinstance(z, Tensor):
            return (
                torch.as_tensor(self.mean.copy(), dtype=z.dtype, device=z.device),
                torch.as_tensor(self.std.copy(), dtype=z.dtype, device=z.device),
            )
        return self.mean.astype(z.dtype), self.std.astype(z.dtype)

    def normalize(self, z: Values) -> Values:
        """(z - mean) / std for z (..., C), floating tensor or array; keeps its dtype."""
        mean, std = self._like(z)
        return (z - mean) / std

    def denormalize(self, z: Values) -> Values:
        """z * std + mean for z (..., C), floating tensor or array; keeps its dtype."""
        mean, std = self._like(z)
        return z * std + mean

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LatentStats) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.mean.tobytes(), self.std.tobytes()))

    def same_transform(self, other: LatentStats) -> bool:
        """Whether both normalise to the same bits, whatever their origin."""
        return np.array_equal(self.mean, other.mean) and np.array_equal(self.std, other.std)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; float64 values survive exactly."""
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "count": self.count,
            "source": self.source,
            "views": list(self.views),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LatentStats:
        """The inverse of :meth:`to_json`.

        Raises:
            ConfigError: it is not such an object.
        """
        try:
            return cls(
                np.array(value["mean"], dtype=np.float64),
                np.array(value["std"], dtype=np.float64),
                int(value.get("count", 0)),
                value.get("source", "given"),
                tuple(value.get("views", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"not a record of latent statistics: {error!r}") from error


def _channel_sums(block: np.ndarray) -> np.ndarray:
    """Sums (C,) of (R, ..., C): over rows first, which adds long vectors."""
    return block.sum(0).reshape(-1, block.shape[-1]).sum(0)


class StatsAccumulator:
    """Mean and standard deviation (population, ddof 0) per channel, in float64, in one pass.

    The result depends on the order of ``update`` and ``merge`` in the last bits: merge in a fixed
    order where bits matter.
    """

    def __init__(self, channels: int) -> None:
        self.values = 0  # a channel's number of values: rows times tokens
        self.rows = 0
        self.mean = np.zeros(channels, np.float64)
        self.deviations = np.zeros(channels, np.float64)  # sum of (value - mean)^2

    def update(self, means: np.ndarray) -> None:
        """Adds posterior means (R, ..., C)."""
        for start in range(0, len(means), _ROWS_AT_ONCE):
            block = means[start : start + _ROWS_AT_ONCE].astype(np.float64)
            part = StatsAccumulator(block.shape[-1])
            part.rows = len(block)
            part.values = block.size // block.shape[-1]
            part.mean = _channel_sums(block) / max(1, part.values)
            block -= part.mean
            part.deviations = _channel_sums(np.square(block, out=block))
            self.merge(part)

    def merge(self, other: StatsAccumulator) -> None:
        """Adds what another accumulator has seen."""
        if not other.values:
            return
        total = self.values + other.values
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.values / total)
        self.deviations = (
            self.deviations
            + other.deviations
            + np.square(delta) * (self.values / total * other.values)
        )
        self.values = total
        self.rows += other.rows

    def finish(self, *, count: int, views: tuple[str, ...] = ()) -> LatentStats:
        """The statistics, source "dataset". A channel that never varies gets std 1.

        Raises:
            ConfigError: nothing was added.
        """
        if not self.values:
            raise ConfigError("no latents to compute statistics from")
        std = np.sqrt(self.deviations / self.values)
        std[std == 0.0] = 1.0
        return LatentStats(self.mean, std, count, "dataset", views)

    def to_json(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "rows": self.rows,
            "mean": self.mean.tolist(),
            "deviations": self.deviations.tolist(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StatsAccumulator:
        made = cls(len(value["mean"]))
        made.values = int(value["values"])
        made.rows = int(value["rows"])
        made.mean = np.array(value["mean"], np.float64)
        made.deviations = np.array(value["deviations"], np.float64)
        return made
