"""Rows of a cache, straight from its files' pages: one reader for both formats.

All files of a cache are mapped into one range of addresses (each to its own page-aligned place in
it). A row is then a number of units from the range's beginning, and a batch is a single indexing
of a strided view, whatever the number of files, which runs without Python's global lock and at the
speed of a plain memory map. Needs a POSIX system.

Files must stay as they are while a cache is open. Sizes are checked when it is opened. A file that
is cut short or overwritten in place afterwards ends the process with a bus error as soon as a lost
page is touched: asking for each file's size before each batch would cost as much as the reading,
and leave a gap all the same. Replacing a file by a rename, as all of this product does, is safe:
the old one stays mapped.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detok_pipe.latents.errors import CacheError
from detok_pipe.latents.manifest import Extent, Manifest

_PAGE = mmap.PAGESIZE
# Where a file begins at a multiple of this, Linux can map it by huge pages, which saves random
# reads a third of their time (4 KiB pages are looked up for each row).
_HUGE_PAGE = 2 << 20
_LARGEST_ALIGNMENT = 64 << 20
_MAP_FIXED = 0x10  # the same on Linux and macOS; the mmap module does not have it
_PROT_NONE = 0
_FAILED = ctypes.c_void_p(-1).value
_WARM_BYTES = 1 << 22
_MADV_WILLNEED = 3  # the same on Linux and macOS
_MADV_HUGEPAGE = 14  # Linux only; an error elsewhere, which does no harm


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    word = ctypes.c_size_t
    libc.mmap.argtypes = [ctypes.c_void_p, word, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    libc.mmap.argtypes.append(ctypes.c_int64)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, word]
    libc.madvise.argtypes = [ctypes.c_void_p, word, ctypes.c_int]
    return libc


class _Mapping:
    """Files, read-only, at aligned places of one range of addresses."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], alignment: int) -> None:
        self._libc = _libc()
        places = [-(-size // alignment) * alignment for size in sizes]
        self.starts = np.concatenate([[0], np.cumsum(places)]).astype(np.int64)
        self.length = int(self.starts[-1])
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        reserved = self.length + _HUGE_PAGE
        begin = self._map(None, reserved, _PROT_NONE, anonymous, -1, "addresses")
        self.base = -(-begin // _HUGE_PAGE) * _HUGE_PAGE
        # Not at the interpreter's exit, when a thread may still be reading.
        weakref.finalize(self, self._libc.munmap, begin, reserved).atexit = False
        for path, size, start in zip(paths, sizes, self.starts, strict=False):
            if size:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    flags = mmap.MAP_SHARED | _MAP_FIXED
                    place = self.base + int(start)
                    self._map(place, size, mmap.PROT_READ, flags, descriptor, str(path))
                finally:
                    os.close(descriptor)
        self._libc.madvise(self.base, self.length, _MADV_HUGEPAGE)

    def _map(
        self, address: int | None, size: int, protection: int, flags: int, file: int, what: str
    ) -> int:
        found = self._libc.mmap(address, size, protection, flags, file, 0)
        if found is None or found == _FAILED:
            raise CacheError(f"cannot map {what}: {os.strerror(ctypes.get_errno())}")
        return int(found)

    def array(self) -> np.ndarray:
        """The whole range, uint8. Valid while this object lives."""
        buffer = (ctypes.c_uint8 * self.length).from_address(self.base)
        return np.ctypeslib.as_array(buffer)

    def will_need(self, start: int, stop: int) -> None:
        """Asks the system to read a range from the disk, without waiting for it."""
        first = start // _PAGE * _PAGE
        self._libc.madvise(self.base + first, stop - first, _MADV_WILLNEED)


class _Array:
    """Where the rows of one array lie, in units from the beginning of the range."""

    def __init__(self, extents: Sequence[Extent], offsets: Sequence[int]) -> None:
        self.files = [extent.file for extent in extents]
        self.first_rows = np.array([e.first_row for e in extents], np.int64)
        self.offsets = np.array(offsets, np.int64)
        self.strides = np.array([e.stride for e in extents], np.int64)
        self.per_record = np.array([e.rows_per_record for e in extents], np.int64)

    def bytes_at(self, rows: np.ndarray, row_bytes: int) -> np.ndarray:
        """Byte offsets of rows in the range."""
        extent = np.searchsorted(self.first_rows, rows, side="right") - 1
        record, within = np.divmod(rows - self.first_rows[extent], self.per_record[extent])
        return self.offsets[extent] + record * self.strides[extent] + within * row_bytes


class RowReader:
    """Reads rows of the arrays "view/field" of a cache whose files were checked."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.count = manifest.count
        self.row_shape = manifest.row_shape
        self._row_bytes = manifest.row_bytes
        used = {extent.file for extents in manifest.arrays.values() for extent in extents}
        files = [record for record in manifest.files if record.path in used]
        self._folder = folder
        alignment = math.lcm(_HUGE_PAGE, self._row_bytes)
        if alignment > _LARGEST_ALIGNMENT:
            alignment = math.lcm(_PAGE, self._row_bytes)
        paths = [folder / record.path for record in files]
        self._mapping = _Mapping(paths, [record.bytes for record in files], alignment)
        starts = {r.path: int(s) for r, s in zip(files, self._mapping.starts, strict=False)}
        self._arrays = {
            name: _Array(extents, [starts[e.file] + e.offset for e in extents])
            for name, extents in manifest.arrays.items()
        }
        units = {alignment, self._row_bytes}
        for array in self._arrays.values():
            units.update(array.offsets.tolist(), array.strides.tolist())
        self._unit = math.gcd(*units)
        if self._unit % 2:
            raise CacheError(f"{folder}: rows at odd byte offsets are not supported")
        # Whether rows lie at multiples of their size: an ordinary matrix, whose rows can be taken
        # into a buffer that is there already.
        self.dense = self._unit == self._row_bytes
        steps = (self._mapping.length - self._row_bytes) // self._unit + 1
        self._rows = np.lib.stride_tricks.as_strided(
            self._mapping.array().view(np.float16),
            (steps, self._row_bytes // 2),
            (self._unit, 2),
            writeable=False,
        )

    def _units(
        self, arrays: Sequence[str], rows: np.ndarray, choice: np.ndarray | None
    ) -> np.ndarray:
        """Where rows begin, (B,) int64 in units."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.count):
            raise IndexError(f"row {rows.min()} or {rows.max()} is not in [0, {self.count})")
        places = self._arrays[arrays[0]].bytes_at(rows, self._row_bytes)
        for number, name in enumerate(arrays[1:] if choice is not None else (), start=1):
            here = choice == number
            places[here] = self._arrays[name].bytes_at(rows[here], self._row_bytes)
        return places // self._unit

    def read(
        self,
        arrays: Sequence[str],
        rows: np.ndarray,
        choice: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """A copy of rows, (B, N, C) float16.

        Args:
            arrays: names, "view/field".
            rows: (B,) integers, in any order.
            choice: (B,) which of ``arrays`` to take each row from; the first where it is None.
            out: where to copy to, contiguous; a new array by default.

        Raises:
            IndexError: a row is not in [0, count).
        """
        units = self._units(arrays, rows, choice)
        flat = None if out is None else out.reshape(len(units), -1)
        if self.dense:
            # Checked above; mode "raise" would copy twice.
            flat = np.take(self._rows, units, axis=0, out=flat, mode="clip")
        elif flat is None:
            flat = self._rows[units]
        else:
            flat[:] = self._rows[units]
        return flat.reshape(-1, *self.row_shape)

    def will_need(self, array: str, rows: np.ndarray) -> None:
        """Begins to read blocks of consecutive rows from the disk, without waiting for them.

        Args:
            array: "view/field".
            rows: (B,) int64, any order; rows between consecutive ones less than 256 apart come too.
        """
        rows = np.sort(rows)
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > 256) + 1):
            ends = self._arrays[array].bytes_at(run[[0, -1]], self._row_bytes)
            # A run over a file's end, where places may be apart, is two.
            self._mapping.will_need(int(ends[0]), int(ends[1]) + self._row_bytes)

    def warm(self, arrays: Sequence[str], first_file: int = 0) -> None:
        """Reads files once in sequence, so that random reads find them in memory.

        Args:
            arrays: names, "view/field"; files that hold none of them are left alone.
            first_file: where to begin: processes of one machine begin at different ones and meet
                each other's pages.
        """
        buffer = bytearray(_WARM_BYTES)
        files = sorted({path for name in arrays for path in self._arrays[name].files})
        for i in range(len(files)):
            path = self._folder / files[(first_file + i) % len(files)]
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
