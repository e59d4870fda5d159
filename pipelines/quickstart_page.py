"""Gathers what a quickstart made and measured, draws its pictures, and writes its page."""

import dataclasses
import json
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from detok_pipe.latents.sample_store import SampleStore, open_sample_store
from detok_pipe.pipelines import pictures, plots
from detok_pipe.pipelines.images import ImageSource
from detok_pipe.pipelines.pictures import ImageRow
from detok_pipe.pipelines.plots import Measured
from detok_pipe.pipelines.reconstruct import evenly_spaced, load_squares, rebuild
from detok_pipe.pipelines.report import write_report
from detok_pipe.pipelines.report_parts import ScoreRow
from detok_pipe.pipelines.report_quickstart import (
    CacheFacts,
    DataFacts,
    GeneratorFacts,
    ProbeFacts,
    QuickstartFacts,
    TokenizerFacts,
    quickstart_page,
)
from detok_pipe.pipelines.run_directory import read_config, read_metrics
from detok_pipe.pipelines.sample import labels_of
from detok_pipe.pipelines.score import metric_names
from detok_pipe.pipelines.stored_features import decode_latents
from detok_pipe.pipelines.sweep import final_path, search_path
from detok_pipe.pipelines.sweep_output import (
    measured,
    scale_and_temperature,
    scale_grid,
    sweep_curves,
    write_plot,
)

if TYPE_CHECKING:
    from detok_pipe.pipelines.quickstart import Quickstart

REPORT = "report.html"
STAGES = "stages.json"
_CREDIT = "Drawings: Twemoji, CC-BY 4.0, by Twitter, Inc, jdecked and other contributors."
_PER_CLASS = 16
_RECONSTRUCTIONS = 32


def write_page(quickstart: "Quickstart") -> dict[str, Any]:
    """Write ``report.html`` and, beside it, its pictures as PNG.

    Returns:
        The figures that the page begins with.
    """
    facts = _Gatherer(quickstart).facts()
    out = quickstart.out
    best = facts.generator.sweep.best
    assert best is not None  # the sweep is done
    pictures.save(
        out / "reconstructions.png",
        pictures.labelled_grid(facts.tokenizer.reconstructions, columns=16),
    )
    pictures.save(out / "samples.png", pictures.labelled_grid(facts.generator.samples[best]))
    pictures.save(out / "samples-by-scale.png", pictures.labelled_grid(facts.generator.by_scale))
    plots.save(out / "tokenizer-loss.png", plots.loss_curve(facts.tokenizer.curves))
    plots.save(out / "generator-loss.png", plots.loss_curve(facts.generator.curves))
    write_plot(quickstart.stages["guidance sweep"]["result"], out)
    write_report(out / REPORT, quickstart_page(facts))
    return {
        "psnr": facts.tokenizer.psnr.value,
        "best scale": best,
        "probe": dataclasses.asdict(facts.probe),
        "scores": {
            row.name: {name: m.value for name, m in row.metrics.items()} for row in facts.scores
        },
    }


