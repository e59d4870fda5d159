"""Reference statistics files: what generated images are compared with.

All are ``.npz``. Read are
- ADM's: ``mu``, ``sigma``, and in its larger files ``arr_0``, uint8 images (M, H, W, 3);
- pytorch-fid's and clean-fid's: ``mu``, ``sigma``; clean-fid's ``_kid`` files: ``feats`` (M, D);
- our own, which the others' tools read too: ``mu``, ``sigma``, where asked for ``feats``, and a
  JSON text ``detok`` that says which network, image size and count they come from.
"""

import io
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detok_pipe.evaluation.frechet import (
    FeatureStats,
    FrechetReference,
    check_stats,
    feature_stats,
)
from detok_pipe.evaluation.weights import (
    PublishedFile,
    check_sha256,
    find_published,
    sha256_file,
)
from detok_pipe.latents.atomic import atomic_file
from detok_pipe.latents.errors import InputError, MismatchError, input_errors

PUBLISHED = {
    "imagenet-256": PublishedFile(
        name="VIRTUAL_imagenet256_labeled.npz",
        url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
        "256/VIRTUAL_imagenet256_labeled.npz",
        sha256="b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
        purpose="ADM's reference batch of ImageNet at 256 pixels (2 GB)",
        instead="or compute a reference from the images: detok-pipe fid-stats",
    ),
}
"""References that others publish, by the name that stands for a path.

ADM's has the statistics of all training images, and 10,000 images. Its statistics of sFID stay
unused: they are of an inner layer of a TensorFlow graph, and ADM's own evaluator is the only code
that ours could be held against. It reads what ``export-images`` writes.
"""

_MADE_FROM = "detok"
_UNREADABLE = "the reference {} is no readable .npz of numbers"


