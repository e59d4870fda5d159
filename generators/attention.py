"""Self-attention with a cache of keys and values, and with queries from a part of the tokens.

Widths are written W, heads H, head width D = W / H, B images, N tokens.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rope: TypeAlias = tuple[Tensor, Tensor]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding on adjacent channel pairs.

    Args:
        x: (B, H, N, D). rope: cosines and sines (N, D), the sine negative in a pair's first place:
            (a, b) -> (a cos - b sin, b cos + a sin).
    """
    cos, sin = rope
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class KeyValueCache:
    """Keys and values of the tokens seen so far, for one attention layer.

    Both buffers (B, H, capacity, D) are allocated once; `append` returns views of their
    filled part.
    """

    def __init__(
        self, batch: int, heads: int, capacity: int, head_width: int, like: Tensor
    ) -> None:
        self.keys = like.new_empty(batch, heads, capacity, head_width)
        self.values = like.new_empty(batch, heads, capacity, head_width)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (b, H, n, D) for the first b rows; returns all of theirs, (b, H, length, D)."""
        batch, start = len(keys), self.length
        self.length = stop = start + keys.shape[2]
        self.keys[:batch, :, start:stop] = keys
        self.values[:batch, :, start:stop] = values
        return self.keys[:batch, :, :stop], self.values[:batch, :, :stop]


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection with bias.

    timm's has neither rotary embedding with a cache nor queries from a part of the tokens.

    `q_norm` and `k_norm`, the identity unless a model replaces them, act on queries and keys over
    D, before the rotary embedding.

    Args:
        dropout: on the attention weights and on the output projection.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(width, width)

    def _project(self, x: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
        """`count` of (query, key, value) of x (B, N, W), from number `first`: (B, H, N, D)."""
        if count == 3:
            out = self.qkv(x)
        else:
            width = x.shape[-1]
            rows = slice(first * width, (first + count) * width)
            out = F.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return out.unflatten(-1, (count, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self,
        x: Tensor,
        *,
        queries: tuple[int, int] | None = None,
        rope: Rope | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x (B, N, W) -> (B, N, W), or (B, n, W) for `queries`, the first place and their number.

        With `cache`, x holds one new token a row, which attends to all cached ones and itself.
        """
        if queries is None:
            q, k, v = self._project(x, 0, 3)
        else:
            (q,) = self._project(x.narrow(1, *queries), 0, 1)
            k, v = self._project(x, 1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        out = self.proj(out.transpose(1, 2).flatten(2))  # (B, n, W)
        return F.dropout(out, dropout) if dropout else out
