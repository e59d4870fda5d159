"""The page of ``detok-pipe report RUN``: one generator run, with all that has been measured."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detok_pipe.pipelines.pictures import ImageRow
from detok_pipe.pipelines.plots import Curve, Metric, Sweep, curves_from_metrics
from detok_pipe.pipelines.report import (
    Block,
    Cell,
    Disclosure,
    ImageGrid,
    KeyValues,
    Report,
    Section,
    Text,
    cell_text,
)
from detok_pipe.pipelines.report_parts import (
    ScoreRow,
    commands,
    curve_figure,
    score_table,
    settings,
    sweep_blocks,
)
from detok_pipe.pipelines.run_directory import read_config, read_metrics
from detok_pipe.pipelines.sweep_output import measured, sweep_curves, sweep_metrics


@dataclass(frozen=True)
class RunFacts:
    """Everything on the page of a run. What has not been done yet stays empty.

    Attributes:
        record: the run's ``config.json``.
        curves: training losses. speed: images a second by step.
        sweeps: the guidance sweep, its deciding curve first. warnings: about it.
        metrics: of sweep and scores, the deciding one first.
        sweep_settings: everything that the sweep's result depends on.
        scores: final scores, the best first. notes: what limits them, a sentence each.
        samples: (caption, rows) of image grids.
        commands: the exact commands that make this run and this page again.
    """

    name: str
    record: Mapping[str, Any]
    curves: Sequence[Curve] = ()
    speed: Sequence[Curve] = ()
    sweeps: Sequence[Sweep] = ()
    warnings: Sequence[str] = ()
    sweep_settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Metric] = ()
    scores: Sequence[ScoreRow] = ()
    notes: Sequence[str] = ()
    samples: Sequence[tuple[str, Sequence[ImageRow]]] = ()
    commands: Sequence[str] = field(default_factory=list)
    footer: str = ""


def read_run(run: Path) -> RunFacts:
    """What the run directory itself tells: configuration, curves, the training command.

    :func:`with_sweep` adds what a sweep found.

    Raises:
        CheckpointError: it is no generator run.
    """
    record = read_config(run, "generator")
    records = read_metrics(run)
    train = record.get("command") or []
    return RunFacts(
        name=run.resolve().name,
        record=record,
        curves=curves_from_metrics(str(record["config"].get("generator", run.name)), records),
        speed=curves_from_metrics("images a second", records, ["images_per_second"]),
        commands=[
            *([shlex.join(["detok-pipe", *map(str, train[1:])])] if train else []),
            shlex.join(["detok-pipe", "report", str(run)]),
        ],
        footer=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )


def with_sweep(
    facts: RunFacts, run: Path, result: Mapping[str, Any], rows: Sequence[ImageRow] = ()
) -> RunFacts:
    """The facts with a sweep's curves, final scores, pictures and its exact command.

    Args:
        run: the run directory, as it stands in the command.
        result: what ``sweep.json`` holds.
        rows: samples by scale.
    """
    scores = []
    for record in result["final"]:
        settings = record["settings"]
        scale = settings["samples"]["sampling"]["guidance_scale"]
        metrics = measured(record["metrics"])
        scores.append(ScoreRow(f"guidance scale {scale:g}", settings["count"], metrics))
    notes = dict.fromkeys(note for record in result["final"] for note in record["notes"])
    caption = "The same labels and the same noise at each guidance scale, in seed order."
    *earlier, again = facts.commands
    return dataclasses.replace(
        facts,
        sweeps=sweep_curves(result),
        warnings=result["warnings"],
        sweep_settings={"plan": result["plan"], **result["settings"]},
        metrics=sweep_metrics(result),
        scores=scores,
        notes=list(notes),
        samples=[*facts.samples, *([(caption, rows)] if rows else [])],
        commands=[*earlier, sweep_command(run, result), again],
    )


def sweep_command(run: Path, result: Mapping[str, Any]) -> str:
    """The command that makes a sweep again, with every option that changes its result."""
    plan, network = result["plan"], result["settings"]["network"]["name"]
    sampling, unguided = plan["sampling"], plan["unguided"]
    low, high = sampling["guidance_interval"]
    is_inception = "@" not in network
    options: dict[str, Any] = {
        "--ref": result["reference"],
        "--tokenizer": result["tokenizer"],
        "--scales": ",".join(f"{scale:g}" for scale in plan["scales"]),
        "--num": plan["count"],
        "--final-num": plan["final_count"],
        "--search": plan["search"],
        "--seed": plan["seed"],
        "--precision": plan["precision"],
        "--schedule": sampling["guidance_schedule"],
        "--guided-channels": sampling["guided_channels"],
        "--temperature": sampling["temperature"],
        "--unguided-temperature": unguided["temperature"],
        "--clip": sampling["clip"],
        "--steps": sampling["steps"],
        "--iterations": sampling["iterations"],
        "--method": sampling["method"],
        "--features": "inception" if is_inception else "efficientnet-lite2",
        "--resolution": None if is_inception else network.rpartition("@")[2],
    }
    words = ["detok-pipe", "sweep-cfg", str(run)]
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    words += ["--interval", str(low), str(high)]
    if not result["generator"].get("ema", True):
        words.append("--no-ema")
    return shlex.join(words)


def run_page(facts: RunFacts) -> Report:
    """The page of a run at any stage of its life."""
    record = facts.record
    guidance = sweep_blocks(facts.sweeps, facts.metrics, facts.warnings)
    sections = [Section("Training", _training(facts)), Section("Guidance", guidance)]
    if facts.samples:
        sections.append(Section("Samples", _samples(facts)))
    sections.append(Section("Scores", _scores(facts)))
    sections.append(Section("What it was made from", _origin(facts)))
    sections.append(
        Section(
            "Again, exactly",
            [commands(facts.commands, caption="The commands that make this run and this page.")],
        )
    )
    generator = str(record["config"].get("generator", "generator"))
    return Report(
        title=generator if generator == facts.name else f"{facts.name}: {generator}",
        lead=_lead(record),
        headline=_headline(facts),
        sections=sections,
        data={
            "config": record.get("config", {}),
            "inputs": record.get("inputs", {}),
            "sweeps": [asdict(sweep) for sweep in facts.sweeps],
            "scores": [asdict(row) for row in facts.scores],
        },
        footer=facts.footer,
    )


def _lead(record: Mapping[str, Any]) -> str:
    latents = record.get("latents", {})
    shape = " x ".join(str(side) for side in latents.get("grid", []))
    classes = len(latents.get("class_names", []))
    return (
        f"A generator of {shape} tokens with {latents.get('channels', '?')} channels, "
        f"{classes:,} classes, trained from the latent cache `{latents.get('path', 'unknown')}`."
    )


def _headline(facts: RunFacts) -> list[tuple[str, Cell]]:
    last = max((c.steps[-1] for c in facts.curves if len(c.steps)), default=0)
    headline: list[tuple[str, Cell]] = [
        ("parameters", facts.record.get("parameters")),
        (f"steps done of {cell_text(facts.record.get('steps'))}", int(last)),
    ]
    if facts.scores:
        best = facts.scores[0]
        headline += [
            (f"{m.name}, {best.name}", best.metrics.get(m.name)) for m in facts.metrics[:2]
        ]
    if facts.sweeps and facts.sweeps[0].best is not None:
        headline.append(("best guidance scale", facts.sweeps[0].best))
    return headline


def _training(facts: RunFacts) -> list[Block]:
    blocks: list[Block] = [curve_figure(facts.curves, caption="Training loss.")]
    if facts.speed:
        speed = curve_figure(facts.speed, caption="Training speed.", ylabel="images a second")
        blocks.append(Disclosure("Training speed", [speed]))
    return blocks


def _samples(facts: RunFacts) -> list[Block]:
    # Small images at twice their size and large ones near their own, so that both can be judged.
    return [
        ImageGrid(
            rows,
            alt=caption,
            caption=caption,
            size=min(200, max(88, max((c[0].width for r in rows for c in r.cells), default=88))),
        )
        for caption, rows in facts.samples
    ]


def _scores(facts: RunFacts) -> list[Block]:
    if not facts.scores:
        return [Text("No final score yet: `detok-pipe sweep-cfg` ends with one.", tone="note")]
    table = score_table(
        facts.scores,
        facts.metrics,
        caption="Final scores. Plus-minus: one standard error.",
        highlight=0,
    )
    return [table, *(Text(note, tone="note") for note in facts.notes)]


def _origin(facts: RunFacts) -> list[Block]:
    record = facts.record
    names = record.get("latents", {}).get("class_names", [])
    latents = {
        k: v for k, v in record.get("latents", {}).items() if k not in ("class_names", "stats")
    }
    return [
        KeyValues({**record.get("inputs", {}), **{f"latents.{k}": v for k, v in latents.items()}}),
        *settings(
            {
                "All settings of the training": record.get("config", {}),
                "All settings of sweep and scores": facts.sweep_settings,
                "Tokenizer": record.get("tokenizer", {}),
                "Latent statistics": record.get("latents", {}).get("stats", {}),
                "Classes": {str(label): name for label, name in enumerate(names)},
                "Versions": record.get("versions", {}),
            }
        ),
    ]
