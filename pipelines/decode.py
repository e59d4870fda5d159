"""From an image file's bytes to a square of pixels: the same pixels everywhere.

Tokenizer training, encoding and scoring all take their pixels from here:

- Colour: 8-bit RGB as ``PIL.Image.convert("RGB")`` gives it for grey, palette, CMYK, YCbCr and
  transparent images (transparency is dropped, not blended, as ImageNet code does).
- 16-bit grey is divided by 257 and rounded, which maps white to white; PIL alone clips nearly
  all of it. 16-bit colour is cut to its high byte by PIL, which differs by one level at most.
- The EXIF rotation is ignored: pixels as stored, as in the published ImageNet statistics.
- The format follows from the content, never from the name; the first frame of an animation.
- Everything else (truncated, empty, no image, floating point, above the limit of pixels) is an
  :class:`InputError`; nothing is repaired or replaced by another image.

The crop is ADM's (Dhariwal and Nichol 2021): halve with a box filter while the short side is at
least twice the wanted size, bicubic to the wanted short side, cut out the centre. Which faster ways
give the same pixels (benchmarks/encoding.py; JPEGs to 256 x 256, PIL 13.0, torchvision 0.29):

- torchvision's JPEG decoder before this crop: the same pixels, at the same speed (both are
  libjpeg-turbo), so nothing is gained by it.
- PIL's ``reduce`` instead of the halvings: other pixels (one rounding where two passes round
  twice), up to 3 levels off in 40 % of the values at 1024 x 768; 1.3 to 1.6 times as fast there
  and above.
- PIL's ``draft`` (scaling inside the JPEG decoder): the same up to where it begins to scale, then
  up to 9 levels off; twice as fast at 2000 x 1500.
- torchvision's resampling of uint8: one level off in 0.4 % of the values at 500 x 375, at twice the
  speed; up to 5 levels off in 63 % at 1024 x 768.

So none of them is used. On 500 x 375, the usual size in ImageNet, a core decodes and crops about
350 images a second.
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from detok_pipe.latents.errors import InputError

MAX_PIXELS = 178_956_970
"""Default limit of an image's pixels: where PIL, too, takes an image for a decompression bomb."""

MEMORY_BUDGET = 2 << 30
"""Bytes that all decoding threads together may hold; a larger image is decoded alone."""

# Raster formats whose decoders live in PIL itself; EPS, for one, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
# PIL stores RGB in 4 bytes a pixel, and converting holds a second copy for a moment.
_BYTES_PER_PIXEL = 8


class MemoryBudget:
    """Shared by threads: each holds its bytes while it decodes, and waits while there are none.

    A request larger than the whole budget waits until nobody else holds anything, so memory is
    bounded by the budget or by the largest image.
    """

    def __init__(self, total: int = MEMORY_BUDGET) -> None:
        self._total = total
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + amount <= self._total)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()


