"""The table and the picture of many runs."""

import json

import pytest
from generator_making import QUIET, recipe, write_latents
from PIL import Image

from detok_pipe.latents.errors import InputError
from detok_pipe.pipelines.cli import main
from detok_pipe.pipelines.run_directory import open_run
from detok_pipe.pipelines.runs import find_runs
from detok_pipe.pipelines.train_generator import train_generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_latents(folder / "cache")
    for name in ("mar-b", "sit-b"):
        train_generator(recipe(name), folder / "cache", folder / "all" / name, QUIET)
    with (folder / "all" / "sit-b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "FID": 7.5}\n{"step": 6, "FID": 8.5}\n')
    final = [{"metrics": {"FID": {"value": 3.25, "error": 0.1}}}]
    (folder / "all" / "mar-b" / "sweep").mkdir()
    (folder / "all" / "mar-b" / "sweep" / "sweep.json").write_text(json.dumps({"final": final}))
    (folder / "all" / "mar-b" / "sweep-step-00000002").mkdir()
    (folder / "all" / "mar-b" / "sweep-step-00000002" / "sweep.json").write_text("[]")
    (folder / "all" / "notes").mkdir()
    (folder / "all" / "notes" / "config.json").write_text("{}")
    return folder


def test_each_run_is_a_line(folder):
    mar, sit = find_runs(folder / "all")
    assert (mar.name, sit.name) == ("mar-b", "sit-b")
    assert mar.model.startswith("mar-b 0.")
    assert mar.made_from == sit.made_from
    assert (mar.step, mar.steps) == (6, 6)
    assert mar.loss is not None
    assert (mar.score, sit.score) == (("FID", 3.25), ("FID", 7.5))


@pytest.mark.parametrize(
    ("metrics", "best"),
    [
        ([{"FID": 9.0}, {"FID": 8.0}, {"FD-EffLite2@128": 2.0}], ("FID", 8.0)),
        ([{"FD-EffLite2@260": 1.0}, {"FD-EffLite2@128": 2.0}], ("FD-EffLite2@128", 2.0)),
        ([{"val/rFD-EffLite2@128": 1.0}, {"val/rFID": 3.0}], ("val/rFID", 3.0)),
        ([{"loss": 1.0}], None),
    ],
)
def test_scores_of_different_networks_are_not_compared(tmp_path, metrics, best):
    run = tmp_path / "run"
    with open_run(run, kind="tokenizer", config={}, inputs={}, keep=1) as opened:
        for step, values in enumerate(metrics):
            opened.log(step, values)
    assert find_runs(run)[0].score == best


def test_one_run_is_found_by_its_own_folder(folder):
    assert [run.name for run in find_runs(folder / "all" / "sit-b")] == ["sit-b"]


def test_a_folder_without_runs_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        find_runs(tmp_path)


def test_the_command_prints_the_table_and_draws_the_curves(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["runs", str(folder / "all"), "--plot", str(tmp_path / "losses.png")])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "best score" in out
    assert "FID 7.5" in out
    assert Image.open(tmp_path / "losses.png").width > 300
