"""Speed of `encode`: ways to decode, decoding by threads, and the whole against the encoder.

    python benchmarks/encoding.py                    # about 2 minutes on two cores
    python benchmarks/encoding.py --preset detok-bb --images 256 --device cuda --precision bf16

Expected on two cores: the whole at least 0.95 of the bare encoder, decoding on two threads about
twice as fast as on one. What the writer makes of the disk is in benchmarks/cache.py.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from detok_pipe.pipelines.decode import (
    BatchDecoder,
    center_crop,
    decode_square,
    default_threads,
    to_float,
)
from detok_pipe.pipelines.encode import encode, make_plan, moments_on_device
from detok_pipe.pipelines.estimate import untrained
from detok_pipe.pipelines.images import open_images
from detok_pipe.pipelines.tokenizer_presets import tokenizer_preset

SIZE = 256
SIDES = ((500, 375), (1024, 768), (2000, 1500))


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG that costs about what a photograph of its size does."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 12, width // 12, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


# ---------------------------------------------------------------- ways to decode and crop


def exact(data: bytes) -> np.ndarray:
    """What the product does: PIL's decoder, ADM's halvings and bicubic step."""
    return decode_square(io.BytesIO(data), SIZE)


def by_reduce(data: bytes) -> np.ndarray:
    """PIL's ``reduce`` instead of the halvings."""
    image, factor = Image.open(io.BytesIO(data)).convert("RGB"), 1
    while min(image.size) >= 2 * SIZE * factor:
        factor *= 2
    return center_crop(image.reduce(factor) if factor > 1 else image, SIZE)


