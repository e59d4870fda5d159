"""The page of ``detok-pipe report RUN``: one generator run, with all that has been measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from detok_pipe.pipelines.pictures import ImageRow
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
from detok_pipe.pipelines.report_facts import RunFacts
from detok_pipe.pipelines.report_parts import (
    commands,
    curve_figure,
    score_table,
    settings,
    sweep_blocks,
)
from detok_pipe.pipelines.sweep_output import sweep_curves


def run_page(facts: RunFacts) -> Report:
    """The page of a run at any stage of its life."""
    record = facts.record
    sections = [Section("Training", _training(facts))]
    if facts.pictures:
        sections.append(Section("While it trained", _pictures(facts)))
    if not facts.sweeps:
        sections.append(Section("Guidance", sweep_blocks([], [])))
    for sweep in facts.sweeps:
        of = f" in {sweep.name}" if len(facts.sweeps) > 1 else ""
        curves = sweep_curves(sweep.result)
        guidance = sweep_blocks(curves, sweep.metrics, sweep.result["warnings"])
        sections.append(Section(f"Guidance{of}", guidance))
        sections.append(Section(f"Samples{of}", _samples(sweep.rows)))
    sections.append(Section("Scores", _scores(facts)))
    sections.append(Section("What it was made from", _origin(facts)))
    again = [line for sweep in facts.sweeps for line in sweep.commands]
    lines = list(dict.fromkeys([facts.train, *again, facts.report]))
    caption = "The commands that make this run and this page."
    sections.append(
        Section("Again, exactly", [commands([line for line in lines if line], caption=caption)])
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
            "sweeps": {sweep.name: sweep.result for sweep in facts.sweeps},
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
    if facts.sweeps:
        sweep = facts.sweeps[0]
        for score in sweep.scores[:1]:
            headline += [
                (f"{m.name}, {score.name}", score.metrics.get(m.name)) for m in sweep.metrics[:2]
            ]
        headline.append(("best guidance scale", sweep.result["best"]))
    return headline


def _training(facts: RunFacts) -> list[Block]:
    blocks: list[Block] = [curve_figure(facts.curves, caption="Training loss.")]
    if facts.speed:
        speed = curve_figure(facts.speed, caption="Training speed.", ylabel="images a second")
        blocks.append(Disclosure("Training speed", [speed]))
    return blocks


def _pictures(facts: RunFacts) -> list[Block]:
    return [
        ImageGrid(
            rows,
            alt=f"{kind} by step",
            caption=f"{kind[:1].upper()}{kind[1:]} by step of the training.",
            size=max(row.cells[0][0].width for row in rows),
        )
        for kind, rows in facts.pictures.items()
    ]


def _samples(rows: Sequence[ImageRow]) -> list[Block]:
    caption = "The same labels and the same noise at each guidance scale, in seed order."
    # Small images at twice their size and large ones near their own, so that both can be judged.
    size = max((cell[0].width for row in rows for cell in row.cells), default=88)
    return [ImageGrid(rows, alt=caption, caption=caption, size=min(200, max(88, size)))]


def _scores(facts: RunFacts) -> list[Block]:
    blocks: list[Block] = []
    for sweep in facts.sweeps:
        if sweep.scores:
            of = f" of {sweep.name}" if len(facts.sweeps) > 1 else ""
            caption = f"Final scores{of}. Plus-minus: one standard error."
            blocks.append(score_table(sweep.scores, sweep.metrics, caption=caption, highlight=0))
            blocks += [Text(note, tone="note") for note in sweep.notes]
    advice = "No final score yet: `detok-pipe sweep-cfg` ends with one."
    return blocks or [Text(advice, tone="note")]


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
                **{
                    f"All settings of {sweep.name} and its scores": {
                        "plan": sweep.result["plan"],
                        **sweep.result["settings"],
                    }
                    for sweep in facts.sweeps
                },
                "What the cache is made of": record.get("made of", {}).get("cache", {}),
                "Tokenizer": record.get("tokenizer", {}),
                "Latent statistics": record.get("latents", {}).get("stats", {}),
                "Classes": {str(label): name for label, name in enumerate(names)},
                "Versions": record.get("versions", {}),
            }
        ),
    ]
