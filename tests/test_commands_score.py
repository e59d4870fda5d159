"""The commands that sample and score, as a user types them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from score_making import make_runs

from detok_pipe.evaluation.frechet import FeatureStats
from detok_pipe.evaluation.reference import write_reference
from detok_pipe.evaluation.weights import INCEPTION
from detok_pipe.latents.sample_store import open_sample_store
from detok_pipe.pipelines.cli import main
from detok_pipe.pipelines.commands_score import _sweep_folder
from detok_pipe.pipelines.report_facts import gather_run

NETWORK = ("--features", "efficientnet-lite2", "--resolution", "64", "--quiet")
QUICK = ("--steps", "3", "--method", "euler", "--batch-size", "10", "--quiet")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    code = stop.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder)
    reference = folder / "reference.npz"
    assert run("fid-stats", folder / "images", "--out", reference, "--size", 16, *NETWORK) == 0
    return folder


def test_sample_score_export(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, reference = tmp_path / "samples", runs / "reference.npz"
    arguments = ("sample", runs / "gen", "--num", 24, "--cfg", 2, "--out", samples, *QUICK)
    assert run(*arguments) == 0
    assert f"preview: {samples / 'preview.png'}" in capsys.readouterr().out
    assert run(*arguments) == 0
    store = open_sample_store(samples)
    assert store.complete
    assert store.identity["sampling"]["guidance_scale"] == 2.0
    assert store.identity["sampling"]["steps"] == 3
    assert run("score", samples, "--ref", reference, *NETWORK) == 0
    output = capsys.readouterr()
    assert "FD-EffLite2@64" in output.out
    assert "24 samples are not more than the 1280" in output.err
    record = json.loads((samples / "scores.jsonl").read_text())
    assert record["tokenizer"].endswith("tok")
    assert record["settings"]["network"]["resolution"] == 64
    assert run("export-images", samples, "--out", tmp_path / "png", "--num", 3, "--quiet") == 0
    assert len(list((tmp_path / "png").glob("*.png"))) == 3
    npz = tmp_path / "s.npz"
    assert run("export-images", samples, "--out", npz, "--quiet") == 0
    assert run("fid-stats", npz, "--out", tmp_path / "s-stats.npz", *NETWORK) == 0
    # The statistics of the samples themselves: their distance is about zero.
    assert run("score", samples, "--ref", tmp_path / "s-stats.npz", *NETWORK) == 0
    value = json.loads((samples / "scores.jsonl").read_text().splitlines()[1])["metrics"]
    assert abs(value["FD-EffLite2@64"]["value"]) < 1e-3


def test_sampling_options_reach_the_record(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option of sampling by its name on the command line."""
    out = tmp_path / "samples"
    options = (
        *("--cfg", 2.5, "--schedule", "linear", "--interval", 0.25, 0.75, "--guided-channels", 3),
        *("--temperature", 1, "--steps", 3, "--method", "euler"),
    )
    more = ("--classes", "1,0", "--first", 3, "--seed", 5, "--precision", "fp32", "--no-ema")
    assert run("sample", runs / "gen", "-n", 2, "--out", out, "-q", *options, *more) == 0
    identity = open_sample_store(out).identity
    assert identity["sampling"] == {
        "guidance_scale": 2.5,
        "guidance_schedule": "linear",
        "guidance_interval": [0.25, 0.75],
        "guided_channels": 3,
        "temperature": 1.0,
        "clip": None,
        "steps": 3,
        "iterations": None,
        "method": "euler",
    }
    expected = {"classes": [1, 0], "first": 3, "seed": 5, "dtype": "fp32", "ema": False}
    assert {key: identity[key] for key in expected} == expected
    # Those that the generator does not use leave nothing behind.
    for option, value in (("--temperature", 0.9), ("--clip", 4), ("--num-iter", 8)):
        unused = ("-n", 2, "--out", tmp_path / "unused", "-q", option, value)
        assert run("sample", runs / "gen", *unused) == 2
        assert f"{option}: SiT does not use this option" in capsys.readouterr().err
    assert not (tmp_path / "unused").exists()


