"""What MAR, RandomAR and RasterAR share: tokens, labels, and a diffusion head for each token.

B images, N tokens (N p^2 latent places for patch size p), c = C p^2 channels a token, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detok_pipe.generators.diffusion import schedule
from detok_pipe.generators.generator import GUIDANCE_OPTIONS, Generator
from detok_pipe.generators.head import DiffusionHead
from detok_pipe.generators.layers import (
    AnyNoise,
    drop_labels,
    init_linear_layers,
    learned_vectors,
)
from detok_pipe.generators.patch import patchify, token_grid, unpatchify
from detok_pipe.generators.sampling import Sampling


class TokenGenerator(Generator):
    """Base of the generators whose transformer gives each token's condition to a diffusion head.

    A subclass makes its own layers, then calls `init_weights`. Module and parameter names follow
    the published checkpoints.

    Args:
        width: W. grid: latent grid, (h, w) or (n,). channels: latent channels C.
        num_classes: labels. head_width, head_depth: of the diffusion head.
        patch_size: latent places a token's side covers.
        label_drop: share of labels replaced by null in training.
        head_draws: (t, noise) pairs a token in the loss.

    Raises:
        ConfigError: the patches do not tile the grid.
    """

    sampling_options = GUIDANCE_OPTIONS | {"temperature", "clip", "steps"}

    def __init__(
        self,
        *,
        width: int,
        grid: Sequence[int],
        channels: int,
        num_classes: int,
        head_width: int = 1024,
        head_depth: int = 3,
        patch_size: int = 1,
        label_drop: float = 0.1,
        head_draws: int = 4,
    ) -> None:
        super().__init__()
        self.grid, self.channels, self.num_classes = tuple(grid), channels, num_classes
        self.tokens = math.prod(token_grid(grid, patch_size))
        self.patch_size, self.token_channels = patch_size, channels * patch_size**2
        self.label_drop, self.head_draws = label_drop, head_draws
        self.fake_latent = learned_vectors(width)  # the null class
        self.class_emb = nn.Embedding(num_classes, width)
        self.diffloss = DiffusionHead(
            self.token_channels, width, width=head_width, depth=head_depth
        )

    def init_weights(self) -> None:
        """Start values of all linear layers and of the class embedding."""
        init_linear_layers(self)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.diffloss.net.init_weights()

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if sampling.steps is not None:
            schedule("cosine", sampling.steps)  # so many can be

    def own_sampling(self, sampling: Sampling) -> dict[str, Any]:
        return {"steps": 100}

    def embed_labels(self, condition: Tensor) -> Tensor:
        """Labels (B,), -1 for null -> (B, W)."""
        table = torch.cat((self.class_emb.weight, self.fake_latent))
        return F.embedding(torch.where(condition < 0, self.num_classes, condition), table)

    def training_inputs(
        self, z: Tensor, condition: Tensor, noise: AnyNoise
    ) -> tuple[Tensor, Tensor]:
        """Latents (B, N p^2, C) as tokens (B, N, c); labels (B,), some dropped in training."""
        if self.training:
            condition = drop_labels(condition, self.label_drop, noise)
        return patchify(z, self.grid, self.patch_size, "crq"), condition

    def assembled(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Tokens (B, N, c), the k-th at place order[:, k], as latents (B, N p^2, C)."""
        raster = order.argsort(dim=1)
        return unpatchify(pick(tokens, raster), self.grid, self.patch_size, "crq")

    def compile_sampler(self) -> None:
        """Let `sample` compile the head's steps; on CUDA its whole loop becomes a CUDA graph."""
        self.diffloss.compile_sampler()


def pick(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, N, c) at `places` (B, n) int64 -> (B, n, c)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
