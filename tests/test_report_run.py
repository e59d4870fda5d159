"""The page of a run at any stage: bare, with pictures of its training, with one or more sweeps."""

import json
import shlex
from pathlib import Path

import pytest
from report_making import EVIL, HOSTILE, checked, picture, rows
from score_making import QUICK, TinyFeatures, make_runs, tiny_reference

from detok_pipe.latents.errors import CheckpointError, InputError, MismatchError
from detok_pipe.pipelines import pictures, report, report_run
from detok_pipe.pipelines.commands_score import sweep_cfg
from detok_pipe.pipelines.plots import Curve
from detok_pipe.pipelines.report_facts import (
    RunFacts,
    SweepFacts,
    gather_run,
    reference_command,
    sweep_command,
    training_pictures,
)
from detok_pipe.pipelines.sweep import plan_for, sweep
from detok_pipe.pipelines.trained import load_generator, load_tokenizer


def sweep_result(text: str = "KD", network: str = "FID", ema: bool = True) -> dict:
    sampling = {
        "guidance_scale": 1.0,
        "guidance_schedule": "linear",
        "guidance_interval": [0.0, 1.0],
        "guided_channels": None,
        "temperature": 0.9,
        "steps": 25,
        "iterations": None,
        "method": None,
        "clip": 4.0,
    }
    value = {text: {"value": 3.0, "error": 0.5}}
    final = {
        "metrics": value,
        "notes": [f"a note {text}"],
        "settings": {"count": 50, "samples": {"sampling": sampling | {"guidance_scale": 2.5}}},
    }
    return {
        "generator": {"ema": ema},
        "run": "run",
        "plan": {
            "scales": [1.0, 2.5],
            "sampling": sampling,
            "unguided": sampling | {"temperature": 0.95},
            "count": 20,
            "search": "halving",
            "final_count": 50,
            "seed": 7,
            "precision": "fp32",
            "batch_size": 32,
        },
        "metrics": [{"name": text, "better": "lower"}],
        "rungs": [{"count": n, "points": [{"scale": 2.5, "metrics": value}]} for n in (10, 20)],
        "best": 2.5,
        "final": [final],
        "warnings": [f"a warning {text}"],
        "settings": {"network": {"name": network}},
        "reference": "my ref.npz",
        "tokenizer": "tok",
    }


def run_facts(name: str = "mar-b", sweeps: int = 1) -> RunFacts:
    return RunFacts(
        name=name,
        record={
            "config": {"generator": name, "lr": 2e-4},
            "inputs": {"cache": f"c0ffee {name}", "tokenizer": "beef"},
            "latents": {
                "path": name,
                "grid": [16, 16],
                "channels": 16,
                "class_names": [name],
                "stats": {"mean": [0.5]},
            },
            "tokenizer": {"encoder": name},
            "steps": 1000,
            "parameters": 208_000_000,
            "versions": {"torch": name},
        },
        curves=[Curve(name, [1, 500], [2.0, 1.0])],
        speed=[Curve("images a second", [1, 500], [20.0, 21.0])],
        pictures={name: rows("step 500", 1)},
        sweeps=[
            SweepFacts(
                f"sweep {i} {name}", sweep_result(name), rows("scale 2.5"), [f"again {name}"]
            )
            for i in range(sweeps)
        ],
        train=f"train {name}",
        report=f"report {name}",
        footer=name,
    )


def test_the_run_page_tells_all_it_must() -> None:
    page = checked(report.render(report_run.run_page(run_facts("KD"))))
    for fact in (
        *("c0ffee", "beef", "3.00 ± 0.50", "208,000,000", "best guidance scale"),
        *("steps done of 1,000", "guidance scale 2.5", "A warning KD", "a note KD", "20 samples"),
        *("step 500", "train KD again KD report KD", "While it trained"),
    ):
        assert fact in page.words, fact


def test_several_sweeps_are_told_apart() -> None:
    page = checked(report.render(report_run.run_page(run_facts("KD", sweeps=2))))
    for number in (0, 1):
        for title in ("Guidance in", "Samples in", "Final scores of", "All settings of"):
            assert page.words.count(f"{title} sweep {number} KD") >= 1
    assert page.words.count("The sweep in numbers") == 2


@pytest.mark.parametrize("name", [HOSTILE[0], HOSTILE[1], EVIL])
def test_it_stands_any_name(name) -> None:
    made = report_run.run_page(run_facts(name, sweeps=2))
    assert checked(report.render(made)).words.count(" ".join(name.split())) >= 8


def test_a_run_that_has_just_begun_has_a_page() -> None:
    page = checked(report.render(report_run.run_page(RunFacts("new", {"config": {}}))))
    assert "No loss has been logged yet" in page.words
    assert "No sweep yet" in page.words
    assert "No final score yet" in page.words


@pytest.mark.parametrize(("network", "ema"), [("FID", True), ("FD-EffLite2@128", False)])
def test_the_command_of_a_sweep_is_one_that_the_program_takes(network, ema) -> None:
    result = sweep_result(network=network, ema=ema)
    words = shlex.split(sweep_command(Path("my run"), Path("my run/sweep"), result))
    assert words[:3] == ["detok-pipe", "sweep-cfg", "my run"]
    options = {p.opts[0]: p for p in sweep_cfg.params} | {"--no-ema": None}
    given = [word for word in words[3:] if word.startswith("--")]
    assert set(given) <= set(options)
    assert ("--no-ema" in given) != ema
    assert words[words.index("--ref") + 1] == "my ref.npz"
    assert words[words.index("--out") + 1] == "my run/sweep"
    assert words[words.index("--unguided-temperature") + 1] == "0.95"
    assert words[words.index("--interval") + 1 :][:2] == ["0.0", "1.0"]
    assert ("--resolution" in given) == (network != "FID")


