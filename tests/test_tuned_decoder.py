"""One cache and one set of samples serve a tokenizer and the same one with a tuned decoder."""

import json
from pathlib import Path

import numpy as np
import pytest
from image_making import random_images
from PIL import Image

from detok_pipe.pipelines.cli import main

TOKENIZER = (
    *("image_size=32", "patch_size=8", "channels=4", "encoder=16,1,2", "decoder=16,1,2"),
    *("perceptual=none", "duration=3 steps", "global_batch=4", "precision=fp32"),
)
TUNING = (
    *("perceptual=none", "duration=3 steps", "global_batch=4", "precision=fp32"),
    *("base_lr=0.1", "warmup=0", "ema=0.5", "adversarial_start=1 step"),
)
GENERATOR = (
    *("model.width=16", "model.depth=1", "model.heads=2", "duration=2 steps", "global_batch=4"),
    *("precision=fp32", "ema=0.5"),
)


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 0


def settings(values: tuple[str, ...]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A tokenizer "tok", its cache, a generator with samples, and the tuned tokenizer "tuned"."""
    folder = tmp_path_factory.mktemp("runs")
    images = folder / "images"
    for name in ("a", "b"):
        random_images(images / name, 6)
    tok, cache, data = folder / "tok", folder / "cache", ("--data", images)
    quiet = ("--quiet", "--device", "cpu")
    run("train-tok", "detok-sb", *data, "--out", tok, *settings(TOKENIZER), *quiet)
    run("encode", "--tokenizer", tok, *data, "--out", cache, *quiet)
    generator = ("--latents", cache, "--out", folder / "gen", *settings(GENERATOR))
    run("train-gen", "sit-b", *generator, *quiet)
    run("sample", folder / "gen", "-n", 8, "--steps", 3, "--out", folder / "samples", *quiet)
    run(
        *("train-tok", "detok-decoder", "--finetune-decoder", tok),
        *(*data, "--out", folder / "tuned", *settings(TUNING), *quiet),
    )
    return folder


def test_both_decode_the_samples(runs: Path, tmp_path: Path) -> None:
    pictures = []
    for name in ("tok", "tuned"):
        out = tmp_path / name
        run("export-images", runs / "samples", "--tokenizer", runs / name, "--out", out, "--quiet")
        pictures.append([np.asarray(Image.open(file)) for file in sorted(out.rglob("*.png"))])
    assert len(pictures[0]) == len(pictures[1]) == 8
    assert any((a != b).any() for a, b in zip(*pictures, strict=True))


def test_both_are_scored(runs: Path, tmp_path: Path) -> None:
    network = (
        "--features",
        "efficientnet-lite2",
        "--resolution",
        128,
        "--device",
        "cpu",
        "--quiet",
    )
    reference = tmp_path / "reference.npz"
    run("fid-stats", runs / "images", "--size", 32, "--out", reference, *network)
    for name in ("tok", "tuned"):
        store = (runs / "samples", "--tokenizer", runs / name)
        run("score", *store, "--ref", reference, *network)
    lines = (runs / "samples" / "scores.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["metrics"] for line in lines)
    assert first["FD-EffLite2@128"] != second["FD-EffLite2@128"]


def test_the_cache_can_go_on_being_written(runs: Path, tmp_path: Path) -> None:
    """Encoding with the tuned tokenizer makes the same cache."""
    out = ("--data", runs / "images", "--out", tmp_path / "cache", "--quiet", "--device", "cpu")
    run("encode", "--tokenizer", runs / "tuned", *out)
    one, other = (
        json.loads((folder / "manifest.json").read_text())
        for folder in (runs / "cache", tmp_path / "cache")
    )
    assert one["fingerprint"] == other["fingerprint"]
