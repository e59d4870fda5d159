"""What latent denoising does to the latents in training: masks and noise.

Yang et al., "Latent Denoising Makes Good Visual Tokenizers" (arXiv 2507.15856). The functions
are pure; the random numbers are passed in.
"""

import math

import torch
from torch import Tensor

from detok_pipe.latents.errors import ConfigError

NOISE_KINDS = ("interpolative", "additive")
MASK_KINDS = ("random", "constant")

# The random mask ratio is drawn from below zero, so that some batches are not masked at all.
_LOWEST_RATIO = -0.1


def draw_mask_ratio(uniform: float, mask_ratio: float, kind: str = "random") -> float:
    """The share of tokens to hide in one batch.

    "random": max(0, U(-0.1, mask_ratio)); "constant": mask_ratio itself.

    Args:
        uniform: a number in [0, 1), the same on all processes. A host number, because the
            count of visible tokens is a tensor shape.

    Raises:
        ConfigError: mask_ratio outside [0, 1), or an unknown kind.
    """
    if not 0 <= mask_ratio < 1:
        raise ConfigError(f"mask_ratio must be in [0, 1), and is {mask_ratio}")
    if kind not in MASK_KINDS:
        raise ConfigError(f"mask kind {kind!r} is unknown: choose one of {', '.join(MASK_KINDS)}")
    if kind == "constant":
        return mask_ratio
    return max(0.0, _LOWEST_RATIO + uniform * (mask_ratio - _LOWEST_RATIO))


def visible_tokens(tokens: int, ratio: float) -> int:
    """ceil(tokens (1 - ratio)), at least 1 for a ratio below 1."""
    # Rounded first: 10 * (1 - 0.7) is 3.0000000000000004 in floating point.
    return max(1, math.ceil(round(tokens * (1 - ratio), 9)))


def choose_visible(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose ``count`` tokens an image: those with the lowest scores, in ascending order.

    Args:
        scores: (B, N) one number a token, uniform noise in training.

    Returns:
        keep (B, count) int64, token numbers in the (shuffled) order in which they are encoded;
        restore (B, N) int64: position of each token in the shuffled order.
    """
    order = scores.argsort(dim=1)
    return order[:, :count], order.argsort(dim=1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, C), index (B, V) int64 -> x[b, index[b, v]] (B, V, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def add_noise(z: Tensor, eps: Tensor, tau: Tensor | float, gamma: float, kind: str) -> Tensor:
    """Corrupt latents with noise of level ``tau``.

    "interpolative": (1 - tau) z + tau gamma eps; "additive": z + tau gamma eps.

    Args:
        z: (B, V, C). eps: the same shape, standard normal.
        tau: noise level in [0, 1]: one number, or (B,) one an image.
        gamma: standard deviation of the noise at tau = 1, in units of z.

    Raises:
        ConfigError: unknown kind.
    """
    if kind not in NOISE_KINDS:
        raise ConfigError(f"noise kind {kind!r} is unknown: choose one of {', '.join(NOISE_KINDS)}")
    level = torch.as_tensor(tau, dtype=z.dtype, device=z.device).reshape(-1, 1, 1)
    noise = level * gamma * eps
    return z + noise if kind == "additive" else (1 - level) * z + noise
