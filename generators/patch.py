"""Grouping latent places into tokens.

A latent travels as ``(B, N, C)``, its N places in raster order over ``grid``. A patch size
p > 1 makes one token of p x p neighbouring places (f8 latents use p = 2). The published
models flatten a token in two ways: MAR and the autoregressive models ``"crq"`` (channel,
row, column), the outputs of DiT, SiT and LightningDiT ``"rqc"`` (row, column, channel).
A 1-D latent (a grid of length 1) is a sequence of tokens already: only p = 1 makes sense.
"""

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from detok_pipe.latents.errors import ConfigError

TokenOrder = Literal["crq", "rqc"]


def token_grid(grid: Sequence[int], patch_size: int) -> tuple[int, ...]:
    """The grid of tokens, ``grid / patch_size``.

    Raises:
        ConfigError: the grid is not of length 1 or 2, or the patches do not tile it.
    """
    if len(grid) not in (1, 2) or min(grid) < 1:
        raise ConfigError(f"grid {tuple(grid)}: give one or two positive sizes")
    if patch_size < 1 or (len(grid) == 1 and patch_size != 1):
        raise ConfigError(
            f"patch_size {patch_size} does not fit the grid {tuple(grid)}: "
            "use 1 for sequences, a positive whole number for images"
        )
    if any(size % patch_size for size in grid):
        raise ConfigError(
            f"patch_size {patch_size} does not divide the grid {tuple(grid)}: "
            "choose a patch size that divides both sides"
        )
    return tuple(size // patch_size for size in grid)


def default_patch_size(grid: Sequence[int]) -> int:
    """2 for maps of more than 16 x 16 places (f8 latents of 256 pixels), else 1, as published."""
    return 2 if len(grid) == 2 and math.prod(grid) > 256 and not any(n % 2 for n in grid) else 1


def patchify(z: Tensor, grid: Sequence[int], patch_size: int, order: TokenOrder) -> Tensor:
    """Latents ``(B, N, C)`` to tokens ``(B, N / p^2, p^2 C)``; any dtype and device."""
    if patch_size == 1:
        return z
    batch, _, channels = z.shape
    rows, columns = token_grid(grid, patch_size)
    p = patch_size
    z = z.reshape(batch, rows, p, columns, p, channels)  # (B, h, r, w, q, C)
    z = z.permute(0, 1, 3, 5, 2, 4) if order == "crq" else z.permute(0, 1, 3, 2, 4, 5)
    return z.reshape(batch, rows * columns, p * p * channels)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch_size: int, order: TokenOrder) -> Tensor:
    """Tokens ``(B, N / p^2, p^2 C)`` back to latents ``(B, N, C)``, undoing :func:`patchify`."""
    if patch_size == 1:
        return tokens
    batch, _, width = tokens.shape
    rows, columns = token_grid(grid, patch_size)
    p = patch_size
    channels = width // (p * p)
    if order == "crq":
        z = tokens.reshape(batch, rows, columns, channels, p, p).permute(0, 1, 4, 2, 5, 3)
    else:
        z = tokens.reshape(batch, rows, columns, p, p, channels).permute(0, 1, 3, 2, 4, 5)
    return z.reshape(batch, math.prod(grid), channels)  # (B, h r w q, C)
