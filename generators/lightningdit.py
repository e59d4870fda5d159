"""LightningDiT: SiT with RMSNorm, SwiGLU, rotary embedding and logit-normal training times.

Yao et al. 2025, "Reconstruction vs. generation: taming optimization dilemma in latent diffusion
models".
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detok_pipe.generators.attention import Rope
from detok_pipe.generators.layers import AnyNoise
from detok_pipe.generators.sit import SiT
from detok_pipe.latents.errors import ConfigError

# float32's machine epsilon. Explicit, because torch's default follows the input's dtype.
rms_norm = partial(nn.RMSNorm, eps=torch.finfo(torch.float32).eps)


class SwiGLU(nn.Module):
    """w3(SiLU(gate) * value), gate and value from one projection; int(2/3 * 4 W) wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class RotaryTable(nn.Module):
    """Cosines and sines (T, D) for the tokens of a 2-D grid.

    D / 4 frequencies 10000^(-2i / (D / 2)), each for two adjacent channels; the first D / 2
    channels turn with the row, the others with the column, both counted in whole tokens.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, grid: Sequence[int], head_width: int) -> None:
        super().__init__()
        if head_width % 4:
            raise ConfigError(
                f"head width {head_width} (width / heads) must be a multiple of 4 for the rotary "
                "embedding"
            )
        rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid)
        half = head_width // 2
        frequency = 10_000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        frequency = frequency.repeat_interleave(2)
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        angle = torch.cat([place.flatten()[:, None] * frequency for place in (row, column)], dim=1)
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self) -> Rope:
        """As `rotate` wants it: the sine negative in the first place of each pair."""
        pairs = self.freqs_sin.unflatten(-1, (-1, 2))
        return self.freqs_cos, torch.stack((-pairs[..., 0], pairs[..., 1]), dim=-1).flatten(-2)


class LightningDiT(SiT):
    """See `SiT`; training times are logit-normal, Euler's points lean towards noise.

    Args:
        qk_norm: RMSNorm of queries and keys, before the rotary embedding.
        cosine_loss: add 1 - cosine similarity of velocity and target over the channels. The
            published recipe computes it without using it.
        sizes: see `Backbone`. Sequences (a grid of one size) have no rotary embedding.
    """

    shift = 0.3
    learned_positions = True
    norm = staticmethod(rms_norm)
    mlp = SwiGLU

    def __init__(self, *, qk_norm: bool = False, cosine_loss: bool = False, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.cosine_loss = cosine_loss
        if qk_norm:
            for block in self.transformer.layers:
                block.attn.q_norm = rms_norm(self.head_width)
                block.attn.k_norm = rms_norm(self.head_width)
        if len(self.grid) == 2:
            self.rope = RotaryTable(self.token_grid, self.head_width)

    def training_times(self, noise: AnyNoise) -> Tensor:
        """t (B,), the logistic function of a standard normal."""
        return torch.sigmoid(noise.normal("t", ()))

    def errors(self, velocity: Tensor, target: Tensor) -> Tensor:
        """Each image's mean squared error, plus the cosine loss where it is on, (B,)."""
        error = super().errors(velocity, target)
        if self.cosine_loss:
            error = error + (1 - F.cosine_similarity(velocity, target, dim=-1)).mean(dim=1)
        return error
