"""Latents in a Zarr v3 store that plain zarr-python reads.

One array a view and field: ``v0/mean``, ``v0/std``, ``v1/mean``, ``v1/std`` (v0 is the image, v1
its mirror image), and ``labels`` and ``source_ids``. No compression: latents are noise-like, so it
saves little, and without it a shard file is raw rows, which our reader maps.

Shard files are written here, not through zarr-python, whose writes are not atomic: the chunks in
sequence, then the index of the sharding codec (offset and size of each chunk as little-endian
uint64, all ones for an absent chunk) and its CRC-32C. A test holds the bytes against zarr-python's.
"""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.storage import MemoryStore

from detok_pipe.latents.atomic import Piece
from detok_pipe.latents.manifest import Extent, FileRecord
from detok_pipe.latents.stores import Arrays, Layout, StoredShard, piece, write_listed

_ABSENT = np.iinfo(np.uint64).max


class ZarrStore:
    """Writes the shards of a cache as Zarr. See :class:`.stores.Store`."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout

    def write_shard(self, shard: int, arrays: Arrays, labels: np.ndarray) -> StoredShard:
        """One file a view and field, each written whole. The labels are metadata here."""
        files: list[FileRecord] = []
        extents: dict[str, list[Extent]] = {}
        rows = len(labels)
        for number, view in enumerate(self.layout.views):
            for field in self.layout.fields:
                path = f"v{number}/{field}/c/{shard}/0/0"
                pieces = self._shard_pieces(arrays[view, field])
                files.append(write_listed(self.folder, path, pieces))
                extent = Extent(
                    file=path,
                    first_row=self.layout.first_row(shard),
                    rows=rows,
                    offset=0,
                    stride=self._chunk_bytes,
                    rows_per_record=self.layout.rows_per_record,
                )
                extents[f"{view}/{field}"] = [extent]
        return StoredShard(files, extents)

    @property
    def _chunk_bytes(self) -> int:
        return self.layout.rows_per_record * int(np.prod(self.layout.row_shape)) * 2

    def _shard_pieces(self, rows: np.ndarray) -> list[Piece]:
        """A shard of the ``sharding_indexed`` codec, index at its end."""
        chunk = self.layout.rows_per_record
        present = -(-len(rows) // chunk)
        index = np.full((self.layout.rows_per_shard // chunk, 2), _ABSENT, "<u8")
        index[:present, 0] = np.arange(present) * self._chunk_bytes
        index[:present, 1] = self._chunk_bytes
        body = piece(rows, "<f2")
        padding = bytes(present * self._chunk_bytes - len(body))
        tail = index.tobytes()
        return [body, padding, tail, google_crc32c.value(tail).to_bytes(4, "little")]

    def write_metadata(self, labels: np.ndarray, source_ids: np.ndarray) -> list[FileRecord]:
        """The ``zarr.json`` files and the small arrays, made by zarr-python, then put in place."""
        layout = self.layout
        made: dict[str, Buffer] = {}
        root = zarr.create_group(MemoryStore(made), attributes=dict(layout.attributes))
        for number, view in enumerate(layout.views):
            group = root.create_group(f"v{number}", attributes={"view": view})
            for field in layout.fields:
                group.create_array(
                    field,
                    shape=(layout.count, *layout.row_shape),
                    dtype="float16",
                    chunks=(layout.rows_per_record, *layout.row_shape),
                    shards=(layout.rows_per_shard, *layout.row_shape),
                    compressors=None,
                    filters=None,
                    fill_value=0,
                    dimension_names=("row", "token", "channel"),
                )
        for name, values in (("labels", labels), ("source_ids", source_ids)):
            root.create_array(
                name,
                data=values,
                chunks=values.shape,
                compressors=None,
                config={"write_empty_chunks": True},
            )
        return [write_listed(self.folder, name, [made[name].to_bytes()]) for name in sorted(made)]
