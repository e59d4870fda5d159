"""How often halving finds the guidance scale that the full grid finds, and at what cost.

    python benchmarks/halving.py                       # synthetic features
    python benchmarks/halving.py runs/quickstart       # and the generator of a quickstart

Each scale's features are computed once. A repetition draws the same rows of every scale's pool,
as scales share labels and noise, and searches them as a grid and by halving. Halving agrees where
its scale is the grid's, or scores within a standard error of the paired difference of it. Expect
agreement in at least 18 of 20 repetitions at under half of the samples.

The quickstart's images are few, so its features are 64 fixed random directions of
EfficientNet-lite2's at 64 pixels: with 320 samples a scale there are as many a dimension as 10,000
samples have of Inception's 2,048. Samples are drawn with few steps, into the folder --out, where
the same command again finds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from detok_pipe.evaluation.features import FeatureExtractor, Features, load_extractor
from detok_pipe.evaluation.frechet import (
    FeatureStats,
    FrechetReference,
    feature_stats,
    paired_difference,
)
from detok_pipe.pipelines.fid_stats import image_batches
from detok_pipe.pipelines.images import open_images
from detok_pipe.pipelines.rungs import halving_counts, samples_drawn, search
from detok_pipe.pipelines.sample import sample, sampled_classes, sampling_of
from detok_pipe.pipelines.score import Scores
from detok_pipe.pipelines.stored_features import StoredFeatures, features_of
from detok_pipe.pipelines.sweep import MAR_SCALES
from detok_pipe.pipelines.trained import load_generator, load_tokenizer

Pool = Mapping[float, np.ndarray]
"""Scale -> features (rows, D); equal rows share labels and noise."""

EMOJI_SCALES = (0.5, 0.75, 1.0, 1.2, 1.4, 1.6, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Repetition:
    """The scale that each search chose.

    Attributes:
        difference, error: of halving's scale to the grid's, on all samples.
        share: samples of halving over those of the grid.
    """

    grid: float
    halving: float
    difference: float
    error: float
    share: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.error


def repeat(
    pool: Pool, reference: FrechetReference, *, count: int, repeats: int
) -> list[Repetition]:
    """Search ``repeats`` draws of ``count`` rows, as a grid and by halving."""
    rng = np.random.default_rng(0)
    size = len(next(iter(pool.values())))
    scales = list(pool)
    found = []
    for _ in range(repeats):
        rows = rng.choice(size, count, replace=False)

        def scored(scale: float, rung: int, rows: np.ndarray = rows) -> Scores:
            features = pool[scale][rows[:rung]]
            score = reference.score(features)
            last = rung == count
            expected = score.value if last else reference.predicted(features, score, count)
            return Scores({}, score, expected, [], {})

        _, best = search(scales, (count,), scored)
        rungs, chosen = search(scales, halving_counts(count), scored)
        difference, error = paired_difference(
            scored(chosen, count).frechet, scored(best, count).frechet
        )
        assert error is not None  # more samples than dimensions
        share = samples_drawn(rungs) / (len(scales) * count)
        found.append(Repetition(best, chosen, difference, error, share))
    return found


def synthetic(*, dimensions: int, rows: int) -> tuple[Pool, FrechetReference]:
    """As guidance does, a higher scale lessens noise and variety and shifts the mean."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, dimensions + 1) ** -0.8  # falls like that of image features
    shared, own = rng.standard_normal((2, rows, dimensions))
    pool = {
        scale: np.sqrt(spectrum)
        * (shared * (1.22 - 0.055 * scale) + own * 1.4 / scale + 0.006 * scale**2)
        for scale in MAR_SCALES
    }
    stats = FeatureStats(np.zeros(dimensions), np.diag(spectrum), None)
    return pool, FrechetReference(stats)


class Projected:
    """Fixed random orthonormal directions of another network's features."""

    def __init__(self, network: FeatureExtractor, dimensions: int) -> None:
        directions = np.random.default_rng(0).standard_normal((network.dimensions, dimensions))
        self.directions = torch.from_numpy(np.linalg.qr(directions)[0]).float()
        self.network = network
        self.dimensions = dimensions
        self.name = f"{network.name}, {dimensions} directions"
        self.settings: dict[str, Any] = {**network.settings, "directions": dimensions}

    def __call__(self, images: torch.Tensor) -> Features:
        features = self.network(images)["features"]
        return {"features": features @ self.directions.to(features.device), "logits": None}


def emoji(
    quickstart: Path, out: Path, *, scales: Sequence[float], dimensions: int, rows: int
) -> tuple[Pool, FrechetReference]:
    """Samples of a quickstart's generator against its training images."""
    generator = load_generator(quickstart / "generator")
    tokenizer = load_tokenizer(quickstart / "tokenizer")
    extractor = Projected(load_extractor("efficientnet-lite2", resolution=64), dimensions)
    images = open_images(quickstart / "images" / "train")
    names = [generator.class_names[label] for label in sampled_classes(generator)]
    labels = [images.class_names.index(name) for name in names]
    real = image_batches(
        images, tokenizer.image_size, 64, rows=np.flatnonzero(np.isin(images.labels, labels))
    )
    pool = {}
    for scale in scales:
        sampling = sampling_of(
            generator, guidance_scale=scale, temperature=0.8, clip=4.0, iterations=8, steps=8
        )
        folder = out / f"cfg-{scale:g}"
        store = sample(
            generator, folder, count=rows, sampling=sampling, batch_size=125, name=folder.name
        )
        stored = StoredFeatures(store, tokenizer, extractor)
        stored.compute(batch_size=125, quiet=True)
        pool[scale] = stored.read().features
    return pool, FrechetReference(feature_stats(features_of(extractor, real).features))


def report(name: str, repetitions: Sequence[Repetition]) -> None:
    """One line a repetition, then the sums."""
    click.echo(f"{name}\n  grid  halving  difference ± error  samples")
    for r in repetitions:
        click.echo(
            f"  {r.grid:4g}  {r.halving:7g}  {r.difference:10.3g} ± {r.error:5.2g}  {r.share:7.0%}"
            + ("" if r.agrees else "  apart")
        )
    agreed = sum(r.agrees for r in repetitions)
    same = sum(r.grid == r.halving for r in repetitions)
    click.echo(
        f"  within a standard error {agreed} of {len(repetitions)}, the same scale {same}, "
        f"samples {np.mean([r.share for r in repetitions]):.0%} of the grid's on average, "
        f"{max(r.share for r in repetitions):.0%} at most"
    )


@click.command()
@click.argument("quickstart", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Of samples: QUICKSTART/halving.")
@click.option("--repeats", default=20, show_default=True)
@click.option("--count", default=320, show_default=True, help="Samples a scale in a repetition.")
@click.option("--rows", default=1000, show_default=True, help="Samples a scale in the pool.")
@click.option("--dimensions", default=64, show_default=True)
def main(
    quickstart: Path | None, out: Path | None, repeats: int, count: int, rows: int, dimensions: int
) -> None:
    """Print a table a model."""
    pool, reference = synthetic(dimensions=dimensions, rows=rows)
    report("synthetic features", repeat(pool, reference, count=count, repeats=repeats))
    if quickstart is not None:
        pool, reference = emoji(
            quickstart,
            out or quickstart / "halving",
            scales=EMOJI_SCALES,
            dimensions=dimensions,
            rows=rows,
        )
        report(f"generator of {quickstart}", repeat(pool, reference, count=count, repeats=repeats))


if __name__ == "__main__":
    main()
