"""Opening a finished latent cache.

cache = open_cache("cache")
rows = cache.rows([0, 1, 2])  # (3, N, C) float16, normalised
for batch in LatentLoader(cache, global_batch=256, seed=0): ...
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from detok_pipe.latents.errors import CacheError
from detok_pipe.latents.manifest import MANIFEST, Manifest, check_file, read_manifest
from detok_pipe.latents.publish import INDEX, INDEX_DTYPE, PLAN, label_end
from detok_pipe.latents.row_reader import RowReader
from detok_pipe.latents.stats import LatentStats
from detok_pipe.latents.writer import CacheWriter, unfinished_message


class LatentCache:
    """A finished cache; get one from :func:`open_cache`.

    Attributes:
        path: its folder. manifest: everything about it. stats: the normalisation of its rows.
        grid: (16, 16) or, one-dimensional, (128,). tokens, channels: N, C. num_rows: images.
        labels: (num_rows,) int32, -1 where unlabelled. source_ids: (num_rows,) int64, the number
            of each row's image in the source. class_names: by label.
        fingerprint: of all that makes the rows. tokenizer: identity of the encoder.
        views, fields: what is stored.
    """

    def __init__(self, path: Path, manifest: Manifest, index: np.ndarray) -> None:
        self.path = path
        self.manifest = manifest
        self.stats: LatentStats = manifest.latent_stats
        self.grid: tuple[int, ...] = tuple(manifest.grid)
        self.tokens = manifest.tokens
        self.channels = manifest.channels
        self.num_rows = manifest.count
        self.labels: np.ndarray = np.ascontiguousarray(index["label"])
        self.source_ids: np.ndarray = np.ascontiguousarray(index["source_id"])
        self.class_names: tuple[str, ...] = tuple(manifest.class_names)
        self.fingerprint = manifest.fingerprint
        self.tokenizer: dict[str, Any] = dict(manifest.encoder)
        self.views: tuple[str, ...] = tuple(manifest.views)
        self.fields: tuple[str, ...] = tuple(manifest.fields)

    @property
    def num_classes(self) -> int:
        """Named classes, or one more than the largest label where names are unknown."""
        return len(self.class_names) or int(self.labels.max()) + 1

    @property
    def has_posterior(self) -> bool:
        """Whether the posterior's standard deviation is stored."""
        return "std" in self.fields

    @property
    def is_exact(self) -> bool:
        """Whether the encoder has no posterior: the means are all there is to a latent."""
        return self.tokenizer.get("posterior") is False

    @cached_property
    def reader(self) -> RowReader:
        """The reader of this process; files are mapped at its first use."""
        return RowReader(self.path, self.manifest)

    def rows(
        self, indices: Sequence[int] | np.ndarray, view: str = "image", field: str = "mean"
    ) -> np.ndarray:
        """Normalised rows (B, N, C) float16, a copy; numbers may repeat, in any order.

        Raises:
            CacheError: the view or field is not stored.
            IndexError: a row is not in the cache.
        """
        self.check_array(view, field)
        rows = np.asarray(indices, np.int64).reshape(-1)
        return self.reader.read([f"{view}/{field}"], rows)

    def check_array(self, view: str, field: str) -> None:
        """Checks that a view and field are stored.

        Raises:
            CacheError: they are not; says which are.
        """
        if f"{view}/{field}" not in self.manifest.arrays:
            raise CacheError(
                f"the cache {self.path} has no {view}/{field}; it has "
                f"{', '.join(sorted(self.manifest.arrays))}"
            )

    def bytes_used(self, arrays: Sequence[str]) -> int:
        """Bytes of the files that hold some arrays, "view/field"."""
        used = {extent.file for name in arrays for extent in self.manifest.arrays[name]}
        return sum(file.bytes for file in self.manifest.files if file.path in used)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself.
        return open_cache, (self.path,)


def open_cache(path: Path | str) -> LatentCache:
    """Opens a finished cache, after checks that cost no reading of rows: version, seal, each
    file's place and size, the index with its hash.

    Raises:
        CacheError: missing, unfinished (says how many shards are missing and how to go on),
            damaged, edited, or of a newer version.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        raise CacheError(_why_no_manifest(path))
    manifest = read_manifest(path)
    for record in manifest.files:
        problem = check_file(path, record)
        if problem is not None:
            raise CacheError(
                f"{path}: {record.path} {problem}; run `detok-pipe verify {path}`, with --repair "
                "where the images are at hand"
            )
    return LatentCache(path, manifest, read_index(path, manifest))


def read_index(path: Path, manifest: Manifest) -> np.ndarray:
    """``index.npy`` of a cache, (count,) of :data:`.publish.INDEX_DTYPE`, checked.

    Raises:
        CacheError: its hash, form or labels are wrong.
    """
    where = path / INDEX
    record = next((r for r in manifest.files if r.path == INDEX), None)
    if record is None:
        raise CacheError(f"{path / MANIFEST} is damaged: it does not list {INDEX}")
    data = where.read_bytes()
    if len(data) > manifest.count * INDEX_DTYPE.itemsize + 4096:
        raise CacheError(f"{where} is damaged: {len(data):,} bytes for {manifest.count} rows")
    if google_crc32c.value(data) != record.crc32c:
        raise CacheError(f"{where} is damaged: its checksum is wrong; run `detok-pipe verify`")
    try:
        index = np.load(where, allow_pickle=False)
    except (ValueError, OSError, MemoryError) as error:
        raise CacheError(f"{where} is damaged: {error}") from error
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.count,):
        raise CacheError(f"{where} is damaged: {index.dtype} of shape {index.shape}")
    labels = index["label"]
    end = label_end(manifest.class_names)
    if labels.min() < -1 or labels.max() >= end:
        raise CacheError(
            f"{where} is damaged: labels {labels.min()} ... {labels.max()}; the cache's are "
            f"-1 ... {end - 1}"
        )
    return index


def _why_no_manifest(path: Path) -> str:
    if not path.exists():
        return f"there is no latent cache at {path}: no such folder"
    if not os.access(path / PLAN, os.F_OK):
        return f"{path} is no latent cache: it has neither a {MANIFEST} nor a {PLAN}"
    writer = CacheWriter.resume(path)
    return unfinished_message(path, len(writer.missing()), writer.plan.shards)
