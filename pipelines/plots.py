"""Loss curves and guidance sweeps as PNG bytes.

Functions draw and return bytes; :func:`save` puts them on disk whole. Matplotlib's
object interface with the Agg canvas is used throughout, so nothing global is touched and
no display is needed. ``narrow`` draws for a telephone's width: same type size, less width.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.signal
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from detok_pipe.latents import atomic
from detok_pipe.latents.errors import InputError
from detok_pipe.pipelines.theme import LIGHT, Theme

_DPI = 200
_STYLES = ("-", "--", ":")  # of curves beyond the theme's colours
_FEW = 5  # more curves than this have their legend beside the axes
_LOG_RATIO = 8.0  # a curve whose values span more than this is easier to read on a log axis


@dataclass(frozen=True)
class Curve:
    """A named series: ``values`` (any finite or non-finite floats) at increasing ``steps``."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Measured:
    """A value and its standard error, None where none is known."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Metric:
    """What is measured, and which direction is better."""

    name: str
    better: Literal["lower", "higher"] = "lower"

    @property
    def label(self) -> str:
        """The name with an arrow towards better; it breaks into lines at its spaces only."""
        name = self.name.replace("-", "\N{NON-BREAKING HYPHEN}")
        return f"{name}\N{NO-BREAK SPACE}{'↓' if self.better == 'lower' else '↑'}"


@dataclass(frozen=True)
class SweepPoint:
    """The measurements at one guidance scale, by metric name."""

    scale: float
    metrics: Mapping[str, Measured]


@dataclass(frozen=True)
class Sweep:
    """The points of one run. ``best`` is the chosen scale, None where none was chosen."""

    name: str
    points: Sequence[SweepPoint]
    best: float | None = None
    levels: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Metric name -> {label: value}: horizontal lines to compare with."""


def curves_from_metrics(
    name: str, records: Sequence[Mapping[str, Any]], keys: Sequence[str] = ("loss",)
) -> list[Curve]:
    """The curves ``keys`` of the records of a ``metrics.jsonl``; absent keys give no curve.

    With one key the curve carries the run's name, with several the key's as well.
    """
    curves = []
    for key in keys:
        pairs = [
            (float(r["step"]), float(r[key]))
            for r in records
            if "step" in r and isinstance(r.get(key), int | float)
        ]
        if pairs:
            steps, values = zip(*pairs, strict=True)
            curves.append(Curve(name if len(keys) == 1 else f"{name} {key}", steps, values))
    return curves


def smoothed(values: np.ndarray, fraction: float = 0.02) -> np.ndarray:
    """Exponential moving average without start-up bias, as long as ``fraction`` of the curve.

    Args:
        values: (n,) finite floats.
        fraction: time constant over n; a constant shorter than one value changes nothing.

    Returns:
        (n,) float64.
    """
    values = np.asarray(values, dtype=np.float64)
    constant = fraction * len(values)
    if constant < 1:
        return values
    keep = 1 - 1 / constant
    biased = scipy.signal.lfilter([1 - keep], [1, -keep], values)
    return biased / (1 - keep ** np.arange(1, len(values) + 1))