def test_a_store_is_decoded_from_any_folder(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It records where the generator's run is, whatever the folder it was drawn in."""
    samples = tmp_path / "samples"
    monkeypatch.chdir(runs)
    assert run("sample", "gen", "-n", 2, "--out", samples, *QUICK) == 0
    monkeypatch.chdir(tmp_path)
    assert run("export-images", "samples", "--out", "png", "--quiet") == 0


def test_sample_without_its_tokenizer(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No preview, and a line that says why; a named tokenizer that does not fit is an error."""
    generator = tmp_path / "alone" / "gen"
    shutil.copytree(runs / "gen", generator)
    out = tmp_path / "samples"
    assert run("sample", generator, "-n", 2, "--out", out, *QUICK) == 0
    assert "no preview: no tokenizer in" in capsys.readouterr().err
    assert not (out / "preview.png").exists()
    wrong = ("--tokenizer", runs / "other")
    assert run("sample", generator, "-n", 2, "--out", tmp_path / "x", *QUICK, *wrong) == 2
    assert "does not belong" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_sweep(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--ref", runs / "reference.npz", "--scales", "1,3", "--num", 12, *NETWORK, *QUICK)
    out = tmp_path / "sweep"
    assert run("sweep-cfg", runs / "gen", "--final-num", 6, "--out", out, *arguments) == 0
    output = capsys.readouterr()
    assert "difference to best" in output.out
    assert "edge of the grid" in output.err
    for name in ("sweep.json", "sweep.png", "samples-by-scale.png", "scores.jsonl"):
        assert (out / name).is_file()


def test_a_sweep_of_a_checkpoint_goes_to_its_run(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint itself may be removed; its tokenizer is the one beside the run."""
    for name in ("tok", "gen"):
        shutil.copytree(runs / name, tmp_path / name)
    checkpoint = tmp_path / "gen" / "checkpoints" / "step-00000001"
    before = sorted(checkpoint.iterdir())
    arguments = ("--ref", runs / "reference.npz", "--scales", "1,3", "--num", 4, *NETWORK, *QUICK)
    assert run("sweep-cfg", checkpoint, "--final-num", 0, *arguments) == 0
    sweep = tmp_path / "gen" / "sweep-step-00000001"
    assert (sweep / "sweep.json").is_file()
    assert sorted(checkpoint.iterdir()) == before
    (found,) = gather_run(tmp_path / "gen").sweeps
    assert found.name == sweep.name
    monkeypatch.chdir(checkpoint)
    assert _sweep_folder(Path()) == sweep
    assert _sweep_folder(tmp_path / "gen") == tmp_path / "gen" / "sweep"


def test_errors_say_what_to_do(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, reference = tmp_path / "samples", runs / "reference.npz"
    assert run("sample", runs / "gen", "--num", 4, "--out", samples, *QUICK) == 0
    damaged = tmp_path / "weights"
    damaged.mkdir()
    (damaged / INCEPTION.name).write_bytes(b"half a download")
    write_reference(
        tmp_path / "fid.npz",
        FeatureStats(np.zeros(2048), np.eye(2048), 50_000),
        extractor="FID",
        settings={},
        image_size=16,
        source={},
    )
    cases = [
        (
            ("score", samples, "--ref", tmp_path / "fid.npz", "--weights-dir", damaged),
            "expected 6726825d",
        ),
        (("sample", runs / "none", "--num", 4, "--out", samples), "none"),
        (("sample", runs / "tok", "--num", 4, "--out", samples), "generator"),
        (("sample", runs / "gen", "--num", 5, "--out", samples, *QUICK), "count"),
        (("score", tmp_path, "--ref", reference, *NETWORK), "holds no samples"),
        (("score", samples, "--ref", tmp_path / "no.npz", *NETWORK), "fid-stats"),
        (("score", samples, "--ref", reference, "--ref-sha256", "00", *NETWORK), "expected 00"),
        (
            ("score", samples, "--ref", reference, "--tokenizer", runs / "other", *NETWORK),
            "does not belong",
        ),
        (
            ("score", samples, "--ref", reference, "--features", "efficientnet-lite2"),
            "FD-EffLite2@64, and the features are FD-EffLite2@260's",
        ),
        (("sample", runs / "gen", "-n", 4, "--out", tmp_path / "x", "--classes", "a"), "207,360"),
        (("sample", runs / "gen", "-n", 4, "--out", tmp_path / "x", "--classes", "2"), "2 classes"),
        (
            ("sweep-cfg", runs / "gen", "--ref", reference, "--scales", "1,x", *NETWORK),
            "write numbers with commas",
        ),
    ]
    capsys.readouterr()
    for arguments, message in cases:
        assert run(*arguments) == 2, arguments
        assert message in capsys.readouterr().err
