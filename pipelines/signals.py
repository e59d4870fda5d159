"""Signals that ask a training to stop: caught, agreed on by all processes, then obeyed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from detok_pipe.pipelines.processes import PATIENCE

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in a list instead of dying in the middle of a step.

    A second SIGINT ends the process at once. Outside the main thread nothing is caught.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(signum)

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Agreement:
    """Lets all processes learn the highest of their numbers, without waiting for their devices."""

    def __init__(self, processes: int) -> None:
        # Collectives of the processors: those of NCCL would have to wait for the GPU.
        self._group: Any = (
            dist.new_group(backend="gloo", timeout=PATIENCE) if processes > 1 else None
        )

    def highest(self, number: int) -> int:
        """The highest ``number`` of all processes; each has to call."""
        if self._group is None:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return int(value)
