"""What every generator offers: a loss to train with, and samples."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detok_pipe.generators.layers import AnyNoise
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError

GUIDANCE_OPTIONS = frozenset(
    ("guidance_scale", "guidance_schedule", "guidance_interval", "guided_channels")
)


class Generator(nn.Module, ABC):
    """A model of normalised latents given labels.

    Attributes:
        sampling_options: the fields of `Sampling` that it uses; it refuses all others.
        grid: the latent grid, (h, w) or (n,). channels: latent channels C. num_classes: labels.
        tokens: N, what its transformer sees of a latent.
    """

    sampling_options: ClassVar[frozenset[str]]
    grid: tuple[int, ...]
    channels: int
    num_classes: int
    tokens: int

    @property
    def title(self) -> str:
        """Its name in messages."""
        return type(self).__name__

    @abstractmethod
    def loss(self, z: Tensor, condition: Tensor, noise: AnyNoise) -> Tensor:
        """Scalar. z (B, places, C) fp32 normalised; condition (B,) int64, -1 for null."""

    def forward(self, z: Tensor, condition: Tensor, noise: AnyNoise) -> Tensor:
        """`loss`, for wrappers that call a module."""
        return self.loss(z, condition, noise)

    @torch.no_grad()
    def sample(self, condition: Tensor, sampling: Sampling, noise: AnyNoise) -> Tensor:
        """Labels (B,) int64, -1 for null -> latents (B, places, C) fp32, normalised.

        Raises:
            ConfigError: see `resolved`.
        """
        return self._sample(condition, self.resolved(sampling), noise)

    @abstractmethod
    def _sample(self, condition: Tensor, sampling: Sampling, noise: AnyNoise) -> Tensor:
        """`sample` with options that are `resolved`."""

    @abstractmethod
    def compile_sampler(self) -> None:
        """Let `sample` run compiled from now on; the weights must stay as they are."""

    @abstractmethod
    def own_sampling(self, sampling: Sampling) -> dict[str, Any]:
        """What None stands for in those of the options that have a number of the model's own."""

    def resolved(self, sampling: Sampling) -> Sampling:
        """The options with the model's own numbers in place of None: all that samples depend on.

        Raises:
            ConfigError: see `check_sampling`.
        """
        self.check_sampling(sampling)
        own = self.own_sampling(sampling)
        missing = {key: value for key, value in own.items() if getattr(sampling, key) is None}
        return dataclasses.replace(sampling, **missing)

    def check_sampling(self, sampling: Sampling) -> None:
        """Check that all options which differ from the default have an effect, and are in range.

        Raises:
            ConfigError: one has none, or more channels, steps or iterations than there are; it is
                named.
        """
        for option in dataclasses.fields(sampling):
            value = getattr(sampling, option.name)
            if option.name not in self.sampling_options and value != option.default:
                raise ConfigError(
                    f"{option.name} {value}: {self.title} does not use this sampling option; "
                    f"leave it out (it uses {', '.join(sorted(self.sampling_options))})"
                )
        if (sampling.guided_channels or 1) > self.channels:
            raise ConfigError(
                f"guided_channels {sampling.guided_channels}: the latents have {self.channels} "
                "channels; leave it out to guide all"
            )

    def used(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of several sampling options that this generator uses."""
        return {key: value for key, value in options.items() if key in self.sampling_options}
