"""Small caches for tests: moments that depend on the source number alone, and are quick to make."""

import numpy as np

from detok_pipe.latents.plan import CachePlan
from detok_pipe.latents.writer import CacheWriter

GRID = (2, 3)
CHANNELS = 4
TOKENS = 6


def moments_of(source_ids, view):
    """(mean, std) of images, (R, N, C) fp32."""
    mean = np.empty((len(source_ids), TOKENS, CHANNELS), np.float32)
    std = np.empty_like(mean)
    for row, i in enumerate(source_ids):
        rng = np.random.default_rng([int(i), 0 if view == "image" else 1])
        mean[row] = rng.standard_normal((TOKENS, CHANNELS)) * [0.3, 5.0, 1.0, 20.0] + [0, 3, -9, 50]
        std[row] = rng.uniform(0.01, 0.5, (TOKENS, CHANNELS))
    return mean, std


def plan_of(count=37, **changes):
    settings = {
        "count": count,
        "rows_per_shard": 8,
        "rows_per_record": 4,
        "grid": GRID,
        "channels": CHANNELS,
        "encoder": {"fingerprint": "e" * 64},
        "preprocessing": {"crop": "adm", "size": 256},
        "sources": {"hash": "s" * 64, "count": count},
        "class_names": ("cat", "dog", "bird"),
        "seed": 1,
    }
    return CachePlan(**(settings | changes))


def label_of(source_ids):
    return (np.asarray(source_ids) % 4 - 1).astype(np.int32)


def encode_shard(writer, shard, bad=()):
    """What the encoder gives for a shard: the arguments of ``commit`` behind the shard number."""
    rows = writer.rows(shard)
    # Such a line separator in a name ends no line of quarantine.jsonl.
    lost = [(int(i), f"dir/{i}\u2028\x85.png", "cut short") for i in rows if int(i) in bad]
    good = np.array([i for i in rows if int(i) not in bad], np.int64)
    moments = {view: moments_of(good, view) for view in writer.plan.views}
    return moments, label_of(good), good, lost


def write_cache(path, plan=None, bad=(), world=1, finalize=True):
    writer = CacheWriter.open(path, plan or plan_of())
    for rank in range(world):
        for shard in writer.pending(rank, world):
            writer.commit(shard, *encode_shard(writer, shard, bad))
    if finalize:
        writer.finalize()
    return writer


def write_as(path, store_format, world=1):
    """A cache of 37 images, 4 of them bad: for processes that are started, and killed."""
    write_cache(path, plan_of(format=store_format), bad=(3, 11, 12, 36), world=world)


def tree(path):
    """Every file below a folder with its bytes."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
