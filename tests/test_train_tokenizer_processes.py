"""The tokenizer's trainer in real processes: how many there are changes nothing but rounding."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from image_making import random_images
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.soak

STEPS = 24
SETTINGS = (
    *("image_size=32", "patch_size=8", "channels=4", "encoder=16,1,2", "decoder=16,1,2"),
    *("perceptual=none", f"duration={STEPS} steps", "global_batch=8", "precision=fp32"),
    *("base_lr=3e-3", "ema=0.9"),
)
ADVERSARY = ("adversarial_start=4 steps",)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CLI = ("-m", "detok_pipe.pipelines.cli")
# The command line, but for a training that stands still after two checkpoints: however late a kill
# comes, it comes before the end.
HELD = """
import itertools, time
from detok_pipe.pipelines.cli import main
from detok_pipe.pipelines.run_directory import RunDirectory

save, saved = RunDirectory.save_checkpoint, itertools.count(1)

def save_and_hold(self, *arguments, **more):
    path = save(self, *arguments, **more)
    if next(saved) == 2:
        time.sleep(600)
    return path

RunDirectory.save_checkpoint = save_and_hold
main()
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return random_images(tmp_path_factory.mktemp("images"), 21)


def command(
    images: Path,
    out: Path,
    processes: int,
    settings: tuple[str, ...],
    program: tuple[str, str] = CLI,
) -> list[str]:
    launcher = []
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        launcher += ["--nproc_per_node", str(processes)]
    arguments = ["train-tok", "detok-sb", "--data", images, "--out", out, "--device", "cpu"]
    arguments += ["--checkpoint-every", 4, "--log-every", 2, "--quiet"]
    arguments += ["--val-data", images, "--eval-every", 12, "--features", "none"]
    for value in (*SETTINGS, *settings):
        arguments += ["--set", value]
    return [*launcher, sys.executable, *program, *map(str, arguments)]


def train(images: Path, out: Path, processes: int = 1, settings: tuple[str, ...] = ()) -> None:
    done = subprocess.run(
        command(images, out, processes, settings),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def killed(images: Path, out: Path, processes: int, settings: tuple[str, ...], seed: int) -> None:
    """Start a training, and kill all its processes a moment after a checkpoint appears."""
    before = checkpoints(out)
    held = command(images, out, processes, settings, ("-c", HELD))
    started = psutil.Popen(held, env=ENVIRONMENT)
    while started.poll() is None and checkpoints(out) <= before:
        time.sleep(0.002)
    time.sleep(random.Random(seed).uniform(0, 0.1))
    # One by one: torchrun starts its processes in sessions, and so in groups, of their own.
    family = [started, *started.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=10)
    assert started.returncode == -signal.SIGKILL
    assert len(family) >= processes + (processes > 1), "there were no workers to kill"
    assert max(checkpoints(out)).name < f"step-{STEPS:08d}"


def checkpoints(out: Path) -> set[Path]:
    return set((out / "checkpoints").glob("step-????????"))


def weights(out: Path, *names: str) -> list[dict[str, Tensor]]:
    newest = max(checkpoints(out))
    assert newest.name == f"step-{STEPS:08d}"
    return [load_file(newest / f"{name}.safetensors") for name in names]


def record(out: Path, step: int) -> dict[str, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {k: v for line in lines if line["step"] == step for k, v in line.items()}


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    train(images, out)
    return out


def test_two_processes_train_what_one_trains(images, alone, tmp_path) -> None:
    train(images, tmp_path / "two", processes=2)
    names = ("model", "ema")
    for one, two in zip(weights(alone, *names), weights(tmp_path / "two", *names), strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=0)
    one, two = record(alone, 12), record(tmp_path / "two", 12)
    assert one.keys() == two.keys()
    for name in ("loss", "mse", "kl", "val/psnr", "val/ssim", "val/images"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)
    assert len(list((tmp_path / "two" / "samples").iterdir())) == 4


def test_a_killed_training_goes_on_with_another_number_of_processes(
    images, alone, tmp_path
) -> None:
    out = tmp_path / "run"
    killed(images, out, 2, (), seed=0)
    killed(images, out, 1, (), seed=1)
    train(images, out, processes=2)
    for one, two in zip(weights(alone, "model"), weights(out, "model"), strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=0)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_killed_with_an_adversary_gives_the_same_bits(images, tmp_path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    train(images, whole, 2, ADVERSARY)
    for seed in range(2):
        killed(images, out, 2, ADVERSARY, seed)
    train(images, out, 2, ADVERSARY)
    names = ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer")
    for one, two in zip(weights(whole, *names), weights(out, *names), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_preempted_job_saves_first(images, alone, tmp_path) -> None:
    out = tmp_path / "run"
    started = subprocess.Popen(
        command(images, out, 2, ()), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while started.poll() is None and not checkpoints(out):
        time.sleep(0.002)
    started.send_signal(signal.SIGTERM)
    _, error = started.communicate(timeout=120)
    assert "with a checkpoint" in error or max(checkpoints(out)).name.endswith(str(STEPS))
    train(images, out, processes=1)
    for one, two in zip(weights(alone, "model"), weights(out, "model"), strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=0)
