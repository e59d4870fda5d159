"""All six generators on one latent cache of real pictures: equal budgets, two seeds each.

    detok-pipe quickstart                            # makes the tokenizer, the cache, the reference
    python benchmarks/six_generators.py              # forty minutes on one processor core
    python benchmarks/six_generators.py --steps 5000 --device cuda

Each generator sees the same images in the same order for a seed, as many steps of the same batch,
and has about as many parameters. Then each draws the same number of samples, which are decoded
and compared with the images that the quickstart trained on. Losses of one family compare over
seeds, not between families: they measure different things. Everything goes on where it stopped.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from detok_pipe.evaluation.features import load_extractor
from detok_pipe.evaluation.reference import read_reference
from detok_pipe.latents import atomic
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.pipelines.config import Execution, GeneratorConfig
from detok_pipe.pipelines.demo_presets import CPU
from detok_pipe.pipelines.pictures import ImageRow, labelled_grid, save, to_images
from detok_pipe.pipelines.run_directory import read_metrics
from detok_pipe.pipelines.sample import sample, sampling_of
from detok_pipe.pipelines.score import score
from detok_pipe.pipelines.stored_features import decode_latents
from detok_pipe.pipelines.train_generator import train_generator
from detok_pipe.pipelines.trained import load_generator, load_tokenizer

_HEAD = {"head_width": 192, "head_depth": 3, "head_draws": 2}
MODELS: Mapping[str, dict[str, Any]] = {
    "mar-b": {"width": 160, "depth": 2, "heads": 5, "buffer": 4, "dropout": 0.0, **_HEAD},
    "random-ar-b": {"width": 128, "depth": 4, "heads": 4, **_HEAD},
    "raster-ar-b": {"width": 128, "depth": 4, "heads": 4, **_HEAD},
    "dit-b": {"width": 160, "depth": 4, "heads": 5},
    "sit-b": {"width": 160, "depth": 4, "heads": 5},
    "lightningdit-b": {"width": 160, "depth": 4, "heads": 5},
}
"""The same families at about two million parameters."""

RESOLUTION = 128
SCALE = 2.0
_COLUMNS = 8


def recipe(name: str, seed: int, steps: int) -> GeneratorConfig:
    """What all have in common: the quickstart's recipe and categories."""
    return dataclasses.replace(
        CPU.generator,
        generator=name,
        model=MODELS[name],
        duration=f"{steps} steps",
        ema=0.99,
        seed=seed,
    )


def sampler(name: str) -> dict[str, Any]:
    """Changes to the published sampling options, of which each generator uses some."""
    by_head = "head_width" in MODELS[name]
    return {
        "guidance_scale": SCALE,
        "temperature": 0.8 if by_head else 1.0,
        "clip": 4.0,
        "iterations": 16,
        "steps": 25 if by_head else 50,
        "method": "euler",
    }


def final_loss(run: Path) -> float:
    """Mean training loss of the last tenth of a run."""
    losses = [record["loss"] for record in read_metrics(run) if "loss" in record]
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


@click.command()
@click.option("--base", type=click.Path(path_type=Path), default=Path("runs/quickstart"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/six-generators"))
@click.option("--steps", type=click.IntRange(1), default=350, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--samples", type=click.IntRange(8), default=300, show_default=True)
@click.option("--device", default=None)
def main(base: Path, out: Path, steps: int, seeds: int, samples: int, device: str | None) -> None:
    """Train, sample and score all six; BASE is a quickstart's folder."""
    execution = Execution(device=device, trackers=(), checkpoint_every=100, keep_checkpoints=1)
    tokenizer = load_tokenizer(base / "tokenizer")
    reference = read_reference(base / "reference.npz")
    extractor = load_extractor("efficientnet-lite2", resolution=RESOLUTION)
    rows, results = [], []
    for name in MODELS:
        for seed in range(seeds):
            run = out / f"{name}-seed{seed}"
            train_generator(recipe(name, seed, steps), base / "cache", run, execution)
            generator = load_generator(run, device=device or "cpu")
            sampling = sampling_of(generator, **generator.model.used(sampler(name)))
            store = sample(
                generator, run / "drawn", count=samples, sampling=sampling, batch_size=100
            )
            scored, _ = score(store, tokenizer, extractor, reference)
            if seed == 0:
                rows.append(picture_row(name.removesuffix("-b"), store, tokenizer))
            results.append(
                {
                    "generator": name,
                    "seed": seed,
                    "parameters": generator.record["parameters"],
                    "loss": final_loss(run),
                    "images_per_second": read_metrics(run)[-1]["images_per_second"],
                    **{key: measured.value for key, measured in scored.metrics.items()},
                    "distance's standard error": scored.frechet.standard_error,
                }
            )
            atomic.write_json(out / "results.json", {"steps": steps, "results": results})
    save(out / "six-generators.png", labelled_grid(rows).quantize(128))
    click.echo(table(results, extractor.name))


def picture_row(name: str, store: SampleStore, tokenizer: Any) -> ImageRow:
    """The first samples of a store; columns share class and noise."""
    z = store.read(0, _COLUMNS)
    images = to_images(decode_latents(tokenizer, store.stats, z))
    return ImageRow(name, [(image,) for image in images])


def table(results: list[dict[str, Any]], distance: str) -> str:
    """A Markdown table, the seeds side by side."""
    lines = [
        f"| generator | parameters | loss, by seed | {distance}, by seed |",
        "|---|---|---|---|",
    ]
    for name in MODELS:
        mine = [result for result in results if result["generator"] == name]
        lines.append(
            f"| {name} | {mine[0]['parameters'] / 1e6:.1f} M "
            f"| {', '.join(format(r['loss'], '.3f') for r in mine)} "
            f"| {', '.join(format(r[distance], '.0f') for r in mine)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
