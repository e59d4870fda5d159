"""Tiny generator trainings for tests, also in processes that torchrun starts."""

import contextlib
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cache_making import plan_of
from score_making import tiny_tokenizer

from detok_pipe.latents.writer import CacheWriter
from detok_pipe.pipelines.checkpoints import latest_checkpoint
from detok_pipe.pipelines.config import Execution, GeneratorConfig
from detok_pipe.pipelines.run_directory import read_metrics
from detok_pipe.pipelines.train_generator import train_generator

FAMILIES = ("mar-b", "random-ar-b", "raster-ar-b", "dit-b", "sit-b", "lightningdit-b")
QUIET = Execution(device="cpu", trackers=(), quiet=True, log_every=1, checkpoint_every=4)


def write_latents(path: Path, count: int = 50) -> None:
    """A cache of ``score_making.tiny_tokenizer``'s form: 4 x 4 tokens of 4 channels."""
    identity = tiny_tokenizer().identity
    writer = CacheWriter.open(path, plan_of(count, grid=(4, 4), encoder=identity))
    rng = np.random.default_rng(0)
    for shard in writer.pending():
        rows = writer.rows(shard)
        moments = {
            view: (
                rng.standard_normal((len(rows), 16, 4), dtype=np.float32),
                np.full((len(rows), 16, 4), 0.1, np.float32),
            )
            for view in writer.plan.views
        }
        writer.commit(shard, moments, (rows % 3).astype(np.int32), rows, [])
    writer.finalize()


def recipe(name: str = "sit-b", **changes: Any) -> GeneratorConfig:
    """Six steps of one of the six, in fp32 and without dropout."""
    model: dict[str, Any] = {"width": 32, "depth": 1, "heads": 2}
    if name == "mar-b":
        model |= {"buffer": 2, "dropout": 0.0}
    if name in ("mar-b", "random-ar-b", "raster-ar-b"):
        model |= {"head_width": 32, "head_depth": 1, "head_draws": 1}
    settings: dict[str, Any] = {
        "model": model,
        "global_batch": 16,
        "duration": "6 steps",
        "lr": 1e-2,
        "clip": 1.0,
        "ema": 0.9,
        "precision": "fp32",
    }
    return GeneratorConfig(generator=name, **(settings | changes))


def weights(run: Path) -> dict[str, Any]:
    """All tensors of a run's newest checkpoint, by file."""
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return {name: checkpoint.tensors(name) for name in ("model", "ema", "optimizer")}


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if "loss" in record]


def train_long(cache: Path, run: Path) -> None:
    """Some steps with many checkpoints: for processes that are started, and killed."""
    execution = dataclasses.replace(QUIET, checkpoint_every=4)
    train_generator(recipe(duration="24 steps"), cache, run, execution)


def train_to_the_same_bits(folder: Path) -> None:
    """One training in one sitting and one in two, by torchrun's processes."""
    from detok_pipe.latents.errors import Interrupted
    from detok_pipe.pipelines import train_generator as module
    from detok_pipe.pipelines.inspection import Inspection

    def stop(step: int) -> dict[str, float]:
        if step == 4:
            raise Interrupted("enough", 15)
        return {}

    config = recipe("mar-b", global_batch=24)
    exact = dataclasses.replace(QUIET, checkpoint_every=1, deterministic=True)
    train_generator(config, folder / "cache", folder / "whole", exact)
    usual = module.inspections
    module.inspections = lambda *_, **__: [Inspection(1, stop)]
    with contextlib.suppress(Interrupted):
        train_generator(config, folder / "cache", folder / "resumed", exact)
    module.inspections = usual
    train_generator(config, folder / "cache", folder / "resumed", exact)


def train_in_processes(folder: Path) -> None:
    """What each of torchrun's processes does; see ``test_training_processes.py``."""
    import torch
    import torch.distributed as dist
    from accelerate import DistributedType
    from accelerate.state import PartialState
    from torch.distributed.fsdp import FSDPModule

    from detok_pipe.pipelines import sharding, training
    from detok_pipe.pipelines import train_generator as module
    from detok_pipe.pipelines.accelerators import make_accelerator, sharding_plugin

    for name in FAMILIES:
        train_generator(recipe(name), folder / "cache", folder / f"two-{name}", QUIET)
    # Goes on where one process stopped.
    train_generator(recipe(), folder / "cache", folder / "moved", QUIET)

    # On a CPU Accelerate would not take its plugin for sharding: it is made to.
    wrapped = []

    def prepared(accelerator: Any, model: Any, optimizer: Any) -> Any:
        wrapped.append(sharding.prepared(accelerator, model, optimizer))
        return wrapped[-1]

    def make(precision: Any, execution: Any, run: Any) -> Any:
        plain = dataclasses.replace(execution, fsdp=False)
        accelerator = make_accelerator(precision, plain, run)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = sharding_plugin()
        return accelerator

    training.make_accelerator = make
    module.prepared = prepared
    sharded = dataclasses.replace(QUIET, fsdp=True)
    for name in FAMILIES:
        train_generator(recipe(name), folder / "cache", folder / f"sharded-{name}", sharded)
    halves = dataclasses.replace(sharded, micro_batch=4, activation_checkpointing=True)
    train_generator(recipe(), folder / "cache", folder / "sharded-moved", halves)
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    compiled = dataclasses.replace(halves, compile=True)
    train_generator(recipe(), folder / "cache", folder / "sharded-compiled", compiled)
    in_graphs = torch._dynamo.utils.counters["stats"]["calls_captured"]
    state = PartialState()
    timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    if state.is_main_process:
        facts = {
            "processes": state.num_processes,
            "sharded": all(isinstance(model, FSDPModule) for model in wrapped),
            "blocks": all(
                isinstance(block, FSDPModule)
                for model in wrapped
                for block in sharding.blocks(model)
            ),
            "compiled": in_graphs > 20,  # an AdaLNBlock's operations
            "patience": timeout.total_seconds() / 3600,
        }
        (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
