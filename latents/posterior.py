"""The encoder's output: a diagonal Gaussian for every token, or a point."""

from __future__ import annotations

import torch
from torch import Tensor

LOGVAR_MIN = -30.0
LOGVAR_MAX = 20.0


class Posterior:
    """Diagonal Gaussian over latents, from moments (..., 2C): mean (..., C), then log variance.

    The log variance is clamped to [-30, 20], as latent diffusion's autoencoders do.

    Args:
        moments: mean and log variance.
        exact: ``moments`` are the latents themselves (..., C), of a tokenizer without a
            posterior: the std is 0.

    Attributes:
        mean: (..., C).
        logvar: (..., C), clamped; minus infinity where exact.
    """

    def __init__(self, moments: Tensor, *, exact: bool = False) -> None:
        if exact:
            self.mean, self.logvar = moments, torch.full_like(moments, -torch.inf)
            return
        self.mean, logvar = moments.chunk(2, dim=-1)
        self.logvar = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)

    @property
    def std(self) -> Tensor:
        """Standard deviation, (..., C)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std * eps, for standard normal ``eps`` (..., C)."""
        return self.mean + self.std * eps

    def kl(self) -> Tensor:
        """KL divergence to N(0, I) in nats, summed over all but the first dimension: (B,)."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)
