"""Mending a finished cache whose images are at hand.

Small files come back from their second copies, the plan and Zarr's metadata from the manifest, and
shards from their images, which are encoded again in the same batches as at first: on the same kind
of device with the same threads they get the same bits. On another one the last bits may differ;
then the manifest records the new checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detok_pipe.latents.atomic import write_bytes
from detok_pipe.latents.cache import read_index
from detok_pipe.latents.errors import CacheError, MismatchError
from detok_pipe.latents.manifest import (
    BACKUP,
    MANIFEST,
    FileRecord,
    Manifest,
    read_manifest,
    write_manifest,
)
from detok_pipe.latents.publish import (
    PLAN,
    Contents,
    clean_up,
    contents_of,
    plan_of,
    shard_arrays,
    working_lock,
)
from detok_pipe.latents.raw_rows import RawRows, dense_rows
from detok_pipe.latents.stores import StoredShard, make_store
from detok_pipe.latents.verify import SMALL_FILES, Problem, file_problems, verify
from detok_pipe.latents.writer import CacheWriter

Encode = Callable[[CacheWriter, list[int]], None]


def repair(path: Path | str, encode: Encode) -> list[Problem]:
    """Mends what ``verify`` finds, and says what is still wrong afterwards.

    Args:
        path: a finished cache.
        encode: encodes the given shards of a writer's plan and commits each to it. It is not
            called when no shard is damaged. It must refuse, with MismatchError, an encoder or
            images that are not those of ``writer.plan``.

    Raises:
        CacheError: both copies of the manifest or of the index are damaged, or there is no cache.
        MismatchError: the images are not those of the cache.
        StorageError: the disk is full or read-only.
    """
    path = Path(path)
    if verify(path):
        _restore_plan(path)
        with working_lock(path):
            manifest = _restored_manifest(path)
            clean_up(path)  # commit records of the first encode, whose raw shards are gone
            _restore_small_files(path, manifest)
            _mend_shards(path, manifest, encode)
            clean_up(path)
    return verify(path)


def _restore_plan(path: Path) -> None:
    """Puts the plan right; one that is right stays, for another repair may hold its lock."""
    plan = plan_of(_whole_manifest(path)).to_bytes()
    if not (path / PLAN).is_file() or (path / PLAN).read_bytes() != plan:
        write_bytes(path / PLAN, plan)


def _restored_manifest(path: Path) -> Manifest:
    manifest = _whole_manifest(path)
    write_manifest(path, manifest)
    return manifest


def _whole_manifest(path: Path) -> Manifest:
    """The manifest, or its backup where that is damaged."""
    errors = []
    for name in (MANIFEST, f"{BACKUP}/{MANIFEST}"):
        try:
            return read_manifest(path, name)
        except CacheError as error:
            errors.append(error)
    raise CacheError(
        f"{path} cannot be repaired: neither copy of its manifest can be used ({errors[0]}); "
        "if both are damaged, encode again"
    )


def _restore_small_files(path: Path, manifest: Manifest) -> None:
    for record in manifest.files:
        if record.path not in SMALL_FILES:
            continue
        for folder in (path, path / BACKUP):
            if not file_problems(folder, record, hashes=True):
                data = (folder / record.path).read_bytes()
                write_bytes(path / record.path, data)
                write_bytes(path / BACKUP / record.path, data)
                break
        else:
            raise CacheError(
                f"{path} cannot be repaired: both copies of {record.path} are damaged; encode again"
            )


def _mend_shards(path: Path, manifest: Manifest, encode: Encode) -> None:
    index = read_index(path, manifest)
    contents = contents_of(path, manifest, index)
    layout = contents.layout()
    bad = {r.path for r in manifest.files if file_problems(path, r, hashes=True)}
    store = make_store(manifest.format, path, layout)
    mended: list[FileRecord] = []
    if bad - {e.file for extents in manifest.arrays.values() for e in extents}:
        mended += store.write_metadata(contents.labels, contents.source_ids)
    shards = [k for k in range(layout.shards) if bad & _files_of(manifest, layout.first_row(k))]
    parts: list[StoredShard] = []
    if shards:
        rows = _encoded_again(path, contents, shards, encode)
        for shard in shards:
            labels = contents.labels[layout.first_row(shard) : layout.stop_row(shard)]
            parts.append(store.write_shard(shard, shard_arrays(layout, shard, rows), labels))
    mended += [record for part in parts for record in part.files]
    new = {record.path: record for record in mended}
    files = [new.get(record.path, record) for record in manifest.files]
    if files != manifest.files:
        write_manifest(path, manifest.model_copy(update={"files": files}).sealed())


def _files_of(manifest: Manifest, first_row: int) -> set[str]:
    """Files that hold the shard that begins at a row."""
    stop = first_row + manifest.rows_per_shard
    return {
        extent.file
        for extents in manifest.arrays.values()
        for extent in extents
        if first_row <= extent.first_row < stop
    }


def _encoded_again(path: Path, contents: Contents, shards: list[int], encode: Encode) -> RawRows:
    """The rows of final shards, from raw shards that are encoded again."""
    writer = _RepairWriter(path, contents.plan)
    lost = [q.source_id for q in contents.quarantined]
    valid = [~np.isin(writer.rows(k), lost) for k in range(contents.plan.shards)]
    shard_of, row_of = dense_rows(contents.plan.rows_per_shard, valid)
    layout = contents.layout()
    places = [slice(layout.first_row(k), layout.stop_row(k)) for k in shards]
    needed = sorted({int(s) for place in places for s in np.unique(shard_of[place])})
    writer.needed = needed
    missing = writer.missing()
    if missing:
        encode(writer, missing)
    commits: dict[int, Mapping[str, Any]] = {}
    for shard in needed:
        commit = writer.commit_record(shard)
        again = sorted(q[0] for q in commit["quarantined"])
        before = sorted(writer.rows(shard)[~valid[shard]].tolist())
        if again != before:
            raise MismatchError(
                f"the images are not those of {path}: in shard {shard}, image numbers {before} "
                f"could not be encoded at first, now {again}"
            )
        commits[shard] = commit
    shape = (contents.plan.tokens, contents.plan.channels)
    return RawRows(path, commits, shard_of, row_of, contents.source_ids, contents.stats, shape)


class _RepairWriter(CacheWriter):
    """Takes the shards of a finished cache once more."""

    needed: list[int]

    @property
    def finished(self) -> bool:
        return False

    def missing(self) -> list[int]:
        return [k for k in self.needed if not self.has_commit(k)]
