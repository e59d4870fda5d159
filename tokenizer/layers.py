"""Layers of the tokenizer: rotary positions, attention, SwiGLU, block, tokens to pixels.

Parameter names are those of the released l-DeTok checkpoints. Normalisation is
``torch.nn.RMSNorm``, attention ``scaled_dot_product_attention``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


def rope_table(grid: tuple[int, int], head_dim: int) -> Tensor:
    """Cosines and signed sines of the tokenizer's 2-D rotary embedding.

    The angle of a token is 2 pi x coordinate x frequency with coordinates running from 0 to 1
    over the grid, whatever its size, and head_dim/4 geometrically spaced frequencies from 7 to
    7e-4. The first half of the channels turns with the row, the second with the column; inside
    a half the frequencies are repeated as a block, [f, f], although the rotation acts on
    adjacent pairs: the two members of a pair thus turn by different angles. That is how the
    released weights were trained.

    Args:
        grid: (rows, columns) of the token grid.
        head_dim: channels of one attention head, a multiple of 4.

    Returns:
        (2, rows * columns, head_dim) fp32: cosines, and sines that are negative at the even
        channels, so that `rotate` needs two products and no concatenation.
    """
    rows, columns = grid
    quarter = head_dim // 4
    frequencies = 7.0 * (7.0 / 7e-4) ** torch.linspace(0, -1, quarter, dtype=torch.float64)
    frequencies = (2 * math.pi * frequencies).repeat(2)  # (head_dim / 2)
    row = torch.linspace(0, 1, rows, dtype=torch.float64)[:, None] * frequencies
    column = torch.linspace(0, 1, columns, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat(
        [row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], dim=-1
    ).reshape(rows * columns, head_dim)
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(head_dim // 2)
    return torch.stack([angles.cos(), angles.sin() * sign]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn adjacent channel pairs of ``x`` by the angles of ``rope``, in fp32.

    Args:
        x: (B, N, ..., D) any float dtype.
        rope: (2, N, D) or (2, B, N, D) from `rope_table`.

    Returns:
        The shape of ``x``, fp32.
    """
    # One angle a token, the same for all the dimensions between token and channel.
    cos, sin = rope.reshape(*rope.shape[:-1], *(1,) * (x.ndim - 3), rope.shape[-1])
    x = x.float()
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, (B, H, N, D) each -> (B, H, N, D) in the dtype of ``v``."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    # On a CPU the backward pass in bf16 takes 13 times as long as in fp32 (torch 2.14).
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v.float()).to(v.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, fused qkv with bias, rotary positions on queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x (B, N, width), rope as for `rotate` -> (B, N, width)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D)
        qk, v = qkv.split((2, 1), dim=2)
        q, k = rotate(qk, rope).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        x = attend(q, k, v.squeeze(2).transpose(1, 2))
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w3(silu(gate) * value) with (gate, value) from one projection; hidden int(8/3 width).

    timm's SwiGLU is the same function under other parameter names.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x (B, N, width), rope as for `rotate` -> (B, N, width)."""
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class ToMap(nn.Module):
    """Tokens (B, N, D) to a map (B, D, rows, columns)."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D, rows, columns)."""
        return x.transpose(1, 2).unflatten(2, self.grid)


class PixelShuffle(nn.Module):
    """A map whose channels are (row in patch, column in patch, colour), to pixels.

    ``torch.nn.PixelShuffle`` expects the colour first.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, p * p * 3, rows, columns) -> (B, 3, rows * p, columns * p)."""
        p = self.patch_size
        x = x.unflatten(1, (p, p, 3)).permute(0, 3, 4, 1, 5, 2)  # (B, 3, rows, p, columns, p)
        return x.flatten(4).flatten(2, 3)
