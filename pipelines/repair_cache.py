"""Mending a damaged cache from its images: the tokenizer's part of ``latents/repair.py``."""

from pathlib import Path

import torch

from detok_pipe.latents.repair import repair
from detok_pipe.latents.verify import Problem
from detok_pipe.latents.writer import CacheWriter
from detok_pipe.pipelines.encode import Encoder, check_made_from, encode_shards
from detok_pipe.pipelines.images import ImageSource


def repair_cache(
    cache: Path,
    tokenizer: Encoder,
    source: ImageSource,
    *,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> list[Problem]:
    """Mend what ``verify`` finds in ``cache``, encoding damaged shards again.

    Returns:
        What is still wrong afterwards; nothing, as a rule.

    Raises:
        MismatchError: tokenizer or images are not those of the cache; names the field.
        CacheError: the cache cannot be mended; says why.
    """

    def encode_again(writer: CacheWriter, shards: list[int]) -> None:
        check_made_from(writer.plan, tokenizer, source, cache)
        encode_shards(tokenizer, source, writer, shards, device=device, quiet=quiet)

    return repair(cache, encode_again)
