"""Trainings that are killed, signalled or run out of disk: the next one completes them."""

import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from generator_making import QUIET, recipe, train_long, weights, write_latents

from detok_pipe.latents.errors import StorageError
from detok_pipe.pipelines.checkpoints import latest_checkpoint
from detok_pipe.pipelines.run_directory import read_metrics
from detok_pipe.pipelines.train_generator import train_generator

KILLS = [3, pytest.param(20, marks=pytest.mark.soak)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "cache"
    write_latents(path)
    return path


def equal(first, second):
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


def begin(context, cache, run):
    child = context.Process(target=train_long, args=(cache, run))
    child.start()
    return child


@pytest.mark.parametrize("kills", KILLS)
def test_killed_at_random_moments(tmp_path, cache, kills):
    """Nothing is lost but the steps since the last checkpoint, and the result is the same."""
    context = multiprocessing.get_context("forkserver")
    # The server finds what is installed, not the tests.
    context.set_forkserver_preload(["detok_pipe.pipelines.train_generator"])
    begin(context, cache, tmp_path / "first").join()  # starts the server
    started = time.monotonic()
    begin(context, cache, tmp_path / "calm").join()
    seconds = time.monotonic() - started
    rng = random.Random(kills)
    reached, run = 0, tmp_path / "killed"
    for _ in range(kills):
        child = begin(context, cache, run)
        # About half of the kills come before the last checkpoint of what is left to do.
        child.join(rng.uniform(0, seconds / 2))
        child.kill()
        child.join()
        checkpoint = latest_checkpoint(run)
        step = checkpoint.step if checkpoint else 0
        assert step >= reached
        reached = step
    begin(context, cache, run).join()
    equal(run, tmp_path / "calm")
    steps = [record["step"] for record in read_metrics(run)]
    assert steps == list(range(1, 25))
    assert not list((run / "checkpoints").glob(".tmp-*"))


def test_a_full_disk_keeps_the_checkpoint_and_is_named(small_disk, tmp_path, cache):
    disk, mount = small_disk
    train_long(cache, tmp_path / "calm")
    folder = latest_checkpoint(tmp_path / "calm").path
    kilobytes = sum(file.stat().st_size for file in folder.iterdir()) // 1024
    mount(f"remount,size={kilobytes * 3 // 2 + 100}k")
    with pytest.raises(StorageError, match=r"no space is left|cannot be written") as failure:
        train_long(cache, disk / "run")
    assert str(disk) in str(failure.value)
    assert latest_checkpoint(disk / "run").step == 4
    assert not list((disk / "run" / "checkpoints").glob(".tmp-*"))
    mount(f"remount,size={kilobytes * 5 + 100}k")
    train_long(cache, disk / "run")
    equal(disk / "run", tmp_path / "calm")


def test_a_disk_that_fills_up_between_checkpoints_is_named(small_disk, cache):
    disk, mount = small_disk
    mount("remount,size=60k")
    execution = dataclasses.replace(QUIET, trackers=("tensorboard",), checkpoint_every=1000)
    with pytest.raises(StorageError, match="no space is left"):
        train_generator(recipe(duration="500 steps"), cache, disk / "run", execution)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_command_ends_with_the_documented_code(tmp_path, cache, number):
    settings = [f"model.{key}={value}" for key, value in recipe().model.items()]
    settings += ["duration=100000 steps", "global_batch=16", "precision=fp32"]
    command = [
        *(sys.executable, "-m", "detok_pipe.pipelines.cli", "train-gen", "sit-b"),
        *("--latents", str(cache), "--out", str(tmp_path / "run"), "--device", "cpu"),
        *("--log-every", "1", "--tracker", "none", "--sample-every", "0"),
        *[word for setting in settings for word in ("--set", setting)],
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not read_metrics(tmp_path / "run"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        os.kill(process.pid, number)
        _, err = process.communicate()
    assert process.returncode == 128 + number
    assert "run the same command again to go on" in err
    assert latest_checkpoint(tmp_path / "run").step > 0
