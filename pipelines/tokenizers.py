"""Any tokenizer by its name or run directory: the one way in which commands open them."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from detok_pipe.generators.state_dicts import fitted
from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines.hub_weights import find_files, read_weights
from detok_pipe.pipelines.published_tokenizers import (
    PUBLISHED_TOKENIZERS,
    PublishedTokenizer,
    TokenizerChoice,
)
from detok_pipe.pipelines.trained import TrainedTokenizer, identified, load_tokenizer, ready
from detok_pipe.tokenizer.contract import Built


def open_tokenizer(
    which: str | Path | TokenizerChoice,
    *,
    device: torch.device | str = "cpu",
    download: bool = True,
) -> TrainedTokenizer:
    """A published tokenizer, or the one that a run directory holds.

    Args:
        which: a name of the table or a run directory, with ``weights`` in a `TokenizerChoice`.
            A folder that is called like a published tokenizer is meant by ``./sd-vae``.
        download: whether weights of a published one may be downloaded.

    Raises:
        ConfigError: neither, or weights named for a run directory.
        WeightsError, CheckpointError: weights are missing, damaged or of another tokenizer.
    """
    choice = which if isinstance(which, TokenizerChoice) else TokenizerChoice(str(which))
    if choice.name is None:
        raise ConfigError("no tokenizer is named: give its name or run directory (--tokenizer)")
    if choice.name in PUBLISHED_TOKENIZERS:
        return load_published(choice.name, choice.weights, device=device, download=download)
    run = Path(choice.name)
    if not run.is_dir():
        raise ConfigError(
            f"{run} is no run directory, and no published tokenizer has this name: they are "
            f"{', '.join(PUBLISHED_TOKENIZERS)}"
        )
    if choice.weights is not None:
        raise ConfigError(
            f"--weights {choice.weights} belongs to a published tokenizer "
            f"({', '.join(PUBLISHED_TOKENIZERS)}); {run} holds its own"
        )
    return load_tokenizer(run, device=device)


def load_published(
    name: str,
    weights: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    download: bool = True,
) -> TrainedTokenizer:
    """A tokenizer of the table with its published normalisation.

    Args:
        weights, download: see `find_files`.

    Raises:
        ConfigError: diffusers is not installed, or a ``config.json`` that is not of this kind.
        WeightsError, CheckpointError: weights are missing, damaged or of another tokenizer.
    """
    published = PUBLISHED_TOKENIZERS[name]
    files = find_files(published, weights, download=download)
    with torch.random.fork_rng(devices=[]):
        built = build_published(published, files.config)
    model = built.model
    state = _module(published).translated(read_weights(files.weights))
    tensors = fitted(model, state, f"{files.weights}, read as {name},")
    model.load_state_dict(tensors)
    facts: dict[str, Any] = {
        "image_size": model.image_size[0],
        "grid": list(model.grid),
        "channels": model.channels,
        **built.encoder,
    }
    if not model.has_posterior:
        facts["posterior"] = False
    identity, decoder = identified(tensors, name=name, **facts)
    return TrainedTokenizer(
        ready(model, device), model.image_size[0], identity, decoder, files.weights, 0, built.stats
    )


def build_published(published: PublishedTokenizer, config: Path | None = None) -> Built:
    """The network of a tokenizer of the table, freshly initialised from torch's seed.

    Args:
        config: a ``config.json``, whose values take precedence over the table's.

    Raises:
        ConfigError: diffusers is not installed, or the file is not of this kind.
    """
    settings = dict(published.config)
    if config is not None:
        settings |= _read_config(config)
    try:
        return _module(published).build(settings)
    except (ConfigError, TypeError) as error:  # a value of another type than ours
        raise ConfigError(f"{config or published.repository}: {error}") from error


def _module(published: PublishedTokenizer) -> ModuleType:
    """The module that builds a tokenizer; imported at use, as diffusers takes seconds."""
    try:
        return importlib.import_module(f"detok_pipe.tokenizer.{published.module}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{published.repository} needs {error.name}: pip install 'detok-pipe[baselines]'"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no configuration but a {type(config).__name__}")
    return config
