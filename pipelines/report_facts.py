"""What the page of a run is made of: gathered from its directory, its pictures and its sweeps."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from detok_pipe.latents.errors import InputError, MismatchError, input_errors
from detok_pipe.latents.sample_store import open_sample_store
from detok_pipe.pipelines.find_tokenizer import find_tokenizer, run_of
from detok_pipe.pipelines.inspection import samples_folder
from detok_pipe.pipelines.pictures import ImageRow
from detok_pipe.pipelines.plots import Curve, Metric, curves_from_metrics
from detok_pipe.pipelines.published_tokenizers import PUBLISHED_TOKENIZERS, TokenizerChoice
from detok_pipe.pipelines.report_parts import ScoreRow
from detok_pipe.pipelines.run_directory import read_config, read_metrics
from detok_pipe.pipelines.sweep import SWEEP, search_path
from detok_pipe.pipelines.sweep_output import (
    measured,
    scale_and_temperature,
    scale_grid,
    sweep_metrics,
)


@dataclass(frozen=True)
class SweepFacts:
    """One guidance sweep of a run. Each has plots and tables of its own.

    Attributes:
        name: of its folder.
        result: what ``sweep.json`` holds.
        rows: samples by scale.
        commands: the exact commands that make it again: first its reference's, where it is known.
    """

    name: str
    result: Mapping[str, Any]
    rows: Sequence[ImageRow]
    commands: Sequence[str]

    @property
    def metrics(self) -> list[Metric]:
        """What was measured, the deciding metric first."""
        return sweep_metrics(self.result)

    @property
    def scores(self) -> list[ScoreRow]:
        """The final scores, that at the best scale first."""
        rows = []
        for record in self.result["final"]:
            settings, metrics = record["settings"], measured(record["metrics"])
            scale, temperature = scale_and_temperature(record)
            name = f"guidance scale {scale:g}"
            if temperature != 1:
                name += f", temperature {temperature:g}"
            rows.append(ScoreRow(name, settings["count"], metrics))
        return rows

    @property
    def notes(self) -> list[str]:
        """What limits the final scores, a sentence each."""
        return list(dict.fromkeys(n for record in self.result["final"] for n in record["notes"]))


@dataclass(frozen=True)
class RunFacts:
    """Everything on the page of a run. What has not been done yet stays empty.

    Attributes:
        record: the run's ``config.json``.
        curves: training losses. speed: images a second by step.
        pictures: what was drawn while it trained: kind -> a row a step.
        sweeps: its guidance sweeps; the first is the one that the page begins with.
        train: the exact command that makes the run again ("": not recorded).
        report: the command that makes this page again.
    """

    name: str
    record: Mapping[str, Any]
    curves: Sequence[Curve] = ()
    speed: Sequence[Curve] = ()
    pictures: Mapping[str, Sequence[ImageRow]] = field(default_factory=dict)
    sweeps: Sequence[SweepFacts] = ()
    train: str = ""
    report: str = ""
    footer: str = ""


def gather_run(
    run: Path,
    *,
    sweeps: Sequence[Path] = (),
    tokenizer: TokenizerChoice | None = None,
    device: torch.device | str = "cpu",
) -> RunFacts:
    """What a run directory and its sweeps tell.

    Args:
        sweeps: folders of sweeps; by default those in the run directory, "sweep" first.
        tokenizer: decodes samples; by default each sweep's own, or one beside the run that fits.

    Raises:
        CheckpointError: it is no generator run.
        InputError: a folder holds no sweep, or a picture is damaged.
        MismatchError: a sweep is another run's.
        ConfigError, CacheError: no tokenizer fits, or a sweep's samples are missing.
    """
    record = read_config(run, "generator")
    records = read_metrics(run)
    train = record.get("command") or []
    found = list(sweeps) or sorted(
        (path.parent for path in run.glob(f"*/{SWEEP}")), key=lambda p: (p.name != "sweep", p.name)
    )
    report = ["detok-pipe", "report", str(run)]
    for sweep in sweeps:
        report += ["--sweep", str(sweep)]
    report += _tokenizer_options(tokenizer)
    return RunFacts(
        name=run.resolve().name,
        record=record,
        curves=curves_from_metrics(
            str(record["config"].get("generator", run.name)),
            records,
            ["loss", "val/loss"] if record["config"].get("holdout") else ["loss"],
        ),
        speed=curves_from_metrics("images a second", records, ["images_per_second"]),
        pictures=training_pictures(run),
        sweeps=_read_sweeps(found, run, record, tokenizer, device) if found else (),
        train=shlex.join(["detok-pipe", *map(str, train[1:])]) if train else "",
        report=shlex.join(report),
        footer=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )


def _read_sweeps(
    folders: Sequence[Path],
    run: Path,
    record: Mapping[str, Any],
    tokenizer: TokenizerChoice | None,
    device: torch.device | str,
) -> list[SweepFacts]:
    encoder = {"fingerprint": record["inputs"]["tokenizer"]}
    sweeps = []
    for folder in folders:
        try:
            result = json.loads((folder / SWEEP).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no finished sweep: {error}") from error
        _check_is_of(folder, result, run, record)
        stores = [
            (scale, open_sample_store(search_path(folder, scale)))
            for scale in result["plan"]["scales"]
        ]
        own = tokenizer_of(result) if Path(result["tokenizer"]).exists() else None
        decoder = find_tokenizer(encoder, run, named=tokenizer or own, device=device)
        rows = scale_grid(stores, decoder)
        commands = [*reference_command(result), sweep_command(run, folder, result)]
        sweeps.append(SweepFacts(folder.resolve().name, result, rows, commands))
    return sweeps


def _check_is_of(
    folder: Path, result: Mapping[str, Any], run: Path, record: Mapping[str, Any]
) -> None:
    """Check that a sweep is of this run.

    Raises:
        MismatchError: generator, cache or tokenizer differ; the first that does is named.
    """
    # Weights and step may differ: the training may have gone on since.
    inputs = record["inputs"]
    for name, here in (
        ("generator", record["config"]["generator"]),
        ("cache", inputs["cache"]),
        ("tokenizer", inputs["tokenizer"]),
    ):
        there = result["generator"].get(name)
        if there != here:
            raise MismatchError(
                f"{folder} is a sweep of another run than {run}: its {name} is {there!r}, the "
                f"run's is {here!r}; name sweeps of {run} with --sweep, or report {result['run']}"
            )


def training_pictures(run: Path, *, most: int = 6) -> dict[str, list[ImageRow]]:
    """Pictures that were drawn while a run trained, by kind, ``most`` evenly spaced steps of each.

    Raises:
        InputError: a file is no image; it is named.
    """
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(samples_folder(run).glob("step-*.png")):
        match = re.fullmatch(r"step-(\d+)-?(.*)", path.stem)
        if match:
            kinds.setdefault(match[2] or "samples", []).append((int(match[1]), path))
    rows: dict[str, list[ImageRow]] = {}
    for kind, steps in kinds.items():
        count = min(most, len(steps))
        chosen = [steps[len(steps) * (i + 1) // count - 1] for i in range(count)]
        rows[kind] = [ImageRow(f"step {step:,}", [(_picture(path),)]) for step, path in chosen]
    return rows


def _picture(path: Path) -> Image.Image:
    with input_errors(f"{path} is no whole image; remove it"), Image.open(path) as image:
        return image.convert("RGB")


def tokenizer_of(result: Mapping[str, Any]) -> TokenizerChoice:
    """The tokenizer that decoded a sweep's samples, as the command line names it."""
    path, name = result["tokenizer"], result.get("tokenizer name")
    if name in PUBLISHED_TOKENIZERS:
        return TokenizerChoice(name, Path(path))
    return TokenizerChoice(path)


