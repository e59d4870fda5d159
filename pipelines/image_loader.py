"""The endless stream of training images for the tokenizer.

Position p of the stream is image ``SampleOrder(N, seed).at(p)``, mirrored or not by a draw from
(seed, p): the same order and the same state as the stream of latents. Global batches are the
same for any number of processes and after any restart; nothing is dropped or padded.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detok_pipe.latents.errors import ConfigError, InputError, MismatchError
from detok_pipe.latents.noise import Noise
from detok_pipe.latents.order import ORDER_VERSION, SampleOrder
from detok_pipe.pipelines.decode import BatchDecoder, default_threads, to_float
from detok_pipe.pipelines.images import ImageSource

RESIDENT_BYTES = 1 << 30
"""An image set whose decoded squares fit in this stays in memory after its first epoch."""


@dataclass(frozen=True)
class ImageBatch:
    """This process's part of a global batch.

    Attributes:
        images: (b, 3, S, S) fp32 in [-1, 1]. labels: (b,) int64, -1 = unlabelled.
        ids: (b,) int64, positions in the stream.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class ImageLoader:
    """Iterates over :class:`ImageBatch` without end.

    Args:
        source: the images; at least one.
        size: side of the squares in pixels.
        global_batch: images a step over all processes, a multiple of ``world``.
        seed: of the order and the mirroring.
        rank, world: this process and the number of processes.
        device: where the batches are wanted.
        flip: mirror half of the images.
        threads: decoding threads; by default one a processor core, at most 16.
        resident_bytes: keep decoded images in memory where all of them fit in this.

    Raises:
        ConfigError: ``global_batch`` does not divide among the processes.
        InputError: while iterating: an image is unreadable. It is named, and the stream ends:
            training never puts another image in its place.
    """

    def __init__(
        self,
        source: ImageSource,
        size: int,
        global_batch: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        flip: bool = True,
        threads: int | None = None,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        if global_batch < 1 or global_batch % world:
            raise ConfigError(
                f"global batch {global_batch} is no multiple of the {world} processes"
            )
        self.source = source
        self.global_batch = global_batch
        self.seed = seed
        self.device = torch.device(device)
        self.flip = flip
        self.samples_consumed = 0
        self._order = SampleOrder(len(source), seed)
        self._part = slice(rank * global_batch // world, (rank + 1) * global_batch // world)
        self._decoder = BatchDecoder(source, size, threads=threads or default_threads())
        self._resident = (
            _Resident(len(source), size)
            if len(source) * size * size * 3 <= resident_bytes
            else None
        )

    @property
    def epoch_length(self) -> int:
        """Images an epoch."""
        return len(self.source)

    def names(self, positions: Sequence[int]) -> list[str]:
        """Names of the images at some positions of the stream."""
        indices = self._order.at(np.asarray(positions, dtype=np.int64))
        return [self.source.name(int(index)) for index in indices]

    def state(self) -> dict[str, Any]:
        """Where the stream stands: independent of processes, batch size and prefetching."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "source": self.source.identity,
            "samples_consumed": self.samples_consumed,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on at a recorded state.

        Raises:
            MismatchError: it belongs to another seed, image list or order.
        """
        mine = self.state()
        for name in ("order_version", "seed", "source"):
            if state[name] != mine[name]:
                raise MismatchError(
                    f"the image stream was at another {name}: {state[name]!r} there, "
                    f"{mine[name]!r} now; resume with the images and the seed of the run"
                )
        self.samples_consumed = int(state["samples_consumed"])

    def __iter__(self) -> Iterator[ImageBatch]:
        """Batches from the present position on; a batch counts as consumed once handed out."""
        start = self.samples_consumed
        squares = self._from_memory(start) if self._resident else self._from_files(start)
        for indices, pixels in squares:
            positions = torch.from_numpy(self._positions(self.samples_consumed))
            self.samples_consumed += self.global_batch
            yield self._batch(indices, pixels, positions)

    def _positions(self, first: int) -> np.ndarray:
        """(b,) positions of this process in the global batch that begins at ``first``."""
        return np.arange(first, first + self.global_batch, dtype=np.int64)[self._part]

    def _indices(self, first: int) -> Iterator[np.ndarray]:
        while True:
            yield self._order.at(self._positions(first))
            first += self.global_batch

    def _from_files(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in self._decoder.batches(self._indices(first)):
            self._check(batch.indices, batch.unreadable)
            yield batch.indices, batch.pixels

    def _from_memory(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        assert self._resident is not None
        asked = self._resident.present.copy()
        waiting: deque[np.ndarray] = deque()

        def missing() -> Iterator[np.ndarray]:
            for indices in self._indices(first):
                waiting.append(indices)
                new = np.unique(indices[~asked[indices]])
                asked[new] = True
                yield new

        for batch in self._decoder.batches(missing()):
            self._check(batch.indices, batch.unreadable)
            self._resident.put(batch.indices, batch.pixels)
            indices = waiting.popleft()
            yield indices, self._resident.pixels[indices]

    def _check(self, indices: np.ndarray, unreadable: dict[int, str]) -> None:
        for place, reason in unreadable.items():
            raise InputError(
                f"{self.source.name(int(indices[place]))} in {self.source.path}: {reason}; "
                "mend it or take it out of the image set"
            )

    def _batch(self, indices: np.ndarray, pixels: np.ndarray, positions: Tensor) -> ImageBatch:
        images = to_float(pixels, self.device)
        ids = positions.to(self.device, non_blocking=True)
        if self.flip:
            mirrored = Noise(self.seed, ids, device=self.device).uniform("flip", ()) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        labels = torch.from_numpy(self.source.labels[indices].astype(np.int64))
        return ImageBatch(images, labels.to(self.device, non_blocking=True), ids)


class _Resident:
    """Decoded squares of a small set, filled as they are first needed."""

    def __init__(self, count: int, size: int) -> None:
        self.pixels = np.empty((count, size, size, 3), np.uint8)
        self.present = np.zeros(count, bool)

    def put(self, indices: np.ndarray, pixels: np.ndarray) -> None:
        self.pixels[indices] = pixels
        self.present[indices] = True
