"""Reference statistics from images: what samples of the same size are compared with.

Images are cropped exactly as the tokenizer's training images are (ADM's centre crop), or taken
as they are from an ``.npz`` of images.

The images are worked through in parts that depend on their number alone and that the processes
share. A finished part is kept beside the target until all are there: an interrupted run goes on
with the missing ones, and any number of processes gives the same numbers.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detok_pipe.evaluation.features import FeatureExtractor
from detok_pipe.evaluation.frechet import FeatureMoments, FeatureStats
from detok_pipe.evaluation.reference import Reference, read_reference, write_reference
from detok_pipe.latents.atomic import atomic_file, create_exclusive
from detok_pipe.latents.errors import CacheError, ConfigError, InputError, MismatchError
from detok_pipe.latents.manifest import read_json
from detok_pipe.latents.plan import first_difference
from detok_pipe.pipelines.decode import BatchDecoder, default_threads
from detok_pipe.pipelines.images import ImageSource
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import progress

_IMAGES_A_PART = 1024
_MOST_PARTS = 64
"""A part of 2,048 dimensions takes 34 MB, so all parts together take at most 2.2 GB."""

_IDENTITY = "identity.json"


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
        out: the ``.npz`` to write; where it is there already, it is read.
        keep_features: keep the features of so many images, evenly spread over the set, for the
            kernel distance, precision and recall.
        rows: numbers of the images to use, int64; by default all.

    Raises:
        InputError: an image is unreadable, or there are fewer than two.
        ConfigError: not a size.
        MismatchError: ``out`` is of other images, another network or other settings.
        StorageError: the disk is full or read-only; finished parts stay.
    """
    if size < 1:
        raise ConfigError(f"the image size must be positive, got {size}")
    rows = np.arange(len(source)) if rows is None else rows
    work = _Work(
        out,
        extractor,
        len(rows),
        size,
        {
            "kind": "images",
            "path": str(source.path.resolve()),
            "images": len(rows),
            "rows": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
            **source.identity,
            "crop": "adm-center",
        },
        keep_features,
        processes or Processes(),
    )
    return work.run(
        lambda start, stop: image_batches(source, size, batch_size, rows=rows[start:stop]),
        quiet=quiet,
    )


def fid_stats_of_npz(
    images: Reference,
    extractor: FeatureExtractor,
    out: Path,
    *,
    keep_features: int = 10_000,
    batch_size: int = 64,
    processes: Processes | None = None,
    quiet: bool = False,
) -> Reference:
    """Compute and write the statistics of the images in an ``.npz`` (ADM's form).

    Statistics of the same network that are in the file stay as they are: in ADM's reference
    batches they are those of all training images, of which the file holds 10,000.

    Raises:
        InputError: the file has no images, or fewer than two.
        MismatchError, StorageError: see `fid_stats`.
    """
    if images.image_shape is None:
        raise InputError(f"{images.path} holds no images (array arr_0)")
    count, height, _, _ = images.image_shape
    own = images.stats is not None and images.network == extractor.name
    work = _Work(
        out,
        extractor,
        count,
        height,
        {
            "kind": "npz",
            "path": str(images.path.resolve()),
            "images": count,
            "sha256": images.sha256,
            "statistics": "the file's own" if own else "of its images",
        },
        keep_features,
        processes or Processes(),
    )
    return work.run(
        lambda start, stop: images.images(batch_size, start=start, stop=stop),
        stats=images.stats if own else None,
        quiet=quiet,
    )


