"""Decode a sample store into files for other people's evaluators: PNG, npz or WebDataset.

An export appears whole or not at all, so that no evaluator ever reads half a folder, or one
with pictures of an earlier export among them. All processes decode and encode; the main one
writes what they send it, in order.
"""

import io
import itertools
import json
import tarfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

import numpy as np
from PIL import Image

from detok_pipe.latents.atomic import atomic_file, atomic_folder
from detok_pipe.latents.errors import ConfigError, InputError
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.pipelines.decode import default_threads
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import ProgressTask, progress
from detok_pipe.pipelines.sample import labels_of
from detok_pipe.pipelines.stored_features import decode_latents
from detok_pipe.pipelines.trained import TrainedTokenizer, check_tokenizer_fits

Form = Literal["png", "npz", "webdataset"]
FORMS: tuple[Form, ...] = get_args(Form)

IMAGES_PER_TAR = 10_000

T = TypeVar("T")


def export_images(
    store: SampleStore,
    tokenizer: TrainedTokenizer,
    out: Path,
    *,
    form: Form = "png",
    count: int | None = None,
    batch_size: int = 64,
    processes: Processes | None = None,
    quiet: bool = False,
) -> int:
    """Write decoded samples.

    Args:
        out: a folder (png: ``000000.png`` ...; webdataset: ``000000.tar`` ... with ``.png`` and
            ``.cls``), or a file that ends in ``.npz`` (``arr_0``: uint8 (N, H, W, 3), in ADM's
            form, and ``labels``). It must not exist.
        count: the first so many samples; by default all.

    Returns:
        The number of images written.

    Raises:
        ConfigError: an unknown form, or ``out`` exists or does not suit it.
        InputError: the store has fewer samples than ``count``.
        MismatchError: the tokenizer does not belong to the samples.
        CacheError: a sample shard is missing or damaged.
        StorageError: the disk is full; nothing is left of the export.
    """
    if form not in FORMS:
        raise ConfigError(f"format {form!r}: choose one of {', '.join(FORMS)}")
    if (form == "npz") != (out.suffix == ".npz"):
        raise ConfigError(f"--out {out}: npz needs a name that ends in .npz, the others a folder")
    if out.exists():
        raise ConfigError(f"--out {out} exists; an export never adds to one: give another --out")
    wanted = {"fingerprint": store.identity["tokenizer"]}
    check_tokenizer_fits(tokenizer, wanted, f"the samples in {store.path}")
    count = store.count if count is None else count
    if not 1 <= count <= store.count:
        raise InputError(f"{store.path} has {store.count} samples; {count} cannot be exported")
    processes = processes or Processes()
    encode: Callable[[np.ndarray], Any] = np.ascontiguousarray if form == "npz" else _pngs
    batches = _decoded(store, tokenizer, count, batch_size, processes, encode)
    if not processes.is_main:
        deque(batches, maxlen=0)
        return count
    labels = labels_of(np.arange(count) + store.identity["first"], store.identity["classes"])
    with progress("export", total=count, quiet=quiet) as task:
        if form == "npz":
            with atomic_file(out) as temporary, temporary.open("wb") as file:
                _write_npz(file, batches, labels, tokenizer.image_size, task)
        else:
            with atomic_folder(out) as folder:
                if form == "png":
                    _write_pngs(folder, batches, task)
                else:
                    _write_tars(folder, batches, labels, task)
                record = {"samples": store.identity, "decoder": tokenizer.decoder}
                (folder / "export.json").write_text(json.dumps(record, indent=1))
    return count


def _decoded(
    store: SampleStore,
    tokenizer: TrainedTokenizer,
    count: int,
    batch_size: int,
    processes: Processes,
    encode: Callable[[np.ndarray], T],
) -> Iterator[T]:
    """The first ``count`` samples, decoded and encoded, a batch at a time and in order.

    Every process must go through it: each makes one batch of a round, and all have all of them.

    Args:
        encode: called with pixels (b, H, W, 3) uint8.
    """
    spans = (store.span(shard) for shard in range(store.shards))
    parts = [
        (shard, begin - start, min(begin + batch_size, stop, count) - start)
        for shard, (start, stop) in enumerate(spans)
        for begin in range(start, min(stop, count), batch_size)
    ]
    for first in range(0, len(parts), processes.world):
        mine = []
        for shard, begin, stop in parts[first + processes.rank :][:1]:
            z = store.read_shard(shard)[begin:stop]
            images = decode_latents(tokenizer, store.stats, z)
            mine.append(encode(images.permute(0, 2, 3, 1).cpu().numpy()))
        yield from processes.gather(mine)


def _pngs(pixels: np.ndarray) -> list[bytes]:
    """A PNG file of each image; zlib releases the interpreter's lock, so threads help."""
    with ThreadPoolExecutor(default_threads()) as pool:
        return list(pool.map(_png, pixels))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_pngs(folder: Path, batches: Iterator[list[bytes]], task: ProgressTask) -> None:
    number = 0
    for files in batches:
        for data in files:
            (folder / f"{number:06d}.png").write_bytes(data)
            number += 1
        task.advance(len(files))


def _write_tars(
    folder: Path, batches: Iterator[list[bytes]], labels: np.ndarray, task: ProgressTask
) -> None:
    files = itertools.chain.from_iterable(batches)
    for start in range(0, len(labels), IMAGES_PER_TAR):
        some = labels[start : start + IMAGES_PER_TAR]
        with tarfile.open(folder / f"{start // IMAGES_PER_TAR:06d}.tar", "w") as tar:
            for number, (label, data) in enumerate(zip(some, files, strict=False), start):
                _add(tar, f"{number:06d}.png", data)
                _add(tar, f"{number:06d}.cls", str(label).encode())
                task.advance()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_npz(
    file: IO[bytes],
    batches: Iterator[np.ndarray],
    labels: np.ndarray,
    size: int,
    task: ProgressTask,
) -> None:
    """An uncompressed ``.npz`` whose images are never all in memory."""
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
                "fortran_order": False,
                "shape": (len(labels), size, size, 3),
            }
            np.lib.format.write_array_header_1_0(member, header)
            for batch in batches:
                member.write(batch.data)
                task.advance(len(batch))
        with archive.open("labels.npy", "w") as member:
            np.lib.format.write_array(member, labels, allow_pickle=False)
