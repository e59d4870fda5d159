"""1.28 million rows, in sparse files: memory and time to open do not grow with the rows."""

import re
from pathlib import Path

import pytest
from sparse_cache import COUNT, write_sparse_cache

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.loader import LatentLoader


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
