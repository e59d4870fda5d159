"""What a tokenizer rebuilds from latents with noise and from part of its tokens.

The picture that shows what latent denoising is, and its numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detok_pipe.evaluation.reconstruction import psnr
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise
from detok_pipe.latents.posterior import Posterior
from detok_pipe.pipelines.config import TokenizerConfig, from_json
from detok_pipe.pipelines.decode import to_float, to_uint8
from detok_pipe.pipelines.pictures import ImageRow, to_images
from detok_pipe.pipelines.run_directory import read_config
from detok_pipe.pipelines.trained import TrainedTokenizer
from detok_pipe.tokenizer.model import LDeTok


@dataclass(frozen=True)
class Corrupted:
    """What a tokenizer rebuilds from latents corrupted in one way.

    Attributes:
        level: standard deviation of the noise, in the study's unit.
        sigma: the same in absolute units. hidden: share of tokens hidden from the encoder.
        psnr: dB, mean over images. rebuilt: (n, 3, S, S) uint8.
    """

    level: float
    sigma: float
    hidden: float
    psnr: float
    rebuilt: Tensor


@dataclass(frozen=True)
class CorruptionStudy:
    """A tokenizer under noise and masks.

    Attributes:
        latent_std: of the posterior's means, root of the mean over channels of their variance.
        cells: one a combination of level and mask ratio, levels outermost.
    """

    latent_std: float
    cells: list[Corrupted]

    def cell(self, level: float, hidden: float) -> Corrupted:
        """The cell of one noise level and mask ratio of the study."""
        return next(c for c in self.cells if (c.level, c.hidden) == (level, hidden))

    def to_json(self) -> dict[str, Any]:
        """The numbers, without the images."""
        cells = [
            {"noise": c.level, "sigma": c.sigma, "hidden": c.hidden, "psnr": c.psnr}
            for c in self.cells
        ]
        return {"latent std": self.latent_std, "cells": cells}

    def rows(self, originals: np.ndarray, shown: slice = slice(8)) -> list[ImageRow]:
        """The images ``shown`` of the study's originals, and below them what each cell rebuilt."""

        def row(label: str, images: np.ndarray | Tensor) -> ImageRow:
            return ImageRow(label, [(image,) for image in to_images(images[shown])])

        return [
            row("original", originals),
            *(
                row(f"noise {c.level:g}, {c.hidden:.0%} hidden: {c.psnr:.1f} dB", c.rebuilt)
                for c in self.cells
            ),
        ]


@torch.inference_mode()
def study_corruption(
    model: LDeTok,
    pixels: np.ndarray,
    *,
    levels: Sequence[float] = (0.0, 0.5, 1.0, 2.0),
    ratios: Sequence[float] = (0.0, 0.3, 0.5, 0.7),
    gamma: float = 0.0,
    unit: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    bf16: bool = False,
) -> CorruptionStudy:
    """Rebuild images from corrupted latents, at every noise level and mask ratio.

    Training with noise inflates the latents' spread, so by default a level is the noise's
    standard deviation divided by the tokenizer's own latent std: equal levels are equal ratios
    of noise to signal. The noise numbers and the hidden places are the same for every tokenizer
    of the same form, level and ratio.

    Args:
        pixels: (n, S, S, 3) uint8.
        levels: standard deviations of the noise in units of ``unit``, at least 0.
        ratios: shares of tokens to hide, in [0, 1).
        gamma: 0 adds the noise to the latents. Above 0 it is scaled as interpolative training
            with this gamma has it, (1 - tau) z + tau gamma eps, with the tau that gives the
            same ratio of noise to signal: the form that such a decoder knows.
        unit: of the levels; None: the tokenizer's latent std.
    """
    batches = list(_numbered(pixels, batch_size))
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        means = [
            Posterior(model.encode_moments(to_float(part, device)).float()).mean
            for _, part in batches
        ]
        variance = torch.cat(means).cpu().flatten(0, 1).double().var(dim=0, unbiased=False)
        latent_std = variance.mean().sqrt().item()
        cells = []
        for level in levels:
            sigma = level * (latent_std if unit is None else unit)
            tau, scale = (sigma / (gamma + sigma), gamma) if gamma else (1.0, sigma)
            for hidden in ratios:
                rebuilt = [
                    to_uint8(
                        model.rebuild(
                            to_float(part, device),
                            Noise(seed, numbers, device=device),
                            tau=tau,
                            gamma=scale,
                            noise_kind="interpolative" if gamma else "additive",
                            hidden=hidden,
                        ).reconstruction
                    ).cpu()
                    for numbers, part in batches
                ]
                images = torch.cat(rebuilt)
                original = torch.from_numpy(pixels).permute(0, 3, 1, 2)
                value = psnr(original, images).mean().item()
                cells.append(Corrupted(level, sigma, hidden, value, images))
    return CorruptionStudy(latent_std, cells)


def study_run(
    tokenizer: TrainedTokenizer,
    pixels: np.ndarray,
    *,
    levels: Sequence[float],
    ratios: Sequence[float],
    device: torch.device | str = "cpu",
) -> CorruptionStudy:
    """`study_corruption` of a tokenizer run, with the noise in the form that it was trained on.

    Raises:
        ConfigError: a tokenizer that is no l-DeTok.
    """
    model = tokenizer.model
    if not isinstance(model, LDeTok):
        raise ConfigError(f"{tokenizer.path}: only l-DeTok tokenizers can hide tokens")
    record = read_config(tokenizer.path, "tokenizer")
    config = from_json(TokenizerConfig, record["config"], where=str(tokenizer.path))
    return study_corruption(
        model,
        pixels,
        levels=levels,
        ratios=ratios,
        gamma=config.blended_gamma,
        device=device,
    )


def _numbered(pixels: np.ndarray, size: int) -> Iterator[tuple[range, np.ndarray]]:
    """Batches of images with their numbers."""
    for start in range(0, len(pixels), size):
        stop = min(start + size, len(pixels))
        yield range(start, stop), pixels[start:stop]
