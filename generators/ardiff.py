"""RandomAR and RasterAR: decoder-only autoregressive generation with a diffusion head.

The sequence is [BOS, tokens in generation order] without its last token; place i predicts token
i and knows which grid place that is (its target position embedding). RasterAR goes in raster
order, RandomAR in a new random order for each image. Sampling keeps every layer's keys and
values, so a step costs one token. B images, N tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detok_pipe.generators.attention import KeyValueCache
from detok_pipe.generators.guidance import scale_at
from detok_pipe.generators.layers import (
    LAYER_NORM_EPS,
    AdaLNBlock,
    AnyNoise,
    Modulation,
    learned_vectors,
    modulate,
)
from detok_pipe.generators.sampling import Sampling
from detok_pipe.generators.token_generator import TokenGenerator, pick
from detok_pipe.latents.errors import ConfigError

# Rows x steps whose modulations are made at once while sampling.
_ROWS_AHEAD = 256


class FinalModulation(nn.Module):
    """LayerNorm without affine, modulated by the class; the head takes its output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, parts: Tensor) -> Tensor:
        """x (B, n, W); parts (B, 1, 2 W), `adaLN_modulation` of the class embedding."""
        shift, scale = parts.chunk(2, dim=-1)
        return modulate(F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS), shift, scale)


class ARDiff(TokenGenerator):
    """Autoregressive generator: RandomAR (`order="random"`) or RasterAR (`order="raster"`).

    Noise names: "label_drop", "order" (random order only), "head/t", "head/noise" in training;
    "order" and "head/<token>" in sampling, whose `steps` None means 100 head steps.

    Args:
        width, depth, heads: of the transformer.
        common: see `TokenGenerator`.
    """

    def __init__(
        self,
        *,
        order: Literal["random", "raster"],
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        **common: Any,
    ) -> None:
        if order not in ("random", "raster"):
            raise ConfigError(f"order: must be random or raster, got {order!r}")
        super().__init__(width=width, **common)
        self.order, self.heads = order, heads
        self.bos_token = learned_vectors(1, width)
        self.pos_embed = learned_vectors(self.tokens + 1, width)
        self.target_pos_embed = learned_vectors(self.tokens, width)
        self.timesteps_embeddings = learned_vectors(self.tokens + 1, width)
        self.x_embedder = nn.Linear(self.token_channels, width)
        self.ln_pre = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        self.transformer = nn.ModuleDict(
            {"blocks": nn.ModuleList(AdaLNBlock(width, heads, norm=norm) for _ in range(depth))}
        )
        self.final_layer = FinalModulation(width)
        self.init_weights()

    @property
    def title(self) -> str:
        """Its name in messages."""
        return "RandomAR" if self.order == "random" else "RasterAR"

    @property
    def blocks(self) -> Sequence[AdaLNBlock]:
        """The transformer's blocks, typed."""
        return cast(Sequence[AdaLNBlock], self.transformer["blocks"])

    def places(self, noise: AnyNoise, device: torch.device) -> Tensor:
        """Generation orders (B, N) int64: the grid place of each token of the sequence."""
        if self.order == "raster":
            return torch.arange(self.tokens, device=device).expand(len(noise), -1)
        return noise.uniform("order", (self.tokens,)).argsort(dim=1)

    def transform(self, tokens: Tensor, order: Tensor, condition: Tensor) -> Tensor:
        """The head's conditions (B, N, W) for all tokens at once (training).

        Args:
            tokens: (B, N, c) in generation order. order: (B, N) int64. condition: (B,).
        """
        position = self.pos_embed[0]
        known = self.x_embedder(tokens[:, :-1]) + position[1:][order[:, :-1]]
        start = (self.bos_token + position[:1]).expand(len(tokens), -1, -1)
        x = torch.cat((start, known), dim=1) + self.target_pos_embed[0][order]
        x = self.ln_pre(x)
        label = self.embed_labels(condition)[:, None]  # (B, 1, W)
        steps = label + self.timesteps_embeddings[:, : self.tokens]  # (B, N, W)
        for block in self.blocks:
            x = block(x, block.adaLN_modulation(steps), causal=True)
        return self.final_layer(x, self.final_layer.adaLN_modulation(label))

    def loss(self, z: Tensor, condition: Tensor, noise: AnyNoise) -> Tensor:
        """Mean diffusion loss over all tokens. z (B, N p^2, C) fp32 normalised."""
        tokens, condition = self.training_inputs(z, condition, noise)
        order = self.places(noise, z.device)
        tokens = pick(tokens, order)
        decoded = self.transform(tokens, order, condition)
        return self.diffloss.loss(tokens, decoded, noise, self.head_draws)

    def _sample(self, condition: Tensor, sampling: Sampling, noise: AnyNoise) -> Tensor:
        batch = len(condition)
        scales = [scale_at(sampling, i / self.tokens) for i in range(self.tokens)]
        # Beyond the last guided step nobody asks for the null half's keys and values.
        guided_until = max((i + 1 for i, scale in enumerate(scales) if scale != 1.0), default=0)
        head = self.diffloss.sampler(sampling, places=self.patch_size**2)
        order = self.places(noise, condition.device)
        decoder = _CachedDecoder(self, condition, order, guided=guided_until > 0)
        new: Tensor | None = None
        tokens = []
        for i, scale in enumerate(scales):
            decoded = decoder.step(i, new, halves=2 if i < guided_until else 1)
            decoded = decoded if scale != 1.0 else decoded[:batch]
            draws = noise.normal_steps(f"head/{i}", head.chain.steps + 1, (self.token_channels,))
            new = head(decoded, draws, scale)  # (B, c)
            tokens.append(new)
        return self.assembled(torch.stack(tokens, dim=1), order)


