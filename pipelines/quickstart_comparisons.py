"""What a quickstart's generator is compared with: chance, and real images."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from detok_pipe.evaluation.linear_probe import LinearProbe
from detok_pipe.generators.registry import build_generator
from detok_pipe.latents.noise import Noise
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.pipelines.fid_stats import image_batches
from detok_pipe.pipelines.images import ImageSource
from detok_pipe.pipelines.sample import labels_of, sample, sampled_classes
from detok_pipe.pipelines.score import measure, score
from detok_pipe.pipelines.stored_features import FeatureTable, StoredFeatures, features_of
from detok_pipe.pipelines.trained import fingerprint, ready

if TYPE_CHECKING:
    from detok_pipe.pipelines.quickstart import Quickstart


def compare(quickstart: "Quickstart") -> dict[str, Any]:
    """Score what the trained model must beat, and real images; probe the classes."""
    rows = {}
    for name, store in (("untrained", _untrained(quickstart)), ("gaussian", _gaussian(quickstart))):
        scores, _ = score(
            store,
            quickstart.tokenizer,
            quickstart.extractor,
            quickstart.reference,
            real=quickstart.real,
            name=f"score {name}",
            quiet=quickstart.quiet,
        )
        rows[name] = {k: dataclasses.asdict(v) for k, v in scores.metrics.items()}
    held_out, held_out_labels = _features(quickstart, quickstart.held_out_images)
    scores = measure(held_out, quickstart.reference, quickstart.extractor, real=quickstart.real)
    rows["held out"] = {k: dataclasses.asdict(v) for k, v in scores.metrics.items()}
    return {
        "scores": rows,
        "held out": len(held_out),
        "probe": _probe(quickstart, held_out, held_out_labels),
    }


def _features(quickstart: "Quickstart", source: ImageSource) -> tuple[FeatureTable, np.ndarray]:
    """Features of real images of the generator's classes, and their labels."""
    rows = quickstart.class_rows(source)
    batches = image_batches(source, quickstart.tokenizer.image_size, 64, rows=rows)
    return features_of(quickstart.extractor, batches), source.labels[rows]


def _untrained(quickstart: "Quickstart") -> SampleStore:
    """Samples of the same network as it was before training."""
    config = quickstart.demo.generator
    torch.manual_seed(config.seed)
    model = build_generator(
        config.generator,
        grid=quickstart.cache.grid,
        channels=quickstart.cache.channels,
        num_classes=quickstart.cache.num_classes,
        **config.model,
    )
    model = ready(model, quickstart.device)
    identity = {
        **quickstart.generator.identity,
        "weights": fingerprint(model.state_dict()),
        "step": 0,
    }
    untrained = dataclasses.replace(quickstart.generator, model=model, identity=identity)
    return sample(
        untrained,
        quickstart.out / "comparisons" / "untrained",
        count=quickstart.demo.final_count,
        sampling=quickstart.demo.sampling,
        seed=quickstart.seed,
        batch_size=100,
        name="sample untrained",
        quiet=quickstart.quiet,
    )


def _gaussian(quickstart: "Quickstart") -> SampleStore:
    """Latents drawn from a Gaussian fitted per position to the cached means."""
    count, cache = quickstart.demo.final_count, quickstart.cache
    wanted = [
        cache.class_names.index(n) for n in quickstart.demo.generator.classes or cache.class_names
    ]
    rows = np.flatnonzero(np.isin(cache.labels, wanted))
    z = np.concatenate([cache.rows(rows, view) for view in cache.views]).astype(np.float64)
    mean = z.mean(0)  # (N, C)
    covariance = np.einsum("bnc,bnd->ncd", z - mean, z - mean) / (len(z) - 1)
    factor = np.linalg.cholesky(covariance + 1e-6 * np.eye(cache.channels))  # (N, C, C)
    noise = Noise(quickstart.seed, np.arange(count)).normal("gaussian", mean.shape).numpy()
    store = SampleStore.open(
        quickstart.out / "comparisons" / "gaussian",
        {
            "generator": "Gaussian per position",
            "cache": cache.fingerprint,
            "tokenizer": cache.tokenizer["fingerprint"],
            "classes": wanted,
            "seed": quickstart.seed,
        },
        count=count,
        grid=cache.grid,
        channels=cache.channels,
        stats=cache.stats,
        rows_per_shard=count,
    )
    if not store.complete:
        store.commit(0, mean + np.einsum("ncd,bnd->bnc", factor, noise))
    return store


def _probe(
    quickstart: "Quickstart", held_out: FeatureTable, held_out_labels: np.ndarray
) -> dict[str, float]:
    """Does a classifier of real images recognise the classes of the samples?"""
    rows = quickstart.class_rows(quickstart.train_images)
    labels = torch.from_numpy(quickstart.train_images.labels[rows]).long()
    probe = LinearProbe.fit(torch.from_numpy(quickstart.real), labels)
    store = quickstart.final_store()
    samples = StoredFeatures(store, quickstart.tokenizer, quickstart.extractor).read()
    classes = sampled_classes(quickstart.generator)
    wanted = labels_of(store.identity["first"] + np.arange(len(samples)), classes)

    def accuracy(features: np.ndarray, wanted: np.ndarray) -> float:
        return probe.accuracy(torch.from_numpy(features), torch.from_numpy(wanted))

    return {
        "samples": accuracy(samples.features, wanted),
        "held out": accuracy(held_out.features, held_out_labels),
        "chance": 1 / len(classes),
    }