@dataclass(frozen=True)
class Reference:
    """Statistics of real images, and what they were computed from as far as it is known.

    Attributes:
        path: the file.
        stats: mean and covariance; None for a file of images alone.
        features: (M, D) fp32, of the kernel distance, precision and recall; None: not kept.
        image_shape: (M, H, W, 3) of images in the file, or None.
        extractor: name of the distance ("FID", "FD-EffLite2@128"); None: the file does not say.
        image_size: side of the images in pixels, or None.
        made_from: everything else that the file says of its origin.
    """

    path: Path
    stats: FeatureStats | None
    features: np.ndarray | None
    image_shape: tuple[int, ...] | None
    extractor: str | None
    image_size: int | None
    made_from: dict[str, Any]

    @property
    def network(self) -> str:
        """Name of the distance. Files of other tools do not tell; wherever they are used it is
        Inception's."""
        return self.extractor or "FID"

    @cached_property
    def sha256(self) -> str:
        """Digest of the file, for records."""
        return sha256_file(self.path)

    @cached_property
    def frechet(self) -> FrechetReference:
        """The statistics with their square root.

        Raises:
            InputError: the file has images alone.
        """
        return FrechetReference(self._statistics())

    def _statistics(self) -> FeatureStats:
        if self.stats is None:
            raise InputError(
                f"{self.path} has images but no statistics; compute them first: detok-pipe "
                f"fid-stats {self.path} --out reference.npz"
            )
        return self.stats

    def check(self, *, extractor: str, dimensions: int, image_size: int | None) -> None:
        """Check that images of ``image_size`` scored by ``extractor`` may be compared with this.

        Raises:
            MismatchError: another feature network, number of dimensions or image size.
            InputError: the file has images alone.
        """
        if self.network != extractor:
            origin = "was made for" if self.extractor else "names no network, so it counts as"
            name, _, resolution = self.network.partition("@")
            remedy = "the other network with --features"
            if name == extractor.partition("@")[0]:
                remedy = f"its resolution with --resolution {resolution}"
            raise MismatchError(
                f"{self.path} {origin} {self.network}, and the features are {extractor}'s; choose "
                f"{remedy}, or make a reference: detok-pipe fid-stats"
            )
        found = self._statistics().dimensions
        if found != dimensions:
            raise MismatchError(
                f"{self.path} has {found} feature dimensions, {extractor} has {dimensions}: it "
                "comes from another feature network"
            )
        if None not in (image_size, self.image_size) and image_size != self.image_size:
            raise MismatchError(
                f"{self.path} was computed from images of {self.image_size} pixels a side, the "
                f"images to score have {image_size}; make a reference of their size: detok-pipe "
                "fid-stats --size"
            )

    def images(self, batch: int, *, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Images [start, stop) of the file as uint8 (b, 3, H, W), read a batch at a time.

        Raises:
            InputError: it has none, or is damaged or cut short.
        """
        if self.image_shape is None:
            raise InputError(f"{self.path} holds no images (array arr_0)")
        count, *shape = self.image_shape
        with (
            input_errors(_UNREADABLE.format(self.path)),
            zipfile.ZipFile(self.path) as archive,
            archive.open("arr_0.npy") as file,
        ):
            _read_header(file)
            file.seek(start * math.prod(shape), io.SEEK_CUR)
            stop = count if stop is None else stop
            for first in range(start, stop, batch):
                rows = min(batch, stop - first)
                wanted = rows * math.prod(shape)
                data = file.read(wanted)
                if len(data) != wanted:
                    raise InputError(f"{self.path} is cut short in image {first + rows - 1}")
                pixels = np.frombuffer(data, np.uint8).reshape(rows, *shape)
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of an ``.npy`` stream, which is left at its data."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _image_shape(path: Path) -> tuple[int, ...]:
    """The shape of ``arr_0`` without reading it.

    Raises:
        InputError: it holds no RGB images.
    """
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        shape, fortran, dtype = _read_header(file)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
        raise InputError(f"{path}: arr_0 must be uint8 images (M, H, W, 3), found {dtype} {shape}")
    return shape


def find_reference(
    name: Path,
    *,
    sha256: str | None = None,
    weights_dir: Path | None = None,
    download: bool = True,
) -> Reference:
    """Read a statistics file that is named by its path or as one of :data:`PUBLISHED`.

    Published ones are found, or downloaded and checked, as weights are (see `find_published`).

    Raises:
        WeightsError: a published one is nowhere, or a digest is wrong.
        InputError, MismatchError, NonFiniteError: see `read_reference`.
    """
    published = None if name.exists() else PUBLISHED.get(str(name))
    if published is not None:
        name = find_published(published, weights_dir, download=download)
    return read_reference(name, sha256=sha256)


def read_reference(path: Path, *, sha256: str | None = None) -> Reference:
    """Read a statistics file, or one of images.

    Args:
        sha256: expected digest, or its first digits.

    Raises:
        InputError: missing, unreadable, or without any of the known arrays.
        MismatchError, NonFiniteError: its arrays do not fit each other or are not finite.
        WeightsError: another digest.
    """
    if not path.is_file():
        raise InputError(
            f"the reference {path} does not exist or is a folder; compute one from images "
            f"with detok-pipe fid-stats, or name a published one: {', '.join(PUBLISHED)}"
        )
    if sha256 is not None:
        check_sha256(path, sha256)
    if not zipfile.is_zipfile(path):  # numpy would take it for a pickle, and advise to unpickle it
        raise InputError(f"the reference {path} is no .npz: damaged, cut short or another file")
    with input_errors(_UNREADABLE.format(path)):
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
            made_from = dict(json.loads(str(arrays[_MADE_FROM]))) if _MADE_FROM in names else {}
            features = arrays["feats"].astype(np.float32) if "feats" in names else None
            stats = None
            if {"mu", "sigma"} <= names:
                stats = FeatureStats(
                    arrays["mu"].astype(np.float64),
                    arrays["sigma"].astype(np.float64),
                    made_from.get("count"),
                )
        shape = _image_shape(path) if "arr_0" in names else None
    if features is not None and features.ndim != 2:
        raise InputError(
            f"{path}: feats must be a row of features an image, (M, D), found {features.shape}; "
            "compute the reference again: detok-pipe fid-stats"
        )
    if stats is None and features is not None:
        stats = feature_stats(features)
    if stats is None and shape is None:
        raise InputError(
            f"{path} has the arrays {', '.join(sorted(names)) or '(none)'}; a reference has mu and "
            "sigma, feats, or arr_0 (images)"
        )
    if stats is not None:
        check_stats(stats, str(path))
        if features is not None and features.shape[1] != stats.dimensions:
            raise MismatchError(
                f"{path}: feats has {features.shape[1]} dimensions, mu {stats.dimensions}; compute "
                "the reference again: detok-pipe fid-stats"
            )
    size = made_from.get("image_size")
    if size is None and shape is not None:
        size = shape[1]
    return Reference(path, stats, features, shape, made_from.get("extractor"), size, made_from)


def write_reference(
    path: Path,
    stats: FeatureStats,
    *,
    extractor: str,
    settings: dict[str, Any],
    image_size: int,
    source: dict[str, Any],
    features: np.ndarray | None = None,
) -> None:
    """Write a statistics file, whole or not at all.

    Args:
        extractor, settings: the network's name and settings.
        image_size: side of the images in pixels.
        source: the images' identity and preprocessing.
        features: (M, D), kept for the kernel distance, precision and recall.

    Raises:
        StorageError: the disk is full or read-only.
    """
    made_from = {
        "extractor": extractor,
        "settings": settings,
        "image_size": image_size,
        "count": stats.count,
        "source": source,
    }
    arrays: dict[str, Any] = {
        "mu": stats.mu,
        "sigma": stats.sigma,
        _MADE_FROM: np.array(json.dumps(made_from)),
    }
    if features is not None:
        arrays["feats"] = features.astype(np.float32)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
