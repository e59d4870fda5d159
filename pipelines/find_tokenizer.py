"""Which tokenizer decodes these latents: the one that was named, or one found beside the run."""

import json
from pathlib import Path

import torch

from detok_pipe.latents.errors import ConfigError, DetokError
from detok_pipe.pipelines.run_directory import CONFIG
from detok_pipe.pipelines.trained import TrainedTokenizer, load_tokenizer


def find_tokenizer(
    fingerprint: str, run: Path, named: Path | None = None, *, device: torch.device | str = "cpu"
) -> TrainedTokenizer:
    """The tokenizer run that was named, else the one in the folder of ``run`` that fits.

    Args:
        fingerprint: of the encoder that the latents come from.
        run: a generator's run directory.
        named: a tokenizer's run directory; whether it fits is checked where it is used.

    Raises:
        ConfigError: none was named and none fits.
        CheckpointError: the named one cannot be loaded.
    """
    if named is not None:
        return load_tokenizer(named, device=device)
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
