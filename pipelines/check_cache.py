"""The test before days of training: does a cache hold what its images give now?

A wrong crop, encoder, normalisation or image order shows here as a number and as a picture:
images, cached rows decoded, and reconstructions without the cache.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detok_pipe.evaluation.reconstruction import psnr
from detok_pipe.latents.cache import LatentCache
from detok_pipe.latents.errors import ConfigError, InputError, MismatchError
from detok_pipe.latents.noise import Noise
from detok_pipe.latents.plan import CachePlan
from detok_pipe.latents.publish import plan_of
from detok_pipe.pipelines.decode import BatchDecoder, default_threads, to_float, to_uint8
from detok_pipe.pipelines.encode import check_made_from, moments_on_device
from detok_pipe.pipelines.held_out import drawn_rows
from detok_pipe.pipelines.images import ImageSource
from detok_pipe.pipelines.pictures import ImageRow, labelled_grid, to_images
from detok_pipe.pipelines.trained import (
    TrainedGenerator,
    TrainedTokenizer,
    check_tokenizer_fits,
)

LEAST_PSNR = 40.0
"""dB between the two decoded images; another crop, normalisation or image stays far below."""

LARGEST_DIFFERENCE = 0.05
"""Root mean square of the difference of latents, in standard deviations: fp16 rows alone are at
3e-4. The picture shows what matters, but a decoder can be blind to part of its latents."""

LEAST_PSNR_OF_SAMPLES = 20.0
"""dB for imported caches that hold one sample of each posterior, which differs from the mean."""

LARGEST_LOSS_DIFFERENCE = 0.01
"""Of a generator's loss on cached and fresh latents with the same noise, relative."""

PICTURED = 8
"""Images in the picture; numbers are of all."""

_SEED = 0


@dataclass(frozen=True)
class CacheCheck:
    """What was found.

    Attributes:
        picture: a column an image (the first eight): the image, its cached row decoded, its
            reconstruction.
        match: PSNR in dB of cached rows decoded against reconstructions, (n,).
        cached, online: PSNR in dB of both against the images, (n,).
        latents: root mean square of the difference of means, in standard deviations.
        losses: a generator's mean loss on cached and on fresh latents, or None.
        problems: what is too far apart, in words; empty where the cache is right.
    """

    picture: Image.Image
    match: np.ndarray
    cached: np.ndarray
    online: np.ndarray
    latents: float
    losses: tuple[float, float] | None
    problems: list[str]

    def lines(self) -> list[str]:
        """The numbers, for people."""
        found = [
            f"cached rows decoded, against reconstructions without the cache: PSNR at least "
            f"{self.match.min():.1f} dB over {len(self.match)} images",
            f"against the images: cached {self.cached.mean():.2f} dB, without the cache "
            f"{self.online.mean():.2f} dB",
            f"latents differ by {self.latents:.2g} standard deviations (root mean square)",
        ]
        if self.losses is not None:
            found.append(
                f"the generator's loss: {self.losses[0]:.5f} on cached latents, "
                f"{self.losses[1]:.5f} on fresh ones"
            )
        return found


def check_cache(
    cache: LatentCache,
    tokenizer: TrainedTokenizer,
    source: ImageSource,
    *,
    num: int = 8,
    generator: TrainedGenerator | None = None,
    device: torch.device | str = "cpu",
) -> CacheCheck:
    """Compare ``num`` rows, spread over the cache, with what their images give now.

    Args:
        tokenizer, source: those that the cache was made from.
        num: images are encoded and decoded in batches of the cache's ``batch_size``.
        generator: one trained on this tokenizer's latents; its loss on cached latents is set
            against that on fresh latents, which are normalised as the generator expects.

    Raises:
        MismatchError: tokenizer, images or generator are not those of the cache; names the field.
        InputError: an image is unreadable.
    """
    if num < 1:
        raise ConfigError(f"{num} images to compare; at least 1 is needed")
    device = torch.device(device)
    plan = plan_of(cache.manifest)
    imported = "imported" in plan.preprocessing
    if imported:
        check_tokenizer_fits(tokenizer, cache.tokenizer, f"the cache {cache.path}")
        _check_count(plan, source)
    else:
        check_made_from(plan, tokenizer, source, cache.path)
    _check_shape(cache, tokenizer)
    num = min(num, cache.num_rows)
    rows = np.arange(num) * cache.num_rows // num
    pieces, pictured = [], []
    for start in range(0, num, plan.batch_size):
        some = rows[start : start + plan.batch_size]
        pixels = _pixels(source, cache.source_ids[some], tokenizer.image_size)
        fresh = moments_on_device(tokenizer.model, to_float(pixels, device), plan)
        noise = Noise(_SEED, some, device=device)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
        decoded = _decoded(cache, tokenizer, fresh, some, noise)
        pieces.append(
            _Piece(
                psnr(*decoded).cpu().numpy(),
                psnr(decoded[0], images).cpu().numpy(),
                psnr(decoded[1], images).cpu().numpy(),
                _square(cache, fresh, some, noise),
                None if generator is None else _losses(cache, generator, fresh, some, noise),
            )
        )
        if start < PICTURED:
            pictured.append((images, *decoded))
    match = np.concatenate([piece.match for piece in pieces])
    weights = [len(piece.match) for piece in pieces]
    difference = float(np.sqrt(np.average([piece.square for piece in pieces], weights=weights)))
    problems = []
    samples = imported and not cache.has_posterior
    if match.min() < (least := LEAST_PSNR_OF_SAMPLES if samples else LEAST_PSNR):
        worst = int(cache.source_ids[rows[int(match.argmin())]])
        problems.append(
            f"{cache.path} does not hold the latents of its images: {source.name(worst)} decoded "
            f"from the cache is {match.min():.1f} dB from its reconstruction, less than "
            f"{least:.0f}; look at the picture, then encode again"
        )
    if difference > LARGEST_DIFFERENCE and not samples:
        problems.append(
            f"{cache.path} does not hold the latents of its images: they are {difference:.2g} "
            f"standard deviations apart, more than {LARGEST_DIFFERENCE}; encode again"
        )
    losses = None
    if generator is not None:
        each = [piece.losses for piece in pieces if piece.losses is not None]
        on_cached, on_fresh = np.average(each, axis=0, weights=weights)
        losses = float(on_cached), float(on_fresh)
        if abs(losses[0] - losses[1]) > LARGEST_LOSS_DIFFERENCE * abs(losses[1]):
            problems.append(
                f"the loss of {generator.path} is {losses[0]:.5f} on cached latents and "
                f"{losses[1]:.5f} on fresh ones, more than {LARGEST_LOSS_DIFFERENCE:.0%} apart"
            )
    shown = zip(
        ("image", "from the cache", "without the cache"),
        (torch.cat(images)[:PICTURED] for images in zip(*pictured, strict=True)),
        strict=True,
    )
    return CacheCheck(
        labelled_grid([ImageRow(label, [(i,) for i in to_images(x)]) for label, x in shown]),
        match,
        np.concatenate([piece.cached for piece in pieces]),
        np.concatenate([piece.online for piece in pieces]),
        difference,
        losses,
        problems,
    )


