"""Losses on their way from the device to the log, without anybody waiting for them."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from detok_pipe.latents.errors import NonFiniteError

DescribeIds = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Reading:
    """The means of some consecutive steps. ``step``: steps finished by then."""

    step: int
    steps: int
    means: dict[str, float]


@dataclass
class _Window:
    """Some steps' values: while they are made, then while they travel."""

    first: int
    ids: list[Tensor] = field(default_factory=list)
    values: list[Mapping[str, Tensor]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    mine: Tensor | None = None  # (steps, names) on the host, of this process
    mean: Tensor | None = None  # the same over all processes
    copied: torch.cuda.Event | None = None


class Readings:
    """Collects named scalars of each step, and hands out their means once they have arrived.

    Args:
        describe_ids: names the samples at some stream positions, for the error message.
    """

    def __init__(self, accelerator: Accelerator, describe_ids: DescribeIds | None = None) -> None:
        self._accelerator = accelerator
        self._describe_ids = describe_ids
        self._open: _Window | None = None
        self._sent: deque[_Window] = deque()

    def add(self, step: int, ids: Tensor, values: Mapping[str, Tensor]) -> None:
        """Note the values, on the device, of step ``step`` (from 0)."""
        if self._open is None:
            self._open = _Window(first=step)
        self._open.ids.append(ids)
        self._open.values.append(values)

    def send(self) -> None:
        """Start the noted values on their way; every process has to, after the same step."""
        window = self._open
        if window is None:
            return
        self._open = None
        # A term may join in the middle, as a discriminator's do.
        window.names = list(dict.fromkeys(name for values in window.values for name in values))
        absent = torch.zeros_like(window.values[0]["loss"], dtype=torch.float32)
        mine = torch.stack(
            [
                torch.stack([values.get(name, absent).float() for name in window.names])
                for values in window.values
            ]
        )  # (steps, names)
        mean = self._accelerator.reduce(mine.clone(), "mean")
        window.mine, window.mean = _to_host(mine), _to_host(mean)
        if mine.device.type == "cuda":
            window.copied = torch.cuda.Event()
            window.copied.record()
        self._sent.append(window)

    def arrived(self, *, wait: bool = False) -> Iterator[Reading]:
        """The readings that have come in since the last call, or, to ``wait``, all that were sent.

        Raises:
            NonFiniteError: at the first step with a value that is not finite.
        """
        while self._sent:
            window = self._sent[0]
            if window.copied is not None:
                if not wait and not window.copied.query():
                    return
                window.copied.synchronize()
            self._sent.popleft()
            yield self._read(window)

    def _read(self, window: _Window) -> Reading:
        assert window.mine is not None
        assert window.mean is not None
        for row, ids in enumerate(window.ids):
            finite = window.mean[row].isfinite().tolist()
            if not all(finite):
                bad = [name for name, good in zip(window.names, finite, strict=True) if not good]
                own = not window.mine[row].isfinite().all()
                where = self._named(ids.tolist()) if own else "on another process"
                raise NonFiniteError(
                    f"{', '.join(bad)} of step {window.first + row + 1:,} is not finite ({where}); "
                    "the last checkpoint is untouched. Lower the learning rate, or train in fp32"
                )
        totals = window.mean.sum(0).tolist()
        counts = [sum(name in values for values in window.values) for name in window.names]
        means = {n: t / c for n, t, c in zip(window.names, totals, counts, strict=True)}
        steps = len(window.values)
        return Reading(window.first + steps, steps, means)

    def _named(self, ids: list[int]) -> str:
        some, more = ids[:8], ", ..." if len(ids) > 8 else ""
        names = f": {self._describe_ids(some)}{more}" if self._describe_ids else ""
        return f"stream positions {', '.join(map(str, some))}{more}{names}"


def _to_host(table: Tensor) -> Tensor:
    """A copy on the host; from a CUDA device it is under way when this returns."""
    if table.device.type != "cuda":
        return table.cpu()
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    return host.copy_(table, non_blocking=True)
