"""Sampling and scoring in real processes: several at once, and killed at random moments."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from score_making import json_of, make_runs

from detok_pipe.latents.sample_store import open_sample_store

pytestmark = pytest.mark.soak

CLI = ("-m", "detok_pipe.pipelines.cli")
QUICK = ("--steps", "3", "--method", "euler", "--batch-size", "10")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _run(*arguments: object, processes: int = 1) -> str:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(processes)]
    command = [*launcher, *CLI, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder)
    return folder


def test_two_processes_give_what_one_gives(runs: Path, tmp_path: Path) -> None:
    network = ("--features", "efficientnet-lite2", "--resolution", "64")
    for processes in (1, 2):
        reference, out = tmp_path / f"{processes}.npz", tmp_path / str(processes)
        images = ("fid-stats", runs / "images", "--size", 16, "--out", reference)
        _run(*images, *network, processes=processes)
        sweep = ("sweep-cfg", runs / "gen", "--ref", tmp_path / "1.npz", "--out", out)
        size = ("--scales", "1,3", "-n", 300, "--final-num", 0)
        output = _run(*sweep, *size, *network, *QUICK, processes=processes)
        assert output.count("difference to best") == 1  # each of two that do not join prints it
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    one, two = (json_of(tmp_path / str(i) / "sweep.json") for i in (1, 2))
    assert one["rungs"] == two["rungs"]
    for scale in ("cfg-1", "cfg-3"):
        stores = [tmp_path / str(i) / "search" / scale for i in (1, 2)]
        files = [{p.name: p.read_bytes() for p in s.glob("*.safetensors")} for s in stores]
        assert files[0] == files[1]
        assert len(files[0]) > 1


def test_two_processes_share_the_images_of_a_reference(runs: Path, tmp_path: Path) -> None:
    """As ADM's reference batch has them: statistics, and images whose features are computed."""
    network = ("--features", "efficientnet-lite2", "--resolution", "64")
    own, batch = tmp_path / "own.npz", tmp_path / "batch.npz"
    _run("fid-stats", runs / "images", "--size", 16, "--out", own, "--keep-features", 0, *network)
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    with np.load(own) as arrays:
        np.savez(batch, images, **arrays)
    _run("sample", runs / "gen", "-n", 30, "--out", tmp_path / "s", *QUICK)
    for processes in (1, 2):
        _run("score", tmp_path / "s", "--ref", batch, *network, processes=processes)
    one, two = map(json.loads, (tmp_path / "s" / "scores.jsonl").read_text().splitlines())
    assert "9 real images" in one["settings"]["measures"]["kernel"]
    for name, metric in one["metrics"].items():
        assert two["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-4), name


def test_two_processes_export_what_one_exports(runs: Path, tmp_path: Path) -> None:
    _run("sample", runs / "gen", "-n", 25, "--out", tmp_path / "s", *QUICK)
    for processes in (1, 2):
        for name in (f"{processes}", f"{processes}.npz"):
            export = ("export-images", tmp_path / "s", "--out", tmp_path / name)
            _run(*export, "--batch-size", 10, processes=processes)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "12"
    )
    assert len(one) == 26
    assert one == two
    with np.load(tmp_path / "1.npz") as first, np.load(tmp_path / "2.npz") as second:
        np.testing.assert_array_equal(first["arr_0"], second["arr_0"])


def test_killed_at_random_moments_gives_the_same_bits(runs: Path, tmp_path: Path) -> None:
    """Each start dies at a moment of its own after its first shard, before its third at the latest.
    It ends itself: from outside, on a busy machine, a kill can come when all is done.
    """
    program = """
import itertools, os, signal, sys
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.pipelines.cli import main

seconds, commit, commits = float(sys.argv.pop(1)), SampleStore.commit, itertools.count()

def commit_and_die(self, shard, z):
    number = next(commits)
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, shard, z)
    if number == 0:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends a process on the spot

SampleStore.commit = commit_and_die
main()
"""
    arguments = ("sample", runs / "gen", "-n", 2500, "--cfg", 2, *QUICK, "--out")
    _run(*arguments, tmp_path / "whole")
    target = tmp_path / "killed"
    moments = random.Random(0)
    kills = 0

    def shards() -> int:
        return len(list(target.glob("*.safetensors")))

    while shards() < 10:
        before = shards()
        command = [sys.executable, "-c", program, str(moments.uniform(0.001, 0.2))]
        done = subprocess.run([*command, *map(str, arguments), str(target)], env=ENVIRONMENT)
        kills += done.returncode in (-signal.SIGALRM, -signal.SIGKILL)
        assert shards() > before, "a restart made no progress"
    whole, killed = open_sample_store(tmp_path / "whole"), open_sample_store(target)
    assert kills >= 4  # a start with more than two shards to go cannot finish
    assert killed.complete
    assert killed.verify() == []
    np.testing.assert_array_equal(whole.read(0, 2500), killed.read(0, 2500))


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """1,800 more images of 256 pixels would take 350 MB; only their features stay."""
    program = """
import resource, sys
from pathlib import Path
import numpy as np
from score_making import TinyFeatures, tiny_reference
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.latents.stats import LatentStats
from detok_pipe.pipelines.score import score
from detok_pipe.pipelines.trained import TrainedTokenizer
from detok_pipe.tokenizer.model import LDeTok

folder, size = Path(sys.argv[1]), (32, 1, 2)
model = LDeTok(image_size=256, patch_size=32, channels=4, encoder=size, decoder=size).eval()
tokenizer = TrainedTokenizer(model, 256, {"fingerprint": "t"}, "decoder", folder, 0)
identity = {"tokenizer": "t", "sampling": {}}
store = SampleStore.open(
    folder / "s", identity, count=2000, grid=(8, 8), channels=4, rows_per_shard=50,
    stats=LatentStats.identity(4),
)
for shard, start, stop in store.pending():
    store.commit(shard, np.random.default_rng(shard).standard_normal((stop - start, 64, 4)))
reference = tiny_reference(folder / "reference.npz", size=256)
for count in (200, 2000):
    score(store, tokenizer, TinyFeatures(), reference, count=count, batch_size=25, quiet=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < 60_000  # kilobytes
