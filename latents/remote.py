"""Files on remote storage, whatever fsspec opens by URL (s3, gs, ...), by way of a local folder.

Nothing is read across the network bit by bit: files are copied into a staging folder first
(temporary name, checksum where one is known, rename) and read there. Caches at URLs are in
:mod:`.place`.

The staging folder of a URL lies in ``$DETOK_STAGING``, by default ``~/.cache/detok-pipe``, and
stays: the next run finds the files there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from filelock import FileLock

from detok_pipe.latents.atomic import atomic_file, crc32c_file, storage_errors, write_json
from detok_pipe.latents.errors import (
    CacheError,
    ConfigError,
    DetokError,
    InputError,
    StorageError,
)
from detok_pipe.latents.manifest import check_relative

STAGING_VARIABLE = "DETOK_STAGING"
_LISTING = ".staged.json"
_TRANSFERS = 8
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Job = TypeVar("Job")
Progress = Callable[[int, int], None]  # files copied, files in all


def is_remote(location: str) -> bool:
    """Whether a location is a URL rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", location) is not None


def staging_folder(url: str) -> Path:
    """The local folder that stands for a URL: the same for the same URL."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detok-pipe"
    root = Path(os.environ.get(STAGING_VARIABLE) or default)
    url = url.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rsplit("/", 1)[-1]).lstrip(".")[-60:]
    return root / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


@contextmanager
def staging_lock(folder: Path) -> Iterator[None]:
    """Held by the one process that copies into or from a staging folder; others wait.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            yield


def no_progress(done: int, total: int) -> None:
    pass


class Remote:
    """The files below a URL.

    Raises:
        ConfigError: fsspec does not know the protocol, or lacks the package for it.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url} cannot be opened: {error}") from error
        # Listings are kept by some file systems; other processes write here too.
        self._files.invalidate_cache()

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(f"{where} does not exist") from error
        except DetokError:
            raise
        except Exception as error:  # each kind of storage has errors of its own
            if getattr(error, "errno", None) in _DISK:
                raise
            raise InputError(f"{where} cannot be reached: {error or type(error)}") from error

    def is_file(self) -> bool:
        """Whether the URL is one file."""
        with self._errors(""):
            return bool(self._files.isfile(self._root))

    def read(self, name: str) -> bytes | None:
        """A small file whole; None where there is none."""
        with self._errors(name):
            try:
                return bytes(self._files.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def info(self, name: str) -> Mapping[str, Any]:
        """What the file system tells about a file, its "size" among it."""
        with self._errors(name):
            return dict(self._files.info(self._at(name)))

    def listing(self) -> dict[str, Mapping[str, Any]]:
        """Name -> :meth:`info` of all files at any depth; empty where there is nothing."""
        with self._errors(""):
            found = self._files.find(self._root, detail=True)
        prefix = len(self._root.rstrip("/")) + 1
        return {path[prefix:]: info for path, info in found.items() if path[prefix:]}

    def fetch(self, name: str, target: Path, crc32c: int | None = None) -> None:
        """Copies a file here: temporary name, checksum where one is known, rename.

        Raises:
            InputError: it is not there, or cannot be read.
            CacheError: its checksum is wrong.
        """
        with atomic_file(target) as temporary, self._errors(name):
            self._files.get_file(self._at(name), str(temporary))
            if crc32c is not None and crc32c_file(temporary) != crc32c:
                raise CacheError(
                    f"{self.url}/{name} is damaged: its checksum is wrong; copy it there again, or "
                    f"run `detok-pipe verify {self.url} --repair` where the images are at hand"
                )

    def put(self, source: Path, name: str) -> None:
        """Copies a file there.

        Raises:
            StorageError: full, read-only or not permitted.
            InputError: it cannot be reached.
        """
        where, url = self._at(name), f"{self.url}/{name}"
        with storage_errors(url), self._errors(name):
            try:
                self._files.makedirs(where.rsplit("/", 1)[0], exist_ok=True)
                self._files.put_file(str(source), where)
            except PermissionError as error:  # some kinds of storage give it no errno
                raise StorageError(
                    f"cannot write {url}: not permitted ({error}); choose another target or "
                    "change its permissions"
                ) from error


def on_each(items: Collection[Job], work: Callable[[Job], None], progress: Progress) -> None:
    """Does the work on some threads; the first error ends it."""
    pool = ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="transfer")
    try:
        for done, _ in enumerate(pool.map(work, items), start=1):
            progress(done, len(items))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def stage_files(url: str, progress: Progress = no_progress) -> Path:
    """Copies a remote file, or all files below a remote folder, into the staging folder.

    Files that have not changed since an earlier copy stay; local ones that are gone at the URL
    are removed. Returns the local file or folder.

    Raises:
        InputError: nothing there, a name that leads out of the folder, or the copy failed.
        StorageError: the disk is full or read-only.
    """
    remote, folder = Remote(url), staging_folder(url)
    result = folder
    if remote.is_file():
        parent, name = remote.url.rsplit("/", 1)
        remote, result = Remote(parent), folder / name
        listing = {name: remote.info(name)}
    else:
        listing = remote.listing()
    if not listing:
        raise InputError(f"{url} does not exist or is empty")
    for name in listing:
        try:
            check_relative(name)
        except ValueError as error:
            raise InputError(f"{url}: {error}") from error
    with staging_lock(folder):
        _remove_outdated(folder, listing)
        missing = [name for name in listing if not (folder / name).exists()]
        on_each(missing, lambda name: remote.fetch(name, folder / name), progress)
    return result


def _remove_outdated(folder: Path, listing: Mapping[str, Mapping[str, Any]]) -> None:
    """Removes staged files that are gone or have changed at their URL, and notes what the
    others, and those to come, are copies of."""
    record = folder / _LISTING
    states = {n: hashlib.sha256(str(info).encode()).hexdigest() for n, info in listing.items()}
    known = json.loads(record.read_bytes()) if record.exists() else {}
    for path in [p for p in folder.rglob("*") if p.is_file() and p != record]:
        name = path.relative_to(folder).as_posix()
        if name not in states or known.get(name) != states[name]:
            path.unlink()
    write_json(record, states)
