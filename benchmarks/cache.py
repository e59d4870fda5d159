"""Speed of the latent cache, as ratios to np.memmap measured in the same run.

    python benchmarks/cache.py       # 80,128 rows of 256 x 16, 313 shard files, 4 GB of disk
    python benchmarks/cache.py --rows 20032 --repeat 3
    python benchmarks/cache.py --device cuda                 # also from pinned memory to a GPU

Every reader hands out batches of 256 rows in a full global shuffle (block mode and the plain
libraries in the order that each of them offers). The files are in the page cache. Expected on two
cores: resident Zarr at least 0.9, tar at least 0.5, block mode at least 0.7; other people's layouts
0.002 to 0.1. Then the writer against the disk, and opening and seeking in 1,281,167 rows.
"""

import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import torch
import webdataset as wds
import zarr
from safetensors import safe_open
from safetensors.numpy import save_file

from detok_pipe.latents.cache import LatentCache, open_cache
from detok_pipe.latents.convert import convert
from detok_pipe.latents.loader import LatentLoader, Mode
from detok_pipe.latents.order import SampleOrder
from detok_pipe.latents.plan import CachePlan
from detok_pipe.latents.writer import CacheWriter

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from sparse_cache import write_sparse_cache

BATCH = 256
SHAPE = (256, 16)
ITEMS = 2048  # files of the one-file-an-item layouts

Stream = Iterator[int]  # yields the rows of each batch that was read


def write_cache(path: Path, rows: int, rows_per_shard: int, fields: tuple[str, ...]) -> float:
    """A cache of random rows in tars; gives the seconds spent in the writer."""
    plan = CachePlan(
        count=rows,
        rows_per_shard=rows_per_shard,
        rows_per_record=min(256, rows_per_shard),
        grid=(16, 16),
        channels=16,
        encoder={"fingerprint": "benchmark"},
        preprocessing={},
        sources={"hash": "benchmark"},
        views=("image",),
        fields=fields,
    )
    writer = CacheWriter.open(path, plan)
    rng = np.random.default_rng(0)
    spent = 0.0
    for shard in writer.pending():
        ids = writer.rows(shard)
        mean = rng.standard_normal((len(ids), *SHAPE), dtype=np.float32)
        start = time.perf_counter()
        writer.commit(shard, {"image": (mean, mean)}, np.zeros(len(ids), np.int32), ids)
        spent += time.perf_counter() - start
    start = time.perf_counter()
    writer.finalize()
    return spent + time.perf_counter() - start


