"""Where a cache is: a folder, or a URL with a staging folder.

A cache for a URL is written in the staging folder and copied to the URL once it is finished, the
manifest last; one at a URL is copied here before it is read. So a cache at a URL is whole or has no
manifest, and a copy that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path

from detok_pipe.latents.atomic import crc32c_file, write_bytes
from detok_pipe.latents.errors import CacheError, ConfigError, MismatchError
from detok_pipe.latents.manifest import (
    BACKUP,
    MANIFEST,
    FileRecord,
    Manifest,
    check_file,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from detok_pipe.latents.publish import INDEX, PLAN, QUARANTINE, SOURCES, plan_of
from detok_pipe.latents.remote import (
    Progress,
    Remote,
    is_remote,
    no_progress,
    on_each,
    staging_folder,
    staging_lock,
)


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
                manifest = self._remote_manifest(remote)
                if manifest is None:
                    raise CacheError(f"there is no finished latent cache at {self.location}")
                _fetch_cache(remote, manifest, self.folder, progress)
        return self.folder

    def begin(self, progress: Progress = no_progress) -> Path:
        """The folder to write a cache in. Where it is new and the URL has a finished cache, that
        is fetched, so that whoever goes on with it finds it done."""
        new = self.remote and not (self.folder / PLAN).exists()
        if new and self._remote_manifest(Remote(self.location)) is not None:
            return self.fetch(progress)
        return self.folder

    def publish(self, progress: Progress = no_progress) -> None:
        """Copies the finished cache in ``folder`` to the URL; nothing to do for a path.

        Raises:
            MismatchError: the URL holds, or was begun as, another cache.
            StorageError, InputError: the copy failed.
        """
        if self.remote:
            with staging_lock(self.folder):
                _send_cache(self.folder, Remote(self.location), progress)

    def _remote_manifest(self, remote: Remote) -> Manifest | None:
        data = remote.read(MANIFEST)
        return None if data is None else _parsed(data, f"{self.location}/{MANIFEST}")


def _parsed(data: bytes, where: str) -> Manifest:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{where} is damaged: it is no JSON ({error})") from error
    return parse_manifest(value, where)


def _fetch_cache(remote: Remote, manifest: Manifest, folder: Path, progress: Progress) -> None:
    if (folder / MANIFEST).exists():
        if read_manifest(folder) == manifest:
            return  # whoever opens it checks the files' sizes
        # Another cache was put there since: this copy is none until it is the new one.
        (folder / MANIFEST).unlink()
    listed = {record.path for record in manifest.files}
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if path.relative_to(folder).as_posix() not in listed:
            path.unlink()

    def fetched(record: FileRecord) -> None:
        whole = check_file(folder, record) is None
        if not whole or crc32c_file(folder / record.path) != record.crc32c:
            remote.fetch(record.path, folder / record.path, record.crc32c)
        if record.path in (INDEX, QUARANTINE, SOURCES):
            write_bytes(folder / BACKUP / record.path, (folder / record.path).read_bytes())

    on_each(manifest.files, fetched, progress)
    # Written last: a folder with a plan is one that somebody works on, or a whole copy.
    write_bytes(folder / PLAN, plan_of(manifest).to_bytes())
    write_manifest(folder, manifest)


def _send_cache(folder: Path, remote: Remote, progress: Progress) -> None:
    manifest = read_manifest(folder)
    backup = f"{BACKUP}/{MANIFEST}"  # goes first: it tells whose files are there
    begun = remote.read(MANIFEST) or remote.read(backup)
    if begun is not None and _parsed(begun, remote.url) != manifest:
        raise MismatchError(
            f"{remote.url} holds, or was begun as, another cache; choose another --out, or remove "
            "what is there"
        )
    there = remote.listing()
    if MANIFEST in there:
        return
    if begun is None:
        if there:
            raise ConfigError(f"{remote.url} is not empty ({min(there)}) and holds no latent cache")
        remote.put(folder / backup, backup)
    names = [record.path for record in manifest.files] + [PLAN]
    names += [f"{BACKUP}/{n}" for n in (INDEX, QUARANTINE, SOURCES) if (folder / n).exists()]

    def sent(name: str) -> None:
        size = (folder / name).stat().st_size
        if name not in there or there[name]["size"] != size:
            remote.put(folder / name, name)

    on_each(names, sent, progress)
    remote.put(folder / MANIFEST, MANIFEST)