@dataclass(frozen=True)
class _Work:
    """One set of statistics in the making.

    Attributes:
        out: the file to write; the parts are in a folder beside it.
        count, size: number of images, and their side in pixels.
        source: what identifies the images.
        keep_features: how many images' features the file keeps.
    """

    out: Path
    extractor: FeatureExtractor
    count: int
    size: int
    source: dict[str, Any]
    keep_features: int
    processes: Processes

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.parts")

    @property
    def identity(self) -> dict[str, Any]:
        """What the written file says of its origin, as JSON values."""
        identity = {
            "extractor": self.extractor.name,
            "settings": self.extractor.settings,
            "image_size": self.size,
            "source": {**self.source, "with features": min(self.keep_features, self.count)},
        }
        return json.loads(json.dumps(identity))

    @property
    def digest(self) -> str:
        """Stands in the parts' names, so that none of another set is ever taken for one of this."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First image of each part, and the one behind its last."""
        size = max(_IMAGES_A_PART, -(-self.count // _MOST_PARTS))
        return [(i, min(i + size, self.count)) for i in range(0, self.count, size)]

    def run(
        self,
        batches: Callable[[int, int], Iterator[Tensor]],
        *,
        stats: FeatureStats | None = None,
        quiet: bool,
    ) -> Reference:
        """Compute what is missing, and write the file.

        Args:
            batches: the images [start, stop) as uint8 (b, 3, H, W).
            stats: statistics to write instead of those of the images.
        """
        if not self.processes.on_main(self._begun):
            self._compute(batches, quiet=quiet)
            self.processes.wait()
            self.processes.on_main(lambda: self._write(stats))
        return read_reference(self.out)

    def _begun(self) -> bool:
        """Make or check the folder of parts; whether the file itself is already there."""
        if self.out.exists():
            self._check(read_reference(self.out).made_from, self.out)
            return True
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, got {self.count}")
        where = self.folder / _IDENTITY
        if not create_exclusive(where, json.dumps(self.identity).encode()):
            self._check(read_json(where), self.folder)
        return False

    def _check(self, found: dict[str, Any], where: Path) -> None:
        difference = first_difference({key: found.get(key) for key in self.identity}, self.identity)
        if difference is not None:
            name, old, new = difference
            raise MismatchError(
                f"{where} is of something else: its {name} is {json.dumps(old)}, now it is "
                f"{json.dumps(new)}; choose another --out or remove it"
            )

    def _compute(self, batches: Callable[[int, int], Iterator[Tensor]], *, quiet: bool) -> None:
        mine = [part for i, part in enumerate(self.parts) if self.processes.mine(i)]
        missing = [part for part in mine if not self._file(part[0]).exists()]
        total, left = (sum(stop - start for start, stop in some) for some in (mine, missing))
        kept = _spread(self.count, self.keep_features)
        quiet = quiet or not self.processes.is_main
        with progress("fid-stats", total=total, initial=total - left, quiet=quiet) as task:
            for start, stop in missing:
                moments, features = FeatureMoments(), []
                for images in batches(start, stop):
                    first = start + moments.count
                    rows = self.extractor(images)["features"].float().cpu().numpy()
                    moments.update(rows)
                    features.append(rows[np.isin(np.arange(first, first + len(rows)), kept)])
                    task.advance(len(rows))
                arrays: dict[str, Any] = moments.arrays()
                arrays["features"] = np.concatenate(features)
                with atomic_file(self._file(start)) as temporary, temporary.open("wb") as file:
                    np.savez(file, **arrays)

    def _file(self, start: int) -> Path:
        return self.folder / f"{self.digest}-{start:08d}.npz"

    def _write(self, stats: FeatureStats | None) -> None:
        if self.out.exists():  # another run of the same command was faster
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        moments, features = FeatureMoments(), []
        for start, _ in self.parts:
            path = self._file(start)
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    moments.merge(FeatureMoments.from_arrays(arrays))
                    features.append(arrays["features"])
            except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
                if self.out.exists():  # another run finished just now, and tidied up
                    return
                raise CacheError(f"{path} is damaged ({error}); remove it, run again") from error
        write_reference(
            self.out,
            moments.finish() if stats is None else stats,
            features=np.concatenate(features) if self.keep_features else None,
            **self.identity,
        )
        shutil.rmtree(self.folder, ignore_errors=True)


def _spread(count: int, wanted: int) -> np.ndarray:
    """``wanted`` of ``count`` places, evenly spread, or all."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))
