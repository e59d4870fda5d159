"""Progress of long work: a live bar on a terminal, a line every few seconds in a log.

A cluster log or a CI log has no cursor to move, so where the output is no terminal the
same facts (done, rate, time left, named values) are printed as plain lines.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True, highlight=False)
"""Messages and progress go to standard error; results that a pipe may read to standard output."""

SECONDS_BETWEEN_LINES = 10.0


def say(message: str, *, quiet: bool = False) -> None:
    """Print one line for the user, neither interpreted nor broken, unless ``quiet``."""
    if not quiet:
        console.print(message, markup=False, soft_wrap=True)


def _format(values: dict[str, float | str]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


class _RateColumn(TextColumn):
    """Units a second since this process began, without the part that a resumed run found done."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed
        if not elapsed:
            return Text("")
        rate = (task.completed - task.fields["initial"]) / elapsed
        return Text(f"{rate:,.1f} {task.fields['unit']}/s")


class ProgressTask:
    """Handle given out by :func:`progress`."""

    def __init__(
        self, name: str, total: int, unit: str, initial: int, bar: Progress | None
    ) -> None:
        self.name, self.total, self.unit, self.initial = name, total, unit, initial
        self.done = initial
        self._bar = bar
        self._task = (
            bar.add_task(
                name, total=total, completed=initial, unit=unit, initial=initial, values=""
            )
            if bar is not None
            else None
        )
        self._start = self._last_line = time.monotonic()
        self._values: dict[str, float | str] = {}

    def advance(self, count: int = 1, **values: float | str) -> None:
        """Count ``count`` more units as done; ``values`` (loss, lr, ...) are shown beside them."""
        self.done += count
        self._values.update(values)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, values=_format(self._values))

    def line(self, now: float) -> str:
        """The state as one line of a log."""
        seconds = max(now - self._start, 1e-9)
        rate = (self.done - self.initial) / seconds
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate > 0 else "unknown"
        return (
            f"{self.name}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, left {left}"
            + (f", {_format(self._values)}" if self._values else "")
        )


class _LineTask(ProgressTask):
    """Prints a line now and then, for logs."""

    def advance(self, count: int = 1, **values: float | str) -> None:
        super().advance(count, **values)
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            say(self.line(now))

    def finish(self) -> None:
        if self.done > self.initial:
            say(self.line(time.monotonic()))


@contextmanager
def progress(
    name: str, *, total: int, unit: str = "images", initial: int = 0, quiet: bool = False
) -> Iterator[ProgressTask]:
    """Show progress of ``total`` units of which ``initial`` were done by an earlier run.

    Example:
        >>> with progress("encode", total=100, quiet=True) as task:
        ...     task.advance(10, loss=0.5)
    """
    if quiet:
        yield ProgressTask(name, total, unit, initial, None)
    elif console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}", markup=False),
        )
        with Progress(*columns, console=console, refresh_per_second=4) as bar:
            yield ProgressTask(name, total, unit, initial, bar)
    else:
        task = _LineTask(name, total, unit, initial, None)
        yield task
        task.finish()
