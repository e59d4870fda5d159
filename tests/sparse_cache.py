"""A cache of ImageNet's size whose shards are holes: 42 GB that take no disk."""

from pathlib import Path

import google_crc32c
import numpy as np

from detok_pipe.latents.manifest import Extent, FileRecord, write_manifest
from detok_pipe.latents.plan import CachePlan
from detok_pipe.latents.publish import Contents, index_bytes, make_manifest
from detok_pipe.latents.stats import LatentStats

COUNT = 1_281_167
ROWS = 4096
SHARDS = -(-COUNT // ROWS)
ROW_BYTES = 256 * 16 * 2


def write_sparse_cache(path: Path) -> None:
    """Writes it, with both views and fields, and its real index and manifest."""
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
