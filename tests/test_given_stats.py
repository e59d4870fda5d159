"""``encode --stats FILE``: the statistics of a manifest, of safetensors, of a released pickle."""

import pickle

import numpy as np
import pytest
import torch
from cache_making import CHANNELS, plan_of, write_cache
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import CacheError, CheckpointError, ConfigError
from detok_pipe.pipelines.given_stats import read_stats

MEAN = np.array([0.5, -1.0, 2.0, 30.0])
STD = np.array([1.0, 0.1, 4.0, 7.0])


def test_of_a_cache(tmp_path):
    write_cache(tmp_path / "c", plan_of())
    recorded = open_cache(tmp_path / "c").stats
    for path in (tmp_path / "c", tmp_path / "c" / "manifest.json"):
        stats = read_stats(path, CHANNELS)
        assert stats.same_transform(recorded)
        assert stats.source == "given"
    # A cache that is normalised with them records them as they are.
    write_cache(tmp_path / "d", plan_of(12, stats=stats))
    assert open_cache(tmp_path / "d").stats == stats


@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1)])
def test_of_safetensors(tmp_path, shape):
    save_file({"mean": MEAN.reshape(shape), "std": STD.reshape(shape)}, tmp_path / "s.safetensors")
    stats = read_stats(tmp_path / "s.safetensors", 4)
    np.testing.assert_array_equal([stats.mean, stats.std], [MEAN, STD])


def test_of_safetensors_in_bfloat16(tmp_path):
    tensors = {"mean": torch.from_numpy(MEAN).bfloat16(), "std": torch.from_numpy(STD).bfloat16()}
    save_torch_file(tensors, tmp_path / "s.safetensors")
    stats = read_stats(tmp_path / "s.safetensors", 4)
    np.testing.assert_array_equal(stats.mean, MEAN)  # each exact in bfloat16
    np.testing.assert_allclose(stats.std, STD, rtol=2**-8)


def test_of_a_released_pickle(tmp_path):
    both = np.concatenate([MEAN, np.zeros(4)]), np.concatenate([STD, np.ones(4)])
    (tmp_path / "stats.pkl").write_bytes(pickle.dumps({"detok": {"channel": both}}))
    stats = read_stats(tmp_path / "stats.pkl", 4)
    np.testing.assert_array_equal([stats.mean, stats.std], [MEAN, STD])
    assert stats.source == "published"


class Bomb:
    def __reduce__(self):
        return print, ("exploded",)


def test_what_is_refused(tmp_path, capsys):
    save_file({"mean": MEAN}, tmp_path / "half.safetensors")
    save_file({"mean": MEAN, "std": STD}, tmp_path / "s.safetensors")
    save_file({"mean": MEAN, "std": -STD}, tmp_path / "negative.safetensors")
    save_file({"mean": MEAN * np.nan, "std": STD}, tmp_path / "nan.safetensors")
    save_file({"mean": MEAN, "std": STD[:3]}, tmp_path / "mixed.safetensors")
    zero = {"detok": {"channel": (MEAN, STD * 0)}}
    (tmp_path / "zero.pkl").write_bytes(pickle.dumps(zero))
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.txt").write_text("1 2")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    for name, channels, error, message in (
        ("gone.json", 4, ConfigError, "there are no statistics at"),
        ("x.json", 4, CacheError, "format version"),
        ("x.txt", 4, ConfigError, "of no known kind"),
        ("x.safetensors", 4, ConfigError, "no tensors mean and std"),
        ("half.safetensors", 4, ConfigError, "no tensors mean and std"),
        ("negative.safetensors", 4, ConfigError, "negative.safetensors: .* must be positive"),
        ("nan.safetensors", 4, ConfigError, "nan.safetensors: .* not finite"),
        ("mixed.safetensors", 4, ConfigError, "mixed.safetensors: .* shapes"),
        ("zero.pkl", 4, ConfigError, "zero.pkl: .* must be positive"),
        ("s.safetensors", 8, ConfigError, "has 4 channels, the latents 8"),
        ("bomb.pkl", 4, CheckpointError, "could run code"),
    ):
        with pytest.raises(error, match=message):
            read_stats(tmp_path / name, channels)
    assert "exploded" not in capsys.readouterr().out
