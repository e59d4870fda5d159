"""Rows held out: not trained on, and their loss is the same for any number of processes."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from generator_making import QUIET, recipe, weights, write_latents

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines import held_out
from detok_pipe.pipelines.generator_inspection import Preview
from detok_pipe.pipelines.held_out import held_out_loss
from detok_pipe.pipelines.run_directory import read_metrics
from detok_pipe.pipelines.train_generator import split_rows, train_generator
from detok_pipe.pipelines.trained import load_generator

ROWS = 50


class Process:
    """In place of an Accelerator."""

    device = torch.device("cpu")

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.process_index, self.num_processes = rank, world

    def autocast(self):
        return nullcontext()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache, and a run on all but ten of its rows."""
    folder = tmp_path_factory.mktemp("held-out")
    write_latents(folder / "cache", ROWS)
    preview = Preview(val_every=4)
    train_generator(recipe(holdout=10), folder / "cache", folder / "run", QUIET, preview=preview)
    return folder


def test_training_is_that_on_the_other_rows(folder, tmp_path):
    train_generator(recipe(limit=ROWS - 10), folder / "cache", tmp_path / "run", QUIET)
    torch.testing.assert_close(weights(folder / "run"), weights(tmp_path / "run"), rtol=0, atol=0)


def test_its_loss_is_logged(folder):
    found = {r["step"]: r["val/loss"] for r in read_metrics(folder / "run") if "val/loss" in r}
    assert list(found) == [4, 6]
    cache = open_cache(folder / "cache")
    model = load_generator(folder / "run").model
    rows = np.arange(ROWS - 10, ROWS)
    again = held_out_loss(model, cache, rows, recipe(holdout=10), Process())
    assert again == pytest.approx(found[6], rel=1e-6)


def test_processes_share_the_rows(folder, monkeypatch):
    monkeypatch.setattr(held_out, "_BATCH", 7)
    cache, model = open_cache(folder / "cache"), load_generator(folder / "run").model
    rows, shares = np.arange(ROWS), []

    def loss(*process):
        return held_out_loss(model, cache, rows, recipe("sit-b"), Process(*process))

    alone = loss()
    monkeypatch.setattr(held_out, "gather_object", lambda mine: shares.extend(mine) or shares)
    assert [loss(rank, 3) for rank in range(3)][-1] == alone
    assert sorted(number for share in shares for number in share) == list(range(8))


def test_which_rows(folder):
    cache = open_cache(folder / "cache")
    assert split_rows(cache, recipe()) == (None, None)
    rows, kept = split_rows(cache, recipe(holdout=20, limit=5))
    assert rows.tolist() == list(range(5))
    assert kept.tolist() == list(range(30, 50))
    name = cache.class_names[1]
    rows, kept = split_rows(cache, recipe(holdout=3, classes=(name,)))
    assert set(cache.labels[rows]) == set(cache.labels[kept]) == {1}
    assert len(kept) == 3
    with pytest.raises(ConfigError, match="holdout 50 leave no row"):
        split_rows(cache, recipe(holdout=50))
    with pytest.raises(ConfigError, match="holdout must not be negative"):
        recipe(holdout=-1)
