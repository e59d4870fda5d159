"""SiT: the DiT transformer as a velocity field, trained on the linear flow.

Ma et al. 2024, "SiT: Exploring flow and diffusion-based generative models with scalable
interpolant transformers". Time runs from 0 (noise) to 1 (data).
"""

from typing import Any

import numpy as np
from torch import Tensor

from detok_pipe.generators import flow
from detok_pipe.generators.backbone import Backbone
from detok_pipe.generators.generator import GUIDANCE_OPTIONS
from detok_pipe.generators.guidance import scale_at
from detok_pipe.generators.layers import AnyNoise
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError


class SiT(Backbone):
    """Scalable interpolant transformer: `network` takes t in [0, 1], returns a velocity (B, N, C).

    Noise names: "label_drop", "t", "noise" in training, "start" in sampling. `method` None means
    euler; `steps` is the number of its time points (None: 250, which are 249 steps). dopri5
    chooses its own steps, for each image.

    Args:
        sizes: see `Backbone`.
    """

    sampling_options = GUIDANCE_OPTIONS | {"steps", "method"}
    shift = 1.0  # of the time points of Euler's method, see `flow.times`

    def training_times(self, noise: AnyNoise) -> Tensor:
        """t (B,), uniform in [0, 1)."""
        return noise.uniform("t", ())

    def losses(self, z: Tensor, condition: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Each image's `errors` at time t, fp32 (B,). z, eps (B, N, C); t (B,)."""
        velocity = self.network(flow.path(z, eps, t), t, condition)
        return self.errors(velocity, flow.velocity_target(z, eps))

    def errors(self, velocity: Tensor, target: Tensor) -> Tensor:
        """Each image's mean squared error, (B,). Both (B, N, C)."""
        return (velocity - target).square().mean(dim=(1, 2))

    def velocity(self, condition: Tensor, sampling: Sampling) -> flow.Velocity:
        """The guided velocity of a batch with labels (B,), as a solver wants it."""

        def velocity(x: Tensor, t: np.ndarray, rows: Tensor) -> Tensor:
            # dopri5 looks slightly beyond 1, where guidance is as at 1.
            scales = np.array([scale_at(sampling, min(moment, 1.0)) for moment in t])
            return self.guided(x, t, condition[rows], scales, sampling.guided_channels)

        return velocity

    def check_sampling(self, sampling: Sampling) -> None:
        super().check_sampling(sampling)
        if sampling.method == "dopri5" and sampling.steps is not None:
            raise ConfigError(
                f"steps {sampling.steps}: dopri5 chooses its own steps; leave steps out, or use "
                "the euler method"
            )

    def own_sampling(self, sampling: Sampling) -> dict[str, Any]:
        return {} if sampling.method == "dopri5" else {"method": "euler", "steps": 250}

    def _sample(self, condition: Tensor, sampling: Sampling, noise: AnyNoise) -> Tensor:
        start = noise.normal("start", (self.places, self.channels))
        velocity = self.velocity(condition, sampling)
        if sampling.method == "dopri5":
            return flow.dopri5(velocity, start)
        assert sampling.steps is not None  # resolved
        return flow.euler(velocity, start, flow.times(sampling.steps, self.shift))
