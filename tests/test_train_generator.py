"""The generator's trainer, on latents so few that its promises can be checked bit for bit."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from generator_making import QUIET, losses, recipe, weights, write_latents
from score_making import TinyFeatures, tiny_reference, tiny_tokenizer
from training_making import Stream

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import CheckpointError, ConfigError, MismatchError, NonFiniteError
from detok_pipe.pipelines import generator_inspection
from detok_pipe.pipelines.accelerators import make_accelerator
from detok_pipe.pipelines.accumulation import largest_micro_batch
from detok_pipe.pipelines.commands_generator import train_gen
from detok_pipe.pipelines.generator_inspection import Preview
from detok_pipe.pipelines.run_directory import read_config, read_metrics
from detok_pipe.pipelines.train_generator import Beginning, describe, train_generator
from detok_pipe.pipelines.trained import load_generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache, and a finished run of six steps."""
    folder = tmp_path_factory.mktemp("generator")
    write_latents(folder / "cache")
    train_generator(recipe(), folder / "cache", folder / "run", QUIET)
    return folder


def equal(first, second):
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


def test_a_run_that_is_extended_equals_one_that_was_longer_at_once(folder, tmp_path):
    longer = recipe(duration="10 steps")
    train_generator(recipe(), folder / "cache", tmp_path / "parts", QUIET)
    train_generator(longer, folder / "cache", tmp_path / "whole", QUIET)
    with pytest.raises(MismatchError, match=r"'6 steps' there, '10 steps' now.*--extend"):
        train_generator(longer, folder / "cache", tmp_path / "parts", QUIET)
    extend = dataclasses.replace(QUIET, extend=True)
    train_generator(longer, folder / "cache", tmp_path / "parts", extend)
    equal(tmp_path / "parts", tmp_path / "whole")
    record = read_config(tmp_path / "parts")
    assert (record["steps"], record["config"]["duration"]) == (10, "10 steps")
    assert [entry["duration"] for entry in record["extended"]] == ["6 steps"]
    with pytest.raises(MismatchError, match="cannot be made shorter"):
        train_generator(recipe(), folder / "cache", tmp_path / "parts", extend)
    # Nothing else may change with the duration.
    other = dataclasses.replace(longer, duration="12 steps", lr=1e-3)
    with pytest.raises(MismatchError, match=r"lr: 0.01 there, 0.001 now"):
        train_generator(other, folder / "cache", tmp_path / "parts", extend)


@pytest.mark.parametrize("which", ["ema", "model"])
def test_a_run_begins_with_the_weights_of_another(folder, tmp_path, which):
    still = recipe(lr=1e-12, duration="1 step")
    begin = Beginning(folder / "run", which)
    train_generator(still, folder / "cache", tmp_path / "run", QUIET, begin=begin)
    torch.testing.assert_close(weights(tmp_path / "run")["model"], weights(folder / "run")[which])
    record = read_config(tmp_path / "run")
    assert record["inputs"]["begin"] == {"run": str((folder / "run").resolve()), "weights": which}
    assert record["begun with"]["step"] == 6
    with pytest.raises(MismatchError, match="begin"):
        train_generator(still, folder / "cache", tmp_path / "run", QUIET)


def test_a_network_that_no_memory_holds_is_refused(folder):
    cache = open_cache(folder / "cache")
    config = recipe("mar-b")
    config = dataclasses.replace(config, model={**config.model, "width": 10**9})
    with pytest.raises(ConfigError, match=r"--set model\.width=1000000000 .* is too large"):
        describe(config, cache)


def test_a_run_of_another_network_is_no_beginning(folder, tmp_path):
    wider = recipe(model={"width": 64, "depth": 1, "heads": 2})
    begin = Beginning(folder / "run")
    with pytest.raises(CheckpointError, match="another network"):
        train_generator(wider, folder / "cache", tmp_path / "run", QUIET, begin=begin)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes", [{"micro_batch": "auto"}, {"activation_checkpointing": True}, {"keep_best": "loss"}]
)
def test_how_a_run_is_carried_out_changes_no_bit(folder, tmp_path, changes):
    execution = dataclasses.replace(QUIET, **changes)
    train_generator(recipe(), folder / "cache", tmp_path / "run", execution)
    equal(tmp_path / "run", folder / "run")


@pytest.mark.soak  # the compiler takes half a minute
def test_compiled_blocks_give_the_same_losses(folder, tmp_path):
    execution = dataclasses.replace(QUIET, compile=True)
    train_generator(recipe(), folder / "cache", tmp_path / "run", execution)
    assert losses(tmp_path / "run") == pytest.approx(losses(folder / "run"), rel=1e-4)


def test_the_largest_micro_batch_that_fits():
    tried = []
    model = torch.nn.Linear(4, 4)

    def loss(part):
        tried.append(len(part.x))
        if len(part.x) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return model(part.x).sum()

    accelerator = make_accelerator("fp32", QUIET)
    stream = Stream(13)
    assert largest_micro_batch(accelerator, model, stream, loss) == 2
    assert tried == [13, 7, 4, 2]
    assert stream.position == 0
    assert model.weight.grad is None


def test_no_micro_batch_that_fits():
    def loss(part):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    accelerator = make_accelerator("fp32", QUIET)
    with pytest.raises(ConfigError, match="not even one row"):
        largest_micro_batch(accelerator, torch.nn.Linear(4, 4), Stream(4), loss)


