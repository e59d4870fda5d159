"""Reference statistics from images: what samples of the same size are compared with.

Images are cropped exactly as the tokenizer's training images are (ADM's centre crop), or taken
as they are from an ``.npz`` of images.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from detok_pipe.evaluation.features import FeatureExtractor
from detok_pipe.evaluation.frechet import FeatureMoments
from detok_pipe.evaluation.reference import Reference, read_reference, write_reference
from detok_pipe.latents.errors import ConfigError, InputError
from detok_pipe.pipelines.decode import BatchDecoder, default_threads
from detok_pipe.pipelines.images import ImageSource
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import progress


def image_batches(
    source: ImageSource, size: int, batch_size: int, *, rows: np.ndarray | None = None
) -> Iterator[Tensor]:
    """Cropped images of a source as uint8 (b, 3, size, size).

    Args:
        rows: numbers of the images, int64; by default all, in order.

    Raises:
        InputError: an image is unreadable; it is named.
    """
    rows = np.arange(len(source)) if rows is None else rows
    pieces = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    for batch in BatchDecoder(source, size, threads=default_threads()).batches(pieces):
        for place, reason in batch.unreadable.items():
            raise InputError(
                f"{source.name(int(batch.indices[place]))} in {source.path}: {reason}; mend it or "
                "take it out of the image set"
            )
        yield torch.from_numpy(batch.pixels).permute(0, 3, 1, 2)


def fid_stats(
    source: ImageSource,
    extractor: FeatureExtractor,
    out: Path,
    *,
    size: int,
    keep_features: int = 10_000,
    rows: np.ndarray | None = None,
    batch_size: int = 64,
    processes: Processes | None = None,
    quiet: bool = False,
) -> Reference:
    """Compute and write the statistics of images cropped to ``size`` pixels.

    Args:
        keep_features: keep the features of so many images, evenly spread over the set, for the
            kernel distance, precision and recall.
        rows: numbers of the images to use, int64; by default all.

    Raises:
        InputError: an image is unreadable, or there are fewer than two.
        ConfigError: not a size.
        StorageError: the disk is full or read-only.
    """
    if size < 1:
        raise ConfigError(f"the image size must be positive, got {size}")
    processes = processes or Processes()
    rows = np.arange(len(source)) if rows is None else rows
    kept = _spread(len(rows), keep_features)
    places = np.arange(processes.rank, len(rows), processes.world)
    moments, features = _measured(
        image_batches(source, size, batch_size, rows=rows[places]),
        extractor,
        places,
        kept,
        total=len(places),
        quiet=quiet,
    )
    parts = gather_object([(moments, features)]) if processes.world > 1 else [(moments, features)]
    described = {
        "kind": "images",
        "path": str(source.path),
        "images": len(rows),
        **source.identity,
        "crop": "adm-center",
    }
    processes.on_main(lambda: _write(out, parts, extractor, size, described))
    return read_reference(out)


def fid_stats_of_npz(
    images: Reference,
    extractor: FeatureExtractor,
    out: Path,
    *,
    keep_features: int = 10_000,
    batch_size: int = 64,
    quiet: bool = False,
) -> Reference:
    """Compute and write the statistics of the images in an ``.npz`` (ADM's form).

    Raises:
        InputError: the file has no images, or fewer than two.
        StorageError: the disk is full or read-only.
    """
    if images.image_shape is None:
        raise InputError(f"{images.path} holds no images (array arr_0)")
    count, height, _, _ = images.image_shape
    part = _measured(
        images.images(batch_size),
        extractor,
        np.arange(count),
        _spread(count, keep_features),
        total=count,
        quiet=quiet,
    )
    described = {"kind": "npz", "path": str(images.path), "sha256": images.sha256, "count": count}
    _write(out, [part], extractor, height, described)
    return read_reference(out)


def _spread(count: int, wanted: int) -> np.ndarray:
    """``wanted`` of ``count`` places, evenly spread, or all."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))


_Part = tuple[FeatureMoments, dict[int, np.ndarray]]


def _measured(
    batches: Iterator[Tensor],
    extractor: FeatureExtractor,
    places: np.ndarray,
    kept: np.ndarray,
    *,
    total: int,
    quiet: bool,
) -> _Part:
    """Moments of all images, and by place the features of those that are kept."""
    moments = FeatureMoments()
    features: dict[int, np.ndarray] = {}
    done = 0
    with progress("fid-stats", total=total, quiet=quiet) as task:
        for images in batches:
            rows = extractor(images)["features"].float().cpu().numpy()
            moments.update(rows)
            here = places[done : done + len(rows)]
            for row in np.flatnonzero(np.isin(here, kept)):
                features[int(here[row])] = rows[row]
            done += len(rows)
            task.advance(len(rows))
    return moments, features


def _write(
    out: Path,
    parts: list[_Part],
    extractor: FeatureExtractor,
    size: int,
    source: dict[str, Any],
) -> None:
    moments = FeatureMoments()
    features: dict[int, np.ndarray] = {}
    for part, some in parts:
        moments.merge(part)
        features |= some
    write_reference(
        out,
        moments.finish(),
        extractor=extractor.name,
        settings=extractor.settings,
        image_size=size,
        source=source,
        features=np.stack([features[place] for place in sorted(features)]) if features else None,
    )
