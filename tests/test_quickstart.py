"""The quickstart, at a size at which it means nothing, does every stage and finds them done."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import CheckpointError, MismatchError, StorageError
from detok_pipe.pipelines.demo_presets import FAST, Demo
from detok_pipe.pipelines.quickstart import Quickstart
from detok_pipe.pipelines.quickstart_page import STAGES, summary

TINY = Demo(
    tokenizer=dataclasses.replace(
        FAST.tokenizer, image_size=32, encoder="16,1,2", decoder="16,1,2", duration="4 steps"
    ),
    generator=dataclasses.replace(
        FAST.generator,
        model={
            "width": 16,
            "depth": 1,
            "heads": 2,
            "head_width": 16,
            "head_depth": 1,
            "buffer": 1,
            "head_draws": 1,
        },
        duration="4 steps",
    ),
    sampling=Sampling(guidance_schedule="linear", clip=4.0, steps=3, iterations=2),
    scales=(1.0, 2.0),
    sweep_count=12,
    final_count=12,
    resolution=64,
)


@pytest.mark.soak
def test_every_stage_runs_and_a_second_run_does_nothing(tmp_path):
    def quickstart(seed: int = 0) -> Path:
        device = torch.device("cpu")
        return Quickstart(tmp_path, "fast", TINY, seed=seed, device=device, quiet=True).run()

    page = quickstart()
    text = page.read_text()
    assert "Flags" in text
    assert 'src="http' not in text
    for picture in ("reconstructions", "samples", "samples-by-scale", "sweep", "generator-loss"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000
    stages = json.loads((tmp_path / STAGES).read_text())
    assert 0 <= stages["comparisons"]["result"]["probe"]["samples"] <= 1
    assert "chance 25%" in summary(tmp_path)

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    quickstart()
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    changed = {p.name for p in after if after[p] != before.get(p)} - {".lock", ".lock-holder"}
    assert not changed

    made = tmp_path / "sweep" / "final"
    rows = {p.name: p.read_bytes() for p in made.glob("*/*.safetensors")}
    assert rows
    shutil.rmtree(made)
    page.unlink()
    assert quickstart().is_file()
    assert {p.name: p.read_bytes() for p in made.glob("*/*.safetensors")} == rows

    with pytest.raises(MismatchError, match="another preset, seed or version"):
        quickstart(seed=1)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A quickstart whose stages only note that they were called; a run returns which."""
    calls = []
    for name, made in (
        ("make_images", "images"),
        ("train_tokenizer", "tokenizer/checkpoints"),
        ("reconstruct", None),
        ("encode", "cache/manifest.json"),
        ("check_cache", "cache-zarr/manifest.json"),
        ("train_generator", "generator/checkpoints"),
        ("reference_statistics", "reference.npz"),
        ("sweep", "sweep/final"),
        ("compare", "comparisons"),
        ("report", "report.html"),
    ):

        def stage(self, name=name, made=made):
            calls.append(name)
            if made is not None:
                (self.out / made).parent.mkdir(exist_ok=True)
                (self.out / made).touch()

        monkeypatch.setattr(Quickstart, name, stage)

    def run():
        calls.clear()
        Quickstart(tmp_path, "fast", TINY, seed=0, device=torch.device("cpu"), quiet=True).run()
        return list(calls)

    return run


@pytest.mark.parametrize(
    ("gone", "stage"),
    [
        ("report.html", "report"),
        ("sweep/final", "sweep"),
        ("cache-zarr/manifest.json", "check_cache"),
        ("generator/checkpoints", "train_generator"),
    ],
)
def test_a_stage_whose_files_are_gone_is_done_again(tmp_path, recorded, gone, stage):
    assert len(recorded()) == 10
    assert recorded() == []
    (tmp_path / gone).unlink()
    assert recorded() == [stage]


@pytest.mark.parametrize("name", ["stages.json", "quickstart.json"])
@pytest.mark.parametrize("text", [b"{", b"[]", b"12", b"\xff"])
def test_a_damaged_record_is_named(tmp_path, recorded, name, text):
    recorded()
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
        recorded()


def test_a_damaged_stage_is_named(tmp_path, recorded):
    recorded()
    (tmp_path / "quickstart.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no record tokenizer"):
        recorded()
    (tmp_path / "quickstart.json").unlink()
    (tmp_path / STAGES).write_text('{"images": 3}')
    with pytest.raises(CheckpointError, match=r"stages\.json .*images has no seconds"):
        recorded()


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    out = tmp_path / "dangling" / "qs"
    with pytest.raises(StorageError, match="a link that leads nowhere"):
        Quickstart(out, "fast", TINY, seed=0, device=torch.device("cpu"), quiet=True).run()


@pytest.mark.soak
def test_an_interrupted_quickstart_equals_one_that_was_not(tmp_path, monkeypatch):
    device = torch.device("cpu")
    whole = Quickstart(tmp_path / "a", "fast", TINY, seed=0, device=device, quiet=True)
    whole.run()
    parts = Quickstart(tmp_path / "b", "fast", TINY, seed=0, device=device, quiet=True)
    monkeypatch.setattr(parts, "sweep", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        parts.run()
    again = Quickstart(tmp_path / "b", "fast", TINY, seed=0, device=device, quiet=True)
    again.run()
    assert again.stages["comparisons"]["result"] == whole.stages["comparisons"]["result"]
