"""Where a cache is: a folder, or a URL with a staging folder.

A cache for a URL is written in the staging folder and copied to the URL once it is finished, the
manifest last; one at a URL is copied here before it is read. So a cache at a URL is whole or has no
manifest, and a copy that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from detok_pipe.latents.atomic import crc32c_file, write_bytes, write_json
from detok_pipe.latents.errors import CacheError, ConfigError, MismatchError
from detok_pipe.latents.manifest import (
    BACKUP,
    MANIFEST,
    FileRecord,
    Manifest,
    check_file,
    parse_manifest,
    read_json,
    read_manifest,
    write_manifest,
)
from detok_pipe.latents.publish import INDEX, PLAN, plan_of
from detok_pipe.latents.remote import (
    Progress,
    Remote,
    is_remote,
    no_progress,
    on_each,
    staging_folder,
    staging_lock,
)
from detok_pipe.latents.verify import SMALL_FILES, Problem, describe

_BACKUP = f"{BACKUP}/{MANIFEST}"  # of a URL's cache: goes there first, and tells whose files follow
_DAMAGED = ".damaged-there.json"


class Place:
    """A cache's location, a path or a URL, and the local folder where it is worked on.

    Attributes:
        folder: the path itself, or the URL's staging folder.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.remote = is_remote(location)
        self.folder = staging_folder(location) if self.remote else Path(location)

    def __str__(self) -> str:
        return self.location

    def fetch(self, progress: Progress = no_progress) -> Path:
        """Makes sure that a finished cache is in ``folder``; nothing to do for a path.

        Raises:
            CacheError: there is no finished cache, or a file is damaged.
            InputError, StorageError: the copy failed.
        """
        if self.remote:
            remote = Remote(self.location)
            with staging_lock(self.folder):
                _fetch_cache(remote, _finished_cache(remote), self.folder, progress)
        return self.folder

    def fetch_whole_files(self, progress: Progress = no_progress) -> Path:
        """Like :meth:`fetch`, but leaves out what is missing or damaged at the URL, so that it can
        be reported by :meth:`problems`, or mended and published.

        Raises:
            CacheError: there is no finished cache, or no copy of its manifest can be used.
            InputError, StorageError: the copy failed.
        """
        if self.remote:
            remote = Remote(self.location)
            with staging_lock(self.folder):
                there = remote.listing()
                # Where there is none, not even a damaged one, it is the beginning of a copy.
                manifest = _begun_cache(remote) if MANIFEST in there else None
                manifest = manifest or _finished_cache(remote)
                _fetch_cache(remote, manifest, self.folder, progress, there)
        return self.folder

    def problems(self) -> list[Problem]:
        """What :meth:`fetch_whole_files` found damaged at the URL, and files that are missing
        there, of another size or no part of the cache in ``folder``; nothing for a path.

        Raises:
            InputError: the URL cannot be reached.
        """
        return list(_problems_there(self.folder, Remote(self.location))) if self.remote else []

    def describe(self) -> dict[str, Any]:
        """Facts about the cache, see :func:`.verify.describe`; of one at a URL, from its manifest
        and index alone.

        Raises:
            CacheError: there is no cache, or its manifest or index is damaged.
            InputError, StorageError: the copy failed.
        """
        if not self.remote:
            return describe(self.folder)
        remote = Remote(self.location)
        manifest = _finished_cache(remote)
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for record in manifest.files:
                if record.path == INDEX:
                    remote.fetch(INDEX, folder / INDEX, record.crc32c)
            write_manifest(folder, manifest)
            return describe(folder)

    def begin(self, progress: Progress = no_progress) -> Path:
        """The folder to write a cache in. Where it is new and the URL has a finished cache, that
        is fetched, so that whoever goes on with it finds it done."""
        new = self.remote and not (self.folder / PLAN).exists()
        if new and _manifest_at(Remote(self.location), MANIFEST) is not None:
            return self.fetch(progress)
        return self.folder

    def publish(self, progress: Progress = no_progress) -> None:
        """Copies the finished cache in ``folder`` to the URL; nothing to do for a path.

        What is missing at the URL, of another size, or was found damaged there is sent again.

        Raises:
            CacheError: a file to send is itself missing or damaged.
            MismatchError: the URL holds, or was begun as, another cache.
            StorageError, InputError: the copy failed.
        """
        if self.remote:
            with staging_lock(self.folder):
                _send_cache(self.folder, Remote(self.location), progress)


def _manifest_at(remote: Remote, name: str) -> Manifest | None:
    """A copy of the manifest at the URL; None where there is none."""
    data = remote.read(name)
    if data is None:
        return None
    where = f"{remote.url}/{name}"
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{where} is damaged: it is no JSON ({error})") from error
    return parse_manifest(value, where)


def _finished_cache(remote: Remote) -> Manifest:
    """The manifest of the finished cache at the URL."""
    manifest = _manifest_at(remote, MANIFEST)
    if manifest is None:
        raise CacheError(f"there is no finished latent cache at {remote.url}")
    return manifest


def _begun_cache(remote: Remote) -> Manifest | None:
    """The manifest of the cache whose files are at the URL, finished or not: the manifest there or,
    where that is missing or damaged, its second copy."""
    try:
        manifest = _manifest_at(remote, MANIFEST)
    except CacheError:
        manifest = _manifest_at(remote, _BACKUP)
        if manifest is None:
            raise
    return manifest or _manifest_at(remote, _BACKUP)


