"""What a latent cache will hold, fixed before its first row is written.

Every process that takes part in an encode, now or after a restart, must come with the same plan.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

from detok_pipe.latents.errors import CacheError, ConfigError, MismatchError
from detok_pipe.latents.order import WRITE_ORDER, permutation
from detok_pipe.latents.stats import LatentStats

# Raised when, and only when, the bytes of the rows change for the same encoder and images.
ENCODE_VERSION = 1
FORMAT_VERSION = 1
ROWS_PER_RECORD = 256

StoreFormat = Literal["webdataset", "zarr"]
STORE_FORMATS: tuple[StoreFormat, ...] = ("webdataset", "zarr")
VIEWS = ("image", "mirror")
FIELDS = ("mean", "std")

_BEGIN_ANEW = "use another --out, or the settings that the cache was begun with"


def canonical_json(value: Any) -> bytes:
    """One spelling for equal values: for hashes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def shard_rows(count: int, shards: int, rows_per_record: int = ROWS_PER_RECORD) -> int:
    """Rows a shard for about ``shards`` shards: rounded up to whole records, as Zarr needs.

    Raises:
        ConfigError: a number is not positive.
    """
    if min(count, shards, rows_per_record) < 1:
        raise ConfigError(
            f"images ({count}), --shards ({shards}) and --rows-per-record ({rows_per_record}) "
            "must each be at least 1"
        )
    return -(-count // (shards * rows_per_record)) * rows_per_record


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The plan of a cache.

    Args:
        count: images in the source, including those that will turn out unreadable.
        rows_per_shard: images a shard, a multiple of ``rows_per_record`` (see :func:`shard_rows`).
        grid: (16, 16) or, for a one-dimensional tokenizer, (128,).
        channels: latent channels C.
        encoder: identity of the encoder, its weights' hash among it; the decoder may change.
        preprocessing: what is done to an image before the encoder (crop, size).
        sources: identity of the image list, with at least a "hash".
        class_names: names by label; empty for unlabelled sources.
        views: "image", or "image" and "mirror".
        fields: "mean", or "mean" and "std" (needed to draw posterior samples).
        format: "webdataset" or "zarr".
        rows_per_record: rows of a tar record or Zarr chunk.
        seed: of the permutation that rows are written in.
        batch_size: of the encoder; part of the plan because the last bits of a row depend on it.
        dtype: what the encoder computes in ("fp32", "bf16").
        settings: further settings that change bits but not meaning (threads a process).
        stats: normalisation to use, or None for the statistics of the rows themselves.
        encode_version: see :data:`ENCODE_VERSION`.

    Raises:
        ConfigError: a value is out of its range.
    """

    count: int
    rows_per_shard: int
    grid: tuple[int, ...]
    channels: int
    encoder: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    sources: Mapping[str, Any]
    class_names: tuple[str, ...] = ()
    views: tuple[str, ...] = VIEWS
    fields: tuple[str, ...] = FIELDS
    format: StoreFormat = "webdataset"
    rows_per_record: int = ROWS_PER_RECORD
    seed: int = 0
    batch_size: int = 32
    dtype: str = "fp32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    stats: LatentStats | None = None
    encode_version: int = ENCODE_VERSION

    def __post_init__(self) -> None:
        for name in ("grid", "views", "fields", "class_names"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("count", "rows_per_shard", "rows_per_record", "channels", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.grid or min(self.grid) < 1:
            raise ConfigError(f"grid is {self.grid}; it needs positive sizes")
        if self.rows_per_shard % self.rows_per_record:
            raise ConfigError(
                f"rows_per_shard ({self.rows_per_shard}) must be a multiple of rows_per_record "
                f"({self.rows_per_record})"
            )
        if self.format not in STORE_FORMATS:
            raise ConfigError(
                f"format is {self.format!r}; choose one of {', '.join(STORE_FORMATS)}"
            )
        if self.views not in (VIEWS, VIEWS[:1]):
            raise ConfigError(f"views are {self.views}; choose {VIEWS[:1]} or {VIEWS}")
        if self.fields not in (FIELDS, FIELDS[:1]):
            raise ConfigError(f"fields are {self.fields}; choose {FIELDS[:1]} or {FIELDS}")
        if not self.encoder or not self.sources.get("hash"):
            raise ConfigError("a plan needs the encoder's identity and the hash of its sources")
        if self.stats is not None and self.stats.channels != self.channels:
            raise ConfigError(
                f"the statistics have {self.stats.channels} channels, the encoder {self.channels}"
            )

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def shards(self) -> int:
        return -(-self.count // self.rows_per_shard)

    def order(self) -> np.ndarray:
        """Source numbers (count,) int64 in the order in which rows are written."""
        return permutation(self.count, self.seed, WRITE_ORDER)

    @property
    def content_bytes(self) -> int:
        """Bytes of the fp16 rows of the finished cache, without containers' headers."""
        return self.count * self.tokens * self.channels * 2 * len(self.views) * len(self.fields)

    def to_json(self) -> dict[str, Any]:
        value = {"format_version": FORMAT_VERSION, **asdict(self)}
        value["stats"] = None if self.stats is None else self.stats.to_json()
        # A round trip turns tuples into lists, so that plans compare equal after one.
        return dict(json.loads(canonical_json(value)))

    def to_bytes(self) -> bytes:
        """The content of ``plan.json``."""
        return (json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "plan.json") -> CachePlan:
        """The inverse of :meth:`to_json`.

        Raises:
            CacheError: of another version, or not a plan.
        """
        check_version(value, where)
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in value.items() if k != "format_version"}
        if set(given) - known:
            raise CacheError(f"{where} has the unknown fields {sorted(set(given) - known)}")
        try:
            if given.get("stats") is not None:
                given["stats"] = LatentStats.from_json(given["stats"])
            return cls(**given)
        except (TypeError, AttributeError, ConfigError) as error:
            raise CacheError(f"{where} is not the plan of a latent cache: {error}") from error

    def digest(self) -> str:
        """SHA-256 of the plan: ties commit records to it."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def check_same(self, other: CachePlan, where: str, remedy: str = _BEGIN_ANEW) -> None:
        """Checks that ``other``, this run's plan, is the one that ``where`` was begun with.

        ``remedy`` tells what to do about it.

        Raises:
            MismatchError: names the first field that differs, with both values.
        """
        difference = first_difference(self.to_json(), other.to_json())
        if difference is not None:
            name, old, new = difference
            raise MismatchError(
                f"{where} was begun with another {name}: {_short(old)} there, {_short(new)} now; "
                f"{remedy}"
            )


def check_version(value: Any, where: str) -> None:
    """Checks the format version of a plan or manifest that was read from a file.

    Raises:
        CacheError: it has none, or that of a newer release.
    """
    version = value.get("format_version") if isinstance(value, Mapping) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CacheError(f"{where} has no format version; it is not of a latent cache")
    if version > FORMAT_VERSION:
        raise CacheError(
            f"{where} has format version {version}, this release reads up to {FORMAT_VERSION}; "
            "update detok-pipe"
        )


def first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Where two JSON values first differ: (dotted name, old value, new value), or None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in (*old, *(k for k in new if k not in old)):
            inner = f"{name}.{key}" if name else str(key)
            found = first_difference(old.get(key), new.get(key), inner)
            if found is not None:
                return found
        return None
    return None if old == new else (name, old, new)


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 8:
        return f"{len(value)} values beginning {list(value[:3])}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