def decode(file: BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image file to 8-bit RGB.

    Raises:
        InputError: it is no image, damaged, or too large; says why, without the file's name.
    """
    return _decoded(_opened(file, max_pixels))


def decode_square(
    file: BinaryIO,
    size: int,
    *,
    max_pixels: int = MAX_PIXELS,
    budget: MemoryBudget | None = None,
) -> np.ndarray:
    """Decode one image file and crop it: (size, size, 3) uint8.

    Raises:
        InputError: as :func:`decode`, or the image is so narrow that scaling it to ``size``
            would take more than ``max_pixels``.
    """
    image = _opened(file, max_pixels)
    width, height = _scaled(image.size, size)
    if width * height > max_pixels:
        raise InputError(
            f"it is too narrow: {image.width} x {image.height} scaled to a short side of {size} "
            f"is {width * height:,} pixels, above the limit of {max_pixels:,} (--max-pixels)"
        )
    pixels = max(image.width * image.height, width * height)
    with (budget or MemoryBudget()).hold(_BYTES_PER_PIXEL * pixels):
        return center_crop(_decoded(image), size)


def _opened(file: BinaryIO, max_pixels: int) -> Image.Image:
    """The image's header; its pixels are not read yet."""
    try:
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        empty = file.seek(0, 2) == 0
        raise InputError("the file is empty" if empty else "it is no image") from None
    except Image.DecompressionBombError:
        raise InputError(f"it has more than {max_pixels:,} pixels (--max-pixels)") from None
    except Exception as error:  # PIL's decoders raise errors of any kind on damaged files
        raise InputError(f"it cannot be opened: {error}") from error
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise InputError(
            f"it has {image.width} x {image.height} = {pixels:,} pixels, above the limit of "
            f"{max_pixels:,} (--max-pixels)"
        )
    return image


def _decoded(image: Image.Image) -> Image.Image:
    try:
        return _as_rgb(image)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"it cannot be decoded: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError("its 32-bit pixels have no fixed range; save it with 8 or 16 bits")
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise InputError("its floating-point pixels have no fixed range; save it with 8 bits")
    # Only blending would need it, and PIL warns about palettes that carry it.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _scaled(size: tuple[int, int], target: int) -> tuple[int, int]:
    """Width and height after the bicubic step, before the crop."""
    width, height = size
    while min(width, height) >= 2 * target:
        width, height = width // 2, height // 2
    scale = target / min(width, height)
    return round(width * scale), round(height * scale)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop of an RGB image of any size: (size, size, 3) uint8."""
    width, height = _scaled(image.size, size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def to_float(pixels: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Pixels (B, H, W, 3) uint8 -> images (B, 3, H, W) fp32 in [-1, 1] on ``device``."""
    tensor = torch.as_tensor(pixels)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    images = tensor.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> uint8, clamped and rounded to the nearest level."""
    return images.float().mul(127.5).add_(127.5).clamp_(0, 255).round_().to(torch.uint8)


class Images(Protocol):
    """What decoding needs of a source of images; see ``images.py``."""

    max_pixels: int

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def open(self, index: int) -> BinaryIO: ...


@dataclass(frozen=True)
class DecodedBatch:
    """A batch of squares.

    Attributes:
        indices: (B,) int64, numbers of the images in their source.
        pixels: (B, size, size, 3) uint8; zeros where the image is unreadable.
        unreadable: place in the batch -> reason.
    """

    indices: np.ndarray
    pixels: np.ndarray
    unreadable: dict[int, str]


def _give_way() -> None:
    """Let this thread compute only where the others leave a core idle.

    Otherwise the threads of a matrix product, which wait for each other, all wait for the one
    whose core decodes.
    """
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def default_threads() -> int:
    """Decoding threads: one a processor core that this process may use, at most 16."""
    allowed = getattr(os, "sched_getaffinity", None)
    return min(16, len(allowed(0)) if allowed else os.cpu_count() or 1)


class BatchDecoder:
    """Decodes batches on threads, ahead of their use (PIL releases the interpreter lock).

    Args:
        size: side of the squares in pixels.
        threads: decoding threads. ahead: batches being decoded while one is used.
    """

    def __init__(
        self,
        source: Images,
        size: int,
        *,
        threads: int,
        ahead: int = 2,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        self.source = source
        self.size = size
        self.ahead = ahead
        self._budget = MemoryBudget(memory_budget)
        self._threads = threads

    def batches(self, batches: Iterable[np.ndarray]) -> Generator[DecodedBatch, None, None]:
        """Decode the images of each array of indices, in order."""
        queue: deque[tuple[DecodedBatch, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode", initializer=_give_way)
        try:
            for indices in batches:
                pixels = np.zeros((len(indices), self.size, self.size, 3), np.uint8)
                batch = DecodedBatch(indices, pixels, {})
                # A job for each image would cost the caller's thread more, beside busy ones.
                jobs = [
                    pool.submit(self._decode, batch, places)
                    for places in np.array_split(
                        np.arange(len(indices)), min(len(indices), 2 * self._threads) or 1
                    )
                ]
                queue.append((batch, jobs))
                if len(queue) > self.ahead:
                    yield self._finished(*queue.popleft())
            while queue:
                yield self._finished(*queue.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, batch: DecodedBatch, places: np.ndarray) -> None:
        """Fill some places of a batch, or note why their images are unreadable."""
        for place in places.tolist():
            try:
                with self.source.open(int(batch.indices[place])) as file:
                    batch.pixels[place] = decode_square(
                        file, self.size, max_pixels=self.source.max_pixels, budget=self._budget
                    )
            except InputError as error:
                batch.unreadable[place] = str(error)

    @staticmethod
    def _finished(batch: DecodedBatch, jobs: list[Future[None]]) -> DecodedBatch:
        for job in jobs:
            job.result()
        return replace(batch, unreadable=dict(sorted(batch.unreadable.items())))