def _is_copy(folder: Path, manifest: Manifest) -> bool:
    try:
        return read_manifest(folder) == manifest
    except CacheError:
        return False


def _fetch_cache(
    remote: Remote,
    manifest: Manifest,
    folder: Path,
    progress: Progress,
    there: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Copies what is not in ``folder`` yet.

    Args:
        there: what is at the URL. Where given, a file that is missing, of another size or damaged
            there is left out, and of the small ones the second copy is tried.
    """
    known = _is_copy(folder, manifest)
    damaged = _damaged_there(folder) if known else set()
    if not known:
        # Another cache was put there since: this copy is none until it is the new one.
        (folder / MANIFEST).unlink(missing_ok=True)
        listed = {record.path for record in manifest.files}
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            if path.relative_to(folder).as_posix() not in listed:
                path.unlink()

    def bring(name: str, record: FileRecord) -> bool:
        if there is not None and (name not in there or there[name]["size"] != record.bytes):
            return False
        try:
            remote.fetch(name, folder / name, record.crc32c)
        except CacheError:
            if there is None:
                raise
            damaged.add(name)
            return False
        damaged.discard(name)
        return True

    def fetched(record: FileRecord) -> None:
        name = record.path
        whole = check_file(folder, record) is None
        # What lies beside this very manifest was hashed when it came.
        if not whole or (not known and crc32c_file(folder / name) != record.crc32c):
            whole = bring(name, record)
        if name in SMALL_FILES:
            if whole:
                write_bytes(folder / BACKUP / name, (folder / name).read_bytes())
            else:
                bring(f"{BACKUP}/{name}", record)

    wanted = [r for r in manifest.files if not known or check_file(folder, r) is not None]
    on_each(wanted, fetched, progress)
    if not known:
        # Written last: a folder with a plan is one that somebody works on, or a whole copy.
        write_bytes(folder / PLAN, plan_of(manifest).to_bytes())
        write_manifest(folder, manifest)
    if damaged or (folder / _DAMAGED).exists():
        write_json(folder / _DAMAGED, sorted(damaged))


def _damaged_there(folder: Path) -> set[str]:
    """Files that had a wrong checksum when they were fetched, and were not sent since: their sizes
    do not tell. The list is a file, so that one who mends them and is killed sends them later."""
    file = folder / _DAMAGED
    return set(read_json(file)) if file.exists() else set()


def _problems_there(folder: Path, remote: Remote) -> Iterator[Problem]:
    manifest = read_manifest(folder)
    there = remote.listing()
    sizes = _sizes(manifest)
    for name in (MANIFEST, _BACKUP):
        if not _holds(remote, name, manifest):
            yield Problem(name, f"at {remote.url} is missing, damaged or that of another cache")
    damaged = _damaged_there(folder)
    for name, size in sizes.items():
        if name not in there:
            yield Problem(name, f"is missing at {remote.url}")
        elif there[name]["size"] != size:
            found = there[name]["size"]
            yield Problem(name, f"has {found:,} bytes at {remote.url} instead of {size:,}")
        elif name in damaged:
            yield Problem(name, f"had a wrong checksum at {remote.url} when it was fetched")
    folders = {name.split("/")[0] for name in sizes if "/" in name} - {BACKUP}
    for name in sorted(set(there) - set(sizes)):
        if name.split("/")[0] in folders:
            yield Problem(name, f"at {remote.url} is not part of the cache; remove it")


def _holds(remote: Remote, name: str, manifest: Manifest) -> bool:
    try:
        return _manifest_at(remote, name) == manifest
    except CacheError:
        return False


def _sizes(manifest: Manifest) -> dict[str, int]:
    """Name -> bytes of all files of a finished cache but the copies of its manifest."""
    sizes = {record.path: record.bytes for record in manifest.files}
    sizes |= {f"{BACKUP}/{name}": sizes[name] for name in SMALL_FILES if name in sizes}
    return sizes | {PLAN: len(plan_of(manifest).to_bytes())}


def _send_cache(folder: Path, remote: Remote, progress: Progress) -> None:
    manifest = read_manifest(folder)
    begun = _begun_cache(remote)
    # A mended cache differs from what it was by checksums at most.
    same = {"files": manifest.files, "digest": manifest.digest}
    if begun is not None and begun.model_copy(update=same) != manifest:
        raise MismatchError(
            f"{remote.url} holds, or was begun as, another cache; choose another --out, or remove "
            "what is there"
        )
    there = remote.listing()
    if begun is None:
        if there:
            raise ConfigError(f"{remote.url} is not empty ({min(there)}) and holds no latent cache")
        remote.put(folder / _BACKUP, _BACKUP)
    sizes = _sizes(manifest)
    stale = _damaged_there(folder)
    if begun is not None:
        stale |= {record.path for record in set(manifest.files) - set(begun.files)}

    def sent(name: str) -> None:
        if name not in stale and name in there and there[name]["size"] == sizes[name]:
            return
        file = folder / name
        if not file.is_file() or file.stat().st_size != sizes[name]:
            raise CacheError(
                f"{file} is missing or damaged, and so is {remote.url}/{name}; run `detok-pipe "
                f"verify {remote.url} --repair`"
            )
        remote.put(file, name)

    on_each(sizes, sent, progress)
    for name in (_BACKUP, MANIFEST):
        if not _holds(remote, name, manifest):
            remote.put(folder / name, name)
    (folder / _DAMAGED).unlink(missing_ok=True)
