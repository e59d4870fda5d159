"""Every kind of generator learns from a latent cache: its training loss falls."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cache_making import CHANNELS, TOKENS, plan_of

from detok_pipe.generators.registry import FAMILIES
from detok_pipe.latents.writer import CacheWriter
from detok_pipe.pipelines.config import Execution, GeneratorConfig
from detok_pipe.pipelines.demo_presets import FAST
from detok_pipe.pipelines.quickstart import Quickstart
from detok_pipe.pipelines.run_directory import read_metrics
from detok_pipe.pipelines.train_generator import train_generator

STEPS = 50
TINY = {"width": 32, "depth": 2, "heads": 2}
HEAD = {"head_width": 32, "head_depth": 2}


@pytest.fixture(scope="module")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 rows of three classes: each class has its own pattern, each row a little noise."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    rng = np.random.default_rng(0)
    patterns = rng.standard_normal((3, TOKENS, CHANNELS)).astype(np.float32)
    writer = CacheWriter.open(path, plan_of(count=96, views=("image",), rows_per_shard=32))
    for shard in writer.pending():
        rows = writer.rows(shard)
        labels = (rows % 3).astype(np.int32)
        noise = rng.standard_normal((len(rows), TOKENS, CHANNELS)).astype(np.float32)
        mean = patterns[labels] + 0.1 * noise
        writer.commit(shard, {"image": (mean, np.full_like(mean, 0.05))}, labels, rows, [])
    writer.finalize()
    return path


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short quickstart's cache: 1,900 drawings by a tokenizer that was trained a little."""
    out = tmp_path_factory.mktemp("quickstart")
    Quickstart(out, "fast", FAST, seed=0, device=torch.device("cpu"), quiet=True).run()
    return out / "cache"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", ["patterns", pytest.param("drawings", marks=pytest.mark.soak)])
def test_training_loss_falls(
    request: pytest.FixtureRequest, tmp_path: Path, cache: str, family: str, one_thread: None
) -> None:
    """The mean of the last tenth against that of the first, when nothing was learned."""
    config = GeneratorConfig(
        generator=f"{family}-b",
        model=TINY | (HEAD if family in ("mar", "random-ar", "raster-ar") else {}),
        global_batch=16,
        duration=f"{STEPS} steps",
        lr=3e-3,
        precision="fp32",
    )
    quick = Execution(device="cpu", log_every=1, checkpoint_every=STEPS, trackers=(), quiet=True)
    train_generator(config, request.getfixturevalue(cache), tmp_path / "run", quick)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert len(losses) == STEPS
    tenth = STEPS // 10
    assert np.mean(losses[-tenth:]) < (0.75 if cache == "patterns" else 0.85) * np.mean(
        losses[:tenth]
    )