class _CachedDecoder:
    """The transformer of `ARDiff`, one token at a time, with preallocated keys and values.

    The null rows share one condition, so its modulations are made for one row.
    """

    def __init__(self, model: ARDiff, condition: Tensor, order: Tensor, *, guided: bool) -> None:
        self.model = model
        self.batch = len(condition)
        null = condition.new_full((1,), -1)
        labels = torch.cat((condition, null)) if guided else condition
        self.label = model.embed_labels(labels)  # (B + 1, W)
        # Modulations need no token: they are made for several steps in one matrix product.
        self.ahead = max(1, _ROWS_AHEAD // len(self.label))
        self.parts: list[Tensor] = []
        self.final = model.final_layer.adaLN_modulation(self.label)
        self.position = model.pos_embed[0, 1:][order]  # (B, N, W), of the tokens as inputs
        self.target = model.target_pos_embed[0][order]  # (B, N, W), of the tokens as targets
        width = self.label.shape[-1]
        rows = self.batch * (2 if guided else 1)
        self.caches = [
            KeyValueCache(rows, model.heads, model.tokens, width // model.heads, self.label)
            for _ in model.blocks
        ]

    def _spread(self, parts: Tensor, halves: int) -> Tensor:
        """Rows of B images (and one null row) -> (B, 1, ...) or (2B, 1, ...)."""
        if halves == 2:
            null = parts[self.batch :].expand(self.batch, -1)
            parts = torch.cat((parts[: self.batch], null))
        return parts[: halves * self.batch, None]

    def _modulations(self, i: int) -> list[Tensor]:
        """Each block's modulations at step i, (B + 1, 6 W); steps are asked for upwards."""
        if i % self.ahead == 0:
            steps = self.model.timesteps_embeddings[0, i : min(i + self.ahead, self.model.tokens)]
            condition = self.label + steps[:, None]  # (steps, B + 1, W)
            self.parts = [block.adaLN_modulation(condition) for block in self.model.blocks]
        return [part[i % self.ahead] for part in self.parts]

    def step(self, i: int, token: Tensor | None, halves: int) -> Tensor:
        """The head's condition for token i, (halves * B, W); `token` (B, c) is number i - 1."""
        model = self.model
        if token is None:
            x = model.bos_token[:, 0] + model.pos_embed[:, 0]
        else:
            x = model.x_embedder(token.to(self.label.dtype)) + self.position[:, i - 1]
        x = model.ln_pre(x + self.target[:, i]).repeat(halves, 1)[:, None]  # (B', 1, W)
        parts = self._modulations(i)
        for block, part, cache in zip(model.blocks, parts, self.caches, strict=True):
            x = block(x, self._spread(part, halves), cache=cache)
        return model.final_layer(x, self._spread(self.final, halves))[:, 0]
