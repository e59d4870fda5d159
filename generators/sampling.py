"""How to sample: everything that may change between two sampling runs of one model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from detok_pipe.latents.errors import ConfigError

GuidanceSchedule = Literal["constant", "linear"]


@dataclass(frozen=True)
class Sampling:
    """Sampling options, shared by all generators; each refuses those that it does not use.

    Attributes:
        guidance_scale: s in null + s (conditional - null); 1 is no guidance.
        guidance_schedule: how the scale moves with sampling progress: "linear" from 1 to
            `guidance_scale`, or "constant".
        guidance_interval: guidance is on while low <= progress <= high, progress running from
            0 (noise, or no token) to 1 (data, or all tokens); elsewhere the scale is 1.
        guided_channels: guide only the first so many latent channels (None: all).
        temperature: factor on the noise of DDPM steps; the start noise keeps its size.
        clip: bound on the predicted x_0 of DDPM steps, in units of the normalised latents. None,
            the published samplers, has none; but a network trained for a short time then
            diverges, because the first cosine steps magnify its errors some thousand times.
        steps: steps of the diffusion head, the diffusion chain or the ODE (None: the model's).
        iterations: MAR only, steps in which the tokens are revealed (None: the model's).
        method: ODE solver of SiT and LightningDiT, "euler" or "dopri5" (None: the model's).
    """

    guidance_scale: float = 1.0
    guidance_schedule: GuidanceSchedule = "constant"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guided_channels: int | None = None
    temperature: float = 1.0
    clip: float | None = None
    steps: int | None = None
    iterations: int | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ConfigError(
                f"guidance_scale: must be 0 or more, got {self.guidance_scale}; 1 is no guidance"
            )
        if self.guidance_schedule not in ("constant", "linear"):
            raise ConfigError(
                f"guidance_schedule: must be constant or linear, got {self.guidance_schedule!r}"
            )
        low, high = self.guidance_interval
        if not 0.0 <= low <= high <= 1.0:
            raise ConfigError(
                f"guidance_interval: must be 0 <= low <= high <= 1, got ({low}, {high})"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature: must be 0 or more, got {self.temperature}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ConfigError(f"clip: must be more than 0 and finite, or left out, got {self.clip}")
        for name in ("guided_channels", "steps", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1, got {value}")
        if self.method not in (None, "euler", "dopri5"):
            raise ConfigError(f"method: must be euler or dopri5, got {self.method!r}")
