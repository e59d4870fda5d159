"""The exponential moving average of a network's parameters."""

import copy
import warnings
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_TOO_EARLY = 0.05

Network = TypeVar("Network", bound=nn.Module)


class Ema(Generic[Network]):
    """A second copy of a network that follows the first one slowly.

    torch's AveragedModel sends its step counter to the device in each step and waits for it;
    this one keeps the device busy, and costs one fused operation a step.

    Attributes:
        module: the averaged network, in evaluation mode, without gradients.
    """

    def __init__(self, model: Network) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Move each parameter to ``decay`` of itself and the rest of the model's; copy buffers."""
        averaged = [_local(p) for p in self.module.parameters()]
        current = [_local(p) for p in model.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - decay)
        buffers = list(self.module.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(model.buffers()))


def ema_decay(step: int, decay: float, warm: bool) -> float:
    """The EMA's decay at step ``step`` (from 0); warmed up it starts at 0.1 and rises."""
    return min(decay, (1 + step) / (10 + step)) if warm else decay


def untrained_share(steps: int, decay: float, warm: bool) -> float:
    """The weight that the EMA after ``steps`` steps still gives to the network it began with."""
    share = 1.0
    for step in range(steps):
        share *= ema_decay(step, decay, warm)
        if share < 1e-6:
            break
    return share


def warn_of_early_average(steps: int, decay: float, warm: bool) -> None:
    """Warn where the average after ``steps`` steps is still much of the untrained network."""
    share = untrained_share(steps, decay, warm)
    if share > _TOO_EARLY:
        warnings.warn(
            f"after {steps:,} steps the averaged weights are still {share:.0%} those of the "
            f"untrained network (ema {decay}): samples say little yet. Shorter runs want a smaller "
            "ema or --set ema_warmup=true, when they begin; sample has --no-ema",
            stacklevel=3,
        )


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
