"""Compiled training gives the same losses, and compiles a few times whatever is masked."""

import copy
import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
from image_making import random_images
from tokenizer_making import PLAIN, QUIET
from torch import nn

from detok_pipe.generators.registry import build_generator
from detok_pipe.latents.noise import Noise
from detok_pipe.pipelines.run_directory import read_metrics
from detok_pipe.pipelines.sharding import compile_blocks
from detok_pipe.pipelines.train_tokenizer import train_tokenizer

SMALL = {"width": 32, "depth": 2, "heads": 2}
HEAD = {"head_width": 16, "head_depth": 1, "head_draws": 1}
MODELS = {"mar-b": {**SMALL, **HEAD, "buffer": 4}, "random-ar-b": {**SMALL, **HEAD}, "sit-b": SMALL}


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiler's graphs without its code generation; too many compilations are an error."""
    compiled = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", compiled)
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
def test_generators(name: str) -> None:
    torch.manual_seed(0)
    latents = {"grid": (16, 16), "channels": 4, "num_classes": 5}
    plain = build_generator(name, **latents, **MODELS[name])
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    z, labels = torch.randn(2, 256, 4), torch.tensor([0, 1])
    for step in range(30):  # MAR hides another number of tokens in each
        losses = []
        for model in (plain, compiled):
            torch.manual_seed(step)  # of dropout
            losses.append(model(z, labels, Noise(0, [2 * step, 2 * step + 1], step=step)))
        losses[1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_tokenizer(tmp_path) -> None:
    images = random_images(tmp_path / "images", 10, (36, 40))
    config = dataclasses.replace(PLAIN, duration="24 steps")
    losses = {}
    for compiled in (False, True):
        out = tmp_path / f"compiled-{compiled}"
        execution = dataclasses.replace(QUIET, compile=compiled, checkpoint_every=24)
        train_tokenizer(config, images, out, execution)
        losses[compiled] = [record["loss"] for record in read_metrics(out) if "loss" in record]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
