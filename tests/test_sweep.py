"""The sweep: same answer as scoring by hand, halving at half the cost, resumable."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest
from score_making import (
    QUICK,
    TinyFeatures,
    json_of,
    tiny_generator,
    tiny_reference,
    tiny_tokenizer,
)

from detok_pipe.evaluation.reference import read_reference
from detok_pipe.generators.registry import build_generator
from detok_pipe.latents.errors import ConfigError, DetokError, MismatchError
from detok_pipe.latents.sample_store import open_sample_store
from detok_pipe.pipelines import sweep_output
from detok_pipe.pipelines.sweep import (
    FLOW_SCALES,
    MAR_SCALES,
    final_path,
    plan_for,
    search_path,
    sweep,
    unguided_path,
)

SCALES = (0.5, 1.0, 2.0, 4.0)


def _run(tmp_path: Path, extractor: TinyFeatures | None = None, **settings: object) -> dict:
    generator = tiny_generator(tmp_path / "run")
    plan = plan_for(
        generator,
        **{"scales": SCALES, "sampling": QUICK, "count": 24, "final_count": 9, **settings},
    )
    return sweep(
        plan,
        generator,
        tiny_tokenizer(),
        extractor or TinyFeatures(),
        tiny_reference(tmp_path / "ref.npz"),
        tmp_path / "sweep",
        quiet=True,
    )


def test_grid_finds_the_lowest_and_scores_on_other_samples(tmp_path: Path) -> None:
    result = _run(tmp_path)
    assert json_of(tmp_path / "sweep" / "sweep.json") == result
    assert result["reference made from"]["source"] == {"count": 60}
    (rung,) = result["rungs"]
    values = {p["scale"]: p["metrics"]["FD-EffLite2@32"]["value"] for p in rung["points"]}
    assert list(values) == list(SCALES)
    assert result["best"] == min(values, key=values.__getitem__)
    best = next(p for p in rung["points"] if p["scale"] == result["best"])
    assert best["difference to best"] == {"value": 0.0, "error": 0.0}
    assert all(p["difference to best"]["value"] >= 0 for p in rung["points"])
    scales = [r["settings"]["samples"]["sampling"]["guidance_scale"] for r in result["final"]]
    assert scales == [result["best"], 1.0]
    assert {r["settings"]["samples"]["first"] for r in result["final"]} == {24}
    assert {r["settings"]["count"] for r in result["final"]} == {9}
    assert len((tmp_path / "sweep" / "scores.jsonl").read_bytes().splitlines()) == 6
    search = open_sample_store(search_path(tmp_path / "sweep", 1.0)).read(0, 9)
    final = open_sample_store(unguided_path(tmp_path / "sweep")).read(0, 9)
    assert (search != final).all(axis=(1, 2)).all()
    assert open_sample_store(final_path(tmp_path / "sweep", result["best"])).complete


def test_again_does_nothing_and_more_scales_only_theirs(tmp_path: Path) -> None:
    first = TinyFeatures()
    result = _run(tmp_path, first)
    finals = 9 * len(result["final"])
    assert first.images == 24 * 4 + finals
    again = TinyFeatures()
    repeated = _run(tmp_path, again)
    assert again.images == 0
    assert repeated["rungs"] == result["rungs"]
    wider = TinyFeatures()
    _run(tmp_path, wider, scales=(*SCALES, 3.0), final_count=0)
    assert wider.images == 24
    with pytest.raises(MismatchError, match="seed"):
        _run(tmp_path, seed=1)


def test_edge_of_grid_is_warned_about(tmp_path: Path) -> None:
    result = _run(tmp_path, scales=(3.0, 4.0), final_count=0)
    assert "is at the edge of the grid 3 ... 4: a" in result["warnings"][-1]
    assert result["final"] == []


def test_halving_takes_under_half(tmp_path: Path) -> None:
    extractor = TinyFeatures()
    scales = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
    result = _run(tmp_path, extractor, scales=scales, count=40, search="halving", final_count=0)
    assert [rung["count"] for rung in result["rungs"]] == [10, 20, 40]
    alive = [[p["scale"] for p in rung["points"]] for rung in result["rungs"]]
    assert set(alive[2]) <= set(alive[1]) < set(alive[0]) == set(scales)
    for rung, following in zip(result["rungs"], alive[1:], strict=False):
        assert [p["scale"] for p in rung["points"] if p["kept"]] == following
    assert extractor.images == result["samples"] < result["samples of a full grid"] / 2
    assert result["best"] in alive[2]


def test_pictures_and_tables(tmp_path: Path) -> None:
    result = _run(tmp_path)
    table = sweep_output.sweep_table(result)
    assert table.count("final") == len(result["final"])
    assert "best" in table.splitlines()[1 + SCALES.index(result["best"])]
    assert sweep_output.write_plot(result, tmp_path).read_bytes().startswith(b"\x89PNG")
    stores = [(s, open_sample_store(search_path(tmp_path / "sweep", s))) for s in SCALES]
    rows = sweep_output.scale_grid(stores, tiny_tokenizer(), columns=5)
    assert [row.label for row in rows] == ["scale 0.5", "scale 1", "scale 2", "scale 4"]
    assert [len(row.cells) for row in rows] == [5] * 4
    sweep_output.write_grid(rows, tmp_path)
    assert "FD-EffLite2@32" in sweep_output.score_table(result["final"][0])


def test_published_grids_and_temperatures(tmp_path: Path) -> None:
    flow = plan_for(tiny_generator(tmp_path))
    assert flow.scales == FLOW_SCALES
    assert (flow.count, flow.final_count) == (10_000, 50_000)
    with pytest.raises(ConfigError, match=r"temperature 0\.9: SiT does not use"):
        plan_for(tiny_generator(tmp_path), unguided_temperature=0.9)
    small = {"grid": (4, 4), "channels": 4, "num_classes": 10, "width": 32, "depth": 1, "heads": 2}
    generator = dataclasses.replace(
        tiny_generator(tmp_path), model=build_generator("mar-b", **small)
    )
    generator.record["config"]["generator"] = "mar-b"
    mar = plan_for(generator)
    assert mar.scales == MAR_SCALES
    assert mar.unguided.temperature == 0.95
    assert mar.unguided.guidance_scale == 1.0
    assert (mar.unguided.iterations, mar.sampling.iterations) == (16, 16)
    assert mar.sampling.temperature == 1.0


def test_what_does_not_fit_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    generator, out = tiny_generator(tmp_path), tmp_path / "sweep"
    plan = plan_for(generator, scales=SCALES, sampling=QUICK, count=24)
    fitting = tiny_reference(tmp_path / "fits.npz")
    larger = tiny_reference(tmp_path / "32.npz", size=32)
    np.savez(tmp_path / "images.npz", np.zeros((4, 16, 16, 3), np.uint8))
    images = dataclasses.replace(
        read_reference(tmp_path / "images.npz"), extractor=TinyFeatures.name
    )
    for tokenizer, reference, message in (
        (tiny_tokenizer(fingerprint="other"), fitting, "does not belong to the generator"),
        (tiny_tokenizer(), larger, "32 pixels a side"),
        (tiny_tokenizer(), images, "images but no statistics"),
    ):
        with pytest.raises(DetokError, match=message):
            sweep(plan, generator, tokenizer, TinyFeatures(), reference, out, quiet=True)
    assert not out.exists()


@pytest.mark.parametrize(
    ("count", "search", "size"),
    [
        *((10_000, "halving", 250), (10_000, "grid", 250), (40, "halving", 10)),
        *((251, "grid", 126), (10_007, "grid", 245)),  # primes
    ],
)
def test_shards_fit_the_first_rung(tmp_path: Path, count: int, search: str, size: int) -> None:
    plan = plan_for(tiny_generator(tmp_path), count=count, search=search)
    assert plan.rows_per_shard == size
    assert -plan.rungs[0] % size < 50  # samples drawn beyond the first rung


def test_bad_plans_are_named(tmp_path: Path) -> None:
    generator = tiny_generator(tmp_path)
    with pytest.raises(ConfigError, match="at least two different"):
        plan_for(generator, scales=[1.5, 1.5])
    with pytest.raises(ConfigError, match="at least two different"):
        plan_for(generator, scales=[1.5, 1.5000001])  # one folder for both
    with pytest.raises(ConfigError, match="guidance_scale"):
        plan_for(generator, scales=[-1.0, 2.0])
    with pytest.raises(ConfigError, match="choose grid or halving"):
        plan_for(generator, search="golden")
    with pytest.raises(ConfigError, match="use a grid"):
        plan_for(generator, scales=[1, 2, 3], search="halving")
    with pytest.raises(ConfigError, match="6 feature dimensions: use at least 28"):
        _run(tmp_path, search="halving", count=24)


def test_halving_agrees_with_the_grid() -> None:
    """At least 18 of 20 repetitions from one pool: the grid's scale, or within the paired error."""
    path = Path(__file__).parents[1] / "benchmarks" / "halving.py"
    benchmark = runpy.run_path(str(path))
    pool, reference = benchmark["synthetic"](dimensions=48, rows=6000)
    found = benchmark["repeat"](pool, reference, count=240, repeats=20)
    benchmark["report"]("synthetic features", found)
    assert 3.0 < np.median([repetition.grid for repetition in found]) < 4.5
    assert sum(repetition.agrees for repetition in found) >= 18
    assert max(repetition.share for repetition in found) < 0.5
