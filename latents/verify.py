"""Checking a finished cache in depth, and describing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detok_pipe.latents.atomic import crc32c_file
from detok_pipe.latents.cache import LatentCache, open_cache, read_index
from detok_pipe.latents.errors import CacheError
from detok_pipe.latents.manifest import (
    BACKUP,
    MANIFEST,
    FileRecord,
    Manifest,
    check_file,
    read_manifest,
)
from detok_pipe.latents.plan import CachePlan
from detok_pipe.latents.publish import COMMITS, INDEX, PLAN, QUARANTINE, SOURCES, plan_of
from detok_pipe.latents.stats import StatsAccumulator
from detok_pipe.latents.writer import CacheWriter

SMALL_FILES = (INDEX, QUARANTINE, SOURCES)
_ROWS_AT_ONCE = 1024
# Rounding to fp16 moves a mean of many values by far less, a std by at most half of it.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file of a cache.

    Attributes:
        file: its path in the cache. message: what is wrong with it.
    """

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file} {self.message}"


def verify(path: Path | str, *, hashes: bool = True) -> list[Problem]:
    """Everything that is wrong with a finished cache; an empty list when it is whole.

    Args:
        path: the cache's folder.
        hashes: also read every file, compare its checksum, and the rows' statistics with those
            recorded.

    Raises:
        CacheError: there is no cache, or it was never finished.
    """
    path = Path(path)
    if not (path / MANIFEST).exists() and not (path / BACKUP / MANIFEST).exists():
        open_cache(path)  # says what is there instead
    manifest, problems = _usable_manifest(path)
    if manifest is None:
        return problems
    problems += _plan_problems(path, manifest)
    for record in manifest.files:
        problems += file_problems(path, record, hashes=hashes)
    problems += list(_backup_problems(path, manifest))
    problems += list(_strangers(path, manifest))
    if hashes and not problems:
        problems += list(_row_problems(open_cache(path)))
    return problems


def damaged_files(path: Path | str, *, rank: int = 0, world: int = 1) -> list[Problem]:
    """Files of a finished cache that are missing, or of another size or checksum; of every
    ``world``-th file only, from file ``rank`` on, so that processes can share the reading.

    Raises:
        CacheError: there is no finished cache, or its manifest is damaged.
    """
    path = Path(path)
    files = read_manifest(path).files[rank::world]
    return [problem for record in files for problem in file_problems(path, record, hashes=True)]


def _usable_manifest(path: Path) -> tuple[Manifest | None, list[Problem]]:
    """The manifest, or its backup where that is damaged."""
    problems = []
    found: list[Manifest] = []
    for name in (MANIFEST, f"{BACKUP}/{MANIFEST}"):
        try:
            found.append(read_manifest(path, name))
        except CacheError as error:
            problems.append(Problem(name, f"cannot be used: {error}"))
    if len(found) == 2 and found[0] != found[1]:
        problems.append(Problem(f"{BACKUP}/{MANIFEST}", "is of another state than the manifest"))
    return (found[0] if found else None), problems


def _plan_problems(path: Path, manifest: Manifest) -> list[Problem]:
    try:
        plan = CacheWriter.resume(path).plan
    except CacheError as error:
        return [Problem(PLAN, f"cannot be used: {error}")]
    return [] if plan == plan_of(manifest) else [Problem(PLAN, "is not that of the manifest")]


def file_problems(path: Path, record: FileRecord, *, hashes: bool) -> list[Problem]:
    """What is wrong with one listed file."""
    message = check_file(path, record)
    if message is None and hashes:
        message = _hash_problem(path / record.path, record.crc32c)
    return [] if message is None else [Problem(record.path, message)]


def _hash_problem(file: Path, crc32c: int) -> str | None:
    try:
        return None if crc32c_file(file) == crc32c else "has a wrong checksum"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _backup_problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    for record in manifest.files:
        if record.path in SMALL_FILES:
            copy = path / BACKUP / record.path
            if not copy.is_file() or _hash_problem(copy, record.crc32c) is not None:
                yield Problem(f"{BACKUP}/{record.path}", "is missing or damaged")


def _strangers(path: Path, manifest: Manifest) -> Iterator[Problem]:
    """Files that a reader of whole folders (a glob over tars) would take for a part."""
    listed = {record.path for record in manifest.files}
    for folder in sorted({name.split("/")[0] for name in listed if "/" in name}):
        for file in sorted((path / folder).rglob("*")):
            name = file.relative_to(path).as_posix()
            if name not in listed and not file.is_dir():
                yield Problem(name, "is not part of the cache; remove it")
    if (path / COMMITS).exists():
        yield Problem(COMMITS, f"is left over; run `detok-pipe finalize {path}`")


def _row_problems(cache: LatentCache) -> Iterator[Problem]:
    """Rows that are not finite, or not normalised as the manifest says."""
    total = StatsAccumulator(cache.channels)
    for name in cache.manifest.arrays:
        view, field = name.split("/")
        for start in range(0, cache.num_rows, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, cache.num_rows)
            rows = cache.rows(np.arange(start, stop), view, field).astype(np.float32)
            finite = np.isfinite(rows).all((1, 2))
            if not finite.all():
                yield Problem(name, f"row {start + int(np.argmin(finite))} is not finite")
                return
            if field == "mean":
                total.update(rows)
    found = total.finish(count=cache.num_rows)
    raw = cache.manifest.measured_stats
    for what, value, wanted in (
        ("mean", found.mean, cache.stats.normalize(raw.mean)),
        ("std", found.std, raw.std / cache.stats.std),
    ):
        off = np.abs(value - wanted) - _TOLERANCE * np.maximum(1.0, np.abs(wanted))
        if off.max() > 0:
            worst = int(np.argmax(off))
            yield Problem(
                MANIFEST,
                f"does not fit the rows: channel {worst} has {what} {value[worst]:.5g} instead of "
                f"{wanted[worst]:.5g}",
            )


def describe(path: Path | str) -> dict[str, Any]:
    """Facts about a cache, finished or not: JSON values, for people and programs.

    Raises:
        CacheError: there is no cache, or its manifest is damaged.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        if not (path / PLAN).exists():
            open_cache(path)  # says what is there instead
        writer = CacheWriter.resume(path)
        missing = len(writer.missing())
        facts = _plan_facts(writer.plan)
        return {"finished": False, "shards": writer.plan.shards, "missing": missing} | facts
    manifest = read_manifest(path)
    labels = read_index(path, manifest)["label"]
    return {
        "finished": True,
        "rows": manifest.count,
        "quarantined": manifest.quarantined,
        "bytes": sum(record.bytes for record in manifest.files),
        "files": len(manifest.files),
        "shards": -(-manifest.count // manifest.rows_per_shard),
        "labelled": int((labels >= 0).sum()),
        **_plan_facts(plan_of(manifest)),
        "statistics": manifest.stats.model_dump(mode="json"),
        "fingerprint": manifest.fingerprint,
        "encode_version": manifest.encode_version,
        "created_with": manifest.created_with,
    }


def _plan_facts(plan: CachePlan) -> dict[str, Any]:
    return {
        "images": plan.count,
        "format": plan.format,
        "grid": list(plan.grid),
        "channels": plan.channels,
        "views": list(plan.views),
        "fields": list(plan.fields),
        "classes": len(plan.class_names),
        "rows_per_shard": plan.rows_per_shard,
        "rows_per_record": plan.rows_per_record,
        "seed": plan.seed,
        "encoder": dict(plan.encoder),
        "preprocessing": dict(plan.preprocessing),
        "sources": dict(plan.sources),
    }
