"""Losses on their way from the device to the log, without anybody waiting for them."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from detok_pipe.latents.errors import NonFiniteError
from detok_pipe.pipelines.host_copies import HostCopies

DescribeIds = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Reading:
    """The means of some consecutive steps. ``step``: steps finished by then."""

    step: int
    steps: int
    means: dict[str, float]


@dataclass
class _Window:
    """Some steps' values while they are made."""

    first: int
    ids: list[Tensor] = field(default_factory=list)
    values: list[Mapping[str, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class _Sent:
    """A window whose values are on their way: "mine", (steps, names) of this process, and "mean",
    the same over all processes."""

    window: _Window
    names: list[str]
    tables: HostCopies


class Readings:
    """Collects named scalars of each step, and hands out their means once they have arrived.

    Args:
        describe_ids: names the samples at some stream positions, for the error message.
    """

    def __init__(self, accelerator: Accelerator, describe_ids: DescribeIds | None = None) -> None:
        self._accelerator = accelerator
        self._describe_ids = describe_ids
        self._open: _Window | None = None
        self._sent: deque[_Sent] = deque()

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
        names = list(dict.fromkeys(name for values in window.values for name in values))
        absent = torch.zeros_like(window.values[0]["loss"], dtype=torch.float32)
        mine = torch.stack(
            [
                torch.stack([values.get(name, absent).float() for name in names])
                for values in window.values
            ]
        )  # (steps, names)
        mean = self._accelerator.reduce(mine.clone(), "mean")
        self._sent.append(_Sent(window, names, HostCopies({"mine": mine, "mean": mean})))

    def arrived(self, *, wait: bool = False) -> Iterator[Reading]:
        """The readings that have come in since the last call, or, to ``wait``, all that were sent.

        Raises:
            NonFiniteError: at the first step with a value that is not finite.
        """
        while self._sent:
            if not wait and not self._sent[0].tables.arrived():
                return
            yield self._read(self._sent.popleft())

    def _read(self, sent: _Sent) -> Reading:
        window, tables = sent.window, sent.tables.wait()
        for row, ids in enumerate(window.ids):
            finite = tables["mean"][row].isfinite().tolist()
            if not all(finite):
                bad = [name for name, good in zip(sent.names, finite, strict=True) if not good]
                own = not tables["mine"][row].isfinite().all()
                where = self._named(ids.tolist()) if own else "on another process"
                raise NonFiniteError(
                    f"{', '.join(bad)} of step {window.first + row + 1:,} is not finite ({where}); "
                    "the last checkpoint is untouched. Lower the learning rate, or train in fp32"
                )
        totals = tables["mean"].sum(0).tolist()
        counts = [sum(name in values for values in window.values) for name in sent.names]
        means = {n: t / c for n, t, c in zip(sent.names, totals, counts, strict=True)}
        steps = len(window.values)
        return Reading(window.first + steps, steps, means)

    def _named(self, ids: list[int]) -> str:
        some, more = ids[:8], ", ..." if len(ids) > 8 else ""
        names = f": {self._describe_ids(some)}{more}" if self._describe_ids else ""
        return f"stream positions {', '.join(map(str, some))}{more}{names}"
