"""What a sweep shows: a table, a plot with error bars, and samples of every scale."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.pipelines import pictures, plots
from detok_pipe.pipelines.pictures import ImageRow
from detok_pipe.pipelines.plots import Measured, Metric, Sweep, SweepPoint
from detok_pipe.pipelines.stored_features import decode_latents
from detok_pipe.pipelines.trained import TrainedTokenizer

PLOT = "sweep.png"
GRID = "samples-by-scale.png"


def sweep_metrics(result: Mapping[str, Any]) -> list[Metric]:
    """The metrics of a sweep, the one that decides first."""
    return [Metric(**metric) for metric in result["metrics"]]


def scale_and_temperature(record: Mapping[str, Any]) -> tuple[float, float]:
    """What tells a sweep's final scores apart; that at scale 1 may have its own temperature."""
    sampling = record["settings"]["samples"]["sampling"]
    return sampling["guidance_scale"], sampling["temperature"]


def sweep_curves(result: Mapping[str, Any]) -> list[Sweep]:
    """One curve a rung, the last rung first: other counts have another bias.

    Args:
        result: what ``sweep.json`` holds.
    """
    last = len(result["rungs"]) - 1
    return [
        Sweep(
            name=f"{rung['count']:,} samples",
            points=[
                SweepPoint(point["scale"], measured(point["metrics"])) for point in rung["points"]
            ],
            best=result["best"] if number == last else None,
        )
        for number, rung in reversed(list(enumerate(result["rungs"])))
    ]


def measured(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Measured]:
    """The metrics of a record or of a point of ``sweep.json``."""
    return {name: Measured(**value) for name, value in metrics.items()}


def write_plot(result: Mapping[str, Any], out: Path) -> Path:
    """Draw the sweep of the two deciding metrics to ``out/sweep.png``.

    Raises:
        StorageError: the disk is full or read-only.
    """
    return plots.save(
        out / PLOT, plots.sweep_curve(sweep_curves(result), sweep_metrics(result)[:2])
    )


def scale_grid(
    stores: Iterable[tuple[float, SampleStore]], tokenizer: TrainedTokenizer, *, columns: int = 8
) -> list[ImageRow]:
    """The first samples of each scale, one row a scale; columns share label and noise."""
    rows = []
    for scale, store in stores:
        z = store.read(0, min(columns, store.count, store.rows_per_shard))
        rows.append((scale, pictures.to_images(decode_latents(tokenizer, store.stats, z))))
    return pictures.scale_rows(rows)


def write_grid(rows: Sequence[ImageRow], out: Path) -> Path:
    """Draw the samples of each scale to ``out/samples-by-scale.png``.

    Raises:
        StorageError: the disk is full or read-only.
    """
    return pictures.save(out / GRID, pictures.labelled_grid(rows))


def sweep_table(result: Mapping[str, Any]) -> str:
    """The sweep and its final scores as text."""
    names = [metric.label for metric in sweep_metrics(result)]
    keys = [metric.name for metric in sweep_metrics(result)]
    lines: list[list[str]] = [["scale", "samples", *names, "difference to best", ""]]
    for rung in result["rungs"]:
        last = rung is result["rungs"][-1]
        for point in rung["points"]:
            difference = point["difference to best"]
            mark = "best" if last and point["scale"] == result["best"] else ""
            lines.append(
                [
                    f"{point['scale']:g}",
                    f"{rung['count']:,}",
                    *_cells(point["metrics"], keys),
                    _number(difference["value"], difference["error"]),
                    mark if last else ("" if point["kept"] else "dropped"),
                ]
            )
    for record in result["final"]:
        scale, temperature = scale_and_temperature(record)
        lines.append(
            [
                f"{scale:g}",
                f"{record['settings']['count']:,}",
                *_cells(record["metrics"], keys),
                "",
                "final" if temperature == 1 else f"final, temperature {temperature:g}",
            ]
        )
    return aligned(lines)


def score_table(record: Mapping[str, Any]) -> str:
    """One score as text."""
    count = record["settings"]["count"]
    lines = [[name, _number(m["value"], m["error"])] for name, m in record["metrics"].items()]
    return aligned([["samples", f"{count:,}"], *lines])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells with columns of equal width."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(metrics: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    return [
        _number(metrics[key]["value"], metrics[key]["error"]) if key in metrics else "-"
        for key in keys
    ]


def _number(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"
