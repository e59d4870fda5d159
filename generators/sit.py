"""SiT: the DiT transformer as a velocity field, trained on the linear flow.

Ma et al. 2024, "SiT: Exploring flow and diffusion-based generative models with scalable
interpolant transformers". Time runs from 0 (noise) to 1 (data).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detok_pipe.generators import flow
from detok_pipe.generators.backbone import Backbone
from detok_pipe.generators.guidance import combine, scale_at
from detok_pipe.generators.layers import AnyNoise, drop_labels
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError


class FlowTransformer(Backbone):
    """What SiT and LightningDiT share: `network` takes t in [0, 1], returns the velocity (B, N, C).

    Noise names: "label_drop", "t", "noise" in training, "start" in sampling. Sampling uses the
    guidance options, `method` (None: euler) and `steps`, the number of time points of Euler's
    method (None: 250, which are 249 steps); dopri5 chooses its own steps, for each image.

    Args:
        label_drop: share of labels replaced by null in training.
        others: see `Backbone`.
    """

    shift = 1.0  # of the time points of Euler's method, see `flow.times`

    def __init__(self, *, label_drop: float, **others: Any) -> None:
        super().__init__(out_channels=others["channels"], **others)
        self.label_drop = label_drop

    def training_times(self, noise: AnyNoise) -> Tensor:
        """t (B,), uniform in [0, 1)."""
        return noise.uniform("t", ())

    def losses(self, z: Tensor, condition: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Each image's mean squared velocity error, fp32 (B,). z, eps (B, N, C); t (B,)."""
        velocity = self.network(flow.path(z, eps, t), t, condition)
        return (velocity - flow.velocity_target(z, eps)).square().mean(dim=(1, 2))

    def loss(self, z: Tensor, condition: Tensor, noise: AnyNoise) -> Tensor:
        """Mean of `losses` at random times. z (B, N, C) fp32 normalised; condition (B,) int64."""
        if self.training:
            condition = drop_labels(condition, self.label_drop, noise)
        t = self.training_times(noise)
        return self.losses(z, condition, t, noise.normal("noise", z.shape[1:])).mean()

    forward = loss

    def velocity(self, condition: Tensor, sampling: Sampling) -> flow.Velocity:
        """The guided velocity of a batch with labels (B,), as a solver wants it.

        The null half is evaluated in the same batch, for those images only whose time lies in
        the guidance interval; where the scale is 1, not at all.
        """

        def velocity(x: Tensor, t: np.ndarray, rows: Tensor) -> Tensor:
            # dopri5 looks slightly beyond 1, where guidance is as at 1.
            scales = np.array([scale_at(sampling, min(moment, 1.0)) for moment in t])
            time = torch.as_tensor(t, dtype=torch.float32, device=x.device)
            label = condition[rows]
            guided = np.flatnonzero(scales != 1.0)
            if not len(guided):
                return self.network(x, time, label)
            index = torch.as_tensor(guided, device=x.device)
            out = self.network(
                torch.cat((x, x[index])),
                torch.cat((time, time[index])),
                torch.cat((label, torch.full_like(index, -1))),
            )
            out, null = out[: len(x)], out[len(x) :]
            scale = torch.as_tensor(scales[guided], dtype=x.dtype, device=x.device).view(-1, 1, 1)
            guided_out = combine(out[index], null, scale, sampling.guided_channels)
            return guided_out if len(guided) == len(x) else out.index_copy(0, index, guided_out)

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


class SiT(FlowTransformer):
    """Scalable interpolant transformer; see `FlowTransformer`.

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
            label_drop=label_drop,
        )
