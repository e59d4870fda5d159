"""Many runs side by side: a table, and their loss curves in one picture."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detok_pipe.latents.errors import CheckpointError, InputError
from detok_pipe.pipelines import plots
from detok_pipe.pipelines.checkpoints import score_of
from detok_pipe.pipelines.find_tokenizer import run_of
from detok_pipe.pipelines.run_directory import CONFIG, read_config, read_metrics
from detok_pipe.pipelines.sweep import SWEEP
from detok_pipe.pipelines.sweep_output import aligned

_DEPTH = 3


@dataclass(frozen=True)
class Run:
    """What a run directory tells about itself.

    Attributes:
        name: its path below the folder that was searched.
        model: generator, or tokenizer, and its size in parameters.
        made_from: the cache's fingerprint, the image set's folder, or the imported file.
        step, steps: finished and planned steps.
        loss: mean of the last tenth of the logged losses.
        score: name and value of its lowest Fréchet distance, while training or in a sweep: FID
            where there is one, else that of the network that scored last.
    """

    name: str
    model: str
    made_from: str
    step: int
    steps: int
    loss: float | None
    score: tuple[str, float] | None
    metrics: list[dict[str, Any]]


def find_runs(folder: Path) -> list[Run]:
    """The runs in ``folder``, or the one that it is, sorted by name.

    Raises:
        InputError: there is none.
    """
    found = [_read(path, folder) for path in sorted(set(_candidates(folder)))]
    runs = [run for run in found if run is not None]
    if not runs:
        raise InputError(
            f"{folder} holds no run: name the folder in which train-tok and train-gen were told "
            "to make theirs (--out)"
        )
    return runs


def _candidates(folder: Path) -> Iterator[Path]:
    for depth in range(_DEPTH + 1):
        for config in folder.glob("*/" * depth + CONFIG):
            if run_of(config.parent) == config.parent:
                yield config.parent


def _read(path: Path, folder: Path) -> Run | None:
    try:
        record = read_config(path)
    except CheckpointError:
        return None  # a config.json of something else
    if record.get("kind") not in ("generator", "tokenizer"):
        return None
    metrics = read_metrics(path)
    losses = [r["loss"] for r in metrics if "loss" in r]
    millions = f"{record['parameters'] / 1e6:,.1f} M" if "parameters" in record else ""
    model = record["config"]["generator"] if record["kind"] == "generator" else "l-DeTok"
    if "imported_from" in record:
        made_from = f"import of {Path(record['imported_from']).name}"
    elif record["kind"] == "generator":
        made_from = f"cache {record['inputs']['cache'][:8]}"
    else:
        made_from = Path(record.get("data", {}).get("path", "-")).name
    return Run(
        name=path.resolve().name if path == folder else path.relative_to(folder).as_posix(),
        model=f"{model} {millions}".strip(),
        made_from=made_from,
        step=max((r["step"] for r in metrics), default=0),
        steps=record.get("steps", 0),
        loss=float(np.mean(losses[-max(1, len(losses) // 10) :])) if losses else None,
        score=_best_score([*metrics, *_final_scores(path)]),
        metrics=metrics,
    )


def _final_scores(run: Path) -> list[dict[str, float]]:
    """The metrics with which sweeps of the run, or of its checkpoints, ended."""
    found = []
    for file in sorted(run.glob(f"*/{SWEEP}")):
        try:
            final = json.loads(file.read_bytes())["final"]
            found += [{name: m["value"] for name, m in r["metrics"].items()} for r in final]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # damaged: the sweep itself says so
    return found


def _best_score(metrics: Sequence[dict[str, Any]]) -> tuple[str, float] | None:
    scores = [score for record in metrics if (score := score_of(record)) is not None]
    if not scores:
        return None
    # Distances of different networks are not comparable.
    names = [name for name, _ in scores]
    name = next((name for name in names if name.endswith("FID")), names[-1])
    return name, min(value for other, value in scores if other == name)


def runs_table(runs: Sequence[Run]) -> str:
    """The runs as text, a line each."""
    lines = [["run", "model", "made from", "step", "loss", "best score"]]
    for run in runs:
        lines.append(
            [
                run.name,
                run.model,
                run.made_from,
                f"{run.step:,} of {run.steps:,}",
                "-" if run.loss is None else f"{run.loss:.4g}",
                "-" if run.score is None else f"{run.score[0]} {run.score[1]:.4g}",
            ]
        )
    return aligned(lines)


def write_curves(runs: Sequence[Run], out: Path) -> Path:
    """Draw the runs' losses over each other to the PNG ``out``.

    Raises:
        InputError: no run has logged a loss. StorageError: the disk is full or read-only.
    """
    curves = [c for run in runs for c in plots.curves_from_metrics(run.name, run.metrics)]
    return plots.save(out, plots.loss_curve(curves))
