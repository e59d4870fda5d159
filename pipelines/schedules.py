"""What moves with the step: the learning rate and the decay of the EMA."""

import math
from typing import Literal


def learning_rate(
    step: int, *, steps: int, peak: float, warmup: float, schedule: Literal["constant", "cosine"]
) -> float:
    """The rate of step ``step`` (from 0): a linear rise over the first share ``warmup``, then
    constant, or a cosine to zero at ``steps``."""
    warm = warmup * steps
    if step < warm:
        return peak * (step + 1) / warm if warm > 1 else peak
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


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
