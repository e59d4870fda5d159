"""The command line: bad input is one line that says what and what to do, with exit code 2."""

import errno
import json
import re
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from detok_pipe.pipelines import cli
from detok_pipe.pipelines.cli import COMMANDS, main

TINY_TOKENIZER = [
    "image_size=16",
    "patch_size=4",
    "channels=4",
    "encoder=16,1,2",
    "decoder=16,1,2",
    "perceptual=none",
    "adversarial_start=null",
    "duration=3steps",
    "global_batch=4",
    "precision=fp32",
]
TINY_MAR = [
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "model.head_width=16",
    "model.head_depth=1",
    "model.buffer=1",
    "duration=3steps",
    "global_batch=4",
    "precision=fp32",
]


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def settings(values):
    return [part for value in values for part in ("--set", value)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve small pictures of two classes, one of which has a hostile name."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("<img onerror=1>", "plain"):
        (folder / label).mkdir()
        for number in range(6):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images):
    """A tokenizer, a cache and a MAR, made by the commands."""
    folder = tmp_path_factory.mktemp("runs")
    for arguments in (
        [
            "train-tok",
            "detok-bb",
            "--data",
            images,
            "--out",
            folder / "tok",
            *settings(TINY_TOKENIZER),
        ],
        ["encode", "--tokenizer", folder / "tok", "--data", images, "--out", folder / "cache"],
        [
            "train-gen",
            "mar-b",
            "--latents",
            folder / "cache",
            "--out",
            folder / "mar",
            *settings(TINY_MAR),
        ],
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments), "--quiet", "--device", "cpu"])
        assert stopped.value.code == 0
    return folder


def test_the_stages_leave_what_they_promise(runs, capsys):
    record = json.loads((runs / "mar" / "config.json").read_text())
    assert record["config"]["precision"] == "fp32"
    assert record["latents"]["class_names"] == ["<img onerror=1>", "plain"]
    code, out, _ = run(capsys, "info", runs / "cache")
    assert code == 0
    assert "12" in out
    assert run(capsys, "verify", runs / "cache", "--quiet")[0] == 0


def test_a_hostile_class_name_is_text_in_the_report(runs, capsys):
    assert run(capsys, "report", runs / "mar", "--quiet")[0] == 0
    page = (runs / "mar" / "report.html").read_text()
    assert "<img onerror" not in page
    assert "&lt;img onerror=1&gt;" in page


def test_the_same_command_again_ends_at_once_and_a_changed_one_names_the_change(
    runs, images, capsys
):
    again = ["train-tok", "detok-bb", "--data", images, "--out", runs / "tok", "--quiet"]
    before = (runs / "tok" / "metrics.jsonl").read_bytes()
    assert run(capsys, *again, *settings(TINY_TOKENIZER))[0] == 0
    assert (runs / "tok" / "metrics.jsonl").read_bytes() == before
    code, _, err = run(capsys, *again, *settings([*TINY_TOKENIZER, "gamma=2"]))
    assert code == 2
    assert "gamma: 3.0 there, 2.0 now" in err


def test_a_dry_run_prints_the_plan_and_writes_nothing(runs, images, tmp_path, capsys):
    out = tmp_path / "run"
    command = ("train-tok", "detok-bb", "--data", images, "--out", out, "--dry-run")
    code, text, _ = run(capsys, *command, "--perceptual", "none", "--seed", 3)
    assert code == 0
    plan = json.loads(text)
    assert plan["parameters"] == 171_712_628
    assert (plan["config"]["perceptual"], plan["config"]["seed"]) == ("none", 3)
    code, text, _ = run(
        capsys, "train-gen", "mar-b", "--latents", runs / "cache", "--out", out, "--dry-run"
    )
    assert code == 0
    assert json.loads(text)["config"]["model"] == {"head_depth": 6, "head_width": 1024}
    assert not out.exists()


