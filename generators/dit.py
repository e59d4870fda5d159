"""DiT: a diffusion transformer over all latent places at once.

Peebles and Xie 2023, "Scalable diffusion models with transformers". Linear schedule of 1000
steps, eps prediction, learned-range variance.
"""

from typing import Any

import numpy as np
from torch import Tensor

from detok_pipe.generators.backbone import Backbone
from detok_pipe.generators.diffusion import TRAIN_STEPS, GaussianDiffusion, ReverseChain, schedule
from detok_pipe.generators.generator import GUIDANCE_OPTIONS
from detok_pipe.generators.guidance import scale_at
from detok_pipe.generators.layers import AnyNoise
from detok_pipe.generators.sampling import Sampling


class DiT(Backbone):
    """Diffusion transformer. `network` takes step numbers and returns (B, N, 2C): eps, then v.

    Noise names: "label_drop", "t", "noise" in training; "start" and "step/<i>" in sampling, i
    counting the respaced chain down to 0. Guidance acts on eps only; the published classic has
    `guided_channels=3`. `steps` None means 250.

    Args:
        sizes: see `Backbone`.
    """

    outputs = 2
    sampling_options = GUIDANCE_OPTIONS | {"temperature", "clip", "steps"}

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.diffusion = GaussianDiffusion("linear")

    def training_times(self, noise: AnyNoise) -> Tensor:
        """Step numbers (B,) int64, uniform in 0..999."""
        return noise.uniform("t", ()).mul(TRAIN_STEPS).long()

    def losses(self, z: Tensor, condition: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Each image's MSE + VLB, fp32 (B,). z, eps (B, N, C); t (B,) int64 in 0..999."""
        predicted, v = self.network(self.diffusion.noised(z, eps, t), t, condition).chunk(2, -1)
        mse, vlb = self.diffusion.losses(z, eps, t, predicted, v)
        return mse + vlb

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if sampling.steps is not None:
            schedule("linear", sampling.steps)  # so many can be

    def own_sampling(self, sampling: Sampling) -> dict[str, Any]:
        return {"steps": 250}

    def _sample(self, condition: Tensor, sampling: Sampling, noise: AnyNoise) -> Tensor:
        assert sampling.steps is not None  # resolved
        batch, shape = len(condition), (self.places, self.channels)
        chain = ReverseChain(
            "linear",
            sampling.steps,
            temperature=sampling.temperature,
            clip=sampling.clip,
            device=condition.device,
        )
        eps_channels = sampling.guided_channels or self.channels
        x = noise.normal("start", shape)
        for i in reversed(range(chain.steps)):
            t = np.full(batch, chain.timestep_map[i])
            scales = np.full(batch, scale_at(sampling, 1.0 - (i + 1) / chain.steps))
            eps, v = self.guided(x, t, condition, scales, eps_channels).chunk(2, -1)
            x = chain.step(i, x, eps, v, noise.normal(f"step/{i}", shape))
        return x
