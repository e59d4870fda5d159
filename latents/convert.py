"""From one format to the other, bit by bit the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from detok_pipe.latents.atomic import write_bytes
from detok_pipe.latents.cache import open_cache, read_index
from detok_pipe.latents.errors import CacheError, ConfigError, MismatchError
from detok_pipe.latents.manifest import Manifest, read_manifest
from detok_pipe.latents.plan import StoreFormat
from detok_pipe.latents.publish import (
    SOURCES,
    clean_up,
    contents_of,
    needs_clean_up,
    publish,
    working_lock,
)
from detok_pipe.latents.verify import verify
from detok_pipe.latents.writer import CacheWriter


def convert(
    source: Path | str,
    target: Path | str,
    store_format: StoreFormat,
    *,
    rows_per_record: int | None = None,
    progress: Callable[[int], None] = lambda shard: None,
) -> Manifest:
    """Writes the cache ``source`` once more, as ``store_format``, into the folder ``target``.

    The fingerprint stays: runs may change between the two. The same call goes on with a conversion
    that was interrupted. The source's files are hashed first, lest damage be sealed anew.

    Args:
        rows_per_record: of the new store; by default as in the source.
        progress: called with each shard's number once it is on the disk.

    Raises:
        CacheError: the source is unfinished or damaged.
        MismatchError: the target holds, or was begun as, another cache.
        ConfigError: source and target are the same.
        StorageError: the disk is full or read-only.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ConfigError(f"--out is the cache itself ({source}); choose another folder")
    problems = verify(source)
    if problems:
        raise CacheError(f"{source} is damaged: {problems[0]}; run `detok-pipe verify {source}`")
    cache = open_cache(source)
    contents = contents_of(source, cache.manifest, read_index(source, cache.manifest))
    plan = replace(
        contents.plan,
        format=store_format,
        rows_per_record=rows_per_record or contents.plan.rows_per_record,
    )
    writer = CacheWriter.open(target, plan)
    if not writer.finished or needs_clean_up(target):
        with working_lock(target):
            if not writer.finished:
                if (source / SOURCES).exists():
                    write_bytes(target / SOURCES, (source / SOURCES).read_bytes())
                publish(
                    target,
                    replace(contents, plan=plan),
                    lambda view, field, first, stop: cache.rows(
                        np.arange(first, stop), view, field
                    ),
                    after_shard=progress,
                )
            clean_up(target)
    manifest = read_manifest(target)
    if manifest.fingerprint != cache.fingerprint:
        raise MismatchError(
            f"{target} holds another cache: fingerprint {manifest.fingerprint} there, "
            f"{cache.fingerprint} in {source}; choose another --out"
        )
    return manifest
