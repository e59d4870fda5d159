"""The quickstart, at a size at which it means nothing, does every stage and finds them done."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import MismatchError
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

    with pytest.raises(MismatchError, match="another preset, seed or version"):
        quickstart(seed=1)


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