@dataclass(frozen=True)
class _Piece:
    """The numbers of :class:`CacheCheck` of some rows; ``square``: mean square of the difference
    of means."""

    match: np.ndarray
    cached: np.ndarray
    online: np.ndarray
    square: float
    losses: tuple[float, float] | None


def _decoded(
    cache: LatentCache,
    tokenizer: TrainedTokenizer,
    fresh: dict[str, Tensor],
    rows: np.ndarray,
    noise: Noise,
) -> list[Tensor]:
    """Images (B, 3, S, S) uint8 of cached and of fresh means."""
    cached = drawn_rows(cache, rows, "image", noise, sample_posterior=False)
    latents = cache.stats.denormalize(cached), fresh["image"][0]
    with torch.inference_mode():
        return [to_uint8(tokenizer.model.decode(z)) for z in latents]


def _square(cache: LatentCache, fresh: dict[str, Tensor], rows: np.ndarray, noise: Noise) -> float:
    """Mean square of the difference of cached and fresh means, normalised, over all views."""
    squares = []
    for view in cache.views:
        means = drawn_rows(cache, rows, view, noise, sample_posterior=False)
        expected = cache.stats.normalize(fresh[view][0])
        squares.append((means - expected).square().mean().item())
    return float(np.mean(squares))


def _check_shape(cache: LatentCache, tokenizer: TrainedTokenizer) -> None:
    """An imported cache only repeats what somebody said of its tokenizer."""
    wanted = cache.grid, cache.channels
    found = tuple(tokenizer.model.grid), tokenizer.model.channels
    for what, there, here in zip(("grid", "channels"), wanted, found, strict=True):
        if there != here:
            raise MismatchError(
                f"the latents of {cache.path} have {what} {there}, those of the tokenizer "
                f"{tokenizer.path} {here}; give the tokenizer that made them"
            )


def _check_count(plan: CachePlan, source: ImageSource) -> None:
    if plan.count != len(source):
        raise MismatchError(
            f"the imported cache has {plan.count} items, {source.path} {len(source)} images: they "
            "are compared by their number in sorted order, so the sets must be the same"
        )


def _pixels(source: ImageSource, indices: np.ndarray, size: int) -> np.ndarray:
    """Squares (n, size, size, 3) uint8 of images that must all be readable."""
    decoder = BatchDecoder(source, size, threads=default_threads())
    (batch,) = decoder.batches([indices])
    for place, reason in batch.unreadable.items():
        raise InputError(f"{source.name(int(indices[place]))} in {source.path}: {reason}")
    return batch.pixels


@torch.inference_mode()
def _losses(
    cache: LatentCache,
    generator: TrainedGenerator,
    fresh: dict[str, Tensor],
    rows: np.ndarray,
    noise: Noise,
) -> tuple[float, float]:
    """Mean loss over all views on cached and on fresh latents, with the same noise for both."""
    if generator.identity["tokenizer"] != cache.tokenizer["fingerprint"]:
        raise MismatchError(
            f"the generator {generator.path} was trained on latents of the tokenizer "
            f"{generator.identity['tokenizer']!r}, the cache is of "
            f"{cache.tokenizer['fingerprint']!r}"
        )
    labels = torch.from_numpy(cache.labels[rows].astype(np.int64)).to(noise.device)
    totals = np.zeros(2)
    draw = cache.has_posterior
    for view in cache.views:
        cached = drawn_rows(cache, rows, view, noise, sample_posterior=draw)
        mean, std = fresh[view]
        if draw:
            mean = mean + noise.normal("posterior", cache.manifest.row_shape) * std
        for place, z in enumerate((cached, generator.stats.normalize(mean))):
            totals[place] += float(generator.model(z, labels, noise)) / len(cache.views)
    return float(totals[0]), float(totals[1])