def _tokenizer_options(tokenizer: TokenizerChoice | None) -> list[str]:
    name, weights = tokenizer or TokenizerChoice(None)
    given = [] if name is None else ["--tokenizer", name]
    return given if weights is None else [*given, "--weights", str(weights)]


def _network_options(network: str) -> list[str]:
    """What chooses the feature network of this name."""
    if "@" not in network:
        return ["--features", "inception"]
    resolution = network.rpartition("@")[2]
    return ["--features", "efficientnet-lite2", "--resolution", resolution]


def reference_command(result: Mapping[str, Any]) -> list[str]:
    """The command that made a sweep's reference, as a list of one; empty where it is unknown.

    Unknown are files of others, and statistics of a choice of the images.
    """
    made_from = result.get("reference made from") or {}
    source = made_from.get("source", {})
    whole = source.get("images") == source.get("count", source.get("images"))
    if source.get("kind") not in ("images", "npz") or not whole:
        return []
    words = ["detok-pipe", "fid-stats", source["path"], "--out", result["reference"]]
    if source["kind"] == "images":
        words += ["--size", str(made_from["image_size"])]
    words += ["--keep-features", str(source["with features"])]
    return [shlex.join(words + _network_options(made_from["extractor"]))]


def sweep_command(run: Path, out: Path, result: Mapping[str, Any]) -> str:
    """The command that makes the sweep ``out`` again, with every option that matters."""
    plan = result["plan"]
    sampling, unguided = plan["sampling"], plan["unguided"]
    low, high = sampling["guidance_interval"]
    options: dict[str, Any] = {
        "--out": out,
        "--ref": result["reference"],
        "--scales": ",".join(str(scale).removesuffix(".0") for scale in plan["scales"]),
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
        "--num-iter": sampling["iterations"],
        "--method": sampling["method"],
        "--batch-size": plan["batch_size"],
    }
    swept = Path(result["run"])  # the run, which may have been moved since, or a checkpoint of it
    generator = run if run_of(swept) == swept else run / "checkpoints" / swept.name
    words = ["detok-pipe", "sweep-cfg", str(generator)]
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    words += ["--interval", str(low), str(high)]
    words += _tokenizer_options(tokenizer_of(result))
    words += _network_options(result["settings"]["network"]["name"])
    if not result["generator"].get("ema", True):
        words.append("--no-ema")
    return shlex.join(words)
