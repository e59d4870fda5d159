"""The released tokenizer's latent statistics, a plain pickle, read without running its code.

Pickle can call anything that it can name, so `_StatsUnpickler` knows the few names that rebuild
tensors, numpy arrays and plain containers, and refuses every other.
"""

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detok_pipe.latents.errors import CheckpointError


def read_channel_stats(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std (C,) float64 of a released tokenizer's ``stats.pkl``; no code in it runs.

    Its form is {key: {"channel": (mean, std), ...}} with one key, over the 2C moments; the first
    C are those of the means.

    Raises:
        CheckpointError: no such file, cut short, of another form, or it holds other objects.
    """
    try:
        with path.open("rb") as file:
            content = _StatsUnpickler(file).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except _Forbidden as error:
        raise CheckpointError(
            f"{path} wants to load {error}, which latent statistics do not need and which could "
            "run code; it was not loaded"
        ) from error
    except Exception as error:  # what a cut or foreign pickle raises is not bounded
        raise CheckpointError(
            f"{path} is cut short or no file of statistics; get it again ({error})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of statistics")
    if len(content) != 1:
        raise CheckpointError(
            f"{path} should hold the statistics of one tokenizer and holds {len(content)} entries "
            f"({', '.join(map(str, content))}); write the mean and std of one of them to a "
            ".safetensors file"
        )
    (entry,) = content.values()
    try:
        mean, std = (
            torch.as_tensor(part).detach().double().reshape(-1).numpy() for part in entry["channel"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path}: no pair (mean, std) under "channel"') from error
    if min(len(mean), len(std)) < channels:
        raise CheckpointError(
            f"{path} has {len(mean)} means and {len(std)} stds, the latents {channels} channels"
        )
    return mean[:channels], std[:channels]


class _Forbidden(pickle.UnpicklingError):
    """The name of something that a pickle of statistics may not load."""


def _storage(content: bytes) -> Any:
    """A tensor's storage in a plain pickle. torch's own function would unpickle it freely."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Forbidden("an object inside a tensor") from error


def _bytes(text: str, encoding: str) -> bytes:
    """Arrays in pickles of protocol 2 and below carry their bytes as latin-1 text."""
    if encoding != "latin1":
        raise _Forbidden(f"text in the encoding {encoding}")
    return text.encode("latin1")


def _array(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """An array in pickles of protocol 5."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _allowed() -> dict[tuple[str, str], Any]:
    # numpy's own functions, under whatever module name this numpy gives them.
    rebuild = np.empty(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    allowed: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("torch.storage", "_load_from_bytes"): _storage,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _bytes,
    }
    for package in ("numpy.core", "numpy._core"):  # the name before numpy 2, and since
        allowed[f"{package}.multiarray", "_reconstruct"] = rebuild
        allowed[f"{package}.multiarray", "scalar"] = scalar
        allowed[f"{package}.numeric", "_frombuffer"] = _array
    return allowed


class _StatsUnpickler(pickle.Unpickler):
    """Refuses to load anything but what rebuilds tensors and arrays."""

    def find_class(self, module: str, name: str) -> Any:
        found = _allowed().get((module, name))
        if found is None:
            raise _Forbidden(f"{module}.{name}")
        return found
