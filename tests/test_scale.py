"""1.28 million rows, in sparse files: memory and time to open do not grow with the rows."""

import re
from pathlib import Path

import numpy as np
import pytest
from sparse_cache import COUNT, write_sparse_cache

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.loader import LatentLoader
from detok_pipe.latents.order import BLOCK_ROWS, LANES, WINDOW_BLOCKS
from detok_pipe.latents.plan import CachePlan
from detok_pipe.latents.writer import CacheWriter


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse")
    write_sparse_cache(path)
    return path


def test_opens(sparse):
    """How long it takes is measured in benchmarks/cache.py."""
    cache = open_cache(sparse)
    assert cache.num_rows == COUNT
    assert cache.num_classes == 1000


@pytest.mark.parametrize("world", [16, 64])
def test_block_mode_shares_a_global_batch_among_many_processes(sparse, world):
    """Over the end of a window, in which each lane's rows are shuffled."""
    cache = open_cache(sparse)
    begin = WINDOW_BLOCKS * BLOCK_ROWS * LANES - 2 * 256

    def rows(rank, world):
        settings = {"rank": rank, "world": world, "views": ("image",), "mode": "block"}
        loader = LatentLoader(
            cache, 256, 0, position=begin, sample_posterior=False, prefetch=1, **settings
        )
        stream = loader.host_batches()
        found = [next(stream).numbers[1:].tolist() for _ in range(4)]
        stream.close()
        return found

    alone = rows(0, 1)
    parts = [rows(rank, world) for rank in range(world)]
    for step, (positions, numbers) in enumerate(alone):
        shared = [pair for part in parts for pair in zip(*part[step], strict=True)]
        assert sorted(shared) == sorted(zip(positions, numbers, strict=True))


def private_memory():
    """Bytes of this process that are not pages of files, which the system drops when it likes."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's account of memory")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
    return int(found.group(1)) * 1024


def test_first_and_far_batches_take_bounded_memory(sparse):
    cache = open_cache(sparse)
    before = private_memory()
    for position in (0, 256 * 10**9):
        settings = {"views": ("image",), "sample_posterior": False, "mode": "block"}
        loader = LatentLoader(cache, 256, 0, position=position, **settings)
        stream = loader.host_batches()
        rows = {r for _ in range(3) for r in next(stream).numbers[2].tolist()}
        assert len(rows) == 768
        # Three buffers of 16 MiB, and the rows of a few windows.
        assert private_memory() - before < 200 << 20
        stream.close()


def test_finishing_takes_the_memory_of_a_shard(tmp_path):
    """However many shards there are; each is 8 MB of fp32 in all views and fields."""
    rows, channels = 512, 16
    mean = np.random.default_rng(0).standard_normal((rows, 64, channels), dtype=np.float32)
    peaks = []
    for shards in (2, 2, 16):  # the first is to warm up
        plan = CachePlan(
            count=shards * rows,
            rows_per_shard=rows,
            grid=(8, 8),
            channels=channels,
            encoder={"fingerprint": "x"},
            preprocessing={},
            sources={"hash": "x"},
        )
        writer = CacheWriter.open(tmp_path / f"{len(peaks)}", plan)
        moments = {view: (mean, abs(mean)) for view in plan.views}
        for shard in writer.pending():
            writer.commit(shard, moments, np.zeros(rows, np.int32), writer.rows(shard))
        seen = []
        writer.finalize(lambda shard, seen=seen: seen.append(private_memory()))
        peaks.append(max(seen))
    assert peaks[2] - peaks[1] < 4 * mean.nbytes
