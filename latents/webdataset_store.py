"""Latents in tar files that plain webdataset reads.

One tar a shard and view, ``image/00000.tar``, with records of (by default) 256 rows:
``<key>.json``, ``<key>.label.npy``, ``<key>.mean.npy``, ``<key>.std.npy``. Read them with

    wds.WebDataset(urls).decode().to_tuple("mean.npy", "std.npy", "label.npy").unbatched()

With one row a record the arrays have no batch dimension, and ``.unbatched()`` is left out.

The tars are put together here, from views of the rows, rather than by webdataset, which copies each
byte several times. A test holds the bytes against webdataset's.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from detok_pipe.latents.atomic import Piece
from detok_pipe.latents.manifest import Extent, FileRecord
from detok_pipe.latents.stores import Arrays, Layout, StoredShard, piece, write_listed


class WebDatasetStore:
    """Writes the shards of a cache as tars. See :class:`.stores.Store`."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout

    def write_shard(self, shard: int, arrays: Arrays, labels: np.ndarray) -> StoredShard:
        """One tar a view, each written whole."""
        files: list[FileRecord] = []
        extents: dict[str, list[Extent]] = {}
        first = self.layout.first_row(shard)
        for view in self.layout.views:
            tar = self._tar(shard, view, arrays, labels)
            path = f"{view}/{shard:05d}.tar"
            files.append(write_listed(self.folder, path, tar.pieces))
            for field in self.layout.fields:
                offsets = tar.data[f"{field}.npy"]
                extents[f"{view}/{field}"] = _runs(path, offsets, self.layout, first, len(labels))
        return StoredShard(files, extents)

    def _tar(self, shard: int, view: str, arrays: Arrays, labels: np.ndarray) -> _Tar:
        tar = _Tar()
        step = self.layout.rows_per_record
        for record, start in enumerate(range(0, len(labels), step)):
            rows = slice(start, start + step) if step > 1 else start
            key = f"{shard:05d}-{record:05d}"
            # The JSON stays below a tar block of 512 bytes, so all full records are of one size.
            about = {
                "view": view,
                "first_row": self.layout.first_row(shard) + start,
                "rows": len(labels[start : start + step]),
            }
            tar.add(key, "json", [json.dumps(about).encode()])
            tar.add(key, "label.npy", _npy(labels[rows], "<i4"))
            for field in self.layout.fields:
                tar.add(key, f"{field}.npy", _npy(arrays[view, field][rows], "<f2"))
        tar.end()
        return tar

    def write_metadata(self, labels: np.ndarray, source_ids: np.ndarray) -> list[FileRecord]:
        """Tars describe themselves: nothing to add."""
        return []


class _Tar:
    """A tar file in the making.

    Attributes:
        pieces: its bytes so far. size: their number.
        data: by extension, where the last piece of each member with it begins.
    """

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.size = 0
        self.data: dict[str, list[int]] = {}

    def _append(self, part: Piece) -> None:
        self.pieces.append(part)
        self.size += len(part)

    def add(self, key: str, extension: str, content: list[Piece]) -> None:
        """Adds a member, of mode 0444, without a time or an owner."""
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = sum(len(part) for part in content)
        info.mode = 0o444
        self._append(info.tobuf(tarfile.USTAR_FORMAT))
        for part in content:
            start = self.size
            self._append(part)
        self.data.setdefault(extension, []).append(start)
        self._append(bytes(-self.size % tarfile.BLOCKSIZE))

    def end(self) -> None:
        """Two empty blocks, and more up to a whole record of tar."""
        self._append(bytes(2 * tarfile.BLOCKSIZE))
        self._append(bytes(-self.size % tarfile.RECORDSIZE))


def _npy(values: np.ndarray, dtype: str) -> list[Piece]:
    """A npy file: its header, then the values."""
    values = np.asarray(values, dtype, order="C")
    header = io.BytesIO()
    described = np.lib.format.header_data_from_array_1_0(values)
    np.lib.format.write_array_header_1_0(header, described)
    return [header.getvalue(), piece(values, dtype)]


def _runs(path: str, offsets: list[int], layout: Layout, first: int, rows: int) -> list[Extent]:
    """Where the rows of a field lie: runs of records at a constant stride."""
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
