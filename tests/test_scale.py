"""1.28 million rows, in sparse files: memory and time to open do not grow with the rows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sparse_cache import COUNT, write_sparse_cache

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.loader import LatentLoader
from detok_pipe.latents.order import BLOCK_ROWS, LANES, WINDOW_BLOCKS


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


FINISH = """
import sys
import numpy as np
from test_scale import private_memory
from detok_pipe.latents.plan import CachePlan
from detok_pipe.latents.writer import CacheWriter

rows = 512
mean = np.random.default_rng(0).standard_normal((rows, 64, 16), dtype=np.float32)
peaks = []
for shards in (2, 2, 16):  # the first is to warm up
    plan = CachePlan(
        count=shards * rows, rows_per_shard=rows, grid=(8, 8), channels=16,
        encoder={"fingerprint": "x"}, preprocessing={}, sources={"hash": "x"},
    )
    writer = CacheWriter.open(f"{sys.argv[1]}/{len(peaks)}", plan)
    moments = {view: (mean, abs(mean)) for view in plan.views}
    for shard in writer.pending():
        writer.commit(shard, moments, np.zeros(rows, np.int32), writer.rows(shard))
    seen = []
    writer.finalize(lambda shard: seen.append(private_memory()))
    peaks.append(max(seen))
print(peaks[2] - peaks[1])
"""


def test_finishing_takes_the_memory_of_a_shard(tmp_path):
    """However many shards there are. One is 8 MB of fp32 in all views and fields, so 14 more would
    add 112 MB; the threads' allocators alone add up to 20. In a process of its own."""
    private_memory()  # skips where the system does not tell
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", FINISH, str(tmp_path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 56 << 20
