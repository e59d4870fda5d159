"""What the two kinds of store have in common: a layout, and the interface of their writers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from detok_pipe.latents.atomic import Piece, crc32c_pieces, write_pieces
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.manifest import Extent, FileRecord
from detok_pipe.latents.stats import LatentStats

Arrays = Mapping[tuple[str, str], np.ndarray]  # (view, field) -> (R, N, C) float16


@dataclass(frozen=True)
class Layout:
    """How the rows of a finished cache are cut into shards and records."""

    count: int
    rows_per_shard: int
    rows_per_record: int
    row_shape: tuple[int, int]  # (N, C)
    views: tuple[str, ...]
    fields: tuple[str, ...]
    attributes: Mapping[str, Any]  # for formats that can carry them

    @property
    def shards(self) -> int:
        return -(-self.count // self.rows_per_shard)

    def first_row(self, shard: int) -> int:
        return shard * self.rows_per_shard

    def stop_row(self, shard: int) -> int:
        return min(self.first_row(shard) + self.rows_per_shard, self.count)


@dataclass(frozen=True)
class StoredShard:
    """The files of one shard, and where rows lie in them ("view/field" -> extents)."""

    files: list[FileRecord]
    arrays: dict[str, list[Extent]]

    def to_json(self) -> dict[str, Any]:
        return {
            "files": [record.model_dump() for record in self.files],
            "arrays": {k: [e.model_dump() for e in v] for k, v in self.arrays.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StoredShard:
        return cls(
            [FileRecord(**record) for record in value["files"]],
            {k: [Extent(**e) for e in v] for k, v in value["arrays"].items()},
        )


class Store(Protocol):
    """Writes one format. Bytes are a pure function of the arguments and the layout."""

    def write_shard(self, shard: int, arrays: Arrays, labels: np.ndarray) -> StoredShard:
        """Writes a shard's files whole: ``arrays`` (R, N, C) float16, ``labels`` (R,) int32."""
        ...

    def write_metadata(self, labels: np.ndarray, source_ids: np.ndarray) -> list[FileRecord]:
        """Writes what belongs to the whole store, after its shards: both arguments (count,)."""
        ...


def piece(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array's bytes as ``dtype``, a :data:`.atomic.Piece`; no copy where it is that already."""
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)


def write_listed(folder: Path, name: str, pieces: Sequence[Piece]) -> FileRecord:
    """Writes a file of a cache whole; gives what the manifest says of it."""
    write_pieces(folder / name, pieces)
    size = sum(len(piece) for piece in pieces)
    return FileRecord(path=name, bytes=size, crc32c=crc32c_pieces(pieces))


def attributes(stats: LatentStats, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What a store that carries attributes tells someone who opens it without this product."""
    return {
        "normalised": "rows are (z - mean) / std per channel; std fields are divided by std",
        "statistics": stats.to_json(),
        "class_names": list(class_names),
    }


def make_store(store_format: str, folder: Path, layout: Layout) -> Store:
    """The writer of a format.

    Raises:
        ConfigError: there is no such format.
    """
    # Imported here: zarr takes half a second.
    if store_format == "webdataset":
        from detok_pipe.latents.webdataset_store import WebDatasetStore

        return WebDatasetStore(folder, layout)
    if store_format == "zarr":
        from detok_pipe.latents.zarr_store import ZarrStore

        return ZarrStore(folder, layout)
    raise ConfigError(f"format is {store_format!r}; choose webdataset or zarr")
