"""MAR: masked autoregressive generation with a diffusion head.

Li et al. 2024, "Autoregressive image generation without vector quantization". An encoder sees
the known tokens, a decoder all places; a diffusion head predicts the unknown tokens from the
decoder's outputs. Attention does not care about the sequence's order, so both networks keep
[class buffer, known tokens, unknown places] instead of raster order: every selection is then a
slice. B images, N tokens, W width, `buffer` class tokens.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from detok_pipe.generators.guidance import scale_at
from detok_pipe.generators.layers import LAYER_NORM_EPS, AnyNoise, Block, learned_vectors
from detok_pipe.generators.sampling import Sampling
from detok_pipe.generators.token_generator import TokenGenerator, pick
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


class MAR(TokenGenerator):
    """Masked autoregressive generator.

    Noise names: "label_drop", "order", "mask_ratio" (shared), "head/t", "head/noise" in training;
    "order" and "head/<iteration>" in sampling. Options that are None mean one iteration a token,
    but 256 (those of the published final scores) where there are more, and 100 head steps.

    Args:
        width, depth, heads: of both encoder and decoder (depth blocks each).
        buffer: class tokens that the encoder sees.
        dropout: in the attentions, in training.
        common: see `TokenGenerator`.
    """

    sampling_options = TokenGenerator.sampling_options | {"iterations"}

    def __init__(
        self,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        buffer: int = 64,
        dropout: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(width=width, **common)
        self.buffer = buffer
        self.encoder_pos_embed_learned = learned_vectors(buffer + self.tokens, width)
        self.mask_token = learned_vectors(1, width)
        self.decoder_pos_embed_learned = learned_vectors(buffer + self.tokens, width)
        self.diffusion_pos_embed_learned = learned_vectors(self.tokens, width)
        self.z_proj = nn.Linear(self.token_channels, width)
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
        self.init_weights()

    def embed_buffer(self, condition: Tensor) -> Tensor:
        """Labels (B,) -> the encoder's class tokens (B, buffer, W)."""
        label = self.embed_labels(condition)[:, None]
        return self.z_proj_ln(label + self.encoder_pos_embed_learned[:, : self.buffer])

    def embed_tokens(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Tokens (B, n, c) at `places` (B, n) int64 -> the encoder's input (B, n, W)."""
        position = self.encoder_pos_embed_learned[0, self.buffer :][places]
        return self.z_proj_ln(self.z_proj(tokens.to(position.dtype)) + position)

    def encode(self, x: Tensor) -> Tensor:
        """Buffer and known tokens (B, buffer + k, W) -> the same shape."""
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decoder_positions(self, order: Tensor) -> Tensor:
        """Position embeddings of the buffer, then of the places in `order` (B, N): (B, ..., W)."""
        table = self.decoder_pos_embed_learned[0]
        buffer = table[: self.buffer].expand(len(order), -1, -1)
        return torch.cat((buffer, table[self.buffer :][order]), dim=1)

    def decode(self, encoded: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """Outputs at the first unknown places, the head's conditions (B, n, W).

        Args:
            encoded: `encode`'s output (B, buffer + k, W).
            positions: `decoder_positions` of an order that begins with the k known places,
                (B, buffer + N, W).
            places: (B, n) int64, the next n <= N - k places of that order, wanted now. The last
                block and the norm run on these only.
        """
        seen, wanted = encoded.shape[1], places.shape[1]
        masked = self.mask_token.expand(len(encoded), positions.shape[1] - seen, -1)
        x = torch.cat((self.decoder_embed(encoded), masked), dim=1) + positions
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, queries=(seen, wanted))
        return self.decoder_norm(x) + self.diffusion_pos_embed_learned[0][places]

    def loss(self, z: Tensor, condition: Tensor, noise: AnyNoise) -> Tensor:
        """Mean diffusion loss over the masked tokens. z (B, N p^2, C) fp32 normalised."""
        tokens, condition = self.training_inputs(z, condition, noise)  # (B, N, c)
        order = noise.uniform("order", (self.tokens,)).argsort(dim=1)  # (B, N)
        count = math.ceil(self.tokens * mask_ratio(float(noise.shared_uniform("mask_ratio"))))
        masked, known = order[:, :count], order[:, count:]
        inputs = self.embed_buffer(condition), self.embed_tokens(pick(tokens, known), known)
        positions = self.decoder_positions(torch.cat((known, masked), dim=1))
        decoded = self.decode(self.encode(torch.cat(inputs, dim=1)), positions, masked)
        return self.diffloss.loss(pick(tokens, masked), decoded, noise, self.head_draws)

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if sampling.iterations is not None:
            reveal_counts(self.tokens, sampling.iterations)  # so many can be

    def own_sampling(self, sampling: Sampling) -> dict[str, Any]:
        return super().own_sampling(sampling) | {"iterations": min(256, self.tokens)}

    def _sample(self, condition: Tensor, sampling: Sampling, noise: AnyNoise) -> Tensor:
        batch, width, device = len(condition), self.mask_token.shape[-1], condition.device
        assert sampling.iterations is not None  # resolved
        counts = reveal_counts(self.tokens, sampling.iterations)
        head = self.diffloss.sampler(sampling, places=self.patch_size**2)
        # Rows B..2B hold the null half; an iteration at scale 1 leaves them out. Places are kept
        # in the order in which they are revealed, an order's entries from its end.
        order = noise.uniform("order", (self.tokens,)).argsort(dim=1).flip(1)  # (B, N)
        places = order.repeat(2, 1)
        positions = self.decoder_positions(places)
        both = torch.cat((condition, torch.full_like(condition, -1)))
        x = positions.new_empty(2 * batch, self.buffer + self.tokens, width)
        x[:, : self.buffer] = self.embed_buffer(both)
        tokens = torch.empty(batch, self.tokens, self.token_channels, device=device)
        known = 0
        for k, count in enumerate(counts):
            now = slice(known, known + count)
            # Progress is the share known after this iteration; in the last, one counts as open.
            progress = min(now.stop, self.tokens - 1) / self.tokens
            scale = scale_at(sampling, progress)
            rows = batch if scale == 1.0 else 2 * batch
            encoded = self.encode(x[:rows, : self.buffer + known])
            decoded = self.decode(encoded, positions[:rows], places[:rows, now])
            shape = count, self.token_channels
            draws = noise.normal_steps(f"head/{k}", head.chain.steps + 1, shape)
            new = head(decoded.flatten(0, 1), draws.flatten(1, 2), scale)
            tokens[:, now] = new.view(batch, *shape)
            inputs = self.embed_tokens(tokens[:, now], order[:, now])
            x[:, self.buffer + known : self.buffer + now.stop] = inputs.repeat(2, 1, 1)
            known = now.stop
        return self.assembled(tokens, order)
