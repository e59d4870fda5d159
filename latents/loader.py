"""Batches for training from a latent cache.

The order is a pure function of (seed, position): see :mod:`.order`. Which view a sample shows and
its draw from the posterior are functions of (seed, position) too, so the same samples come
whatever the number of processes, and after a restart. Two threads read ahead; there are no worker
processes, which would cost more than the reads. Do not hand the loader to Accelerate's ``prepare``
(it would shard again what is sharded already); keep ``state()`` in the checkpoint.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from detok_pipe.latents.block_reads import BlockReads
from detok_pipe.latents.cache import LatentCache
from detok_pipe.latents.errors import ConfigError, MismatchError
from detok_pipe.latents.noise import Noise
from detok_pipe.latents.order import LANES, ORDER_VERSION, BlockOrder, SampleOrder

# Small batches are read several at a time, which halves what Python adds to the copying; with more
# at once, the buffers in turn no longer fit into a core's cache, which costs a quarter.
_READERS = 2
_ROWS_A_READ = 1024
_BYTES_A_READ = 8 << 20

Mode = Literal["auto", "resident", "block"]


@dataclass(frozen=True)
class Batch:
    """One process's part of a global batch.

    Attributes:
        z: (b, N, C) fp32, normalised, on the loader's device.
        condition: (b,) int64 labels, -1 where unlabelled, on the device.
        ids: (b,) int64 positions in the stream, on the device.
        rows: (b,) int64 row numbers in the cache, on the device.
    """

    z: Tensor
    condition: Tensor
    ids: Tensor
    rows: Tensor


class LatentLoader:
    """An endless stream of batches.

    Args:
        cache: an open cache.
        global_batch: samples a step over all processes, a multiple of ``world``.
        seed: of the order, the views and the posterior draws.
        rank, world: this process and their number.
        position: samples of the stream that are consumed already.
        device: where batches are made.
        views: which stored views to draw from; all by default.
        sample_posterior: draw from the posterior, where the encoder has one; otherwise take
            its mean.
        subset: row numbers to train on (for some classes, a limit, held-out rows); all by default.
        prefetch: batches read ahead, at least.
        mode: "resident" reads all files once, then shuffles all rows: right when they fit into
            memory; "block" keeps reads local. "auto" takes the first when the bytes in use fit
            half of it.

    Raises:
        ConfigError: numbers that do not fit together, an empty subset, a view or field that the
            cache does not have.
    """

    def __init__(
        self,
        cache: LatentCache,
        global_batch: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        device: torch.device | str = "cpu",
        views: Sequence[str] | None = None,
        sample_posterior: bool = True,
        subset: np.ndarray | None = None,
        prefetch: int = 2,
        mode: Mode = "auto",
    ) -> None:
        if global_batch < 1 or world < 1 or global_batch % world:
            raise ConfigError(
                f"the global batch ({global_batch}) must be a multiple of the number of processes "
                f"({world})"
            )
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of {world} processes: it must be 0 ... {world - 1}")
        self.cache = cache
        self.global_batch = global_batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self.device = torch.device(device)
        self.views = tuple(cache.views if views is None else views)
        self.sample_posterior = sample_posterior and not cache.is_exact
        self.prefetch = max(1, prefetch)
        self._subset = _checked_subset(cache, subset)
        self._position = position
        self._mode = mode
        self.order_lock = threading.Lock()  # orders keep what they have worked out
        self._fields = ("mean", "std") if self.sample_posterior else ("mean",)
        if self.sample_posterior and not cache.has_posterior:
            raise ConfigError(
                f"the cache {cache.path} stores no posterior std: train with sample_posterior off"
            )
        for view in self.views:
            cache.check_array(view, "mean")
        if not self.views:
            raise ConfigError("no view to train on")
        self._arrays = [f"{view}/{field}" for view in self.views for field in self._fields]
        if mode == "auto":
            fits = cache.bytes_used(self._arrays) <= memory_bytes() // 2
            mode = "resident" if fits else "block"
        self._set_order(mode)

    def _set_order(self, mode: str) -> None:
        rows = self.epoch_length
        self._order = (
            BlockOrder(rows, self.seed) if mode == "block" else SampleOrder(rows, self.seed)
        )
        if mode == "block" and LANES % self.world:
            raise ConfigError(
                f"block mode needs a number of processes that divides {LANES}, not {self.world}"
            )

    @property
    def mode(self) -> str:
        """ "resident" or "block"."""
        return "block" if isinstance(self._order, BlockOrder) else "resident"

    @property
    def epoch_length(self) -> int:
        """Samples in an epoch: rows of the cache, or of the subset."""
        return self.cache.num_rows if self._subset is None else len(self._subset)

    @property
    def samples_consumed(self) -> int:
        """Samples of the stream in the batches handed out so far, over all processes."""
        return self._position

    def state(self) -> dict[str, Any]:
        """Where the stream is: JSON values, the same on every process."""
        subset = None if self._subset is None else zlib.crc32(self._subset.tobytes())
        return {
            "order_version": ORDER_VERSION,
            "mode": self.mode,
            "seed": self.seed,
            "cache": self.cache.fingerprint,
            "subset": subset,
            "views": list(self.views),
            "position": self._position,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken; begin a new iteration afterwards. The number of
        processes may differ.

        Raises:
            MismatchError: the state is of another cache, seed, subset or order; names the field.
        """
        mine = self.state()
        if self._mode == "auto" and state.get("mode") in ("resident", "block"):
            # What "auto" chose must not change with the memory of the machine.
            mine["mode"] = state["mode"]
        for name, value in mine.items():
            if name != "position" and state.get(name) != value:
                raise MismatchError(
                    f"the data order cannot go on: its {name} was {state.get(name)!r} in the "
                    f"checkpoint and is {value!r} now"
                )
        self._set_order(mine["mode"])
        self._position = int(state["position"])

    def positions(self, position: int) -> np.ndarray:
        """This process's stream positions (b,) int64 of the global batch at ``position``."""
        local = np.arange(self.global_batch // self.world, dtype=np.int64)
        if self.mode == "block":
            # Every world-th position: a process then touches 64 / world lanes only.
            return position + self.rank + self.world * local
        return position + self.rank * len(local) + local

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """The cache's rows at some stream positions, int64."""
        rows = self._order.at(positions)
        return rows if self._subset is None else self._subset[rows]

    def _block_reads(self) -> BlockReads | None:
        if not isinstance(self._order, BlockOrder):
            return None
        reader = self.cache.reader
        return BlockReads(reader, self._arrays, self._order, self._subset, self.rank, self.world)

    def __iter__(self) -> Iterator[Batch]:
        with closing(self.host_batches()) as batches:
            for batch in batches:
                made = batch.to_device(self)
                self._position += self.global_batch
                yield made

    def host_batches(self) -> Generator[HostBatch, None, None]:
        """The same stream before it goes to the device; what it hands out is not counted as
        consumed, and is overwritten once the next one is asked for."""
        local = self.global_batch // self.world
        rows = min(_ROWS_A_READ, _BYTES_A_READ // self.cache.manifest.row_bytes)
        group = max(1, rows // local)
        block_reads = self._block_reads()
        buffers = [
            _Buffers(self, group, block_reads) for _ in range(-(-self.prefetch // group) + 2)
        ]
        ahead = self._position
        waiting: deque[Future[_Buffers]] = deque()
        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="latents")
        try:
            if self.mode == "resident":  # before any random read, which are slow from a disk
                pool.submit(self.cache.reader.warm, self._arrays, self.rank).result()
            while True:
                while len(buffers) > 1:
                    waiting.append(pool.submit(buffers.pop(0).fill, ahead))
                    ahead += group * self.global_batch
                filled = waiting.popleft().result()
                yield from filled.batches()
                buffers.append(filled)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class HostBatch:
    """A batch on the host.

    Attributes:
        arrays: "mean", and "std" where posteriors are sampled: (b, N, C) fp16.
        numbers: labels, positions and rows, (3, b) int64.
    """

    arrays: dict[str, Tensor]
    numbers: Tensor

    def to_device(self, loader: LatentLoader) -> Batch:
        """The batch on the loader's device, its views' posteriors drawn."""
        # Elsewhere than on CUDA nothing would tell when a copy in flight is through.
        later = loader.device.type == "cuda"
        arrays = {k: v.to(loader.device, non_blocking=later) for k, v in self.arrays.items()}
        numbers = self.numbers.to(loader.device, non_blocking=later, copy=True)
        condition, ids, rows = numbers.unbind(0)
        z = arrays["mean"].to(torch.float32)  # (b, N, C), a copy
        if "std" in arrays:
            eps = Noise(loader.seed, ids, device=loader.device).normal("posterior", z.shape[1:])
            z.addcmul_(arrays["std"].to(torch.float32), eps)
        return Batch(z, condition, ids, rows)


class _Buffers:
    """Room for some consecutive batches, pinned for a CUDA device, used again and again."""

    def __init__(self, loader: LatentLoader, group: int, block_reads: BlockReads | None) -> None:
        self._loader = loader
        self._group = group
        self._block_reads = block_reads
        cache = loader.cache
        size = group * loader.global_batch // loader.world
        pinned = loader.device.type == "cuda"
        shape = (size, cache.tokens, cache.channels)
        self._arrays = {
            field: torch.empty(shape, dtype=torch.float16, pin_memory=pinned)
            for field in loader._fields
        }
        self._numbers = torch.empty((group, 3, size // group), dtype=torch.int64, pin_memory=pinned)
        # Without pinned memory, a buffer is of use only where rows can be taken straight into it.
        self._reuse = pinned or cache.reader.dense
        self._copied: torch.cuda.Event | None = None  # when the device has its copies

    def fill(self, position: int) -> _Buffers:
        """Reads the batches from a position on; runs on a reading thread."""
        if self._copied is not None:
            self._copied.synchronize()
        loader = self._loader
        step = loader.global_batch
        steps = position + step * np.arange(self._group, dtype=np.int64)
        positions = (steps[:, None] + loader.positions(0)).reshape(-1)
        with loader.order_lock:
            rows = loader.rows_at(positions)
            if self._block_reads is not None:
                self._block_reads.advance(int(positions[0]))
        choice = None
        if len(loader.views) > 1:
            draws = Noise(loader.seed, torch.from_numpy(positions)).uniform("view", ())
            choice = (draws.numpy() * len(loader.views)).astype(np.int64)
        reader = loader.cache.reader
        for field, buffer in self._arrays.items():
            names = [f"{view}/{field}" for view in loader.views]
            out = buffer.numpy() if self._reuse else None
            found = reader.read(names, rows, choice, out)
            if not self._reuse:
                self._arrays[field] = torch.from_numpy(found)
        for column, values in enumerate((loader.cache.labels[rows], positions, rows)):
            self._numbers[:, column] = torch.from_numpy(values).view(self._group, -1)
        return self

    def batches(self) -> Iterator[HostBatch]:
        """The batches, by turns; afterwards the buffers may be filled again."""
        for number, numbers in enumerate(self._numbers):
            rows = slice(number * numbers.shape[1], (number + 1) * numbers.shape[1])
            yield HostBatch({f: values[rows] for f, values in self._arrays.items()}, numbers)
        if self._loader.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._loader.device))


def _checked_subset(cache: LatentCache, subset: np.ndarray | None) -> np.ndarray | None:
    if subset is None:
        return None
    rows = np.asarray(subset)
    if rows.dtype.kind not in "iu" or rows.ndim != 1 or not len(rows):
        raise ConfigError("a subset must be a list of at least one row number")
    rows = rows.astype(np.int64)
    if rows.min() < 0 or rows.max() >= cache.num_rows or len(np.unique(rows)) != len(rows):
        raise ConfigError(
            f"a subset must name different rows in [0, {cache.num_rows}), got {rows.min()} ... "
            f"{rows.max()}"
        )
    return rows


def memory_bytes() -> int:
    """The machine's memory, or the control group's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control groups, or "max": no limit
        return total
