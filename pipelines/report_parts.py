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
    SweepPoint,
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


def sweep_blocks(
    sweeps: Sequence[Sweep], metrics: Sequence[Metric], warnings: Sequence[str] = ()
) -> list[Block]:
    """Plot and table of a guidance sweep.

    Args:
        sweeps: the deciding curve first, then others (earlier rungs, with fewer samples).
        metrics: the deciding one first; the plot shows two, the table all.
        warnings: what a reader must know, a sentence each.
    """
    points = [(sweep, p) for sweep in sweeps for p in sorted(sweep.points, key=_scale)]
    if not points:
        advice = "No sweep yet: run `detok-pipe sweep-cfg` on this run, then this page again."
        return [Text(advice, tone="note")]
    best = sweeps[0].best
    found = "" if best is None else f" The best scale is {best:g}."
    scales = sorted(p.scale for _, p in points)
    blocks: list[Block] = []
    if any(_finite(p.metrics.get(m.name)) for _, p in points for m in metrics[:2]):
        blocks.append(
            plot_figure(
                functools.partial(sweep_curve, sweeps, metrics[:2]),
                alt=f"{' and '.join(m.name for m in metrics[:2])} against the guidance scale, "
                f"{len(set(scales))} scales from {scales[0]:g} to {scales[-1]:g}.{found}",
                caption="Scores by guidance scale. Bars: plus and minus one standard error. All "
                "scales share labels and noise, so their differences are surer than the bars "
                "suggest. The ring marks the best scale.",
            )
        )
    shown = [m for m in metrics if any(m.name in p.metrics for _, p in points)]
    named = len(sweeps) > 1
    blocks.append(
        Table(
            columns=["Guidance scale", *(["Curve"] if named else []), *(m.label for m in shown)],
            rows=[
                [p.scale, *([sweep.name] if named else []), *(p.metrics.get(m.name) for m in shown)]
                for sweep, p in points
            ],
            caption=f"The sweep in numbers.{found}",
            highlight=next(
                (i for i, (s, p) in enumerate(points) if s is sweeps[0] and p.scale == best), None
            ),
        )
    )
    blocks.extend(Text(f"{text[:1].upper()}{text[1:]}", tone="warning") for text in warnings)
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


def _scale(point: SweepPoint) -> float:
    return point.scale