class _Gatherer:
    """Reads the stages' outcomes and the folders into the facts of the page."""

    def __init__(self, quickstart: "Quickstart") -> None:
        self.quickstart = quickstart
        self.results = {name: stage["result"] for name, stage in quickstart.stages.items()}
        self.names = metric_names(quickstart.extractor.name)

    def facts(self) -> QuickstartFacts:
        quickstart, demo = self.quickstart, self.quickstart.demo
        metrics = [self.names["frechet"], self.names["kernel"]]
        versions = read_config(quickstart.out / "generator", "generator")["versions"]
        return QuickstartFacts(
            preset=quickstart.preset,
            device=_device_name(quickstart.device),
            data=self.data(),
            tokenizer=self.tokenizer(),
            cache=self.cache(),
            generator=self.generator(),
            probe=ProbeFacts(
                **{
                    name.replace(" ", "_"): share
                    for name, share in self.results["comparisons"]["probe"].items()
                }
            ),
            metrics=metrics,
            feature_dimensions=quickstart.extractor.dimensions,
            scores=self.scores(),
            timings=[(name, stage["seconds"]) for name, stage in quickstart.stages.items()],
            settings={
                "Tokenizer settings": dataclasses.asdict(demo.tokenizer),
                "Generator settings": dataclasses.asdict(demo.generator),
                "Sampling and scoring settings": {
                    **dataclasses.asdict(demo.sampling),
                    "samples a scale": demo.sweep_count,
                    "samples scored": demo.final_count,
                    "seed": quickstart.seed,
                },
            },
            commands=self.commands(),
            footer=", ".join(f"{name} {version}" for name, version in versions.items()),
        )

    def data(self) -> DataFacts:
        result = self.results["images"]
        counts = {
            name: (count, result["held out"][name]) for name, count in result["training"].items()
        }
        source = self.quickstart.train_images
        size = self.quickstart.tokenizer.image_size
        rows = []
        for label, name in enumerate(source.class_names):
            numbers = np.flatnonzero(source.labels == label)
            pixels, _ = load_squares(source, numbers[evenly_spaced(len(numbers), 12)], size)
            rows.append(ImageRow(name, [(image,) for image in pictures.to_images(pixels)]))
        return DataFacts("the Twemoji drawings", _CREDIT, size, counts, rows)

    def tokenizer(self) -> TokenizerFacts:
        quickstart = self.quickstart
        scores = self.results["reconstructions"]
        model = quickstart.tokenizer.model
        originals, rebuilt = self._rebuilt(quickstart.held_out_images)
        distance = quickstart.extractor.name
        return TokenizerFacts(
            parameters=sum(p.numel() for p in model.parameters()),
            grid=model.grid,
            channels=model.channels,
            curves=plots.curves_from_metrics(
                "l-DeTok", read_metrics(quickstart.out / "tokenizer"), ["loss", "mse"]
            ),
            reconstructions=pictures.reconstruction_rows(originals, rebuilt),
            psnr=Measured(scores["psnr"]),
            psnr_mean_image=Measured(scores["psnr of the mean image"]),
            rfd=Measured(scores[f"r{distance}"]),
            rfd_name=distance,
            images=scores["images"],
        )

    def _rebuilt(self, source: ImageSource) -> tuple[list[Image.Image], list[Image.Image]]:
        from detok_pipe.pipelines.decode import to_float

        quickstart = self.quickstart
        numbers = evenly_spaced(len(source), _RECONSTRUCTIONS)
        pixels, _ = load_squares(source, numbers, quickstart.tokenizer.image_size)
        rebuilt = rebuild(quickstart.tokenizer.model, to_float(pixels, quickstart.device))
        return pictures.to_images(pixels), pictures.to_images(rebuilt)

    def cache(self) -> CacheFacts:
        checked = self.results["verify and convert"]
        return CacheFacts(
            info=_brief(self.results["encode"]),
            verify="\n".join(checked["verify"]),
            converted=_brief(checked["zarr"]),
        )

    def generator(self) -> GeneratorFacts:
        quickstart = self.quickstart
        result = self.results["guidance sweep"]
        run = quickstart.out / "generator"
        sweep_folder = quickstart.out / "sweep"
        stores = {
            s: open_sample_store(search_path(sweep_folder, s)) for s in quickstart.demo.scales
        }
        samples = {scale: self._by_class(store) for scale, store in stores.items()}
        # The best scale's own samples are the final ones, which no choice was based on.
        samples[result["best"]] = self._by_class(
            open_sample_store(final_path(sweep_folder, result["best"]))
        )
        return GeneratorFacts(
            name=f"A small MAR ({quickstart.demo.generator.model['width']} wide)",
            parameters=read_config(run, "generator")["parameters"],
            curves=plots.curves_from_metrics("MAR", read_metrics(run)),
            sweep=sweep_curves(result)[0],
            samples=samples,
            by_scale=scale_grid(stores.items(), quickstart.tokenizer, columns=16),
        )

    def _by_class(self, store: SampleStore) -> list[ImageRow]:
        classes = store.identity["classes"]
        count = min(store.count, _PER_CLASS * len(classes))
        z = np.concatenate(
            [store.read(*store.span(k)) for k in range(-(-count // store.rows_per_shard))]
        )[:count]
        labels = labels_of(store.identity["first"] + np.arange(count), classes)
        images = pictures.to_images(decode_latents(self.quickstart.tokenizer, store.stats, z))
        return pictures.class_rows(
            images, labels.tolist(), self.quickstart.generator.class_names, per_class=_PER_CLASS
        )

    def scores(self) -> list[ScoreRow]:
        compared = self.results["comparisons"]
        final = self.results["guidance sweep"]["final"]
        count = self.quickstart.demo.final_count
        rows = [
            ScoreRow(
                f"trained MAR, scale {scale_and_temperature(record)[0]:g}",
                count,
                self._shown(record["metrics"]),
            )
            for record in final
        ]
        untrained, gaussian, held_out = (
            compared["scores"][name] for name in ("untrained", "gaussian", "held out")
        )
        return [
            *rows,
            ScoreRow("untrained MAR", count, self._shown(untrained), "the same network at step 0"),
            ScoreRow(
                "Gaussian latents",
                count,
                self._shown(gaussian),
                "drawn from a Gaussian fitted to the cache at each position",
            ),
            ScoreRow(
                "held-out real images",
                compared["held out"],
                self._shown(held_out),
                "another count: compare the kernel distance only",
            ),
        ]

    def _shown(self, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Measured]:
        wanted = {self.names["frechet"].name, self.names["kernel"].name}
        return measured({name: value for name, value in metrics.items() if name in wanted})

    def commands(self) -> list[str]:
        quickstart = self.quickstart
        out = str(quickstart.out)
        again = ["detok-pipe", "quickstart", "--out", out, "--preset", quickstart.preset]
        return [
            shlex.join([*again, "--seed", str(quickstart.seed)]),
            shlex.join(["detok-pipe", "info", f"{out}/cache"]),
            shlex.join(["detok-pipe", "verify", f"{out}/cache"]),
            shlex.join(["detok-pipe", "report", f"{out}/generator", "--sweep", f"{out}/sweep"]),
        ]


def _brief(info: Mapping[str, Any]) -> dict[str, Any]:
    """A cache's facts without the long ones."""
    return {key: value for key, value in info.items() if key not in ("statistics", "created_with")}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def summary(out: Path) -> str:
    """The closing lines of the command, from what :func:`write_page` returned."""
    stages = json.loads((out / STAGES).read_bytes())
    facts = stages["report"]["result"]
    seconds = sum(stage["seconds"] for stage in stages.values())
    lines = [
        f"done; the stages took {seconds:.0f} s in all",
        f"held-out reconstructions: {facts['psnr']:.1f} dB",
        f"samples recognised as their class: {facts['probe']['samples']:.0%} "
        f"(real images {facts['probe']['held_out']:.0%}, chance {facts['probe']['chance']:.0%})",
    ]
    for name, metrics in facts["scores"].items():
        shown = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
        lines.append(f"{name}: {shown}")
    return "\n".join([*lines, f"open {out / REPORT} in a browser"])
