"""Statistics to normalise latents with: those of ``--stats``."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from detok_pipe.generators.stats_import import read_channel_stats
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.manifest import MANIFEST, read_manifest
from detok_pipe.latents.stats import LatentStats, Source

StatsChoice = LatentStats | Literal["published", "dataset"]
"""Statistics, or the words for those published with a tokenizer and those of the whole set."""

_FORMS = (
    "a cache or its manifest.json, a .safetensors file with the tensors mean and std, or a "
    "released stats.pkl"
)


def read_stats(path: Path, channels: int) -> LatentStats:
    """The statistics that a file holds.

    Args:
        path: a cache's folder or manifest, safetensors with ``mean`` and ``std`` of any shape
            with ``channels`` values, or a released tokenizer's ``stats.pkl`` (whose code is not
            run).
        channels: of the latents.

    Raises:
        ConfigError: no such file, of another kind, of other channels, or with values that are not
            finite, not positive or of different shapes.
        CacheError: the manifest is damaged. CheckpointError: the pickle is.
    """
    if path.is_dir():
        path = path / MANIFEST
    if not path.is_file():
        raise ConfigError(f"there are no statistics at {path}; --stats takes {_FORMS}")
    if path.suffix == ".json":
        stats = replace(read_manifest(path.parent, path.name).latent_stats, source="given")
    elif path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
            mean, std = (tensors[name].double().reshape(-1).numpy() for name in ("mean", "std"))
        except (SafetensorError, KeyError, OSError) as error:
            raise ConfigError(f"{path} holds no tensors mean and std: {error}") from error
        stats = _checked(path, mean, std, "given")
    elif path.suffix in (".pkl", ".pickle"):
        mean, std = read_channel_stats(path, channels)
        stats = _checked(path, mean, std, "published")
    else:
        raise ConfigError(f"{path} is of no known kind; --stats takes {_FORMS}")
    if stats.channels != channels:
        raise ConfigError(f"{path} has {stats.channels} channels, the latents {channels}")
    return stats


def _checked(path: Path, mean: np.ndarray, std: np.ndarray, source: Source) -> LatentStats:
    try:
        return LatentStats(mean, std, source=source)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; name another file with --stats") from error


def chosen_stats(
    choice: StatsChoice | None, published: LatentStats | None, tokenizer: str
) -> LatentStats | None:
    """What a choice means for a tokenizer; None: the statistics of the whole set.

    Args:
        choice: None: the published ones where there are any, else the set's.
        published: those published with the tokenizer, if any are.
        tokenizer: its name, for the message.

    Raises:
        ConfigError: the published ones are wanted, and there are none.
    """
    if choice == "published" and published is None:
        raise ConfigError(
            f"no normalisation is published with {tokenizer}; use the set's own statistics "
            "(dataset) or a file of them"
        )
    if choice is None or choice == "published":
        return published
    return None if choice == "dataset" else choice
