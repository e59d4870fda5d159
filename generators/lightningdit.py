"""LightningDiT: SiT with RMSNorm, SwiGLU, rotary embedding and logit-normal training times.

Yao et al. 2025, "Reconstruction vs. generation: taming optimization dilemma in latent diffusion
models".
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detok_pipe.generators import flow
from detok_pipe.generators.layers import AnyNoise, Rope
from detok_pipe.generators.patch import token_grid
from detok_pipe.generators.sit import FlowTransformer
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


class LightningDiT(FlowTransformer):
    """See `FlowTransformer`; training times are logit-normal, Euler's points lean towards noise.

    Args:
        grid: latent grid, (h, w), or (n,) without rotary embedding. channels: latent channels C.
        num_classes: labels. width, depth, heads: of the transformer.
        patch_size: latent places a token's side covers.
        label_drop: share of labels replaced by null in training.
        qk_norm: RMSNorm of queries and keys, before the rotary embedding.
        cosine_loss: add 1 - cosine similarity of velocity and target over the channels. The
            published recipe computes it without using it.
    """

    shift = 0.3

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
        qk_norm: bool = False,
        cosine_loss: bool = False,
    ) -> None:
        super().__init__(
            grid=grid,
            channels=channels,
            num_classes=num_classes,
            width=width,
            depth=depth,
            heads=heads,
            patch_size=patch_size,
            label_drop=label_drop,
            learned_positions=True,
            norm=rms_norm,
            mlp=SwiGLU,
            qk_norm=rms_norm if qk_norm else None,
        )
        self.cosine_loss = cosine_loss
        if len(self.grid) == 2:
            self.rope = RotaryTable(token_grid(grid, patch_size), width // heads)

    def training_times(self, noise: AnyNoise) -> Tensor:
        """t (B,), the logistic function of a standard normal."""
        return torch.sigmoid(noise.normal("t", ()))

    def losses(self, z: Tensor, condition: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Each image's mean squared velocity error, plus the cosine loss where it is on, (B,)."""
        velocity = self.network(flow.path(z, eps, t), t, condition)
        target = flow.velocity_target(z, eps)
        loss = (velocity - target).square().mean(dim=(1, 2))
        if self.cosine_loss:
            loss = loss + (1 - F.cosine_similarity(velocity, target, dim=-1)).mean(dim=1)
        return loss
