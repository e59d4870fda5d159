"""The transformer that DiT, SiT and LightningDiT share.

Peebles and Xie 2023, "Scalable diffusion models with transformers". Module and parameter names
follow the published checkpoints. B images, N places of the latent, C channels, T tokens
(N / p^2 for patch size p), W width, H heads, D = W / H.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detok_pipe.generators.layers import (
    AdaLNBlock,
    FinalLayer,
    Rope,
    TimeEmbedding,
    gelu_mlp,
    init_linear_layers,
    plain_layer_norm,
)
from detok_pipe.generators.patch import patchify, token_grid, unpatchify
from detok_pipe.latents.errors import ConfigError


class PatchEmbedding(nn.Module):
    """One linear map of each p x p patch, kept as the strided convolution of the checkpoints.

    Latents (B, N, C) -> (B, T, W). 1-D latents: a plain linear layer.
    """

    def __init__(self, grid: Sequence[int], channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.patch_size = patch_size
        self.proj = (
            nn.Linear(channels, width)
            if len(grid) == 1
            else nn.Conv2d(channels, width, patch_size, stride=patch_size)
        )

    def forward(self, z: Tensor) -> Tensor:
        # A patch in (channel, row, column) order meets the convolution's weight as a matrix.
        tokens = patchify(z, self.grid, self.patch_size, "crq")
        weight = self.proj.weight.flatten(1)
        return F.linear(tokens.to(weight.dtype), weight, self.proj.bias)


class LabelEmbedding(nn.Module):
    """Labels (B,), -1 for null -> (B, W); the null class is the table's last row."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: Tensor) -> Tensor:
        return self.embedding_table(torch.where(condition < 0, self.num_classes, condition))


class Blocks(nn.Module):
    """A stack of adaLN-zero blocks."""

    def __init__(self, blocks: Sequence[AdaLNBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, y: Tensor, rope: Rope | None) -> Tensor:
        """x (B, T, W), condition y (B, 1, W) -> (B, T, W)."""
        for block in cast(Iterable[AdaLNBlock], self.blocks):
            x = block(x, block.adaLN_modulation(y), rope=rope)
        return x


class Backbone(nn.Module):
    """x_t (B, N, C), time, label -> (B, N, out_channels).

    Args:
        grid: latent places, (rows, columns), or (N,) for a sequence.
        channels: C.
        num_classes: number of labels; one more, the null class, is added.
        width, depth, heads: W, number of blocks, H.
        patch_size: p x p places a token.
        out_channels: channels predicted for each place.
        learned_positions: train the position embedding. Sequences always learn theirs.
        norm, mlp, qk_norm: as in `AdaLNBlock`; `norm` serves the final layer too.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        grid: Sequence[int],
        channels: int,
        num_classes: int,
        width: int,
        depth: int,
        heads: int,
        patch_size: int,
        out_channels: int,
        learned_positions: bool = False,
        norm: Callable[[int], nn.Module] = plain_layer_norm,
        mlp: Callable[[int], nn.Module] = gelu_mlp,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if width % heads or width % 4:
            raise ConfigError(f"width {width} must be a multiple of 4 and of the {heads} heads")
        self.grid = tuple(grid)
        self.channels = channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        tokens = token_grid(grid, patch_size)
        self.places = math.prod(grid)
        self.tokens = math.prod(tokens)
        self.x_embedder = PatchEmbedding(grid, channels, width, patch_size)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes, width)
        if len(grid) == 1:
            self.pos_embed = nn.Parameter(torch.randn(1, *tokens, width) * 0.02)
        elif learned_positions:
            self.pos_embed = nn.Parameter(sincos_positions(tokens, width))
        else:
            self.register_buffer("pos_embed", sincos_positions(tokens, width))
        self.rope: nn.Module | None = None
        self.transformer = Blocks(
            [AdaLNBlock(width, heads, norm=norm, mlp=mlp, qk_norm=qk_norm) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(width, out_channels * patch_size**2, norm)
        self._init_weights()

    def _init_weights(self) -> None:
        init_linear_layers(self)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))  # a view
        nn.init.zeros_(self.get_parameter("x_embedder.proj.bias"))
        for name in (
            "t_embedder.mlp.0.weight",
            "t_embedder.mlp.2.weight",
            "y_embedder.embedding_table.weight",
        ):
            nn.init.normal_(self.get_parameter(name), std=0.02)

    def network(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """One evaluation, fp32 out.

        Args:
            x: (B, N, C). t: (B,) in the model's own unit. condition: (B,) int64, -1 for null.
        """
        y = (self.t_embedder(t) + self.y_embedder(condition)).unsqueeze(1)  # (B, 1, W)
        h = self.x_embedder(x)
        h = h + self.pos_embed.to(h.dtype)  # (B, T, W)
        rope = self.rope() if self.rope is not None else None
        h = self.final_layer(self.transformer(h, y, rope), y)
        return unpatchify(h, self.grid, self.patch_size, "rqc").float()


def sincos_positions(grid: Sequence[int], width: int) -> Tensor:
    """Fixed position embedding (1, T, width) of a 2-D token grid, fp32.

    The first half holds the column, the second the row; each half its sines, then its cosines,
    at width / 4 frequencies 10000^(-i / (width / 4)).
    """
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid)
    frequency = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    halves = [
        part
        for place in (column, row)
        for angle in (place.flatten()[:, None] * frequency,)
        for part in (angle.sin(), angle.cos())
    ]
    return torch.cat(halves, dim=1).float().unsqueeze(0)