def test_commands_name_what_the_sweep_was_made_with(tmp_path) -> None:
    result = sweep_result(network="FD-EffLite2@128")
    words = shlex.split(sweep_command(Path("run"), Path("out"), result))
    assert words[words.index("--tokenizer") + 1] == "tok"
    assert words[words.index("--batch-size") + 1] == "32"
    assert reference_command(result) == []  # a file of others
    result |= {"tokenizer": "sd.bin", "tokenizer name": "sd-vae"}
    words = shlex.split(sweep_command(Path("run"), Path("out"), result))
    assert words[words.index("--tokenizer") :][:4] == [
        "--tokenizer",
        "sd-vae",
        "--weights",
        "sd.bin",
    ]
    source = {"kind": "images", "path": "/my images", "images": 9, "count": 9, "with features": 5}
    made_from = {"extractor": "FD-EffLite2@128", "image_size": 64, "source": source}
    result["reference made from"] = made_from
    assert reference_command(result) == [
        "detok-pipe fid-stats '/my images' --out 'my ref.npz' --size 64 --keep-features 5 "
        "--features efficientnet-lite2 --resolution 128"
    ]
    source["kind"] = "npz"
    assert "--size" not in reference_command(result)[0]
    source |= {"kind": "images", "count": 20}
    assert reference_command(result) == []  # of a choice of the images


def test_a_run_directory_is_read(tmp_path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    record = {
        "kind": "generator",
        "config": {"generator": "mar-b"},
        "inputs": {},
        "latents": {},
        "versions": {"torch": "2"},
        "command": ["/usr/bin/detok-pipe", "train-gen", "mar-b", "--out", "my run"],
    }
    (run / "config.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0, "images_per_second": 9}\n{"step": 2, "loss": 1.5}\n{"step": 3, "l'
    )
    facts = gather_run(run)
    assert facts.train == "detok-pipe train-gen mar-b --out 'my run'"
    assert facts.report.startswith("detok-pipe report ")
    assert list(facts.curves[0].values) == [2.0, 1.5]
    assert list(facts.speed[0].values) == [9.0]
    assert "mar-b" in checked(report.render(report_run.run_page(facts))).words
    with pytest.raises(CheckpointError, match="no run directory"):
        gather_run(tmp_path)


def test_sweeps_of_a_run_are_found(tmp_path) -> None:
    make_runs(tmp_path)
    run, reference = tmp_path / "gen", tiny_reference(tmp_path / "reference.npz")
    generator, tokenizer = load_generator(run), load_tokenizer(tmp_path / "tok")
    for name, scales in (("a", (1.0, 4.0)), ("sweep", (1.0, 2.0))):
        plan = plan_for(generator, scales=scales, sampling=QUICK, count=8, final_count=4)
        sweep(plan, generator, tokenizer, TinyFeatures(), reference, run / name, quiet=True)
    facts = gather_run(run)
    assert [found.name for found in facts.sweeps] == ["sweep", "a"]
    assert [row.label for row in facts.sweeps[1].rows] == ["scale 1", "scale 4"]
    only = gather_run(run, sweeps=[run / "a"])
    assert [found.name for found in only.sweeps] == ["a"]
    assert only.report.endswith(f"--sweep {run / 'a'}")
    checked(report.render(report_run.run_page(facts)))
    with pytest.raises(InputError, match="none holds no finished sweep"):
        gather_run(run, sweeps=[run / "none"])


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("config", "generator", "dit-b"),
        ("inputs", "cache", "another"),
        ("inputs", "tokenizer", "another"),
    ],
)
def test_a_sweep_of_another_run_is_refused(tmp_path, section, name, value) -> None:
    make_runs(tmp_path)
    run, reference = tmp_path / "gen", tiny_reference(tmp_path / "reference.npz")
    generator, tokenizer = load_generator(run), load_tokenizer(tmp_path / "tok")
    plan = plan_for(generator, scales=(1.0, 2.0), sampling=QUICK, count=8, final_count=0)
    sweep(plan, generator, tokenizer, TinyFeatures(), reference, run / "sweep", quiet=True)
    record = json.loads((run / "config.json").read_text())
    record[section][name] = value
    other = tmp_path / "other run"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(record))
    with pytest.raises(MismatchError, match=f"gen/sweep is .* {name} is .* is '{value}'.*--sweep"):
        gather_run(other, sweeps=[run / "sweep"])


def test_a_sweep_of_a_checkpoint_is_made_again_from_it() -> None:
    result = sweep_result() | {"run": "moved/since/checkpoints/step-00000004"}
    words = shlex.split(sweep_command(Path("run"), Path("run/sweep-step-00000004"), result))
    assert words[2] == "run/checkpoints/step-00000004"


def test_pictures_of_the_training_are_shown_evenly(tmp_path) -> None:
    for step in range(10, 130, 10):
        for kind in ("", "-reconstructions"):
            path = tmp_path / "samples" / f"step-{step:08d}{kind}.png"
            pictures.save(path, picture(48))
    found = training_pictures(tmp_path)
    assert set(found) == {"samples", "reconstructions"}
    labels = [row.label for row in found["reconstructions"]]
    assert labels == [f"step {step}" for step in (20, 40, 60, 80, 100, 120)]
    assert [row.label for row in training_pictures(tmp_path, most=1)["samples"]] == ["step 120"]
    whole = path.read_bytes()
    flipped = whole[:40] + bytes([whole[40] ^ 64]) + whole[41:]  # in the second chunk's name
    for damaged in (whole[:40], flipped):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match=r"step-00000120-reconstructions\.png is no whole image"
        ):
            training_pictures(tmp_path)
