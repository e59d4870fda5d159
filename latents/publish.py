"""The last step of every cache: normalised rows into shards, then the index, then the manifest.

Restartable at any moment: a shard's record is written after its files, and whoever comes next
skips shards that have one. Bytes are a pure function of the arguments, so that two processes that
publish the same cache can only write the same files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from detok_pipe.latents.atomic import remove_temporaries, storage_errors, write_bytes, write_json
from detok_pipe.latents.manifest import (
    BACKUP,
    FileRecord,
    Manifest,
    StatsRecord,
    read_json,
    write_manifest,
)
from detok_pipe.latents.plan import CachePlan, canonical_json
from detok_pipe.latents.stats import LatentStats
from detok_pipe.latents.stores import (
    Layout,
    Store,
    StoredShard,
    attributes,
    make_store,
    write_listed,
)

PLAN = "plan.json"
INDEX = "index.npy"
QUARANTINE = "quarantine.jsonl"
SOURCES = "sources.jsonl"
COMMITS = "_commit"
RAW = "_raw"
INDEX_DTYPE = np.dtype([("source_id", "<i8"), ("label", "<i4")])

# (view, field, first row, stop row) -> (R, N, C) float16, normalised
RowSource = Callable[[str, str, int, int], np.ndarray]


@dataclass(frozen=True)
class Quarantined:
    """An image that could not be encoded."""

    source_id: int
    path: str
    reason: str


@dataclass(frozen=True)
class Contents:
    """All of a cache but its rows."""

    plan: CachePlan
    stats: LatentStats
    measured: LatentStats
    labels: np.ndarray  # (count,) int32
    source_ids: np.ndarray  # (count,) int64
    quarantined: tuple[Quarantined, ...]

    def layout(self) -> Layout:
        plan = self.plan
        return Layout(
            len(self.labels),
            plan.rows_per_shard,
            plan.rows_per_record,
            (plan.tokens, plan.channels),
            plan.views,
            plan.fields,
            attributes(self.stats, plan.class_names),
        )

    def key(self) -> str:
        """Ties records of written shards to what they were written from."""
        hashed = hashlib.sha256(canonical_json([self.plan.to_json(), self.stats.to_json()]))
        hashed.update(index_bytes(self.labels, self.source_ids))
        return hashed.hexdigest()


def label_end(class_names: Sequence[str]) -> int:
    """One more than the largest label: of those with a name or, without names, of those that fit
    into ``index.npy``. The smallest is -1, unlabelled."""
    return len(class_names) or int(np.iinfo(INDEX_DTYPE["label"]).max)


@contextmanager
def working_lock(folder: Path) -> Iterator[None]:
    """Held by the one process that publishes or repairs; others wait.

    The lock is on the plan, which is there from the beginning and never replaced: a lock file of
    its own could not be removed afterwards without letting two processes in.
    """
    with storage_errors(folder), open(folder / PLAN, "r+b") as plan:
        fcntl.flock(plan, fcntl.LOCK_EX)  # let go by closing
        (folder / COMMITS).mkdir(exist_ok=True)
        yield


def index_bytes(labels: np.ndarray, source_ids: np.ndarray) -> bytes:
    """``index.npy``: source number and label of each row."""
    index = np.empty(len(labels), INDEX_DTYPE)
    index["source_id"] = source_ids
    index["label"] = labels
    buffer = BytesIO()
    np.save(buffer, index, allow_pickle=False)
    return buffer.getvalue()


def quarantine_bytes(quarantined: tuple[Quarantined, ...]) -> bytes:
    """``quarantine.jsonl``: one JSON object a line, by source number."""
    entries = sorted(quarantined, key=lambda q: q.source_id)
    lines = [json.dumps(vars(q), ensure_ascii=False) + "\n" for q in entries]
    return "".join(lines).encode("utf-8", "surrogateescape")


def shard_arrays(layout: Layout, shard: int, rows: RowSource) -> dict[tuple[str, str], np.ndarray]:
    """The rows of a shard for its store."""
    first, stop = layout.first_row(shard), layout.stop_row(shard)
    return {(v, f): rows(v, f, first, stop) for v in layout.views for f in layout.fields}


def publish(
    folder: Path,
    contents: Contents,
    rows: RowSource,
    *,
    after_shard: Callable[[int], None] = lambda shard: None,
) -> Manifest:
    """Writes the shards that have no record yet, then everything else, the manifest last.

    ``after_shard`` is called for each shard once its record is on the disk. The caller holds
    :func:`working_lock`.

    Raises:
        StorageError: the disk is full or read-only.
    """
    layout = contents.layout()
    store = make_store(contents.plan.format, folder, layout)
    key = contents.key()
    stored = []

    def write(shard: int) -> StoredShard:
        return _stored_shard(folder, shard, store, layout, contents.labels, rows, key)

    # One shard is computed while another waits for the disk.
    pool = ThreadPoolExecutor(2, thread_name_prefix="publish")
    try:
        for shard, part in enumerate(pool.map(write, range(layout.shards))):
            stored.append(part)
            after_shard(shard)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    files = [record for part in stored for record in part.files]
    files += store.write_metadata(contents.labels, contents.source_ids)
    small = {
        INDEX: index_bytes(contents.labels, contents.source_ids),
        QUARANTINE: quarantine_bytes(contents.quarantined),
    }
    if (folder / SOURCES).exists():
        small[SOURCES] = (folder / SOURCES).read_bytes()
    for name, data in small.items():
        write_bytes(folder / BACKUP / name, data)
        files.append(write_listed(folder, name, [data]))
    arrays = {
        name: [extent for part in stored for extent in part.arrays[name]]
        for name in (stored[0].arrays if stored else ())
    }
    manifest = make_manifest(contents, files, arrays)
    write_manifest(folder, manifest)
    return manifest


def _stored_shard(
    folder: Path,
    shard: int,
    store: Store,
    layout: Layout,
    labels: np.ndarray,
    rows: RowSource,
    key: str,
) -> StoredShard:
    record = folder / COMMITS / f"final-{shard:05d}.json"
    if record.exists():
        value = read_json(record)
        part = StoredShard.from_json(value)
        if value["key"] == key and all(_has_size(folder, file) for file in part.files):
            return part
    part = store.write_shard(
        shard,
        shard_arrays(layout, shard, rows),
        labels[layout.first_row(shard) : layout.stop_row(shard)],
    )
    write_json(record, {"key": key, **part.to_json()})
    return part


def _has_size(folder: Path, record: FileRecord) -> bool:
    try:
        return (folder / record.path).stat().st_size == record.bytes
    except OSError:
        return False


def make_manifest(contents: Contents, files: list[FileRecord], arrays: Any) -> Manifest:
    """The sealed manifest of a cache whose files are all written."""
    plan = contents.plan
    return Manifest(
        format_version=1,
        encode_version=plan.encode_version,
        format=plan.format,
        count=len(contents.labels),
        quarantined=len(contents.quarantined),
        grid=list(plan.grid),
        channels=plan.channels,
        views=list(plan.views),  # type: ignore[arg-type]
        fields=list(plan.fields),  # type: ignore[arg-type]
        dtype="float16",
        condition="labels",
        class_names=list(plan.class_names),
        rows_per_shard=plan.rows_per_shard,
        rows_per_record=plan.rows_per_record,
        seed=plan.seed,
        stats=StatsRecord(**contents.stats.to_json()),
        measured=StatsRecord(**contents.measured.to_json()),
        encoder=dict(plan.encoder),
        preprocessing=dict(plan.preprocessing),
        sources=dict(plan.sources),
        encoding={
            "batch_size": plan.batch_size,
            "dtype": plan.dtype,
            "settings": dict(plan.settings),
            "plan": plan.digest(),
        },
        created_with=library_versions(),
        files=files,
        arrays=arrays,
        fingerprint="",
    ).sealed()


def library_versions() -> dict[str, str]:
    """Versions of what made the cache, for the record only."""
    found = {"python": platform.python_version()}
    for name in ("detok-pipe", "numpy", "torch", "webdataset", "zarr"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def clean_up(folder: Path) -> None:
    """Removes what only the making of a cache needs, and what killed processes left."""
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        remove_temporaries(path)
    for name in (RAW, COMMITS):  # the last, so that its absence means that all is clean
        shutil.rmtree(folder / name, ignore_errors=True)


def needs_clean_up(folder: Path) -> bool:
    """Whether a finished cache was left before :func:`clean_up` was through."""
    return (folder / COMMITS).exists()


def plan_of(manifest: Manifest) -> CachePlan:
    """The plan that a finished cache was made by."""
    encoding = manifest.encoding
    return CachePlan(
        count=manifest.count + manifest.quarantined,
        rows_per_shard=manifest.rows_per_shard,
        grid=tuple(manifest.grid),
        channels=manifest.channels,
        encoder=manifest.encoder,
        preprocessing=manifest.preprocessing,
        sources=manifest.sources,
        class_names=tuple(manifest.class_names),
        views=tuple(manifest.views),
        fields=tuple(manifest.fields),
        format=manifest.format,
        rows_per_record=manifest.rows_per_record,
        seed=manifest.seed,
        batch_size=encoding["batch_size"],
        dtype=encoding["dtype"],
        settings=encoding["settings"],
        stats=None if manifest.stats.source == "dataset" else manifest.latent_stats,
        encode_version=manifest.encode_version,
    )


def contents_of(folder: Path, manifest: Manifest, index: np.ndarray) -> Contents:
    """All of a finished cache but its rows, from its checked manifest and index."""
    # Split as bytes: str.splitlines() would also end a line at U+2028 and others inside a name.
    lines = (folder / QUARANTINE).read_bytes().splitlines()
    return Contents(
        plan_of(manifest),
        manifest.latent_stats,
        manifest.measured_stats,
        np.ascontiguousarray(index["label"]),
        np.ascontiguousarray(index["source_id"]),
        tuple(Quarantined(**json.loads(x.decode("utf-8", "surrogateescape"))) for x in lines),
    )
