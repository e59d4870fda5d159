"""Sampled latents: rows i = 0 ... count - 1, in order, drawn once and scored many times.

A folder of ``samples.json`` (what the samples are) and shards ``00000.safetensors`` with one tensor
``z`` (R, N, C) float16, normalised, its CRC-32C, and a digest of the store that it belongs to.
Shards are written whole by any number of processes; a store of the same identity is gone on with,
one of another identity is refused, and so is a shard of another store.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from detok_pipe.latents.atomic import (
    TEMPORARY_PREFIX,
    create_exclusive,
    remove_temporaries,
    storage_errors,
)
from detok_pipe.latents.errors import CacheError, ConfigError, MismatchError, NonFiniteError
from detok_pipe.latents.manifest import read_json
from detok_pipe.latents.plan import FORMAT_VERSION, canonical_json, check_version, first_difference
from detok_pipe.latents.stats import LatentStats

HEADER = "samples.json"
ROWS_PER_SHARD = 1024


@dataclass(frozen=True, eq=False)
class SampleStore:
    """A store of samples, finished or not; get one from :meth:`open` or :func:`open_sample_store`.

    Attributes:
        path: its folder.
        identity: what identifies the samples (generator weights, sampling, seed, labels).
        count: rows when it is finished. rows_per_shard: rows of each shard but the last.
        grid, channels: form of a latent. stats: the normalisation that undoes theirs.
        digest: SHA-256 of all of these but the path.
        extra: further facts for readers, which identify nothing.
    """

    path: Path
    identity: dict[str, Any]
    count: int
    grid: tuple[int, ...]
    channels: int
    rows_per_shard: int
    stats: LatentStats
    digest: str
    extra: dict[str, Any]

    @classmethod
    def open(
        cls,
        path: Path | str,
        identity: Mapping[str, Any],
        *,
        count: int,
        grid: tuple[int, ...],
        channels: int,
        stats: LatentStats,
        rows_per_shard: int = ROWS_PER_SHARD,
        extra: Mapping[str, Any] | None = None,
    ) -> SampleStore:
        """Begins a store, or goes on with one of the same identity.

        Raises:
            MismatchError: the store there is of another identity; names the field.
            ConfigError: a number is not positive, or the folder holds something else.
            CacheError: the store there is damaged or of a newer version.
            StorageError: the disk is full or read-only.
        """
        path = Path(path)
        if min(count, rows_per_shard, channels, *grid) < 1 or stats.channels != channels:
            raise ConfigError(
                f"cannot store {count} samples of {grid} x {channels}, {rows_per_shard} a shard, "
                f"with statistics of {stats.channels} channels"
            )
        header = {
            "format_version": FORMAT_VERSION,
            "identity": dict(identity),
            "count": count,
            "grid": list(grid),
            "channels": channels,
            "rows_per_shard": rows_per_shard,
            "stats": stats.to_json(),
        }
        header = json.loads(canonical_json(header))
        where = path / HEADER
        with storage_errors(path):
            names = sorted(p.name for p in path.iterdir()) if path.exists() else []
        others = [name for name in names if not name.startswith(TEMPORARY_PREFIX)]
        if others and HEADER not in others:
            raise ConfigError(f"{path} is not empty ({others[0]}) and holds no samples")
        if not create_exclusive(where, canonical_json(header | {"extra": dict(extra or {})})):
            found = read_json(where)
            check_version(found, str(where))
            found.pop("extra", None)
            difference = first_difference(found, header)
            if difference is not None:
                name, old, new = difference
                raise MismatchError(
                    f"{path} holds other samples: their {name} is {json.dumps(old)}, now it is "
                    f"{json.dumps(new)}; choose another --out or remove the folder"
                )
        return open_sample_store(path)

    @property
    def shards(self) -> int:
        return -(-self.count // self.rows_per_shard)

    @property
    def row_shape(self) -> tuple[int, int]:
        """(N, C)."""
        return math.prod(self.grid), self.channels

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row behind its last."""
        start = shard * self.rows_per_shard
        return start, min(start + self.rows_per_shard, self.count)

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [k for k in range(self.shards) if not self._path(k).exists()]

    def pending(self, rank: int = 0, world: int = 1) -> list[tuple[int, int, int]]:
        """(shard, start, stop) of what process ``rank`` of ``world`` must still draw."""
        return [(k, *self.span(k)) for k in self.missing() if k % world == rank]

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return not self.missing()

    def commit(self, shard: int, z: np.ndarray) -> None:
        """Writes a shard: ``z`` (R, N, C), normalised. The first of two writers wins.

        Raises:
            ConfigError: its shape is not that of the shard.
            NonFiniteError: a row is not finite in fp16; names the sample.
            StorageError: the disk is full or read-only.
        """
        start, stop = self.span(shard)
        shape = (stop - start, *self.row_shape)
        if z.shape != shape:
            raise ConfigError(f"shard {shard} has shape {shape}, got samples of shape {z.shape}")
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(z, np.float16)
        finite = np.isfinite(cast).all((1, 2))
        if not finite.all():
            raise NonFiniteError(
                f"sample {start + int(np.argmin(finite))} is not finite in fp16: its largest value "
                f"is {np.abs(z[int(np.argmin(finite))]).max():g}"
            )
        data = save({"z": cast}, metadata=self._metadata(cast))
        if create_exclusive(self._path(shard), data) and self.complete:
            # Whoever is still writing is writing a shard that is there already.
            remove_temporaries(self.path)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as (R, N, C) float16, normalised.

        Raises:
            CacheError: a shard is missing or damaged.
            IndexError: rows beyond the store's.
        """
        if not 0 <= start <= stop <= self.count:
            raise IndexError(f"rows {start} to {stop} of {self.count}")
        out = np.empty((stop - start, *self.row_shape), np.float16)
        for shard in range(start // self.rows_per_shard, -(-stop // self.rows_per_shard)):
            first, last = self.span(shard)
            a, b = max(first, start), min(last, stop)
            with self._opened(shard) as file:
                out[a - start : b - start] = file.get_slice("z")[a - first : b - first]
        return out

    def read_shard(self, shard: int) -> np.ndarray:
        """All rows of a shard, (R, N, C) float16, with their checksum compared.

        Raises:
            CacheError: it is missing or damaged.
        """
        with self._opened(shard) as file:
            z, metadata = file.get_tensor("z"), file.metadata()
        if metadata != self._metadata(z):
            raise CacheError(
                f"{self._path(shard)}: its checksum is wrong; remove it and sample again"
            )
        return z

    def verify(self) -> list[str]:
        """Reads and hashes every shard: what is wrong, a line a problem."""
        problems = []
        for shard in range(self.shards):
            try:
                self.read_shard(shard)
            except CacheError as error:
                problems.append(str(error))
        return problems

    def _metadata(self, z: np.ndarray) -> dict[str, str]:
        # One entry, because safetensors writes several in an order that changes.
        return {"store": f"{self.digest} crc32c {google_crc32c.value(z.tobytes())}"}

    def _path(self, shard: int) -> Path:
        return self.path / f"{shard:05d}.safetensors"

    def _opened(self, shard: int) -> Any:
        path = self._path(shard)
        if not path.is_file():
            raise CacheError(
                f"{path} is missing: {len(self.missing())} of {self.shards} shards are; run the "
                "same sample command again"
            )
        start, stop = self.span(shard)
        try:
            file = safe_open(path, framework="numpy")
            found = (file.get_slice("z").get_dtype(), file.get_slice("z").get_shape())
            metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{path} is damaged ({error}); remove it and sample again") from error
        if found != ("F16", [stop - start, *self.row_shape]):
            raise CacheError(f"{path} is damaged: it holds {found}; remove it and sample again")
        if not metadata.get("store", "").startswith(self.digest):
            raise CacheError(
                f"{path} belongs to other samples than {self.path / HEADER} describes; remove it "
                "and sample again"
            )
        return file


def _digest(header: Mapping[str, Any]) -> str:
    described = {key: value for key, value in header.items() if key != "extra"}
    return hashlib.sha256(canonical_json(described)).hexdigest()


def open_sample_store(path: Path | str) -> SampleStore:
    """The store at ``path``, finished or not.

    Raises:
        CacheError: there is none, it is damaged, or of a newer version.
    """
    path = Path(path)
    where = path / HEADER
    if not where.exists():
        raise CacheError(f"{path} holds no samples: it has no {HEADER}")
    header = read_json(where)
    check_version(header, str(where))
    try:
        return SampleStore(
            path,
            dict(header["identity"]),
            int(header["count"]),
            tuple(int(n) for n in header["grid"]),
            int(header["channels"]),
            int(header["rows_per_shard"]),
            LatentStats.from_json(header["stats"]),
            _digest(header),
            dict(header.get("extra", {})),
        )
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CacheError(f"{where} is damaged: {error!r}") from error
