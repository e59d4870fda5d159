"""Which tokenizer decodes these latents: the one that was named, or one that can be found."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from detok_pipe.latents.errors import ConfigError, DetokError, MismatchError
from detok_pipe.pipelines.published_tokenizers import PUBLISHED_TOKENIZERS, TokenizerChoice
from detok_pipe.pipelines.run_directory import CONFIG
from detok_pipe.pipelines.tokenizers import open_tokenizer
from detok_pipe.pipelines.trained import TrainedTokenizer, check_tokenizer_fits, load_tokenizer


def run_of(path: Path) -> Path:
    """The run directory that a checkpoint's folder lies in; any other path is returned as it is."""
    whole = path.resolve()
    # Not by its record: a sample store goes on naming a checkpoint that has been removed.
    return whole.parent.parent if whole.match("checkpoints/step-????????") else path


def find_tokenizer(
    encoder: Mapping[str, Any],
    *beside: Path,
    named: TokenizerChoice | Path | None = None,
    device: torch.device | str = "cpu",
    download: bool = True,
) -> TrainedTokenizer:
    """The tokenizer that was named; else the published one that made the latents, or the run of
    one that did.

    Args:
        encoder: identity of the encoder that the latents come from; its "fingerprint" at least,
            the rest is then read from the records of ``beside``.
        beside: run directories, checkpoints of some, or a cache; tokenizers' runs are looked for
            in the folders that hold the runs and the cache.
        named: a tokenizer; with weights alone, those of the published one that made the latents.
        download: whether weights of a published one may be downloaded.

    Raises:
        ConfigError: none was named and none fits.
        MismatchError: the named one did not make the latents.
        WeightsError, CheckpointError: it cannot be loaded.
    """
    encoder = _whole(encoder, beside)
    choice = TokenizerChoice(str(named)) if isinstance(named, Path) else named
    if choice is None or choice.name is None:
        weights = choice.weights if choice else None
        if encoder.get("name") in PUBLISHED_TOKENIZERS:
            choice = TokenizerChoice(encoder["name"], weights)
        elif weights is None:
            return _neighbour(encoder, beside, device)
        else:
            raise ConfigError(
                f"--weights {weights} belongs to a published tokenizer "
                f"({', '.join(PUBLISHED_TOKENIZERS)}), and {beside[0]} does not say that one of "
                "them made its latents; name the tokenizer with --tokenizer"
            )
    tokenizer = open_tokenizer(choice, device=device, download=download)
    try:
        check_tokenizer_fits(tokenizer, encoder, f"the latents of {beside[0]}")
    except MismatchError as error:
        if choice.name not in PUBLISHED_TOKENIZERS or choice.weights is not None:
            raise
        raise MismatchError(
            f"{error}; if they were made with weights from elsewhere, name these with --weights"
        ) from error
    return tokenizer


def tokenizer_if_any(
    encoder: Mapping[str, Any],
    *beside: Path,
    named: TokenizerChoice | Path | None = None,
    wanted: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[TrainedTokenizer | None, str]:
    """`find_tokenizer` for pictures that nobody asked for: nothing is downloaded for them.

    Args:
        wanted: it was asked for all the same, as it is where one was named.

    Returns:
        The tokenizer and "", or None and why there is none.

    Raises:
        DetokError: as `find_tokenizer`, where it was asked for.
    """
    if wanted or named is not None:
        return find_tokenizer(encoder, *beside, named=named, device=device), ""
    try:
        return find_tokenizer(encoder, *beside, device=device, download=False), ""
    except DetokError as error:
        return None, str(error)


def _whole(encoder: Mapping[str, Any], beside: tuple[Path, ...]) -> dict[str, Any]:
    """``encoder``, or the same one as a generator's record describes it."""
    for run in dict.fromkeys(path for each in beside for path in (each, run_of(each))):
        try:
            record = json.loads((run / CONFIG).read_bytes())["tokenizer"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if record.get("fingerprint") == encoder["fingerprint"]:
            return dict(record)
    return dict(encoder)


def _neighbour(
    encoder: Mapping[str, Any], beside: tuple[Path, ...], device: torch.device | str
) -> TrainedTokenizer:
    """A tokenizer's run in the folders that hold ``beside``, whose encoder made the latents."""
    folders = list(dict.fromkeys(run_of(path).resolve().parent for path in beside))
    for config in (config for folder in folders for config in sorted(folder.glob(f"*/{CONFIG}"))):
        try:
            if json.loads(config.read_bytes()).get("kind") != "tokenizer":
                continue
            tokenizer = load_tokenizer(config.parent, device=device)
        except (DetokError, OSError, ValueError):
            continue  # a neighbour that is no whole run is not what is looked for
        if tokenizer.identity.get("fingerprint") == encoder["fingerprint"]:
            return tokenizer
    raise ConfigError(
        f"no tokenizer in {' or '.join(map(str, folders))} made the latents of {beside[0]}: name "
        "it, or its run directory, with --tokenizer"
    )
