"""Which tokenizer decodes these latents: the one that was named, or one that the run tells."""

import json
from pathlib import Path
from typing import Any

import torch

from detok_pipe.latents.errors import ConfigError, DetokError
from detok_pipe.pipelines.published_tokenizers import PUBLISHED_TOKENIZERS, TokenizerChoice
from detok_pipe.pipelines.run_directory import CONFIG
from detok_pipe.pipelines.tokenizers import open_tokenizer
from detok_pipe.pipelines.trained import TrainedTokenizer, check_tokenizer_fits, load_tokenizer


def find_tokenizer(
    fingerprint: str,
    run: Path,
    named: TokenizerChoice | Path | None = None,
    *,
    device: torch.device | str = "cpu",
) -> TrainedTokenizer:
    """The tokenizer that was named; else the published one that the run's record names, or the
    run in the folder of ``run`` that fits.

    Args:
        fingerprint: of the encoder that the latents come from.
        run: a generator's run directory.
        named: a tokenizer; with weights alone, those of the published one that the record names.

    Raises:
        ConfigError: none was named and none fits.
        MismatchError: the run's record says that its latents come from another one.
        WeightsError, CheckpointError: it cannot be loaded.
    """
    record = _recorded(run)
    choice = TokenizerChoice(str(named)) if isinstance(named, Path) else named
    if choice is None or choice.name is None:
        weights = choice.weights if choice else None
        if record.get("name") in PUBLISHED_TOKENIZERS:
            choice = TokenizerChoice(record["name"], weights)
        elif weights is not None:
            raise ConfigError(
                f"--weights {weights} is not needed: the latents of {run} come from a tokenizer "
                "with a run directory; name that with --tokenizer"
            )
        else:
            return _neighbour(fingerprint, run, device)
    tokenizer = open_tokenizer(choice, device=device)
    check_tokenizer_fits(tokenizer, record, f"the latents that {run} was trained on")
    return tokenizer


def _recorded(run: Path) -> dict[str, Any]:
    """The identity of the encoder that a generator's record names; empty where it names none."""
    try:
        return dict(json.loads((run / CONFIG).read_text())["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _neighbour(fingerprint: str, run: Path, device: torch.device | str) -> TrainedTokenizer:
    """The tokenizer's run beside ``run`` whose encoder made the latents."""
    for config in sorted(run.resolve().parent.glob(f"*/{CONFIG}")):
        try:
            if json.loads(config.read_text()).get("kind") != "tokenizer":
                continue
            tokenizer = load_tokenizer(config.parent, device=device)
        except (DetokError, OSError, ValueError):
            continue  # a neighbour that is no whole run is not what is looked for
        if tokenizer.identity.get("fingerprint") == fingerprint:
            return tokenizer
    raise ConfigError(
        f"no tokenizer in {run.resolve().parent} made the latents that {run} was trained on: name "
        "its run directory with --tokenizer"
    )
