"""The diffusion head's network: a small MLP that denoises one token given a condition vector.

Li et al. 2024, "Autoregressive image generation without vector quantization". Rows R are tokens
of any images, C a token's channels, Z the condition's width, W the head's width.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from detok_pipe.generators.layers import (
    LAYER_NORM_EPS,
    FinalLayer,
    Modulation,
    TimeEmbedding,
    init_linear_layers,
    modulate,
)


class ResidualBlock(nn.Module):
    """x + gate * MLP(modulated LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = Modulation(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(modulate(self.in_ln(x), shift, scale)))


class HeadNet(nn.Module):
    """The head's network: (x_t, t, condition) -> (eps, v)."""

    def __init__(self, channels: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Start values of all layers; the network then predicts zero."""
        init_linear_layers(self)
        for name in ("0.weight", "2.weight"):
            nn.init.normal_(self.time_embed.mlp.get_parameter(name), std=0.02)

    @property
    def blocks(self) -> Iterable[ResidualBlock]:
        """`res_blocks`, typed."""
        return cast(Iterable[ResidualBlock], self.res_blocks)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x (..., R, C), t (..., R), condition (R, Z), shared by the leading dimensions."""
        y = self.time_embed(t) + self.cond_embed(condition)
        x = self.input_proj(x)
        for block in self.blocks:
            x = block(x, y)
        return self.final_layer(x, y)  # (..., R, 2C)