def bad_inputs(runs, images, tmp_path):
    """(command line, words that the error must have)."""
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    hollow = tmp_path / "hollow"
    (hollow / "nothing-inside").mkdir(parents=True)
    fake = tmp_path / "fake" / "class"
    fake.mkdir(parents=True)
    (fake / "no-image.png").write_bytes(b"plain text")
    train = ["train-tok", "detok-bb", "--out", out, *settings(TINY_TOKENIZER), "--data"]
    generate = ["train-gen", "mar-b", "--out", out, *settings(TINY_MAR), "--latents"]
    yield [*train, tmp_path / "nowhere"], ["nowhere"]
    yield [*train, tmp_path / "empty"], ["empty"]
    yield [*train, hollow], ["nothing-inside"]
    yield [*train, tmp_path / "fake"], ["no-image.png"]
    yield ["train-tok", "detok-bx", "--out", out, "--data", images], ["detok-bx", "detok-bb"]
    yield [*train, images, "--set", "gama=1"], ["gama", "gamma"]
    yield [*train, images, "--device", "gpu"], ["--device gpu"]
    yield [*generate, tmp_path / "empty"], ["empty"]
    yield [*generate, runs / "cache", "--set", "model.widht=3"], ["widht"]
    yield [*generate, runs / "cache", "--set", 'classes=["dog"]'], ["dog", "plain"]
    yield ["report", runs / "tok"], ["tokenizer run", "generator run is needed"]
    yield ["report", tmp_path / "nowhere"], ["no run directory"]
    yield ["sample", runs / "mar", "-n", 0, "--out", out], ["0"]
    yield ["convert", runs / "cache", "--format", "hdf5", "--out", out], ["hdf5"]
    yield ["quickstart", "--fast", "--preset", "cpu", "--out", out], ["--fast"]
    yield ["banana"], ["banana"]


def test_bad_input_is_one_clear_error(runs, images, tmp_path, capsys):
    for arguments, words in bad_inputs(runs, images, tmp_path):
        code, _, err = run(capsys, *arguments)
        assert code == 2, (arguments, err)
        assert "Traceback" not in err
        assert all(word in err for word in words), (arguments, words, err)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied"),
        (MemoryError("Unable to allocate 7 TiB"), "not enough memory: Unable to allocate 7 TiB;"),
        (MemoryError(), "not enough memory: MemoryError; a smaller batch"),
        (RuntimeError("x DefaultCPUAllocator: can't allocate memory: y"), "can't allocate memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB"), "give a smaller --micro-batch"),
    ],
)
def test_files_that_are_refused_and_memory_that_ran_out_are_one_line(
    error, line, capsys, monkeypatch
):
    monkeypatch.setattr(cli.group, "main", Mock(side_effect=error))
    code, _, err = run(capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: ")
    assert line in err


@pytest.mark.parametrize(
    "error", [RuntimeError("a defect"), OSError(errno.EIO, "no file is named")]
)
def test_a_defect_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(cli.group, "main", Mock(side_effect=error))
    with pytest.raises(type(error), match=re.escape(str(error))):
        main([])


def test_missing_weights_name_the_places_and_the_alternatives(
    images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    overrides = [value for value in TINY_TOKENIZER if not value.startswith("perceptual")]
    code, _, err = run(
        capsys,
        *["train-tok", "detok-bb", "--data", images, "--out", tmp_path / "out"],
        *settings(overrides),
    )
    assert code == 2
    assert "vgg16-397923af.pth" in err
    assert "--perceptual efficientnet-lite2" in err


@pytest.mark.parametrize(
    ("options", "shown"), [((), "warning: early average\n"), (("-W", "ignore"), "")]
)
def test_a_warning_is_one_line(options, shown):
    code = (
        "import warnings; from detok_pipe.pipelines import cli\n"
        "cli.group.main = lambda **_: warnings.warn('early\\n average')\n"
        "cli.main([])"
    )
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, capsys):
    code, out, _ = run(capsys, command, "-h")
    assert code == 0
    assert "Example" in out
    assert f"detok-pipe {command}" in out


def test_the_module_runs_as_a_program_and_help_is_quick():
    code = "import sys; import detok_pipe.pipelines.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "detok_pipe.pipelines.cli", "-h"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "quickstart" in done.stdout
