"""Latents in tar files that plain webdataset reads.

One tar a shard and view, ``image/00000.tar``, with records of (by default) 256 rows:
``<key>.json``, ``<key>.label.npy``, ``<key>.mean.npy``, ``<key>.std.npy``. Read them with

    wds.WebDataset(urls).decode().to_tuple("mean.npy", "std.npy", "label.npy").unbatched()

With one row a record the arrays have no batch dimension, and ``.unbatched()`` is left out.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import google_crc32c
import numpy as np
import webdataset as wds

from detok_pipe.latents.atomic import write_bytes
from detok_pipe.latents.manifest import Extent, FileRecord
from detok_pipe.latents.stores import Arrays, Layout, StoredShard


class WebDatasetStore:
    """Writes the shards of a cache as tars. See :class:`.stores.Store`."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout

    def write_shard(self, shard: int, arrays: Arrays, labels: np.ndarray) -> StoredShard:
        """One tar a view, each written whole."""
        files: list[FileRecord] = []
        extents: dict[str, list[Extent]] = {}
        for view in self.layout.views:
            path = f"{view}/{shard:05d}.tar"
            data = self._tar(shard, view, arrays, labels)
            write_bytes(self.folder / path, data)
            files.append(FileRecord(path=path, bytes=len(data), crc32c=google_crc32c.value(data)))
            extents.update(self._extents(path, view, shard, data, len(labels)))
        return StoredShard(files, extents)

    def _tar(self, shard: int, view: str, arrays: Arrays, labels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        step = self.layout.rows_per_record
        writer = wds.TarWriter(buffer, mtime=0, user="", group="")
        for record, start in enumerate(range(0, len(labels), step)):
            rows = slice(start, start + step) if step > 1 else start
            # The JSON stays below a tar block of 512 bytes, so all full records are of one size.
            sample = {
                "__key__": f"{shard:05d}-{record:05d}",
                "json": {
                    "view": view,
                    "first_row": self.layout.first_row(shard) + start,
                    "rows": len(labels[start : start + step]),
                },
                "label.npy": np.asarray(labels[rows], np.int32),
            }
            for field in self.layout.fields:
                sample[f"{field}.npy"] = arrays[view, field][rows]
            writer.write(sample)
        writer.close()
        return buffer.getvalue()

    def _extents(
        self, path: str, view: str, shard: int, data: bytes, rows: int
    ) -> dict[str, list[Extent]]:
        """Where the rows of each field lie: runs of records at a constant stride."""
        places: dict[str, list[int]] = {field: [] for field in self.layout.fields}
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                field = member.name.split(".")[-2]
                if field in places:
                    places[field].append(member.offset_data + _npy_header(data, member))
        return {
            f"{view}/{field}": _runs(path, offsets, self.layout, self.layout.first_row(shard), rows)
            for field, offsets in places.items()
        }

    def write_metadata(self, labels: np.ndarray, source_ids: np.ndarray) -> list[FileRecord]:
        """Tars describe themselves: nothing to add."""
        return []


def _npy_header(data: bytes, member: tarfile.TarInfo) -> int:
    """Length of the header of a npy member."""
    head = io.BytesIO(data[member.offset_data : member.offset_data + 4096])
    np.lib.format.read_magic(head)
    np.lib.format.read_array_header_1_0(head)
    return head.tell()


def _runs(path: str, offsets: list[int], layout: Layout, first: int, rows: int) -> list[Extent]:
    step = layout.rows_per_record
    runs: list[Extent] = []
    start = 0
    while start < len(offsets):
        stride = offsets[start + 1] - offsets[start] if start + 1 < len(offsets) else 0
        stop = start + 1
        while stop < len(offsets) and offsets[stop] - offsets[stop - 1] == stride:
            stop += 1
        runs.append(
            Extent(
                file=path,
                first_row=first + start * step,
                rows=min(stop * step, rows) - start * step,
                offset=offsets[start],
                stride=stride,
                rows_per_record=step,
            )
        )
        start = stop
    return runs
