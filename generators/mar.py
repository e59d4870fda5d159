"""MAR: masked autoregressive generation with a diffusion head.

Li et al. 2024, "Autoregressive image generation without vector quantization". An encoder sees
the known tokens, a decoder all places; a diffusion head predicts the unknown tokens from the
decoder's outputs. Attention does not care about the sequence's order, so both networks keep
[class buffer, known tokens, unknown places] instead of raster order: every selection is then a
slice. B images, N tokens, W width, `buffer` class tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn

from detok_pipe.generators.guidance import scale_at
from detok_pipe.generators.head import DiffusionHead
from detok_pipe.generators.layers import (
    LAYER_NORM_EPS,
    AnyNoise,
    Block,
    drop_labels,
    embed_labels,
    init_linear_layers,
)
from detok_pipe.generators.patch import patchify, token_grid, unpatchify
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError


def mask_ratio(uniform: float) -> float:
    """A normal(1, 0.25) truncated to [0.7, 1], by the inverse of its distribution function."""
    normal = NormalDist(1.0, 0.25)
    low, high = normal.cdf(0.7), normal.cdf(1.0)
    return min(1.0, max(0.7, normal.inv_cdf(low + uniform * (high - low))))


def reveal_counts(tokens: int, iterations: int) -> list[int]:
    """How many tokens each iteration predicts: the cosine schedule, known beforehand.

    After iteration k of K, floor(N cos(pi/2 (k+1)/K)) tokens stay masked, at least one and at
    least one fewer than before; the last iteration takes the rest.

    Raises:
        ConfigError: more iterations than tokens.
    """
    if not 1 <= iterations <= tokens:
        raise ConfigError(
            f"iterations: MAR with {tokens} tokens takes 1 to that many, got {iterations}"
        )
    counts, masked = [], tokens
    for k in range(1, iterations):
        left = math.floor(tokens * math.cos(math.pi / 2 * k / iterations))
        left = max(1, min(masked - 1, left))
        counts.append(masked - left)
        masked = left
    return [*counts, masked]


class MAR(nn.Module):
    """Masked autoregressive generator.

    Noise names: "label_drop", "order", "mask_ratio" (shared), "head/t", "head/noise" in training;
    "order" and "head/<iteration>" in sampling. Sampling uses all options but `method`; None means
    64 iterations (or one a token, if fewer) and 100 head steps.

    Args:
        grid: latent grid, (h, w) or (n,). channels: latent channels C. num_classes: labels.
        width, depth, heads: of both encoder and decoder (depth blocks each).
        head_width, head_depth: of the diffusion head.
        patch_size: latent places a token's side covers.
        buffer: class tokens that the encoder sees.
        dropout: in the attentions, in training. label_drop: share of labels replaced by null.
        head_draws: (t, noise) pairs a token in the loss.
    """

    def __init__(
        self,
        *,
        grid: Sequence[int],
        channels: int,
        num_classes: int,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        head_width: int = 1024,
        head_depth: int = 3,
        patch_size: int = 1,
        buffer: int = 64,
        dropout: float = 0.1,
        label_drop: float = 0.1,
        head_draws: int = 4,
    ) -> None:
        super().__init__()
        self.grid, self.channels, self.num_classes = tuple(grid), channels, num_classes
        self.tokens = math.prod(token_grid(grid, patch_size))
        self.patch_size, self.buffer = patch_size, buffer
        self.label_drop, self.head_draws = label_drop, head_draws
        token_channels = channels * patch_size**2

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(1, *shape) * 0.02)

        self.fake_latent = table(width)
        self.encoder_pos_embed_learned = table(buffer + self.tokens, width)
        self.mask_token = table(1, width)
        self.decoder_pos_embed_learned = table(buffer + self.tokens, width)
        self.diffusion_pos_embed_learned = table(self.tokens, width)
        self.class_emb = nn.Embedding(num_classes, width)
        self.z_proj = nn.Linear(token_channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.encoder_blocks = nn.ModuleList(
            Block(width, heads, dropout=dropout) for _ in range(depth)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_blocks = nn.ModuleList(
            Block(width, heads, dropout=dropout) for _ in range(depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        init_linear_layers(self)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.diffloss = DiffusionHead(token_channels, width, width=head_width, depth=head_depth)

    def embed_buffer(self, condition: Tensor) -> Tensor:
        """Labels (B,) -> the encoder's class tokens (B, buffer, W)."""
        label = embed_labels(condition, self.class_emb, self.fake_latent)
        return self.z_proj_ln(label[:, None] + self.encoder_pos_embed_learned[:, : self.buffer])

    def embed_tokens(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Tokens (B, n, c) at `places` (B, n) int64 -> the encoder's input (B, n, W)."""
        position = self.encoder_pos_embed_learned[0, self.buffer :][places]
        return self.z_proj_ln(self.z_proj(tokens.to(position.dtype)) + position)

    def encode(self, x: Tensor) -> Tensor:
        """Buffer and known tokens (B, buffer + n, W) -> the same shape."""
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def embed_masked(self, places: Tensor) -> Tensor:
        """The decoder's input at unknown `places` (B, m) -> (B, m, W)."""
        return self.mask_token + self.decoder_pos_embed_learned[0, self.buffer :][places]

    def decode(self, encoded: Tensor, known: Tensor, masked: Tensor, places: Tensor) -> Tensor:
        """Outputs at the first unknown places, the head's conditions (B, n, W).

        Args:
            encoded: `encode`'s output (B, buffer + k, W).
            known: (B, k) int64, its tokens' places.
            masked: `embed_masked` of the unknown places (B, m, W).
            places: (B, n) int64, the first n <= m of them, wanted now. The last block and the
                norm run on these only.
        """
        position = self.decoder_pos_embed_learned[0]
        buffer = position[: self.buffer].expand(len(known), -1, -1)
        position = torch.cat((buffer, position[self.buffer :][known]), dim=1)
        x = torch.cat((self.decoder_embed(encoded) + position, masked), dim=1)
        wanted = slice(encoded.shape[1], encoded.shape[1] + places.shape[1])
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, queries=wanted)
        return self.decoder_norm(x) + self.diffusion_pos_embed_learned[0][places]

    def loss(self, z: Tensor, condition: Tensor, noise: AnyNoise) -> Tensor:
        """Mean diffusion loss over the masked tokens. z (B, N p^2, C) fp32 normalised."""
        tokens = patchify(z, self.grid, self.patch_size, "crq")  # (B, N, c)
        if self.training:
            condition = drop_labels(condition, self.label_drop, noise)
        order = noise.uniform("order", (self.tokens,)).argsort(dim=1)  # (B, N)
        count = math.ceil(self.tokens * mask_ratio(float(noise.shared_uniform("mask_ratio"))))
        masked, known = order[:, :count], order[:, count:]

        def at(places: Tensor) -> Tensor:
            return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))

        x = torch.cat((self.embed_buffer(condition), self.embed_tokens(at(known), known)), dim=1)
        decoded = self.decode(self.encode(x), known, self.embed_masked(masked), masked)
        return self.diffloss.loss(at(masked), decoded, noise, self.head_draws)

    forward = loss

    @torch.no_grad()
    def sample(self, condition: Tensor, sampling: Sampling, noise: AnyNoise) -> Tensor:
        """Labels (B,) int64, -1 for null -> latents (B, N p^2, C) fp32, normalised."""
        batch, width, device = len(condition), self.mask_token.shape[-1], condition.device
        counts = reveal_counts(self.tokens, sampling.iterations or min(64, self.tokens))
        scales, known = [], 0
        for count in counts:
            # The share of tokens known after this iteration; in the last one, one counts as open.
            known += count
            scales.append(scale_at(sampling, min(known, self.tokens - 1) / self.tokens))
        head = self.diffloss.sampler(sampling, places=self.patch_size**2)
        # Rows B..2B hold the null half; an iteration at scale 1 leaves them out. Places are kept
        # in the order in which they are revealed, an order's entries from its end.
        order = noise.uniform("order", (self.tokens,)).argsort(dim=1).flip(1)  # (B, N)
        order = order.repeat(2, 1)
        both = torch.cat((condition, torch.full_like(condition, -1)))
        x = self.mask_token.new_empty(2 * batch, self.buffer + self.tokens, width)
        x[:, : self.buffer] = self.embed_buffer(both)
        masked = self.embed_masked(order)  # (2B, N, W)
        tokens = torch.empty(batch, self.tokens, self.diffloss.channels, device=device)
        known = 0
        for k, (count, scale) in enumerate(zip(counts, scales, strict=True)):
            rows = batch if scale == 1.0 else 2 * batch
            now = slice(known, known + count)
            decoded = self.decode(
                self.encode(x[:rows, : self.buffer + known]),
                order[:rows, :known],
                masked[:rows, known:],
                order[:rows, now],
            )
            draws = noise.normal_steps(f"head/{k}", head.chain.steps + 1, (count, tokens.shape[-1]))
            new = head(decoded.flatten(0, 1), draws.flatten(1, 2), scale)
            tokens[:, now] = new.view(batch, count, -1)
            inputs = self.embed_tokens(tokens[:, now], order[:batch, now])
            x[:, self.buffer + known : self.buffer + known + count] = inputs.repeat(2, 1, 1)
            known += count
        raster = order[:batch].argsort(dim=1)[..., None].expand(-1, -1, tokens.shape[-1])
        return unpatchify(tokens.gather(1, raster), self.grid, self.patch_size, "crq")
