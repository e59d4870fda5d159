"""Trainings in two real processes, joined by torchrun, against the same training in one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generator_making import FAMILIES, QUIET, losses, recipe, weights, write_latents

from detok_pipe.latents.errors import Interrupted
from detok_pipe.pipelines import train_generator as module
from detok_pipe.pipelines.inspection import Inspection
from detok_pipe.pipelines.train_generator import train_generator

pytestmark = pytest.mark.soak


def stop_after(steps, folder, monkeypatch):
    """Train in this process until so many steps are done and saved."""

    def stop(step):
        if step == steps:
            raise Interrupted("enough", 15)
        return {}

    execution = dataclasses.replace(QUIET, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "inspections", lambda *a, **k: [Inspection(1, stop)])
        with pytest.raises(Interrupted):
            train_generator(recipe(), folder.parent / "cache", folder, execution)


def in_processes(count, function, folder):
    """Call a function of ``generator_making`` in so many processes."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={count}", str(tests / "generator_making.py")),
            *(function, str(folder)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The cache, and the runs of two processes beside those of one."""
    folder = tmp_path_factory.mktemp("processes")
    write_latents(folder / "cache")
    for name in FAMILIES:
        train_generator(recipe(name), folder / "cache", folder / f"one-{name}", QUIET)
        halves = dataclasses.replace(QUIET, micro_batch=8)
        train_generator(recipe(name), folder / "cache", folder / f"halves-{name}", halves)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(4, folder / "moved", patch)
        stop_after(4, folder / "sharded-moved", patch)
    in_processes(2, "train_in_processes", folder)
    return folder


def close(first, second):
    """Equal to rounding, but for the biases of keys: attention does not depend on them, so their
    gradients are nothing but rounding, which AdamW scales up."""

    def compared(tensors):
        return {k: v for k, v in tensors.items() if not k.endswith("attn.qkv.bias")}

    torch.testing.assert_close(compared(first), compared(second), rtol=2e-4, atol=5e-5)


def test_there_were_two_processes_and_real_shards(folder):
    facts = json.loads((folder / "facts.json").read_text())
    assert facts == {
        "processes": 2,
        "sharded": True,
        "blocks": True,
        "compiled": True,
        "patience": 2.0,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_and_two_micro_batches_give_the_same_losses(folder, name):
    expected = losses(folder / f"one-{name}")
    assert len(expected) == 6
    assert losses(folder / f"halves-{name}") == pytest.approx(expected, rel=1e-5)
    assert losses(folder / f"two-{name}") == pytest.approx(expected, rel=1e-5)
    close(weights(folder / f"two-{name}")["ema"], weights(folder / f"one-{name}")["ema"])


def test_a_run_goes_on_with_another_number_of_processes(folder):
    expected = losses(folder / "one-sit-b")
    assert losses(folder / "moved") == pytest.approx(expected, rel=1e-5)
    assert losses(folder / "sharded-moved") == pytest.approx(expected, rel=1e-5)


def test_a_sharded_training_is_compiled_with_its_recomputations(folder):
    expected = losses(folder / "one-sit-b")
    assert losses(folder / "sharded-compiled") == pytest.approx(expected, rel=1e-5)


def test_three_processes_go_on_to_the_same_bits(tmp_path):
    """Beyond two, the order of adding up their gradients shows."""
    write_latents(tmp_path / "cache")
    in_processes(3, "train_to_the_same_bits", tmp_path)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mar-b", "sit-b"])
def test_a_sharded_training_is_the_same_and_its_checkpoints_are_whole(folder, name):
    assert losses(folder / f"sharded-{name}") == pytest.approx(
        losses(folder / f"one-{name}"), rel=1e-5
    )
    sharded, plain = weights(folder / f"sharded-{name}"), weights(folder / f"one-{name}")
    for part in ("model", "ema", "optimizer"):
        assert {k: v.shape for k, v in sharded[part].items()} == {
            k: v.shape for k, v in plain[part].items()
        }
        close(sharded[part], plain[part])