def disk_speed(path: Path, size: int) -> float:
    """Sequential writing of one file with a sync at the end, bytes a second."""
    block = np.random.default_rng(0).bytes(1 << 24)
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    path.unlink()
    return (size // len(block)) * len(block) / (time.perf_counter() - start)


def writer_against_disk(root: Path) -> dict[str, float]:
    """Bytes a second of the writer (all that it writes, and those of finished rows) and of the
    disk: medians of three rounds, as the speed of a disk changes from second to second."""
    rows = 4 * 4096
    finished = rows * 2 * int(np.prod(SHAPE)) * 2
    rounds = []
    for number in range(3):
        disk = disk_speed(root / "disk", 1 << 29)
        # Each fp16 value is first written as fp32, in a raw shard: three times its bytes in all.
        speed = 3 * finished / write_cache(root / f"{number}", rows, 4096, ("mean", "std"))
        shutil.rmtree(root / f"{number}")
        rounds.append((speed, speed / 3, disk, speed / disk))
    medians = (statistics.median(values) for values in zip(*rounds, strict=True))
    return dict(zip(("written", "rows", "disk", "ratio"), medians, strict=True))


def memmap(path: Path, count: int) -> Stream:
    rows = np.memmap(path, np.float16, "r", shape=(count, *SHAPE))
    order = SampleOrder(count, 0)
    for step in itertools.count():
        yield len(rows[order.at(np.arange(BATCH) + step * BATCH)])


def ours(cache: LatentCache, mode: Mode) -> Stream:
    loader = LatentLoader(cache, BATCH, 0, sample_posterior=False, mode=mode)
    for batch in loader.host_batches():
        yield len(batch.arrays["mean"])


def ours_on_device(cache: LatentCache, device: torch.device) -> Stream:
    """fp32 batches, each waited for until it is on the device."""
    for batch in LatentLoader(cache, BATCH, 0, sample_posterior=False, device=device):
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        yield len(batch.z)


def webdataset_pipeline(path: Path) -> Stream:
    urls = sorted(str(p) for p in (path / "image").glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).decode()
    samples = dataset.to_tuple("mean.npy", "label.npy").unbatched().shuffle(5000).batched(BATCH)
    while True:
        for mean, _ in samples:
            yield len(mean)


def zarr_rows(path: Path, count: int) -> Stream:
    array = zarr.open(path, mode="r")["v0/mean"]
    rng = np.random.default_rng(0)
    while True:
        yield len(array.oindex[np.sort(rng.integers(0, count, BATCH))])


def zarr_chunks(path: Path, count: int) -> Stream:
    array = zarr.open(path, mode="r")["v0/mean"]
    rng = np.random.default_rng(0)
    while True:
        start = int(rng.integers(0, count // BATCH)) * BATCH
        yield len(array[start : start + BATCH])


def one_file_an_item(paths: list[Path], read: Callable[[Path], np.ndarray]) -> Stream:
    rng = np.random.default_rng(0)
    while True:
        items = [read(paths[i]) for i in rng.integers(0, len(paths), BATCH)]
        yield len(np.stack(items))


def read_npz(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["mean"]


def read_safetensors(path: Path) -> np.ndarray:
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor("mean")


def at_imagenet_size(path: Path) -> dict[str, float]:
    """Seconds to open a cache of 1,281,167 rows, and to find the samples of a far position."""
    write_sparse_cache(path)
    result = {"open": fastest(lambda: open_cache(path))}
    cache = open_cache(path)
    far = 7 * cache.num_rows + 600_000
    result["seek"] = fastest(lambda: SampleOrder(cache.num_rows, 1).at(np.arange(BATCH) + far))

    def first_batch() -> None:
        stream = LatentLoader(cache, BATCH, 1, position=far, mode="block").host_batches()
        next(stream)
        stream.close()

    result["first batch there, block mode"] = fastest(first_batch)
    return result


def fastest(function: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def speed(stream: Stream, seconds: float) -> float:
    """Rows a second, after a batch to warm up."""
    next(stream)
    rows, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        rows += next(stream)
    return rows / (time.perf_counter() - start)


@click.command()
@click.option("--rows", default=313 * 256, show_default=True)
@click.option("--shards", default=313, show_default=True)
@click.option("--repeat", default=5, show_default=True, help="Medians of as many rounds.")
@click.option("--seconds", default=1.0, show_default=True, help="Of each reader in each round.")
@click.option("--device", default="cpu", show_default=True, help="Where fp32 batches go to.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers as JSON.")
def main(
    rows: int, shards: int, repeat: int, seconds: float, device: str, out: Path | None
) -> None:
    target = torch.device(device)
    with tempfile.TemporaryDirectory(prefix="detok-cache-") as folder:
        root = Path(folder)
        write_cache(root / "tar", rows, rows // shards, ("mean",))
        writer = writer_against_disk(root)
        convert(root / "tar", root / "zarr", "zarr")
        tars, zarrs = open_cache(root / "tar"), open_cache(root / "zarr")
        with open(root / "flat", "wb") as file:
            for start in range(0, rows, 4096):
                file.write(tars.rows(np.arange(start, min(start + 4096, rows))).tobytes())
        items = tars.rows(np.arange(ITEMS) % rows)
        for kind in ("npz", "safetensors"):
            (root / kind).mkdir()
        npz = [root / "npz" / f"{i}.npz" for i in range(ITEMS)]
        tensors = [root / "safetensors" / f"{i}.safetensors" for i in range(ITEMS)]
        for i in range(ITEMS):
            np.savez(npz[i], mean=items[i])
            save_file({"mean": items[i]}, tensors[i])

        readers: dict[str, Callable[[], Stream]] = {
            "np.memmap, one file": lambda: memmap(root / "flat", rows),
            "ours, Zarr, resident": lambda: ours(zarrs, "resident"),
            "ours, WebDataset, resident": lambda: ours(tars, "resident"),
            "ours, Zarr, block": lambda: ours(zarrs, "block"),
            "ours, WebDataset, block": lambda: ours(tars, "block"),
            f"ours, Zarr, resident, fp32 on {target}": lambda: ours_on_device(zarrs, target),
            "webdataset's own pipeline": lambda: webdataset_pipeline(root / "tar"),
            "zarr's own API, random rows": lambda: zarr_rows(root / "zarr", rows),
            "zarr's own API, whole chunks": lambda: zarr_chunks(root / "zarr", rows),
            "npz an image": lambda: one_file_an_item(npz, read_npz),
            "safetensors an image": lambda: one_file_an_item(tensors, read_safetensors),
        }
        measured: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(repeat):
            for name, make in readers.items():
                stream = make()
                measured[name].append(speed(stream, seconds))
                stream.close()  # type: ignore[attr-defined]
        large_cache = at_imagenet_size(root / "sparse")
    base = measured["np.memmap, one file"]
    result = {}
    for name, speeds in measured.items():
        ratio = statistics.median(a / b for a, b in zip(speeds, base, strict=True))
        result[name] = {"rows/s": statistics.median(speeds), "ratio": ratio}
        click.echo(f"{name:40}{statistics.median(speeds):12,.0f} rows/s{ratio:9.3f}")
    click.echo(
        f"writer, shards of 4096 rows: {writer['rows'] / 1e6:,.0f} MB/s of rows, "
        f"{writer['written'] / 1e6:,.0f} MB/s to the disk, whose sequential speed is "
        f"{writer['disk'] / 1e6:,.0f} MB/s, ratio {writer['ratio']:.2f}"
    )
    for name, seconds in large_cache.items():
        click.echo(f"1,281,167 rows: {name} {1000 * seconds:.0f} ms")
    if out is not None:
        numbers = {
            "readers": result,
            "writer": writer,
            "1,281,167 rows": large_cache,
        }
        out.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