def loss_curve(
    curves: Sequence[Curve],
    *,
    ylabel: str = "loss",
    xlabel: str = "step",
    log: bool | None = None,
    theme: Theme = LIGHT,
    narrow: bool = False,
) -> bytes:
    """One or several training curves: the raw values faint, their smoothing on top.

    Args:
        log: logarithmic vertical axis; None decides by the span of the smoothed values.

    Returns:
        PNG.

    Raises:
        InputError: there is no finite value to draw.
    """
    finite = []
    for curve in curves:
        steps = np.asarray(curve.steps, dtype=np.float64)
        values = np.asarray(curve.values, dtype=np.float64)
        kept = np.isfinite(values)
        if kept.any():
            finite.append((curve.name, steps[kept], values[kept]))
    if not finite:
        raise InputError("there is no finite value to plot; the run has logged no loss yet")
    lines = [(name, steps, values, smoothed(values)) for name, steps, values in finite]
    low = min(line.min() for *_, line in lines)
    high = max(line.max() for *_, line in lines)
    if log is None:
        log = low > 0 and high / low > _LOG_RATIO

    figure = _figure(theme, narrow, height=2.9)
    axes = figure.add_subplot()
    for index, (name, steps, values, line) in enumerate(lines):
        colour = theme.series[index % len(theme.series)]
        few = len(values) < 3
        if line is not values:
            axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.7)
        axes.plot(
            steps,
            line,
            color=colour,
            linestyle=_STYLES[index // len(theme.series) % len(_STYLES)],
            linewidth=1.7,
            label=_plain(name),
            marker="o" if few else "",
        )
    if log and low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        # A few outliers must not flatten the rest: one value in a hundred may fall outside.
        low = min(low, *(float(np.quantile(values, 0.01)) for _, _, values, _ in lines))
        high = max(high, *(float(np.quantile(values, 0.99)) for _, _, values, _ in lines))
        pad = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
        axes.set_ylim(low - pad, high + pad)
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 7, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _dress(axes, theme)
    if len(lines) > 1:
        _legend(axes, theme)
    return _png(figure, theme)


def sweep_curve(
    sweeps: Sequence[Sweep],
    metrics: Sequence[Metric],
    *,
    theme: Theme = LIGHT,
    narrow: bool = False,
) -> bytes:
    """Each metric against the guidance scale, one panel a metric on a shared scale axis.

    Bars are plus and minus one standard error. The chosen scale carries a ring and, for a
    single sweep, a line through all panels.

    Returns:
        PNG.

    Raises:
        InputError: there is no point to draw.
    """
    shown = [m for m in metrics if any(_finite(s, m.name) for s in sweeps)]
    if not shown:
        raise InputError("there is no finite score to plot; run detok-pipe sweep-cfg first")
    figure = _figure(theme, narrow, height=0.55 + 2.1 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for row, (axes, metric) in enumerate(zip(panels, shown, strict=True)):
        for index, sweep in enumerate(sweeps):
            alone = len(sweeps) == 1
            colour = theme.series[(row if alone else index) % len(theme.series)]
            _draw_sweep(axes, sweep, metric.name, colour, theme)
            for label, level in sweep.levels.get(metric.name, {}).items():
                axes.axhline(level, color=theme.muted, linewidth=0.9, linestyle=(0, (1, 2)))
                axes.annotate(
                    _plain(label),
                    (1, level),
                    xycoords=axes.get_yaxis_transform(),
                    xytext=(-3, 3),
                    textcoords="offset points",
                    ha="right",
                    fontsize=7.5,
                    color=theme.muted,
                )
            if alone and sweep.best is not None:
                axes.axvline(sweep.best, color=theme.muted, linewidth=0.8, linestyle=(0, (4, 3)))
                if row == 0:
                    axes.annotate(
                        f"best {sweep.best:g}",
                        (sweep.best, 1),
                        xycoords=axes.get_xaxis_transform(),
                        xytext=(0, 4),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8.5,
                        color=theme.ink,
                    )
        axes.set_ylabel(metric.label)
        axes.margins(x=0.04, y=0.14)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _dress(axes, theme)
    panels[-1].set_xlabel("guidance scale")
    panels[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    figure.align_ylabels(list(panels))
    if len(sweeps) > 1:
        _legend(panels[0], theme)
    return _png(figure, theme)


def save(path: Path, png: bytes) -> Path:
    """Write a figure whole (temporary name, then rename).

    Raises:
        StorageError: the disk is full or read-only.
    """
    atomic.write_bytes(path, png)
    return path


def _finite(sweep: Sweep, metric: str) -> list[tuple[float, Measured]]:
    points = [(p.scale, p.metrics[metric]) for p in sweep.points if metric in p.metrics]
    return sorted((p for p in points if math.isfinite(p[1].value)), key=lambda p: p[0])


def _draw_sweep(axes: Axes, sweep: Sweep, metric: str, colour: str, theme: Theme) -> None:
    points = _finite(sweep, metric)
    if not points:
        return
    scales = [scale for scale, _ in points]
    values = [measured.value for _, measured in points]
    # A missing error is a bar of length nan: matplotlib draws the point without a bar.
    errors = [math.nan if m.error is None else m.error for _, m in points]
    axes.errorbar(
        scales,
        values,
        yerr=errors,
        color=colour,
        linewidth=1.5,
        marker="o",
        markersize=4.5,
        elinewidth=1.1,
        capsize=3,
        label=_plain(sweep.name),
    )
    for scale, measured in points:
        if scale == sweep.best:
            axes.plot(
                scale,
                measured.value,
                marker="o",
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=theme.ink,
                markeredgewidth=1.3,
            )


def _plain(text: str) -> str:
    """Text that matplotlib draws as it stands: no mathematics, no private legend names."""
    return "\u200b" + text.replace("$", r"\$")


def _figure(theme: Theme, narrow: bool, height: float) -> Figure:
    figure = Figure(figsize=(3.9 if narrow else 7.6, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_facecolor(theme.paper)
    return figure


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.grid(True, axis="y", color=theme.rule, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.muted)
        spine.set_linewidth(0.8)
    axes.tick_params(which="both", colors=theme.muted, labelsize=8.5, length=0, pad=4)
    axes.tick_params(axis="x", which="major", length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.ink)
        label.set_fontsize(9.5)


def _legend(axes: Axes, theme: Theme) -> None:
    beside = len(axes.get_legend_handles_labels()[0]) > _FEW
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.02)} if beside else {"loc": "best"}
    axes.legend(frameon=False, fontsize=8.5, labelcolor=theme.ink, **place)


def _png(figure: Figure, theme: Theme) -> bytes:
    buffer = io.BytesIO()
    # Without the software's version the same numbers give the same bytes.
    figure.savefig(buffer, format="png", facecolor=theme.paper, metadata={"Software": None})
    return buffer.getvalue()
