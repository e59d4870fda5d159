"""Pieces that the generators share: embeddings, adaLN modulation, transformer blocks.

Module and parameter names follow the published checkpoints. Widths are written W, heads H, head
width D = W / H, B images, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias, cast

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from detok_pipe.generators.attention import Attention, KeyValueCache, Rope
from detok_pipe.latents.noise import Noise, ReplayNoise

LAYER_NORM_EPS = 1e-6
plain_layer_norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS, elementwise_affine=False)
AnyNoise: TypeAlias = Noise | ReplayNoise


def on_device(values: np.ndarray | Sequence[float], device: torch.device | str) -> Tensor:
    """Numbers from the host as fp32, without waiting for the device."""
    return torch.as_tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def timestep_features(t: Tensor, size: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of t (...,): fp32 (..., size), cosines first, then sines."""
    half = size // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = t.float().unsqueeze(-1) * torch.exp(-math.log(max_period) * exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoidal features, then linear-SiLU-linear: t (...,) -> (..., W)."""

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(timestep_features(t, self.features).to(dtype))


def drop_labels(condition: Tensor, probability: float, noise: AnyNoise) -> Tensor:
    """Labels (B,) with some replaced by -1 (null), for guidance; noise name "label_drop"."""
    if probability <= 0:
        return condition
    dropped = noise.uniform("label_drop", ()) < probability
    return condition.masked_fill(dropped, -1)


def learned_vectors(*shape: int) -> nn.Parameter:
    """A table of vectors (1, *shape) to be learned, standard deviation 0.02."""
    return nn.Parameter(torch.randn(1, *shape) * 0.02)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, scale + 1)


class Modulation(nn.Sequential):
    """linear(SiLU(condition)) to `parts` vectors of `width`."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))

    def chunks(self, parts: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The linear layer's weights and biases, each cut into its `parts`."""
        linear = cast(nn.Linear, self[1])
        return linear.weight.chunk(parts), linear.bias.chunk(parts)


class FinalLayer(nn.Module):
    """Modulated norm, then a linear layer. x (..., W), condition y that broadcasts to it."""

    def __init__(
        self, width: int, out: int, norm: Callable[[int], nn.Module] = plain_layer_norm
    ) -> None:
        super().__init__()
        self.norm = norm(width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


def init_linear_layers(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in every linear layer below `module`.

    Modulations and final layers become zero, so that a block starts as the identity and a
    network predicts zero.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            if name.endswith(("adaLN_modulation.1", "final_layer.linear")):
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def gelu_mlp(width: int) -> nn.Module:
    """linear-GELU-linear, 4 times as wide inside."""
    return Mlp(width, 4 * width)


class Block(nn.Module):
    """Pre-norm transformer block (LayerNorm, attention, GELU MLP) without condition.

    `dropout` acts in the attention, not in the MLP.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = gelu_mlp(width)

    def forward(self, x: Tensor, queries: tuple[int, int] | None = None) -> Tensor:
        """x (B, N, W) -> (B, N, W), or (B, n, W) for `queries`, the first place and their number.

        Numbers, not a slice: torch.compile would compile once for each slice.
        """
        attended = self.attn(self.norm1(x), queries=queries)
        x = (x if queries is None else x.narrow(1, *queries)) + attended
        return x + self.mlp(self.norm2(x))


class AdaLNBlock(nn.Module):
    """Transformer block whose norms are modulated and whose branches are gated by a condition.

    Peebles and Xie 2023, "Scalable diffusion models with transformers" (adaLN-zero).

    Args:
        norm: makes norm1 and norm2 from the width.
        mlp: makes the MLP from the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        norm: Callable[[int], nn.Module],
        mlp: Callable[[int], nn.Module] = gelu_mlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = norm(width)
        self.mlp = mlp(width)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(
        self,
        x: Tensor,
        parts: Tensor,
        *,
        rope: Rope | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x (B, N, W) -> (B, N, W).

        Args:
            parts: `adaLN_modulation` of the condition, (B, N, 6 W), or (B, 1, 6 W) where all
                tokens of an image share it: (shift, scale, gate) of attention, then of the MLP.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, dim=-1)
        attended = self.attn(
            modulate(self.norm1(x), shift1, scale1), rope=rope, causal=causal, cache=cache
        )
        x = torch.addcmul(x, gate1, attended)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))
