"""Tiny trained networks for tests of sampling and scoring: 16 x 16 pixels, 4 x 4 tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detok_pipe.evaluation.frechet import feature_stats
from detok_pipe.evaluation.reference import Reference, read_reference, write_reference
from detok_pipe.generators.registry import build_generator
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.stats import LatentStats
from detok_pipe.pipelines.config import GeneratorConfig, TokenizerConfig, to_json
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.run_directory import open_run
from detok_pipe.pipelines.trained import (
    TrainedGenerator,
    TrainedTokenizer,
    build_tokenizer,
    load_tokenizer,
)
from detok_pipe.tokenizer.model import LDeTok

CLASSES = ["a", "b", "c"]
MODEL: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2}
QUICK = Sampling(guidance_scale=1.5, steps=3, method="euler")


class Rank(Processes):
    """One process of several that are not there."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world


class TinyFeatures:
    """Random filters instead of a network: 6 features, 4 logits."""

    name = "FD-EffLite2@32"
    dimensions = 6

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"extractor": "tiny"}
        self.images = 0
        generator = torch.Generator().manual_seed(0)
        self.filters = torch.randn(6, 3, 5, 5, generator=generator) / 8
        self.head = torch.randn(6, 4, generator=generator)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        assert images.dtype == torch.uint8
        self.images += len(images)
        y = torch.nn.functional.conv2d(images.float() / 64, self.filters)
        features = y.relu().mean((2, 3))
        return {"features": features, "logits": features @ self.head}


def tiny_generator(path: Path, *, seed: int = 0, **config: Any) -> TrainedGenerator:
    torch.manual_seed(seed)
    model = build_generator("sit-s", grid=(4, 4), channels=4, num_classes=3, **MODEL)
    for parameter in model.parameters():  # the output layer starts at zero
        torch.nn.init.normal_(parameter, std=0.15)
    return TrainedGenerator(
        model=model.eval().requires_grad_(False),
        stats=LatentStats(np.array([0.1, 0.2, 0.3, 0.4]), np.array([1.0, 2.0, 1.0, 0.5])),
        grid=(4, 4),
        class_names=CLASSES,
        identity={
            "generator": "sit-s",
            "weights": f"seed {seed}",
            "ema": True,
            "step": 10,
            "cache": "cache",
            "tokenizer": "encoder",
        },
        record={
            "config": {"generator": "sit-s", "model": {}, **config},
            "latents": {"num_classes": 3},
        },
        path=path,
    )


def tiny_tokenizer(*, fingerprint: str = "encoder", decoder: str = "decoder") -> TrainedTokenizer:
    torch.manual_seed(1)
    size = (32, 1, 2)
    model = LDeTok(image_size=16, patch_size=4, channels=4, encoder=size, decoder=size)
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return TrainedTokenizer(
        model=model.eval().requires_grad_(False),
        image_size=16,
        identity={"fingerprint": fingerprint},
        decoder=decoder,
        path=Path("runs/tok"),
        step=5,
    )


def tiny_reference(path: Path, *, size: int = 16, name: str = TinyFeatures.name) -> Reference:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (60, 3, size, size), dtype=np.uint8))
    features = TinyFeatures()(images)["features"].numpy()
    write_reference(
        path,
        feature_stats(features),
        extractor=name,
        settings={},
        image_size=size,
        source={"count": 60},
        features=features,
    )
    return read_reference(path)


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def make_runs(folder: Path) -> None:
    """Run directories tok, other (a tokenizer that does not fit) and gen, and images."""
    config = TokenizerConfig(
        image_size=16, patch_size=4, channels=4, encoder="32,1,2", decoder="32,1,2"
    )
    for seed, name in enumerate(("other", "tok")):
        torch.manual_seed(seed)
        tensors = build_tokenizer(config).state_dict()
        with open_run(
            folder / name, kind="tokenizer", config=to_json(config), inputs={}, keep=1
        ) as out:
            out.save_checkpoint(1, {"model": tensors, "ema": tensors}, {})
    torch.manual_seed(2)
    model = build_generator("sit-s", grid=(4, 4), channels=4, num_classes=2, **MODEL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    fingerprint = load_tokenizer(folder / "tok").identity["fingerprint"]
    with open_run(
        folder / "gen",
        kind="generator",
        config=to_json(GeneratorConfig(generator="sit-s", model=MODEL)),
        inputs={"cache": "c", "tokenizer": fingerprint},
        extra={
            "latents": {
                "grid": [4, 4],
                "channels": 4,
                "class_names": ["a", "b"],
                "num_classes": 2,
                "stats": LatentStats.identity(4).to_json(),
            }
        },
        keep=1,
    ) as out:
        out.save_checkpoint(1, {"model": model.state_dict(), "ema": model.state_dict()}, {})
    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
