"""Gaussian diffusion with learned-range variance: schedules, losses, the DDPM step.

Ho et al. 2020 ("Denoising diffusion probabilistic models"), Nichol and Dhariwal 2021 ("Improved
denoising diffusion probabilistic models"). Step numbers run from 0 (least noise) to T - 1. A
network's output holds 2C channels: the predicted noise eps, then the interpolation v of the log
variance. Used by DiT and by the diffusion head of MAR, RandomAR and RasterAR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from detok_pipe.generators.layers import on_device
from detok_pipe.latents.errors import ConfigError

ScheduleName = Literal["linear", "cosine"]
TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """Tables of a diffusion, float64 (T,).

    Attributes:
        betas: noise variance added at each step.
        timestep_map: int64, the step number that the network sees.
    """

    betas: np.ndarray
    timestep_map: np.ndarray

    @property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1.0 - self.betas)

    @property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log variance of q(x_{t-1} | x_t, x_0); entry 0, where it is -inf, repeats entry 1.

        A schedule of one step has no entry 1; there it is log beta, which no sample depends on.
        """
        kept = self.alphas_cumprod
        before = np.append(1.0, kept[:-1])
        variance = self.betas * (1.0 - before) / (1.0 - kept)
        variance[0] = variance[1] if len(variance) > 1 else self.betas[0]
        return np.log(variance)

    @property
    def mean_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """(a, b) such that the posterior mean, at the x_0 that eps implies, is a x_t - b eps.

        At step 0 this is the implied x_0 itself.
        """
        a = 1.0 / np.sqrt(1.0 - self.betas)
        return a, a * self.betas / np.sqrt(1.0 - self.alphas_cumprod)


@lru_cache(maxsize=32)
def schedule(name: ScheduleName, steps: int = TRAIN_STEPS) -> Schedule:
    """The 1000-step schedule `name`, respaced to `steps` steps.

    Raises:
        ConfigError: unknown name, or a step count that is not in 2..1000 (or 1).
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise ConfigError(f"steps: diffusion has 1 to {TRAIN_STEPS} steps, got {steps}")
    if name == "linear":
        betas = np.linspace(1e-4, 0.02, TRAIN_STEPS)
    elif name == "cosine":
        u = np.arange(TRAIN_STEPS + 1) / TRAIN_STEPS
        level = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(0.999, 1.0 - level[1:] / level[:-1])
    else:
        raise ConfigError(f"noise schedule: must be linear or cosine, got {name!r}")
    if steps == TRAIN_STEPS:
        return Schedule(betas, np.arange(TRAIN_STEPS))
    stride = (TRAIN_STEPS - 1) / max(steps - 1, 1)
    kept = np.array([round(i * stride) for i in range(steps)], dtype=np.int64)
    levels = np.cumprod(1.0 - betas)[kept]
    return Schedule(1.0 - levels / np.append(1.0, levels[:-1]), kept)


class GaussianDiffusion:
    """Training side: noising and losses on rows of any shape (R, ...).

    Args:
        name: "linear" or "cosine"; always 1000 steps.
    """

    def __init__(self, name: ScheduleName) -> None:
        self.name = name
        self._tables: dict[torch.device, Tensor] = {}

    def _at(self, t: Tensor, ndim: int) -> list[Tensor]:
        """The table's columns at steps t (R,), shaped to broadcast over `ndim` dimensions."""
        if t.device not in self._tables:
            full = schedule(self.name)
            kept = full.alphas_cumprod
            columns = np.stack(
                (
                    np.sqrt(kept),
                    np.sqrt(1.0 - kept),
                    full.posterior_log_variance_clipped,
                    np.log(full.betas),
                    full.mean_coefficients[1],
                ),
                axis=1,
            )
            self._tables[t.device] = on_device(columns, t.device)
        rows = self._tables[t.device][t].unbind(-1)
        return [row.view(-1, *(1,) * (ndim - 1)) for row in rows]

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(kept) x_0 + sqrt(1 - kept) eps. x_0, eps (R, ...); t (R,) int64."""
        signal, spread, *_ = self._at(t, x_0.ndim)
        return signal * x_0 + spread * eps

    def losses(
        self, x_0: Tensor, eps: Tensor, t: Tensor, predicted: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each row's (mse, vlb), fp32 (R,), averaged over its other dimensions; vlb in bits.

        The VLB term trains v only: it sees eps detached. It is the divergence of the predicted
        step from the posterior, at step 0 the likelihood of x_0 in bins of 1/255 on each side.

        Args:
            x_0, eps, predicted, v: (R, ...). t: (R,) int64.
        """
        predicted, v = predicted.float(), v.float()
        _, _, low, high, weight = self._at(t, x_0.ndim)
        log_variance = low + (v + 1.0) / 2.0 * (high - low)
        error = predicted.detach() - eps
        # Both means come from the same x_t, so they differ by weight * error; taking the
        # difference of the two means instead would cancel most digits at large t.
        shift = weight * error
        divergence = 0.5 * (
            log_variance
            - low
            - 1.0
            + (low - log_variance).exp()
            + shift.square() / log_variance.exp()
        )
        likelihood = _binned_log_likelihood(x_0, shift, 0.5 * log_variance)
        first = (t == 0).view(-1, *(1,) * (x_0.ndim - 1))
        vlb = torch.where(first, -likelihood, divergence).flatten(1).mean(1) / math.log(2.0)
        mse = (predicted - eps).square().flatten(1).mean(1)
        return mse, vlb


