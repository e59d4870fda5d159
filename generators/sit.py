"""SiT: the DiT transformer as a velocity field, trained on the linear flow.

Ma et al. 2024, "SiT: Exploring flow and diffusion-based generative models with scalable
interpolant transformers". Time runs from 0 (noise) to 1 (data).
"""

import numpy as np
import torch
from torch import Tensor

from detok_pipe.generators import flow
from detok_pipe.generators.backbone import Backbone
from detok_pipe.generators.guidance import scale_at
from detok_pipe.generators.layers import AnyNoise
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError


class SiT(Backbone):
    """Scalable interpolant transformer: `network` takes t in [0, 1], returns a velocity (B, N, C).

    Noise names: "label_drop", "t", "noise" in training, "start" in sampling. Sampling uses the
    guidance options, `method` (None: euler) and `steps`, the number of time points of Euler's
    method (None: 250, which are 249 steps); dopri5 chooses its own steps, for each image.

    Args:
        sizes: see `Backbone`.
    """

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

    @torch.no_grad()
    def sample(self, condition: Tensor, sampling: Sampling, noise: AnyNoise) -> Tensor:
        """Labels (B,) int64, -1 for null -> latents (B, N, C) fp32, normalised.

        Raises:
            ConfigError: a temperature other than 1; an ODE draws no noise after its start.
        """
        if sampling.temperature != 1.0:
            raise ConfigError(
                f"temperature {sampling.temperature}: {type(self).__name__} follows an ODE, "
                "which adds no noise; leave the temperature at 1"
            )
        start = noise.normal("start", (self.places, self.channels))
        velocity = self.velocity(condition, sampling)
        if sampling.method == "dopri5":
            return flow.dopri5(velocity, start)
        return flow.euler(velocity, start, flow.times(sampling.steps or 250, self.shift))
