"""What an encode will take, before anyone starts: disk from arithmetic, time from a short trial."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from detok_pipe.latents.plan import CachePlan
from detok_pipe.pipelines.config import TokenizerConfig
from detok_pipe.pipelines.decode import MAX_PIXELS, BatchDecoder, default_threads, to_float
from detok_pipe.pipelines.encode import Encoder, moments_on_device
from detok_pipe.pipelines.images import ImageSource
from detok_pipe.pipelines.trained import TrainedTokenizer, build_tokenizer, ready

_TYPICAL_SIZE = (500, 375)
_TRIAL_SECONDS = 3.0
_RAW_BYTES = 4  # a value of a shard before its statistics are known; fp16 afterwards


@dataclass(frozen=True)
class Estimate:
    """Needs of an encode.

    Attributes:
        images, shards, files: counts; a file a shard and view for tars, a view and field for Zarr.
        cache_bytes: of the finished rows. peak_bytes: on the disk while the cache is finished,
            when the provisional rows are still there (each is freed as its shard is done).
        encoder_rate, decoder_rate: images a second of one process, measured here.
        seconds: of one process, its decoding hidden on a GPU and sharing the cores on a CPU.
    """

    images: int
    shards: int
    files: int
    cache_bytes: int
    peak_bytes: int
    encoder_rate: float
    decoder_rate: float
    seconds: float


class TypicalImages(ImageSource):
    """Images of which nothing but their number is known yet: 500 x 375, as usual in ImageNet."""

    def __init__(self, count: int) -> None:
        super().__init__(Path("images to come"), np.full(count, -1).tolist(), [], MAX_PIXELS)
        self._identity = {"hash": "unknown", "count": count}
        noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize(_TYPICAL_SIZE).save(file, "JPEG", quality=95)
        self._data = file.getvalue()

    def name(self, index: int) -> str:
        return str(index)

    def size(self, index: int) -> int:
        return len(self._data)

    def open(self, index: int) -> BinaryIO:
        return io.BytesIO(self._data)


def untrained(config: TokenizerConfig, device: torch.device | str) -> TrainedTokenizer:
    """A tokenizer of ``config`` whose weights do not matter: its speed is that of a trained one."""
    model = ready(build_tokenizer(config), device)
    identity = {"fingerprint": "untrained"}
    return TrainedTokenizer(model, config.image_size, identity, "untrained", Path("untrained"), 0)


def estimate(
    tokenizer: Encoder, plan: CachePlan, *, device: torch.device | str = "cpu"
) -> Estimate:
    """Estimate the encode of ``plan`` by a process on ``device``, in a few seconds."""
    encoder = _encoder_rate(tokenizer, plan, torch.device(device))
    decoder = _decoder_rate(tokenizer.image_size)
    parts = len(plan.views) * (1 if plan.format == "webdataset" else len(plan.fields))
    on_cpu = torch.device(device).type == "cpu"
    seconds = 1 / encoder + 1 / decoder if on_cpu else max(1 / encoder, 1 / decoder)
    raw_bytes = plan.content_bytes // 2 * _RAW_BYTES
    largest_shard = plan.content_bytes // plan.shards
    return Estimate(
        images=plan.count,
        shards=plan.shards,
        files=plan.shards * parts,
        cache_bytes=plan.content_bytes,
        peak_bytes=raw_bytes + largest_shard,
        encoder_rate=encoder,
        decoder_rate=decoder,
        seconds=plan.count * seconds,
    )


def _encoder_rate(tokenizer: Encoder, plan: CachePlan, device: torch.device) -> float:
    """Images a second of the network, all views."""
    size = tokenizer.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (plan.batch_size, size, size, 3), np.uint8)
    images = to_float(pixels, device)

    def once() -> None:
        results = moments_on_device(tokenizer.model, images, plan)
        for values in results.values():
            values.cpu()

    once()
    return plan.batch_size / _seconds_each(once)


def _decoder_rate(size: int) -> float:
    """Images a second of reading, decoding and cropping on all threads."""
    threads = default_threads()
    decoder = BatchDecoder(TypicalImages(1), size, threads=threads)
    batch = np.zeros(8 * threads, np.int64)

    def once() -> None:
        for _ in decoder.batches([batch]):
            pass

    once()
    return len(batch) / _seconds_each(once)


def _seconds_each(function: Callable[[], None]) -> float:
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < _TRIAL_SECONDS:
        function()
        calls += 1
    return (time.perf_counter() - start) / calls
