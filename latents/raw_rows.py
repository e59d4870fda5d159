"""From raw shards (fp32, unnormalised, with holes) to the dense, normalised rows of a cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from detok_pipe.latents.atomic import Piece, crc32c_file
from detok_pipe.latents.errors import CacheError, NonFiniteError
from detok_pipe.latents.publish import COMMITS, RAW
from detok_pipe.latents.stats import LatentStats
from detok_pipe.latents.stores import piece

_ROWS_AT_ONCE = 64  # of a 256 x 16 cache 1 MB, which stays in a core's cache


def raw_pieces(tensors: Mapping[str, np.ndarray]) -> list[Piece]:
    """A safetensors file of fp32 arrays in pieces: its header, then each array.

    The library's own writer copies all into one string first, which takes more time than checking,
    hashing and writing a shard, and as much memory again.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin aligned
    arrays = [piece(values, "<f4") for values in tensors.values()]
    return [len(text).to_bytes(8, "little") + text, *arrays]


def dense_rows(rows_per_shard: int, valid: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where each final row comes from, when the last rows fill the holes.

    Args:
        rows_per_shard: planned rows a shard.
        valid: by shard, which of its planned rows were encoded, (R,) bool.

    Returns:
        (raw shard, row among that shard's encoded rows), each (count,) int64.
    """
    flags = np.concatenate(valid)
    within = np.concatenate([np.cumsum(v) - 1 for v in valid])
    count = int(flags.sum())
    places = np.arange(count)
    holes = np.flatnonzero(~flags[:count])
    donors = np.flatnonzero(flags[count:])[::-1] + count
    places[holes] = donors
    return places // rows_per_shard, within[places]


def _runs(rows: np.ndarray) -> Iterator[slice]:
    """Slices of an array in which its numbers follow each other, not too long for a cache."""
    ends = [*np.flatnonzero(np.diff(rows) != 1) + 1, len(rows)]
    start = 0
    for end in ends:
        for begin in range(start, end, _ROWS_AT_ONCE):
            yield slice(begin, min(begin + _ROWS_AT_ONCE, end))
        start = end


class RawRows:
    """Final rows, normalised and cast, from raw shards. See :data:`.publish.RowSource`."""

    def __init__(
        self,
        folder: Path,
        commits: Mapping[int, Mapping[str, Any]],
        shard_of: np.ndarray,
        row_of: np.ndarray,
        source_ids: np.ndarray,
        stats: LatentStats,
        row_shape: tuple[int, int],
    ) -> None:
        self.folder = folder
        self.commits = commits
        self.shard_of = shard_of
        self.row_of = row_of
        self.source_ids = source_ids
        self.stats = stats
        self.row_shape = row_shape
        self._checked: set[int] = set()

    def __call__(self, view: str, field: str, first: int, stop: int) -> np.ndarray:
        shards, rows = self.shard_of[first:stop], self.row_of[first:stop]
        out = np.empty((stop - first, *self.row_shape), np.float16)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            with self._open(int(shard)) as file:
                part = file.get_slice(f"{view}.{field}")
                for run in _runs(rows[here]):
                    places = here[run]
                    values = part[int(rows[places[0]]) : int(rows[places[-1]]) + 1]
                    out[places] = self._cast(values, field, view, first + places).numpy()
        return out

    def _open(self, shard: int) -> Any:
        commit = self.commits[shard]
        path = self.folder / RAW / commit["raw"]
        if shard not in self._checked:
            if not path.is_file() or crc32c_file(path) != commit["crc32c"]:
                record = self.folder / COMMITS / f"{shard:05d}.json"
                raise CacheError(
                    f"{path} is missing or damaged; remove {record} and run the same encode "
                    "command again"
                )
            self._checked.add(shard)
        # As torch tensors: its slices are not copied, and numpy takes six times as long to fp16.
        return safe_open(path, framework="pt")

    def _cast(self, values: Tensor, field: str, view: str, rows: np.ndarray) -> Tensor:
        if field == "mean":
            values = self.stats.normalize(values)
        else:
            values = values / torch.tensor(self.stats.std, dtype=torch.float32)
        cast = values.half()
        if not torch.stack(values.aminmax()).half().isfinite().all():
            finite = cast.isfinite().flatten(1).all(1)
            bad = int(self.source_ids[rows[int(finite.int().argmin())]])
            raise NonFiniteError(
                f"the normalised {field} of image {bad} ({view}) is too large for fp16: the "
                f"statistics (std from {self.stats.std.min():g}) do not fit this encoder"
            )
        return cast

    def release(self, shard: int, rows_per_shard: int) -> None:
        """Removes a raw shard that no later final shard takes rows from: it halves the peak."""
        if shard not in self.shard_of[(shard + 1) * rows_per_shard :]:
            (self.folder / RAW / self.commits[shard]["raw"]).unlink(missing_ok=True)
