"""A sample store at a glance: a grid of its first samples."""

from pathlib import Path

import numpy as np
from PIL import Image

from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.pipelines import pictures
from detok_pipe.pipelines.pictures import ImageRow
from detok_pipe.pipelines.sample import labels_of
from detok_pipe.pipelines.stored_features import decode_latents
from detok_pipe.pipelines.trained import TrainedTokenizer

PREVIEW = "preview.png"
_ROWS, _COLUMNS, _SIDE = 8, 8, 128


def preview_grid(store: SampleStore, tokenizer: TrainedTokenizer) -> Image.Image:
    """Decode the store's first samples, at most 64, into a grid.

    Few classes make a row each; many stand in the order of the samples.

    Raises:
        CacheError: a shard is missing or damaged.
    """
    count = min(store.count, _ROWS * _COLUMNS)
    images = pictures.to_images(decode_latents(tokenizer, store.stats, store.read(0, count)))
    labels = labels_of(np.arange(count) + store.identity["first"], store.identity["classes"])
    if len(np.unique(labels)) <= _ROWS:
        names = store.extra["class_names"]
        rows = pictures.class_rows(images, labels.tolist(), names, per_class=_COLUMNS)
    else:
        rows = [
            ImageRow(
                f"from {store.identity['first'] + start}",
                [(image,) for image in images[start : start + _COLUMNS]],
            )
            for start in range(0, count, _COLUMNS)
        ]
    return pictures.labelled_grid(rows, side=_SIDE)


def write_preview(store: SampleStore, tokenizer: TrainedTokenizer) -> Path:
    """Write the grid of the store's first samples to ``preview.png`` in its folder.

    Raises:
        CacheError: a shard is missing or damaged.
        StorageError: the disk is full or read-only.
    """
    return pictures.save(store.path / PREVIEW, preview_grid(store, tokenizer))