def by_draft(data: bytes) -> np.ndarray:
    """PIL's ``draft``: the JPEG decoder itself scales by 1/2, 1/4 or 1/8."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (2 * SIZE, 2 * SIZE))
    return center_crop(image.convert("RGB"), SIZE)


def _torchvision(data: bytes) -> torch.Tensor:
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def torchvision_decoder(data: bytes) -> np.ndarray:
    """torchvision's decoder, then the product's crop."""
    pixels = _torchvision(data).permute(1, 2, 0).numpy()
    return center_crop(Image.fromarray(pixels), SIZE)


def torchvision_alone(data: bytes) -> np.ndarray:
    """torchvision's decoder and its resampling of uint8, one step."""
    image = _torchvision(data)
    image = v2.functional.resize(image, [SIZE], v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(image, [SIZE, SIZE]).permute(1, 2, 0).numpy()


WAYS: tuple[Callable[[bytes], np.ndarray], ...] = (
    exact,
    by_reduce,
    by_draft,
    torchvision_decoder,
    torchvision_alone,
)


def ways_to_decode(seconds: float) -> dict[str, Any]:
    """Images a second on one core, and how far pixels are from the exact ones."""
    result: dict[str, Any] = {}
    for width, height in SIDES:
        files = [photograph(width, height, seed) for seed in range(6)]
        wanted = [exact(data).astype(int) for data in files]
        for way in WAYS:
            apart = [np.abs(way(data) - right) for data, right in zip(files, wanted, strict=True)]
            count, start = 0, time.thread_time()
            while time.thread_time() - start < seconds:
                way(files[count % len(files)])
                count += 1
            speed = count / (time.thread_time() - start)
            levels, share = (
                max(int(d.max()) for d in apart),
                np.mean([(d > 0).mean() for d in apart]),
            )
            result[f"{width} x {height}, {way.__name__}"] = {
                "images/s": speed,
                "levels": levels,
                "share": float(share),
            }
            click.echo(
                f"{width} x {height:<5} {way.__name__:20}{speed:8.0f} images/s a core   "
                + ("exact" if not levels else f"up to {levels} levels off in {share:.0%} of values")
            )
    return result


# ---------------------------------------------------------------- the stages and the whole


class Instant:
    """An encoder that takes no time: latents are the first pixels."""

    grid = (16, 16)
    channels = 16
    has_posterior = True

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(len(images), -1)[:, : 256 * 32].reshape(-1, 256, 32)


@dataclass
class Stub:
    """A tokenizer around :class:`Instant`."""

    model: Any = field(default_factory=Instant)
    image_size: int = SIZE
    identity: dict[str, Any] = field(default_factory=lambda: {"fingerprint": "instant"})
    stats: None = None


def write_images(root: Path, count: int) -> Path:
    for number in range(count):
        path = root / f"class{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(500, 375, number % 64))
    return root


def decoding_by_threads(images: Path) -> dict[str, float]:
    """Images a second of reading, decoding and cropping."""
    source = open_images(images)
    batches = list(np.array_split(np.arange(len(source)), len(source) // 32))
    result = {}
    for threads in [n for n in (1, 2, 4, 8, 16) if n <= default_threads()]:
        decoder = BatchDecoder(source, SIZE, threads=threads)
        start = time.perf_counter()
        for _ in decoder.batches(batches):
            pass
        result[str(threads)] = len(source) / (time.perf_counter() - start)
        click.echo(
            f"decoding on {threads} threads: {result[str(threads)]:.0f} images/s, "
            f"{result[str(threads)] / result['1']:.2f} times one"
        )
    return result


def whole_against_encoder(
    images: Path, out: Path, preset: str, precision: str, device: torch.device, repeat: int
) -> dict[str, float]:
    """Throughput of `encode`, from open images to manifest, over that of the network alone."""
    source = open_images(images)
    tokenizer = untrained(tokenizer_preset(preset), device)
    plan = make_plan(
        tokenizer, source, batch_size=32, precision=precision, device=device, rows_per_record=32
    )
    (batch,) = BatchDecoder(source, SIZE, threads=2).batches([np.arange(32)])
    ready = to_float(batch.pixels, device)
    count = len(source) // 32 * 32

    def bare() -> float:
        start = time.perf_counter()
        for _ in range(count // 32):
            for values in moments_on_device(tokenizer.model, ready, plan).values():
                values.cpu()
        return count / (time.perf_counter() - start)

    def whole(number: int) -> float:
        start = time.perf_counter()
        encode(tokenizer, source, out / str(number), plan, device=device, quiet=True)
        return len(source) / (time.perf_counter() - start)

    bare()
    pairs = [(bare(), whole(number)) for number in range(repeat)]
    result = {
        "bare": statistics.median(b for b, _ in pairs),
        "whole": statistics.median(w for _, w in pairs),
        "ratio": statistics.median(w / b for b, w in pairs),
    }
    click.echo(
        f"{preset} in {precision} on {device}: encoder alone {result['bare']:.2f} images/s, encode "
        f"{result['whole']:.2f} images/s, ratio {result['ratio']:.3f}"
    )
    return result


@click.command()
@click.option("--preset", default="detok-sb", show_default=True, help="Of the tokenizer.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32")
@click.option("--device", default="cpu", show_default=True)
@click.option("--images", default=64, show_default=True, help="For the whole against the encoder.")
@click.option("--repeat", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers as JSON.")
def main(
    preset: str, precision: str, device: str, images: int, repeat: int, out: Path | None
) -> None:
    with tempfile.TemporaryDirectory(prefix="detok-encoding-") as folder:
        root = Path(folder)
        numbers: dict[str, Any] = {"ways": ways_to_decode(0.7)}
        many = write_images(root / "many", 512)
        numbers["threads"] = decoding_by_threads(many)
        source = open_images(many)
        start = time.perf_counter()
        encode(Stub(), source, root / "stub", make_plan(Stub(), source), quiet=True)
        numbers["without encoder"] = len(source) / (time.perf_counter() - start)
        click.echo(f"encode without an encoder: {numbers['without encoder']:.0f} images/s")
        numbers["whole"] = whole_against_encoder(
            write_images(root / "few", images),
            root / "whole",
            preset,
            precision,
            torch.device(device),
            repeat,
        )
    if out is not None:
        out.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