def _binned_log_likelihood(x: Tensor, deviation: Tensor, log_std: Tensor) -> Tensor:
    """log probability of the bin of half-width 1/255 around x, under a Gaussian.

    The Gaussian lies at x - deviation; its CDF is the tanh approximation. Beyond +-0.999 the
    bin is open to that side.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    inverse = torch.exp(-log_std)
    upper = cdf(inverse * (deviation + 1.0 / 255.0))
    lower = cdf(inverse * (deviation - 1.0 / 255.0))
    inside = torch.where(x > 0.999, 1.0 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp_min(1e-12).log()


class ReverseChain:
    """Sampling side: the steps of a respaced schedule, from the last to the first.

    The coefficients of all steps lie in one table on the device, so that a step can be compiled
    or captured once for all, and nothing is copied or waited for between steps.

    Args:
        name: "linear" or "cosine". steps: of the respaced schedule.
        temperature: factor on each step's noise.
        clip: bound on the magnitude of each step's predicted x_0; None (as published) for none.

    Attributes:
        timestep_map: the step numbers that the network sees.
        table: fp32 (steps, 9), what `reverse_step` takes a row of.
    """

    def __init__(
        self,
        name: ScheduleName,
        steps: int,
        *,
        temperature: float = 1.0,
        clip: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        given = schedule(name, steps)
        self.steps, self.clip = steps, clip
        self.timestep_map: list[int] = given.timestep_map.tolist()
        kept = given.alphas_cumprod
        before = np.append(1.0, kept[:-1])
        low, high = given.posterior_log_variance_clipped, np.log(given.betas)
        # Half of low + (v + 1) / 2 * (high - low) is the log of the standard deviation.
        slope = (high - low) / 4.0
        offset = low / 2.0 + slope
        heat = np.full(steps, temperature)
        slope[0] = offset[0] = heat[0] = 0.0  # step 0 adds no noise, whatever v is
        columns = (
            *given.mean_coefficients,
            1.0 / np.sqrt(kept),
            np.sqrt(1.0 / kept - 1.0),
            np.sqrt(before) * given.betas / (1.0 - kept),
            np.sqrt(1.0 - given.betas) * (1.0 - before) / (1.0 - kept),
            slope,
            offset,
            heat,
        )
        self.table = on_device(np.stack(columns, 1), device)

    def step(self, i: int, x: Tensor, eps: Tensor, v: Tensor, noise: Tensor) -> Tensor:
        """x_{i-1} from x_i; i from steps - 1 (first) to 0 (last). See `reverse_step`."""
        return reverse_step(self.table[i], x, eps, v, noise, self.clip)


def reverse_step(
    row: Tensor, x: Tensor, eps: Tensor, v: Tensor, noise: Tensor, clip: float | None
) -> Tensor:
    """x_{i-1} from x_i, all fp32 (R, ...).

    Args:
        row: the step's row of `ReverseChain.table`, (9,).
        eps: predicted (and guided) noise. v: interpolation of the log variance.
        noise: standard normals.
        clip: bound on the predicted x_0, None for none.
    """
    a, b, signal, spread, towards, remains, slope, offset, heat = row.unbind()
    if clip is None:
        mean = a * x - b * eps
    else:
        x_0 = (signal * x - spread * eps).clamp(-clip, clip)
        mean = towards * x_0 + remains * x
    return torch.addcmul(mean, torch.exp(v * slope + offset), heat * noise)
