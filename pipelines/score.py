"""Scores: measures of features against a reference, as records that tell every setting.

A record is one JSON line. Two records may stand in one curve only if they differ in nothing but
the guidance scale (see :func:`check_comparable`).
"""

import copy
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detok_pipe.evaluation.features import FeatureExtractor
from detok_pipe.evaluation.frechet import FrechetScore
from detok_pipe.evaluation.inception_score import inception_score
from detok_pipe.evaluation.kernel_distance import (
    KernelScore,
    kernel_distance,
    subset_kernel_distance,
)
from detok_pipe.evaluation.precision_recall import precision_recall
from detok_pipe.evaluation.reference import Reference
from detok_pipe.latents.atomic import storage_errors
from detok_pipe.latents.errors import InputError, MismatchError
from detok_pipe.latents.plan import first_difference
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.pipelines.plots import Measured, Metric
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import progress
from detok_pipe.pipelines.run_directory import versions
from detok_pipe.pipelines.stored_features import (
    PIXELS,
    FeatureTable,
    StoredFeatures,
    features_of,
)
from detok_pipe.pipelines.trained import TrainedTokenizer

ALL_PAIRS_UP_TO = 10_000
"""Samples up to which the kernel distance uses all pairs, not 100 subsets of 1,000."""

_SPLITS = 10
_NEIGHBOURS = 3


def metric_names(extractor: str) -> dict[str, Metric]:
    """What is measured on a network's features, under names that tell the network.

    Args:
        extractor: "FID" or "FD-EffLite2@R".
    """
    network = "" if extractor == "FID" else extractor.removeprefix("FD")
    return {
        "frechet": Metric(extractor),
        "kernel": Metric(f"KD{network}" if network else "KID"),
        "score": Metric(f"IS{network}", "higher"),
        "precision": Metric("precision", "higher"),
        "recall": Metric("recall", "higher"),
    }


@dataclass(frozen=True)
class Scores:
    """What a set of images scored.

    Attributes:
        metrics: by name (see `metric_names`), the Fréchet distance first.
        frechet: the distance with the influences that paired differences need.
        expected: the distance to expect at the count that was asked for; else the distance.
        notes: what a reader must know, a sentence each.
        settings: of the measures.
    """

    metrics: dict[str, Measured]
    frechet: FrechetScore = field(repr=False)
    expected: float
    notes: list[str]
    settings: dict[str, Any]


def measure(
    table: FeatureTable,
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    real: np.ndarray | None = None,
    image_size: int | None = None,
    expect_at: int | None = None,
    device: torch.device | str = "cpu",
) -> Scores:
    """All measures that the features and the reference allow.

    Args:
        table: of the images to score.
        real: features (M, D) of real images (see `real_features`); without them there is no
            kernel distance, precision or recall.
        image_size: side of the scored images in pixels, to be checked.
        expect_at: predict the distance at so many samples (see ``FrechetReference.predicted``).
        device: for the nearest neighbours.

    Raises:
        MismatchError: the reference is of another network, dimension or image size.
        NonFiniteError: a feature is NaN or infinite.
        InputError: fewer than two images.
    """
    reference.check(
        extractor=extractor.name, dimensions=extractor.dimensions, image_size=image_size
    )
    names = {key: metric.name for key, metric in metric_names(extractor.name).items()}
    frechet = reference.frechet.score(table.features)
    metrics = {names["frechet"]: Measured(frechet.value, frechet.standard_error)}
    notes = [frechet.note] if frechet.note else []
    settings: dict[str, Any] = {"interval": "delta method"}
    if real is not None and len(real) > _NEIGHBOURS and len(table) > _NEIGHBOURS:
        kernel, how = _kernel(table.features, real)
        metrics[names["kernel"]] = kernel
        settings["kernel"] = f"cubic, {how}, {len(real)} real images"
        both = precision_recall(table.features, real, neighbours=_NEIGHBOURS, device=device)
        metrics[names["precision"]] = Measured(both.precision)
        metrics[names["recall"]] = Measured(both.recall)
        settings["precision and recall"] = (
            f"{_NEIGHBOURS} neighbours, {len(table)} samples, {len(real)} real images"
        )
    if table.logits is not None and len(table) >= _SPLITS:
        mean, spread = inception_score(table.logits, splits=_SPLITS)
        metrics[names["score"]] = Measured(mean)
        settings["inception score"] = {
            "splits": _SPLITS,
            "shuffle seed": 2020,
            "standard deviation over splits": spread,
        }
    expected = frechet.value
    if expect_at is not None:
        expected = reference.frechet.predicted(table.features, frechet, expect_at)
    return Scores(metrics, frechet, expected, notes, settings)


