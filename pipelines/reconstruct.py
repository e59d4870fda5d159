"""How well a tokenizer rebuilds images: scores and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn

from detok_pipe.evaluation.features import FeatureExtractor, load_extractor
from detok_pipe.evaluation.frechet import FeatureMoments, FrechetReference
from detok_pipe.evaluation.inception_score import inception_score
from detok_pipe.evaluation.reconstruction import ReconstructionMetrics, psnr
from detok_pipe.latents.errors import InputError, NonFiniteError
from detok_pipe.pipelines.decode import (
    BatchDecoder,
    DecodedBatch,
    default_threads,
    to_float,
    to_uint8,
)
from detok_pipe.pipelines.images import ImageSource
from detok_pipe.pipelines.perceptual import lpips_term
from detok_pipe.pipelines.pictures import labelled_grid, reconstruction_rows, to_images
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import progress
from detok_pipe.tokenizer.contract import Tokenizer

BASELINE_IMAGES = 1024
"""The mean image, whose PSNR is the baseline, is that of at most so many images."""

_INCEPTION_SPLITS = 10


@torch.inference_mode()
def rebuild(model: Tokenizer, images: Tensor, *, bf16: bool = False) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> uint8 (B, 3, H, W), decoded from the posterior's mean.

    Raises:
        NonFiniteError: the decoder's output is not finite.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        moments = model.encode_moments(images)
        rebuilt = model.decode(moments[..., : model.channels].float())
    # As uint8, what is not a number would be a black pixel.
    if not torch.isfinite(rebuilt).all():
        raise NonFiniteError("the tokenizer rebuilds images with pixels that are NaN or infinite")
    return to_uint8(rebuilt)


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """``wanted`` of the numbers 0 ... count - 1, spread evenly (sources are sorted by class)."""
    wanted = min(count, wanted)
    return np.arange(wanted) * count // max(1, wanted)


def load_squares(
    source: ImageSource, indices: Sequence[int] | np.ndarray, size: int
) -> tuple[np.ndarray, list[str]]:
    """Decoded and cropped images, (n, size, size, 3) uint8, and the names of unreadable ones.

    Raises:
        InputError: none of them is readable.
    """
    decoder = BatchDecoder(source, size, threads=default_threads())
    batch = next(decoder.batches([np.asarray(indices)]))
    readable, unreadable = _readable(batch, source)
    if not len(readable):
        raise InputError(f"none of {len(batch.indices)} images is readable: {unreadable[0]}")
    return readable, unreadable


def _readable(batch: DecodedBatch, source: ImageSource) -> tuple[np.ndarray, list[str]]:
    """The readable squares, and "name: reason" of the others."""
    bad = batch.unreadable
    names = [f"{source.name(int(batch.indices[i]))}: {why}" for i, why in sorted(bad.items())]
    return np.delete(batch.pixels, sorted(bad), axis=0), names


class _Share:
    """What one process measured on its part of the images."""

    def __init__(self) -> None:
        self.pairs = ReconstructionMetrics()
        self.real, self.fake = FeatureMoments(), FeatureMoments()
        self.logits: dict[int, np.ndarray] = {}  # by number in the source
        self.lpips_sum = 0.0
        self.unreadable: list[str] = []

    def add(
        self,
        numbers: np.ndarray,
        images: Tensor,
        rebuilt: Tensor,
        extractor: FeatureExtractor | None,
        lpips: nn.Module | None,
    ) -> None:
        """Add pairs of uint8 images (B, 3, H, W), numbered in the source (B,)."""
        self.pairs.update(images, rebuilt)
        if lpips is not None:
            self.lpips_sum += lpips(rebuilt / 255, images / 255).item() * len(images)
        if extractor is not None:
            self.real.update(extractor(images)["features"].cpu().numpy())
            found = extractor(rebuilt)
            self.fake.update(found["features"].cpu().numpy())
            if found["logits"] is not None:
                self.logits.update(
                    zip(numbers.tolist(), found["logits"].cpu().numpy(), strict=True)
                )

    def merge(self, other: "_Share") -> None:
        """Add what another process measured."""
        self.pairs.merge(other.pairs)
        self.real.merge(other.real)
        self.fake.merge(other.fake)
        self.logits |= other.logits
        self.lpips_sum += other.lpips_sum
        self.unreadable += other.unreadable


class Measures(TypedDict):
    """The networks that `evaluate_tokenizer` measures with."""

    extractor: FeatureExtractor | None
    lpips: nn.Module | None


def open_measures(
    processes: Processes,
    *,
    features: str,
    resolution: int | None = None,
    lpips: bool = False,
    weights_dir: Path | None = None,
) -> Measures:
    """The networks that a user chose, with their published weights.

    Args:
        features: a name for `load_extractor`, or "none". resolution: of its input.
        lpips: whether LPIPS is wanted. weights_dir: where weights are looked for first.

    Raises:
        WeightsError: weights are not to be had. ConfigError: see `load_extractor`.
    """
    device = processes.device
    with processes.main_first():
        return {
            "extractor": None
            if features == "none"
            else load_extractor(
                features, resolution=resolution, weights_dir=weights_dir, device=device
            ),
            "lpips": lpips_term(weights_dir=weights_dir).to(device) if lpips else None,
        }


def evaluate_tokenizer(
    model: Tokenizer,
    source: ImageSource,
    *,
    image_size: int,
    extractor: FeatureExtractor | None = None,
    lpips: nn.Module | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    bf16: bool = False,
    limit: int | None = None,
    accelerator: Accelerator | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Rebuild every image once and score the results; streams, on all processes.

    Args:
        extractor: for the Fréchet distance and the inception score; None: leave them out.
        lpips: a ``tokenizer.perceptual.LPIPS``; None: leave it out.
        limit: score only so many images, evenly spaced in the source.
        accelerator: where there are several processes, each takes its share; all return
            the scores of the whole.

    Returns:
        "images" (count), "unreadable" (list of "name: reason"), "psnr" in dB and "ssim" (mean
        over images), "psnr of the mean image" in dB (what a decoder gets that ignores its
        input), and if asked for "lpips", "r" + the extractor's name (say "rFID"), "is" and
        "is std". The Fréchet distance of fewer images than "feature dimensions" is strongly
        biased: compare it at equal counts only.

    Raises:
        InputError: no image is readable. NonFiniteError: the decoder's output is not finite.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    chosen = evenly_spaced(len(source), limit or len(source))
    if not len(chosen):
        raise InputError("there are no images to evaluate the tokenizer on")
    mine = chosen[rank::world]
    share = _Share()
    decoder = BatchDecoder(source, image_size, threads=default_threads())
    slices = (mine[i : i + batch_size] for i in range(0, len(mine), batch_size))
    with (
        torch.inference_mode(),
        progress("rebuild", total=len(mine), quiet=quiet or rank > 0) as task,
    ):
        for batch in decoder.batches(slices):
            pixels, unreadable = _readable(batch, source)
            share.unreadable += unreadable
            if len(pixels):
                rebuilt = rebuild(model, to_float(pixels, device), bf16=bf16)
                original = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(rebuilt.device)
                numbers = np.delete(batch.indices, sorted(batch.unreadable))
                share.add(numbers, original, rebuilt, extractor, lpips)
            task.advance(len(batch.indices))
    first, *others = gather_object([share]) if world > 1 else [share]
    for other in others:
        first.merge(other)
    some = chosen[evenly_spaced(len(chosen), BASELINE_IMAGES)]
    baseline, _ = load_squares(source, some, image_size)
    return _scores(first, extractor, lpips is not None, mean_image_psnr(baseline))


def _scores(
    share: _Share, extractor: FeatureExtractor | None, with_lpips: bool, baseline: float
) -> dict[str, Any]:
    pairs = share.pairs.result()
    scores: dict[str, Any] = {
        "images": pairs["count"],
        "unreadable": share.unreadable,
        "psnr": pairs["psnr"],
        "ssim": pairs["ssim"],
        "psnr of the mean image": baseline,
    }
    if with_lpips:
        scores["lpips"] = share.lpips_sum / pairs["count"]
    if extractor is not None and share.fake.count > 1:
        reference = FrechetReference(share.real.finish())
        scores[f"r{extractor.name}"] = reference.distance(share.fake.finish())
        scores["feature dimensions"] = extractor.dimensions
        if share.logits and pairs["count"] >= _INCEPTION_SPLITS:
            # In the source's order, since the score splits them.
            logits = np.stack([share.logits[number] for number in sorted(share.logits)])
            scores["is"], scores["is std"] = inception_score(logits, splits=_INCEPTION_SPLITS)
    return scores


def mean_image_psnr(pixels: np.ndarray) -> float:
    """Mean PSNR in dB of images (n, S, S, 3) uint8 against their mean image."""
    total = np.zeros(pixels.shape[1:])
    for image in pixels:
        total += image
    mean = np.round(total / len(pixels)).astype(np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    mean_image = torch.from_numpy(mean).permute(2, 0, 1)[None]
    values = [psnr(image[None], mean_image).item() for image in images]
    return sum(values) / len(values)


def reconstruction_picture(
    model: Tokenizer,
    pixels: np.ndarray,
    *,
    columns: int = 8,
    side: int | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    bf16: bool = False,
) -> Image.Image:
    """A grid, each original above what the tokenizer makes of it.

    Args:
        pixels: (n, S, S, 3) uint8, as from `load_squares`.
        side: see `labelled_grid`.
    """
    parts = [pixels[i : i + batch_size] for i in range(0, len(pixels), batch_size)]
    rebuilt = torch.cat([rebuild(model, to_float(p, device), bf16=bf16).cpu() for p in parts])
    rows = reconstruction_rows(to_images(pixels), to_images(rebuilt))
    return labelled_grid(rows, columns=min(columns, len(pixels)), side=side)
