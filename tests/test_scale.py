"""1.28 million rows, in sparse files: memory and time to open do not grow with the rows."""

import re
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.loader import LatentLoader
from detok_pipe.latents.manifest import Extent, FileRecord, write_manifest
from detok_pipe.latents.plan import CachePlan
from detok_pipe.latents.publish import Contents, index_bytes, make_manifest
from detok_pipe.latents.stats import LatentStats

COUNT = 1_281_167
ROWS = 4096
SHARDS = -(-COUNT // ROWS)
ROW_BYTES = 256 * 16 * 2


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A Zarr-like cache whose shards are holes: 42 GB that take no disk."""
    path = tmp_path_factory.mktemp("sparse")
    plan = CachePlan(
        count=COUNT,
        rows_per_shard=ROWS,
        grid=(16, 16),
        channels=16,
        encoder={"fingerprint": "x"},
        preprocessing={},
        sources={"hash": "x"},
        class_names=tuple(f"class {i}" for i in range(1000)),
        format="zarr",
    )
    labels = (np.arange(COUNT) % 1000).astype(np.int32)
    ids = plan.order()
    stats = LatentStats.identity(16)
    files, arrays = [], {}
    for name in ("image/mean", "image/std", "mirror/mean", "mirror/std"):
        (path / name / "c").mkdir(parents=True)
        arrays[name] = []
        for shard in range(SHARDS):
            rows = min(ROWS, COUNT - shard * ROWS)
            file = f"{name}/c/{shard}"
            with open(path / file, "wb") as hole:
                hole.truncate(rows * ROW_BYTES)
            files.append(FileRecord(path=file, bytes=rows * ROW_BYTES, crc32c=0))
            arrays[name].append(
                Extent(
                    file=file,
                    first_row=shard * ROWS,
                    rows=rows,
                    offset=0,
                    stride=0,
                    rows_per_record=ROWS,
                )
            )
    data = index_bytes(labels, ids)
    (path / "index.npy").write_bytes(data)
    files.append(FileRecord(path="index.npy", bytes=len(data), crc32c=google_crc32c.value(data)))
    write_manifest(
        path, make_manifest(Contents(plan, stats, stats, labels, ids, ()), files, arrays)
    )
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