def _kernel(generated: np.ndarray, real: np.ndarray) -> tuple[Measured, str]:
    if max(len(generated), len(real)) <= ALL_PAIRS_UP_TO:
        score: KernelScore = kernel_distance(generated, real)
        return Measured(score.value, score.standard_error), "all pairs"
    size = min(1000, len(generated), len(real))
    score = subset_kernel_distance(generated, real, subset_size=size)
    how = f"100 subsets of {size}, standard deviation over subsets {score.standard_error:.3g}"
    return Measured(score.value), how


def real_features(
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    processes: Processes | None = None,
    quiet: bool = False,
) -> np.ndarray | None:
    """Features (M, D) of the reference's real images: kept in its file, or of its images.

    All processes share the work and have the result. None where the reference has neither.
    """
    if reference.features is not None:
        return reference.features
    if reference.image_shape is None:
        return None
    processes = processes or Processes()
    count = reference.image_shape[0]
    start, stop = (count * (processes.rank + i) // processes.world for i in (0, 1))
    quiet = quiet or not processes.is_main
    tables = []
    with progress("reference", total=stop - start, quiet=quiet) as task:
        for batch in reference.images(batch_size, start=start, stop=stop):
            tables.append(features_of(extractor, [batch]))
            task.advance(len(batch))
    return FeatureTable.joined(processes.gather(tables)).features


def score(
    store: SampleStore,
    tokenizer: TrainedTokenizer,
    extractor: FeatureExtractor,
    reference: Reference,
    *,
    count: int | None = None,
    real: np.ndarray | None = None,
    expect_at: int | None = None,
    batch_size: int = 64,
    processes: Processes | None = None,
    name: str = "score",
    quiet: bool = False,
) -> tuple[Scores, dict[str, Any]]:
    """Decode a sample store, compute features and measure them.

    Args:
        count: score the first so many samples; by default all.
        real: features of real images; by default those of the reference (see `real_features`).
        expect_at: see `measure`.

    Returns:
        The scores, and their record (see :func:`make_record`).

    Raises:
        InputError: the store has fewer samples than ``count``.
        MismatchError: tokenizer, samples, features and reference do not belong together.
        CacheError, NonFiniteError: the store is unfinished, damaged, or holds NaN.
    """
    processes = processes or Processes()
    stop = store.count if count is None else count
    if not 2 <= stop <= store.count:
        raise InputError(f"{store.path} has {store.count} samples; {stop} of them cannot be scored")
    size = tokenizer.image_size
    reference.check(extractor=extractor.name, dimensions=extractor.dimensions, image_size=size)
    stored = StoredFeatures(store, tokenizer, extractor)
    stored.compute(stop=stop, batch_size=batch_size, processes=processes, name=name, quiet=quiet)
    if real is None:
        real = real_features(
            reference, extractor, batch_size=batch_size, processes=processes, quiet=quiet
        )
    processes.wait()

    def on_main() -> tuple[Scores, dict[str, Any]]:
        scores = measure(
            stored.read(stop),
            reference,
            extractor,
            real=real,
            image_size=size,
            expect_at=expect_at,
            device=processes.device,
        )
        return scores, make_record(scores, store, stop, tokenizer, extractor, reference)

    return processes.on_main(on_main)


def make_record(
    scores: Scores,
    store: SampleStore,
    count: int,
    tokenizer: TrainedTokenizer,
    extractor: FeatureExtractor,
    reference: Reference,
) -> dict[str, Any]:
    """A score with everything that it depends on, as JSON values."""
    return {
        "metrics": {name: asdict(measured) for name, measured in scores.metrics.items()},
        "notes": scores.notes,
        "settings": {
            "count": count,
            "samples": store.identity,
            "decoder": tokenizer.decoder,
            "network": {"name": extractor.name, **extractor.settings},
            "reference": reference.sha256,
            "image_size": tokenizer.image_size,
            "pixels": PIXELS,
            "measures": scores.settings,
        },
        "reference": str(reference.path),
        "store": str(store.path),
        "tokenizer": str(tokenizer.path),
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record to a JSON-lines file, on a new line even where the last one was cut short.

    Raises:
        StorageError: the disk is full or read-only.
    """
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, io.SEEK_END)
                line = line if file.read() == b"\n" else b"\n" + line
            file.write(line)


def check_comparable(records: Iterable[Mapping[str, Any]]) -> None:
    """Check that records differ in nothing but the guidance scale.

    Raises:
        MismatchError: names the first setting that differs, with both values.
    """
    first: dict[str, Any] | None = None
    for record in records:
        settings = copy.deepcopy(dict(record["settings"]))
        settings["samples"]["sampling"].pop("guidance_scale", None)
        # Derived from the others; spreads over subsets differ from score to score.
        settings.pop("measures", None)
        if first is None:
            first = settings
            continue
        difference = first_difference(first, settings)
        if difference is not None:
            name, old, new = difference
            raise MismatchError(
                f"scores cannot stand in one curve: {name} is {old!r} in one and {new!r} in "
                "another; score them with the same settings"
            )
