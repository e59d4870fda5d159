"""DiT: a diffusion transformer over all latent places at once.

Peebles and Xie 2023, "Scalable diffusion models with transformers". Linear schedule of 1000
steps, eps prediction, learned-range variance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detok_pipe.generators.backbone import Backbone
from detok_pipe.generators.diffusion import TRAIN_STEPS, GaussianDiffusion, ReverseChain
from detok_pipe.generators.guidance import combine, scale_at
from detok_pipe.generators.layers import AnyNoise, drop_labels
from detok_pipe.generators.sampling import Sampling


class DiT(Backbone):
    """Diffusion transformer. `network` takes step numbers and returns (B, N, 2C): eps, then v.

    Noise names: "label_drop", "t", "noise" in training; "start" and "step/<i>" in sampling, i
    counting the respaced chain down to 0. Sampling uses the guidance options (on eps only; the
    published classic guides `guided_channels=3`), `temperature` and `steps` (None: 250).

    Args:
        grid: latent grid, (h, w) or (n,). channels: latent channels C. num_classes: labels.
        width, depth, heads: of the transformer. patch_size: latent places a token's side covers.
        label_drop: share of labels replaced by null in training.
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
        patch_size: int = 1,
        label_drop: float = 0.1,
    ) -> None:
        super().__init__(
            grid=grid,
            channels=channels,
            num_classes=num_classes,
            width=width,
            depth=depth,
            heads=heads,
            patch_size=patch_size,
            out_channels=2 * channels,
        )
        self.label_drop = label_drop
        self.diffusion = GaussianDiffusion("linear")

    def losses(self, z: Tensor, condition: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Each image's MSE + VLB, fp32 (B,). z, eps (B, N, C); t (B,) int64 in 0..999."""
        predicted, v = self.network(self.diffusion.noised(z, eps, t), t, condition).chunk(2, -1)
        mse, vlb = self.diffusion.losses(z, eps, t, predicted, v)
        return mse + vlb

    def loss(self, z: Tensor, condition: Tensor, noise: AnyNoise) -> Tensor:
        """Mean of `losses` at random steps. z (B, N, C) fp32 normalised; condition (B,) int64."""
        if self.training:
            condition = drop_labels(condition, self.label_drop, noise)
        t = noise.uniform("t", ()).mul(TRAIN_STEPS).long()
        return self.losses(z, condition, t, noise.normal("noise", z.shape[1:])).mean()

    forward = loss

    @torch.no_grad()
    def sample(self, condition: Tensor, sampling: Sampling, noise: AnyNoise) -> Tensor:
        """Labels (B,) int64, -1 for null -> latents (B, N, C) fp32, normalised."""
        batch, shape = len(condition), (self.places, self.channels)
        chain = ReverseChain(
            "linear",
            sampling.steps or 250,
            temperature=sampling.temperature,
            clip=sampling.clip,
        )
        both = torch.cat((condition, torch.full_like(condition, -1)))
        x = noise.normal("start", shape)
        for i in reversed(range(chain.steps)):
            scale = scale_at(sampling, 1.0 - (i + 1) / chain.steps)
            rows = batch if scale == 1.0 else 2 * batch
            t = torch.full((rows,), chain.timestep_map[i], device=condition.device)
            out = self.network(x if rows == batch else torch.cat((x, x)), t, both[:rows])
            eps, v = out.chunk(2, -1)
            if rows > batch:
                eps = combine(eps[:batch], eps[batch:], scale, sampling.guided_channels)
            draw = noise.normal(f"step/{i}", shape)
            x = chain.step(i, x, eps, v[:batch], draw)
        return x
