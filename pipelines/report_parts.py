"""Parts that both pages show: training curves, sweeps, score tables, settings, commands."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detok_pipe.pipelines.plots import (
    Curve,
    Measured,
    Metric,
    Sweep,
    loss_curve,
    sweep_curve,
)
from detok_pipe.pipelines.report import (
    Block,
    Cell,
    Code,
    Disclosure,
    Figure,
    KeyValues,
    Table,
    Text,
    duration,
    plot_figure,
)


@dataclass(frozen=True)
class ScoreRow:
    """What one set of images scored. ``metrics`` is by metric name; ``note`` says what it is."""

    name: str
    images: int
    metrics: Mapping[str, Measured]
    note: str = ""


def curve_figure(curves: Sequence[Curve], *, caption: str, ylabel: str = "loss") -> Figure | Text:
    """The training curves, or a sentence where nothing finite was logged."""
    drawable = [c for c in curves if any(math.isfinite(v) for v in c.values)]
    if not drawable:
        return Text("No loss has been logged yet.", tone="note")
    ends = "; ".join(
        f"{c.name}: {c.values[0]:.4g} at step {c.steps[0]:,.0f}, "
        f"{c.values[-1]:.4g} at step {c.steps[-1]:,.0f}"
        for c in drawable
    )
    return plot_figure(
        functools.partial(loss_curve, drawable, ylabel=ylabel),
        alt=f"Training curve. {ends}.",
        caption=f"{caption} Faint: each logged value. Line: moving average over 2 % of the run.",
    )


def sweep_blocks(sweep: Sweep, metrics: Sequence[Metric]) -> list[Block]:
    """Plot and table of a guidance sweep, and a warning where the best scale is at the edge."""
    points = sorted(sweep.points, key=lambda point: point.scale)
    if not points:
        return [
            Text(
                "No sweep yet: run `detok-pipe sweep-cfg` on this run, then this page again.",
                "note",
            )
        ]
    found = "" if sweep.best is None else f" The best scale is {sweep.best:g}."
    blocks: list[Block] = []
    if any(_finite(p.metrics.get(m.name)) for p in points for m in metrics):
        blocks.append(
            plot_figure(
                functools.partial(sweep_curve, [sweep], metrics),
                alt=f"{' and '.join(m.name for m in metrics)} against the guidance scale, "
                f"{len(points)} scales from {points[0].scale:g} to {points[-1].scale:g}.{found}",
                caption="Scores by guidance scale. Bars: plus and minus one standard error. All "
                "scales share labels and noise, so their differences are surer than the bars "
                "suggest. The ring marks the best scale.",
            )
        )
    best = next((i for i, p in enumerate(points) if p.scale == sweep.best), None)
    blocks.append(
        Table(
            columns=["Guidance scale", *(m.label for m in metrics)],
            rows=[[p.scale, *(p.metrics.get(m.name) for m in metrics)] for p in points],
            caption=f"The sweep in numbers.{found}",
            highlight=best,
        )
    )
    if best is not None and len(points) > 2 and best in (0, len(points) - 1):
        blocks.append(
            Text(
                f"The best scale, {sweep.best:g}, is the {'first' if best == 0 else 'last'} of the "
                "grid. A better one may lie beyond it: sweep again with a wider grid.",
                tone="warning",
            )
        )
    return blocks


def score_table(
    rows: Sequence[ScoreRow],
    metrics: Sequence[Metric],
    *,
    caption: str,
    highlight: int | None = None,
) -> Table:
    """Rows by metrics. Metrics that no row has are left out."""
    shown = [m for m in metrics if any(m.name in row.metrics for row in rows)]
    noted = any(row.note for row in rows)
    return Table(
        columns=["Images", *(m.label for m in shown), "Count", *(["What it is"] if noted else [])],
        rows=[
            [row.name, *(row.metrics.get(m.name) for m in shown), row.images]
            + ([row.note] if noted else [])
            for row in rows
        ],
        caption=caption,
        highlight=highlight,
    )


def settings(groups: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """One closed disclosure a group; empty groups are left out."""
    return [
        Disclosure(summary=name, blocks=[KeyValues(values)])
        for name, values in groups.items()
        if values
    ]


def commands(lines: Sequence[str], caption: str) -> Code:
    """Shell commands, one a line."""
    return Code("\n".join(lines), caption=caption)


def timings(stages: Sequence[tuple[str, float]]) -> Table:
    """How long each stage took, and the sum."""
    total = sum(seconds for _, seconds in stages)
    rows: list[Sequence[Cell]] = [
        [name, duration(seconds), f"{100 * seconds / total:.0f} %" if total else "–"]
        for name, seconds in stages
    ]
    return Table(
        columns=["Stage", "Time", "Share"],
        rows=[*rows, ["Together", duration(total), ""]],
        caption="Wall-clock time of each stage, measured in this run.",
        highlight=len(rows),
    )


def _finite(measured: Measured | None) -> bool:
    return measured is not None and math.isfinite(measured.value)
