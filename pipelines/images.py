"""Sources of labelled images: class folders, a list file, or WebDataset tars.

A source is a numbered list of names with labels; its pixels are read one at a time (see
``decode.py``). Its order is fixed, so a number means the same image in every process, and its
identity (a hash of names and labels, and their count) tells two sources apart. What is in the files
cannot be told without reading them all; a latent cache also compares the sizes of a thousand, which
finds a set that was resized or saved anew under the same names, and costs milliseconds where
asking for all of ImageNet's would take minutes on a network's disk.

Data from strangers is read with care: no name is ever handed to a shell, to a URL opener or to
an unpickler; tars are read member by member, by the byte ranges of their headers.
"""

import hashlib
import io
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from detok_pipe.latents.errors import ConfigError, InputError
from detok_pipe.latents.names import printable
from detok_pipe.pipelines.decode import MAX_PIXELS, decode

EXTENSIONS = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Names that are taken for images, whatever their case; the content decides the format."""

SIZES_COMPARED = 1024
"""Files whose sizes :meth:`ImageSource.sizes_hash` covers."""

_MAX_CLASSES = 1_000_000
# No image within the limit of pixels takes more bytes a pixel than 16-bit RGBA does.
_MAX_FILE_BYTES_PER_PIXEL = 8


class ImageSource(ABC):
    """Numbered images with labels.

    Attributes:
        labels: (N,) int32 class numbers; -1 = unlabelled.
        class_names: name of each class.
        path: what the user named.
        max_pixels: larger images count as unreadable.
    """

    def __init__(
        self, path: Path, labels: Sequence[int], class_names: list[str], max_pixels: int
    ) -> None:
        self.path = path
        self.labels = np.asarray(labels, dtype=np.int32)
        self.class_names = [printable(name) for name in class_names]
        self.max_pixels = max_pixels
        self._identity: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """The image's name, to show and to record: relative path, or tar and member."""

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """The image's bytes.

        Raises:
            InputError: the file is missing or unreadable.
        """

    @abstractmethod
    def size(self, index: int) -> int:
        """Bytes of the image's file; -1 where it cannot be told."""

    def sizes_hash(self) -> str:
        """Hash of the sizes of up to :data:`SIZES_COMPARED` files, spread over the source."""
        count = min(len(self), SIZES_COMPARED)
        sizes = [self.size(place * len(self) // count) for place in range(count)]
        return hashlib.sha256(str(sizes).encode()).hexdigest()

    def load(self, index: int) -> Image.Image:
        """The whole image as 8-bit RGB.

        Raises:
            InputError: it is unreadable; names the image.
        """
        try:
            with self.open(index) as file:
                return decode(file, max_pixels=self.max_pixels)
        except InputError as error:
            raise InputError(f"{self.name(index)}: {error}") from error

    @property
    def identity(self) -> dict[str, Any]:
        """Hash of names, labels and class names in their order, and the count."""
        if self._identity is None:
            digest = hashlib.sha256()
            for class_name in self.class_names:
                digest.update(class_name.encode() + b"\n")
            for index, label in enumerate(self.labels.tolist()):
                digest.update(self.name(index).encode() + b"\0%d\n" % label)
            self._identity = {"hash": digest.hexdigest(), "count": len(self)}
        return self._identity


class FileImages(ImageSource):
    """Images that are files; names are relative to ``root`` unless they are absolute."""

    def __init__(
        self,
        path: Path,
        root: Path,
        names: list[str],
        labels: Sequence[int],
        class_names: list[str],
        max_pixels: int,
    ) -> None:
        super().__init__(path, labels, class_names, max_pixels)
        self._root = root
        self._names = names

    def name(self, index: int) -> str:
        return printable(self._names[index])

    def size(self, index: int) -> int:
        try:
            return (self._root / self._names[index]).stat().st_size
        except OSError:
            return -1

    def open(self, index: int) -> BinaryIO:
        try:
            return (self._root / self._names[index]).open("rb")
        except OSError as error:
            raise InputError(f"the file cannot be read: {error.strerror}") from error


class TarImages(ImageSource):
    """Images that are members of uncompressed tars.

    Args:
        members: (tar's number, member's name, offset of its data, size), one an image.
    """

    def __init__(
        self,
        path: Path,
        tars: list[Path],
        members: list[tuple[int, str, int, int]],
        labels: Sequence[int],
        class_names: list[str],
        max_pixels: int,
    ) -> None:
        super().__init__(path, labels, class_names, max_pixels)
        self._tars = tars
        self._names = [name for _, name, _, _ in members]
        self._tar = np.array([tar for tar, _, _, _ in members], dtype=np.int32)
        self._ranges = np.array([member[2:] for member in members], dtype=np.int64)  # (N, 2)

    def name(self, index: int) -> str:
        return printable(f"{self._tars[self._tar[index]].name}/{self._names[index]}")

    def size(self, index: int) -> int:
        return int(self._ranges[index, 1])

    def open(self, index: int) -> BinaryIO:
        offset, size = (int(value) for value in self._ranges[index])
        if size > _MAX_FILE_BYTES_PER_PIXEL * self.max_pixels:
            raise InputError(f"its {size:,} bytes are more than the limit of pixels can need")
        try:
            with self._tars[self._tar[index]].open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise InputError(f"the tar cannot be read: {error.strerror}") from error
        return io.BytesIO(data)


def open_images(
    path: Path | str, *, root: Path | None = None, max_pixels: int = MAX_PIXELS
) -> ImageSource:
    """Find the images of ``path``.

    - A folder of class folders: names sorted, images of a class in its folder at any depth.
    - A folder of images without class folders: unlabelled.
    - A file with a line ``path label`` an image (spaces in the path are fine).
    - A tar, or a folder of tars, in WebDataset's naming: ``key.jpg`` with ``key.cls`` (a number).

    Symbolic links are followed; names that begin with a dot are passed over, and so are FIFOs,
    sockets and devices in a folder.

    Args:
        root: where relative paths of a list file start; by default the list's own folder.
        max_pixels: larger images count as unreadable. PIL's limit is raised to this where it
            is lower, for the whole process.

    Raises:
        InputError: nothing there, no images, a class without images, tars beside images, a bad
            line or member.
        ConfigError: ``root`` is given, and ``path`` is no list file.
        OSError: a folder or a list file cannot be read.
    """
    path = Path(path)
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder of class folders, a list or tars")
    is_tree = path.is_dir()
    is_tar = not is_tree and path.name.endswith(".tar")
    if not is_tree and not is_tar:  # a list, which may be a pipe of the shell's
        return _from_list(path, root or path.parent, max_pixels)
    if root is not None:
        raise ConfigError(
            f"--data-root {root} is for the paths of a list file, and {path} is a "
            f"{'folder' if is_tree else 'tar'}; leave it out"
        )
    return _from_tars(path, [path], max_pixels) if is_tar else _from_folder(path, max_pixels)


def _from_folder(root: Path, max_pixels: int) -> ImageSource:
    with os.scandir(root) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    files = sorted(entry.name for entry in visible if entry.is_file())
    tars = [name for name in files if name.endswith(".tar")]
    loose = [name for name in files if _is_image(name)]
    classes = sorted(entry.name for entry in visible if entry.is_dir())
    if tars:
        _check_tars_alone(root, tars[0], classes, loose)
        return _from_tars(root, [root / name for name in tars], max_pixels)
    return _from_tree(root, classes, loose, max_pixels)


def _check_tars_alone(root: Path, tar: str, classes: list[str], loose: list[str]) -> None:
    """Refuses images beside tars: which of them are meant is not for us to guess."""
    with_images = next((name for name in classes if any(_walk(root / name, name))), None)
    if with_images is None and not loose:
        return
    others = f"class folders ({with_images}, ...)" if with_images else f"images ({loose[0]}, ...)"
    raise InputError(f"{root} has tars ({tar}, ...) and {others}; name the tar or move one of them")


def _from_tree(root: Path, classes: list[str], loose: list[str], max_pixels: int) -> FileImages:
    if not classes and not loose:
        raise InputError(
            f"{root} has no images and no class folders; images end in {', '.join(EXTENSIONS)}"
        )
    if not classes:
        return FileImages(root, root, loose, [-1] * len(loose), [], max_pixels)
    if loose:
        raise InputError(
            f"{root} has class folders ({classes[0]}, ...) and images beside them ({loose[0]}, "
            "...); move the images into a class folder"
        )
    names: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        found = sorted(_walk(root / class_name, class_name))
        if not found:
            raise InputError(
                f"the class folder {root / class_name} has no images; remove it, or fill it "
                f"(images end in {', '.join(EXTENSIONS)})"
            )
        names += found
        labels += [label] * len(found)
    return FileImages(root, root, names, labels, classes, max_pixels)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _walk(
    folder: Path, prefix: str, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    """Images under ``folder``, named from ``prefix`` on; a link to a folder above ends there."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(
                    folder / entry.name, f"{prefix}/{entry.name}", above | frozenset([here])
                )
            elif _is_image(entry.name) and not _is_special(entry):
                yield f"{prefix}/{entry.name}"


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether what is no folder is a FIFO, a socket or a device, whose reading may never end. A
    link that leads nowhere is not: it counts as an image that cannot be read."""
    return not entry.is_file() and os.path.exists(entry)


def _from_list(path: Path, root: Path, max_pixels: int) -> FileImages:
    names: list[str] = []
    labels: list[int] = []
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            name, _, label = line.strip().rpartition(" ")
            if not name or not re.fullmatch(r"-?[0-9]{1,9}", label):
                raise InputError(
                    f"{path}, line {number}: {line.strip()[:80]!a} is no path and class number "
                    "with a space between them"
                )
            names.append(name.rstrip())
            labels.append(_checked_label(int(label), f"{path}, line {number}"))
    if not names:
        raise InputError(f"{path} lists no images; it needs a line 'path label' an image")
    if not (root / names[0]).exists():
        raise InputError(
            f"{path}: its first image {root / names[0]} does not exist; relative paths start at "
            f"{root}; --data-root names another folder"
        )
    return FileImages(path, root, names, labels, _names_of_classes(names, labels), max_pixels)


def _checked_label(label: int, where: str) -> int:
    if not -1 <= label < _MAX_CLASSES:
        raise InputError(
            f"{where}: class number {label} is outside 0 ... {_MAX_CLASSES - 1} (-1: unlabelled)"
        )
    return label


def _names_of_classes(names: Iterable[str], labels: Sequence[int]) -> list[str]:
    """A class's name is that of the folder of all its images, where that is one folder and no
    other class's; otherwise the class's number."""
    folders: dict[int, set[str]] = {}
    for name, label in zip(names, labels, strict=True):
        folders.setdefault(label, set()).add(os.path.basename(os.path.dirname(name)))
    used = [folder for found in folders.values() for folder in found]
    clear = len(used) == len(folders) == len(set(used)) and "" not in used
    return [
        next(iter(folders[label])) if clear and label in folders else str(label)
        for label in range(max(labels) + 1)
    ]


def _from_tars(path: Path, tars: list[Path], max_pixels: int) -> TarImages:
    members: list[tuple[int, str, int, int]] = []
    labels: list[int] = []
    for number, tar in enumerate(tars):
        images, classes = _tar_members(tar)
        if not images:
            raise InputError(f"{tar} has no images; their names end in {', '.join(EXTENSIONS)}")
        for key, (name, offset, size) in images.items():
            members.append((number, name, offset, size))
            labels.append(classes.get(key, -1))
    unlabelled = labels.count(-1)
    if 0 < unlabelled < len(labels):
        tar_number, name, _, _ = members[labels.index(-1)]
        raise InputError(
            f"{unlabelled} of {len(labels)} images have no class number, for one {name} in "
            f"{tars[tar_number]}; each needs a member of the same name with .cls"
        )
    class_names = [str(label) for label in range(max(labels) + 1)]
    return TarImages(path, tars, members, labels, class_names, max_pixels)


def _tar_members(tar: Path) -> tuple[dict[str, tuple[str, int, int]], dict[str, int]]:
    """By key: (name, offset, size) of the image, and the class number where there is one."""
    images: dict[str, tuple[str, int, int]] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else a million stay in memory
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}"
                if not member.isreg() or member.issparse() or not stem:
                    continue
                if extension.lower() == "cls":
                    classes[key] = _tar_label(archive, member, tar)
                elif _is_image(base):
                    if key in images:
                        raise InputError(
                            f"{tar}: {images[key][0]} and {member.name} have the same key; one "
                            "image a key is needed"
                        )
                    images[key] = (member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(
            f"{tar} cannot be read as an uncompressed tar ({error}); it may be cut short"
        ) from error
    return images, classes


def _tar_label(archive: tarfile.TarFile, member: tarfile.TarInfo, tar: Path) -> int:
    file = archive.extractfile(member)
    text = file.read(32).strip() if file else b""
    if not re.fullmatch(rb"[0-9]{1,9}", text):
        raise InputError(f"{tar}: {member.name} holds {text!r}, not a class number")
    return _checked_label(int(text), f"{tar}: {member.name}")
