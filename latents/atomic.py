"""Files that appear whole or not at all.

A file or folder is written under a temporary name in the folder it belongs to, synced to the
disk and renamed. A reader, or the next run after a power cut, sees the old one or the new one,
never a part. Failures of the disk become :class:`StorageError`, which names the path.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from detok_pipe.latents.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"

Piece = bytes | np.ndarray  # a part of a file; arrays are one-dimensional, uint8 and contiguous

_CHUNK_BYTES = 1 << 22
_REASONS = {
    errno.ENOSPC: "no space is left on the disk; free some and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose another target",
    errno.EACCES: "permission denied; choose another target or change its permissions",
    errno.EPERM: "operation not permitted; choose another target or change its permissions",
    errno.EIO: "input/output error of the disk",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder; name a file in it",
    errno.ENAMETOOLONG: "the name is too long for the file system",
}


@contextlib.contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turns the OSErrors that a user can mend into a StorageError that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise
        raise StorageError(f"cannot write {path}: {reason}") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable (a rename is lost in a power cut without it)."""
    if os.name == "nt":  # Windows has no handle of a folder that could be synced.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; their rename is durable by itself.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Creates a folder and those above it, where they are missing.

    Raises:
        StorageError: a file, or a link that leads nowhere, is in the way. Others under
            :func:`storage_errors`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StorageError(
            f"cannot write {folder}: {error.filename} is a file, or a link that leads nowhere"
        ) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}")


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path; at a normal exit the file written there becomes ``path``.

    Creates the folder where it is missing. On any exception, Ctrl-C included, the temporary file
    is removed and an older ``path`` stays as it was.

    Raises:
        StorageError: the disk is full, read-only, or not permitted.
    """
    path = Path(path)
    with storage_errors(path):
        make_folder(path.parent)
        temporary = _temporary(path)
        try:
            yield temporary
            _sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields a new temporary folder; at a normal exit it becomes ``path``.

    A folder already at ``path`` is replaced: moved aside, then removed, so that a kill between
    the two leaves the old one beside as a temporary, and never a mixture.

    Raises:
        StorageError: the disk is full, read-only, or not permitted.
    """
    path = Path(path)
    with storage_errors(path):
        make_folder(path.parent)
        temporary = _temporary(path)
        temporary.mkdir()
        try:
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _sync_file(Path(folder, name))
                sync_folder(Path(folder))
            if path.exists():
                old = _temporary(path)
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_folder(path: Path | str) -> None:
    """Removes a folder: by a rename first, so that readers find it whole or not at all.

    What cannot be deleted (files that others hold open, on some network file systems) stays as a
    temporary.

    Raises:
        StorageError: the disk is read-only, or not permitted.
    """
    path = Path(path)
    with storage_errors(path):
        old = _temporary(path)
        os.replace(path, old)
        shutil.rmtree(old, ignore_errors=True)


def write_pieces(path: Path | str, pieces: Iterable[Piece]) -> None:
    """Writes a file whole (see :func:`atomic_file`), its pieces one behind the other: they need
    not be copied together first, which costs as much as writing them."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.writelines(pieces)  # type: ignore[arg-type]  # arrays are buffers


def write_bytes(path: Path | str, data: bytes) -> None:
    """Writes a file whole (see :func:`atomic_file`)."""
    write_pieces(path, [data])


def write_text(path: Path | str, text: str) -> None:
    """Writes a UTF-8 file whole, line ends as given."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Writes a JSON file whole; NaN and infinity, which are no JSON, raise ValueError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def create_exclusive(path: Path | str, data: bytes) -> bool:
    """Creates a file whole, unless it exists. Of several processes exactly one gets True.

    Raises:
        StorageError: the disk is full, read-only, or not permitted.
    """
    path = Path(path)
    with storage_errors(path):
        make_folder(path.parent)
        if path.exists():
            return False
        temporary = _temporary(path)
        try:
            temporary.write_bytes(data)
            try:
                _sync_file(temporary)
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                # The folder's owner tidied up, as it may once all that belongs there is there.
                if error.errno == errno.ENOENT and path.exists():
                    return False
                # No hard links here (FAT, some network file systems): the name is still taken
                # exclusively, but a kill in the next lines leaves a part, which readers reject.
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                try:
                    with open(path, "xb") as file:
                        file.write(data)
                        os.fsync(file.fileno())
                except FileExistsError:
                    return False
            sync_folder(path.parent)
            return True
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path | str) -> None:
    """Removes what killed processes left directly in ``folder``.

    Only for the one process that owns the folder: it would take away another's file in the making.
    """
    for path in Path(folder).glob(TEMPORARY_PREFIX + "*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def crc32c_pieces(pieces: Iterable[Piece]) -> int:
    """CRC-32C (Castagnoli) of a file's pieces."""
    value = 0
    for piece in pieces:
        value = google_crc32c.extend(value, piece)
    return value


def crc32c_file(path: Path | str) -> int:
    """CRC-32C (Castagnoli) of a file, read in pieces."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = google_crc32c.extend(value, chunk)
    return value