def test_grids_and_scores_are_made_and_change_nothing(folder, tmp_path, monkeypatch):
    features = TinyFeatures()
    tiny_reference(tmp_path / "ref.npz")
    monkeypatch.setattr(generator_inspection, "load_extractor", lambda *a, **k: features)
    found = tiny_tokenizer(), ""
    monkeypatch.setattr(generator_inspection, "tokenizer_if_any", lambda *a, **k: found)
    preview = Preview(sample_every=4, score_every=3, reference=tmp_path / "ref.npz", count=12)
    with pytest.warns(UserWarning, match="still .* of the untrained network"):
        train_generator(recipe(), folder / "cache", tmp_path / "run", QUIET, preview=preview)
    equal(tmp_path / "run", folder / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        "step-00000004-samples.png",
        "step-00000006-samples.png",
    ]
    scored = {
        r["step"]: r[features.name] for r in read_metrics(tmp_path / "run") if features.name in r
    }
    assert list(scored) == [3, 6]


def test_the_best_checkpoint_stays(folder, tmp_path, monkeypatch):
    from detok_pipe.pipelines import train_generator as module
    from detok_pipe.pipelines.checkpoints import checkpoint_paths
    from detok_pipe.pipelines.inspection import Inspection

    def distance(step):
        return {"FD-EffLite2@128": abs(step - 3.0)}

    monkeypatch.setattr(module, "inspections", lambda *a, **k: [Inspection(1, distance)])
    execution = dataclasses.replace(
        QUIET, checkpoint_every=1, keep_checkpoints=1, keep_every=2, keep_best="score"
    )
    preview = Preview(score_every=1, reference=tmp_path / "ref.npz")
    train_generator(recipe(), folder / "cache", tmp_path / "run", execution, preview=preview)
    kept = [int(path.name[-1]) for path in checkpoint_paths(tmp_path / "run")]
    assert kept == [2, 3, 4, 6]


def test_scores_come_from_the_network_of_the_command_s_default():
    (command,) = (p.default for p in train_gen.params if p.name == "features")
    assert Preview().features == command


def test_a_score_without_a_reference_is_refused():
    with pytest.raises(ConfigError, match="--score-ref"):
        Preview(score_every=10)
    with pytest.raises(ConfigError, match=r"--score-ref ref\.npz .*--score-every"):
        Preview(reference=Path("ref.npz"))


def test_the_best_by_score_needs_scores_of_checkpoints(folder, tmp_path):
    scored = Preview(score_every=6, reference=tmp_path / "ref.npz")
    best = dataclasses.replace(QUIET, keep_best="score")
    for preview, words in (
        (None, "--keep-best score needs scores.*--score-every"),
        (scored, "--score-every 6 is no multiple of --checkpoint-every 4"),
    ):
        with pytest.raises(ConfigError, match=words):
            train_generator(recipe(), folder / "cache", tmp_path / "run", best, preview=preview)
    assert not (tmp_path / "run").exists()
    scored.check_keep_best(dataclasses.replace(best, checkpoint_every=3))


def test_scores_need_a_tokenizer_and_grids_alone_do_without(folder, tmp_path):
    tiny_reference(tmp_path / "ref.npz")
    scored = Preview(score_every=3, reference=tmp_path / "ref.npz")
    with pytest.raises(ConfigError, match="--tokenizer"):
        train_generator(recipe(), folder / "cache", tmp_path / "run", QUIET, preview=scored)
    assert not (tmp_path / "run").exists()
    drawn = Preview(sample_every=3)
    train_generator(recipe(), folder / "cache", tmp_path / "run", QUIET, preview=drawn)
    assert not (tmp_path / "run" / "samples").exists()


def test_a_loss_that_is_not_finite_names_rows_of_the_cache(folder, tmp_path):
    with pytest.raises(NonFiniteError, match=r"step \d.*stream positions .*: rows .* of the cache"):
        train_generator(recipe(lr=1e30, clip=None), folder / "cache", tmp_path / "run", QUIET)


def test_sharding_is_refused_where_there_is_nothing_to_shard_over(folder, tmp_path):
    execution = dataclasses.replace(QUIET, fsdp=True)
    with pytest.raises(ConfigError, match=r"--fsdp.*1 process on cpu"):
        train_generator(recipe(), folder / "cache", tmp_path / "run", execution)


def test_a_checkpoint_can_be_loaded_by_itself(folder):
    found = load_generator(folder / "run" / "checkpoints" / "step-00000004", ema=False)
    assert found.identity["step"] == 4
    assert found.stats.to_json() == load_generator(folder / "run", ema=False).stats.to_json()
    assert found.identity["tokenizer"] == tiny_tokenizer().identity["fingerprint"]


@pytest.mark.parametrize(("name", "words"), [("wandb", "not installed"), ("wandbb", "wandbb")])
def test_a_tracker_that_is_not_there_is_an_error(folder, tmp_path, name, words):
    execution = dataclasses.replace(QUIET, trackers=(name,))
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=words):
        train_generator(recipe(), folder / "cache", tmp_path / "run", execution)


def test_the_record_carries_statistics_and_the_tokenizers_fingerprint(folder):
    record = json.loads((folder / "run" / "config.json").read_text())
    assert record["inputs"]["tokenizer"] == tiny_tokenizer().identity["fingerprint"]
    assert len(record["latents"]["stats"]["mean"]) == 4
