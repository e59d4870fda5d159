"""The tokenizer's stats.pkl: every honest form is read, no hostile one runs."""

import collections
import io
import os
import pickle

import numpy as np
import pytest
import torch

from detok_pipe.generators.stats_import import read_channel_stats
from detok_pipe.latents.errors import CheckpointError

MEAN, STD = np.linspace(-1, 1, 8), np.linspace(1, 2, 8)


class Runs:
    """Unpickled, it makes a folder: what a hostile file would do."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Reduces:
    """Pickled as a call of any function with any arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def written(tmp_path, content, protocol=None):
    path = tmp_path / "stats.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


FORMS = {
    "float64 arrays": lambda x: x,
    "float32 arrays": np.float32,
    "fortran arrays": lambda x: np.asfortranarray(np.stack([x]).T),
    "tensors": torch.tensor,
    "float32 tensors": lambda x: torch.tensor(x, dtype=torch.float32),
    "parameters": lambda x: torch.nn.Parameter(torch.tensor(x)),
    "numpy scalars": list,
    "numbers": lambda x: x.tolist(),
    "shaped (1, C, 1, 1)": lambda x: torch.tensor(x).view(1, -1, 1, 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_honest_forms(tmp_path, form, protocol):
    pair = FORMS[form](MEAN), FORMS[form](STD)
    content = {"detok": {"channel": pair, "single": (0.0, np.float64(1.0))}}
    path = written(tmp_path, content, protocol)
    mean, std = read_channel_stats(path, 4)
    assert mean.dtype == std.dtype == np.float64
    np.testing.assert_allclose(mean, MEAN[:4], rtol=1e-6)
    np.testing.assert_allclose(std, STD[:4], rtol=1e-6)


def test_names_of_numpy_1(tmp_path):
    """What numpy before version 2 wrote: its modules were numpy.core."""
    data = pickle.dumps({"a": {"channel": (MEAN, STD)}}, protocol=2)
    path = tmp_path / "stats.pkl"
    path.write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    np.testing.assert_array_equal(read_channel_stats(path, 8)[0], MEAN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list"),
        ({"a": {}, "b": {}}, r"2 entries \(a, b\); write .*safetensors"),
        ({"a": {"single": (0, 1)}}, "no pair"),
        ({"a": {"channel": MEAN}}, "no pair"),
        ({"a": {"channel": (MEAN[:3], STD)}}, "3 means and 8 stds, the latents 4"),
    ],
)
def test_other_contents(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_channel_stats(written(tmp_path, content), 4)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_channel_stats(tmp_path / "none.pkl", 4)
    path = written(tmp_path, {"a": {"channel": (torch.tensor(MEAN), STD)}})
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"stats\.pkl is cut short"):
            read_channel_stats(path, 4)


def hostile(target):
    """Ways to run code: directly, or through each name that the reader does allow."""
    trap = Runs(target)
    inner = io.BytesIO()
    torch.save({"x": trap}, inner)
    old = io.BytesIO()
    torch.save(trap, old, _use_new_zipfile_serialization=False)
    return {
        "a call": trap,
        "in an ordered dict": collections.OrderedDict(a=trap),
        "in an object array": np.array([trap], dtype=object),
        "in a tensor's bytes": Reduces(torch.storage._load_from_bytes, inner.getvalue()),
        "in old tensor bytes": Reduces(torch.storage._load_from_bytes, old.getvalue()),
        "in plain bytes": Reduces(torch.storage._load_from_bytes, pickle.dumps(trap)),
        "eval": Reduces(eval, f"__import__('os').mkdir({str(target)!r})"),
        "getattr": Reduces(getattr, np.ndarray, "tofile"),
        "another torch loader": Reduces(torch.load, str(target)),
        "another codec": Reduces(__import__("_codecs").encode, "x", "unicode_escape"),
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("way", hostile("ran"))
def test_hostile_statistics_run_nothing(tmp_path, way):
    target = tmp_path / "ran"
    content = {"a": {"channel": (hostile(target)[way], STD)}}
    with pytest.raises(CheckpointError, match=r"stats\.pkl"):
        read_channel_stats(written(tmp_path, content), 4)
    assert not target.exists()


def test_the_traps_are_real(tmp_path):
    """The same bytes, read by plain pickle, do run: so the tests above prove something."""
    for number, way in enumerate(("a call", "in an object array", "in old tensor bytes", "eval")):
        target = tmp_path / f"ran{number}"
        pickle.loads(pickle.dumps(hostile(target)[way]))
        assert target.exists(), way
