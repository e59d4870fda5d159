"""State dicts of files that others made: read without running their code, fitted to a network.

PyTorch files are read with ``weights_only=True``: only tensors, plain containers, and the
``argparse.Namespace`` of training options.
"""

import argparse
import errno
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detok_pipe.latents.errors import CheckpointError

_LISTED = 12  # keys named in an error; the rest are counted


def unpickled(path: Path) -> Any:
    """Tensors, plain containers and ``argparse.Namespace`` of a PyTorch file; no code in it runs.

    Raises:
        CheckpointError: it cannot be read, is cut short, or holds other objects.
    """
    damaged = f"{path} is cut short or no PyTorch checkpoint; download it again"
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            forbidden = re.search(r"unsupported global:? (?:GLOBAL )?(\S+)", str(error), re.I)
            if forbidden is None:
                raise CheckpointError(damaged) from error
            raise CheckpointError(
                f"{path} wants to load {forbidden[1]}, which a checkpoint of weights does not "
                "need and which could run code; it was not loaded"
            ) from error
        except (RuntimeError, EOFError, ValueError, LookupError) as error:
            raise CheckpointError(damaged) from error
        except OSError as error:
            # A zip archive without its end makes PyTorch seek to a place that does not exist.
            if error.errno == errno.EINVAL:
                raise CheckpointError(damaged) from error
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def state_dict_of(path: Path, name: str, value: Any) -> dict[str, Tensor]:
    """A state dict, ``name`` in ``path``, checked to be one.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(f"{path}: {name} is no state dict but a {type(value).__name__}")
    others = [key for key, entry in value.items() if not isinstance(entry, Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: {name} is no state dict; these entries are no tensors: {_listed(others)}"
        )
    return {str(key): entry for key, entry in value.items()}


def _listed(keys: Sequence[Any]) -> str:
    names = ", ".join(str(key) for key in keys[:_LISTED])
    return names + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")


def fitted(
    module: nn.Module, state: Mapping[str, Tensor], source: str, *, spare: Mapping[str, Tensor] = {}
) -> dict[str, Tensor]:
    """A complete state dict for ``module`` from a released one; ``module`` stays as it is.

    Buffers that ``state`` lacks come from ``spare`` (the checkpoint's other state dict), else
    they keep their computed values.

    Raises:
        CheckpointError: parameters are missing, unknown, or of another shape; they are named.
    """
    own = module.state_dict()
    buffers = {name for name, _ in module.named_buffers()}
    missing = [key for key in own if key not in state and key not in buffers]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults = [
        f"{kind} {_listed(keys)}"
        for kind, keys in (
            ("missing keys:", missing),
            ("unexpected keys:", unexpected),
            ("other shapes:", reshaped),
        )
        if keys
    ]
    if faults:
        raise CheckpointError(f"{source} is of another model; {'; '.join(faults)}")
    complete = {key: state.get(key, spare.get(key, value)) for key, value in own.items()}
    return {key: value.to(own[key].dtype).contiguous() for key, value in complete.items()}
