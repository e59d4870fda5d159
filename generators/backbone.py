"""The transformer that DiT, SiT and LightningDiT share.

Peebles and Xie 2023, "Scalable diffusion models with transformers". Module and parameter names
follow the published checkpoints. B images, N places of the latent, C channels, T tokens
(N / p^2 for patch size p), W width, H heads, D = W / H.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detok_pipe.generators.attention import Rope
from detok_pipe.generators.generator import Generator
from detok_pipe.generators.guidance import combine
from detok_pipe.generators.layers import (
    AdaLNBlock,
    AnyNoise,
    FinalLayer,
    TimeEmbedding,
    drop_labels,
    gelu_mlp,
    init_linear_layers,
    learned_vectors,
    on_device,
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

    @property
    def layers(self) -> Iterable[AdaLNBlock]:
        """`blocks`, typed."""
        return cast(Iterable[AdaLNBlock], self.blocks)

    def forward(self, x: Tensor, y: Tensor, rope: Rope | None) -> Tensor:
        """x (B, T, W), condition y (B, 1, W) -> (B, T, W)."""
        for block in self.layers:
            x = block(x, block.adaLN_modulation(y), rope=rope)
        return x


class Backbone(Generator):
    """x_t (B, N, C), time, label -> `outputs` predictions for each of the N C numbers.

    A kind of generator sets the class attributes, and says at which times it trains and with
    which losses; how it samples is its own.

    Args:
        grid: latent grid, (rows, columns), or (N,) for a sequence. channels: latent channels C.
        num_classes: number of labels; one more, the null class, is added.
        width, depth, heads: W, number of blocks, H.
        patch_size: latent places a token's side covers.
        label_drop: share of labels replaced by null in training.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    outputs = 1  # predictions a channel
    learned_positions = False  # train the position embedding; sequences always learn theirs
    norm: Callable[[int], nn.Module] = staticmethod(plain_layer_norm)  # see `AdaLNBlock`
    mlp: Callable[[int], nn.Module] = staticmethod(gelu_mlp)

    def __init__(
        self,
        *,
        grid: Sequence[int],
        channels: int,
        num_classes: int,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch_size: int = 1,
        label_drop: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads or width % 4:
            raise ConfigError(f"width {width} must be a multiple of 4 and of the {heads} heads")
        self.grid = tuple(grid)
        self.channels = channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.label_drop = label_drop
        self.head_width = width // heads
        self.token_grid = token_grid(grid, patch_size)
        self.places = math.prod(grid)
        self.tokens = math.prod(self.token_grid)
        self.x_embedder = PatchEmbedding(grid, channels, width, patch_size)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes, width)
        if len(grid) == 1:
            self.pos_embed = learned_vectors(self.tokens, width)
        elif self.learned_positions:
            self.pos_embed = nn.Parameter(sincos_positions(self.token_grid, width))
        else:
            self.register_buffer("pos_embed", sincos_positions(self.token_grid, width))
        self.rope: nn.Module | None = None
        self.transformer = Blocks(
            [AdaLNBlock(width, heads, norm=self.norm, mlp=self.mlp) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(width, self.outputs * channels * patch_size**2, self.norm)
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

    def guided(
        self,
        x: Tensor,
        t: np.ndarray,
        condition: Tensor,
        scales: np.ndarray,
        guided_channels: int | None,
    ) -> Tensor:
        """`network` with guidance on the first `guided_channels` predictions (None: all).

        The null halves of the images to be guided are evaluated in the same batch; where the
        scale is 1, none is.

        Args:
            x: (B, N, C). condition: (B,) int64.
            t, scales: (B,) on the host, each image's time and guidance scale.
        """
        time = on_device(t, x.device)
        rows = np.flatnonzero(scales != 1.0)
        if not len(rows):
            return self.network(x, time, condition)
        every = len(rows) == len(x)
        at = slice(None) if every else torch.as_tensor(rows, device=x.device)
        label = torch.cat((condition, torch.full_like(condition[at], -1)))
        out = self.network(torch.cat((x, x[at])), torch.cat((time, time[at])), label)
        out, null = out[: len(x)], out[len(x) :]
        scale = on_device(scales[rows], x.device).view(-1, 1, 1)
        out[at] = combine(out[at], null, scale, guided_channels)
        return out

    @abstractmethod
    def training_times(self, noise: AnyNoise) -> Tensor:
        """t (B,) in the model's own unit, from the noise named "t"."""

    @abstractmethod
    def losses(self, z: Tensor, condition: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Each image's loss, fp32 (B,). z, eps (B, N, C); t (B,)."""

    def loss(self, z: Tensor, condition: Tensor, noise: AnyNoise) -> Tensor:
        """Mean of `losses` at random times. z (B, N, C) fp32 normalised; condition (B,) int64.

        Noise names: "label_drop", "t", "noise".
        """
        if self.training:
            condition = drop_labels(condition, self.label_drop, noise)
        t = self.training_times(noise)
        return self.losses(z, condition, t, noise.normal("noise", z.shape[1:])).mean()

    def compile_sampler(self) -> None:
        """Let `sample` evaluate the network compiled."""
        self.network = torch.compile(self.network)  # type: ignore[method-assign]


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
