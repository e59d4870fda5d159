"""Stage two: write the latent cache of an image set.

Each process encodes the shards that are its own and not yet there, so the same call starts,
resumes and joins an encode. Images are read and decoded on threads ahead of the encoder, and
shards are written by a thread behind it; the encoder itself is what takes the time.

The rows of a shard depend on its images, the encoder and the plan only: batches never straddle
shards and keep their size where an image is unreadable, so any number of processes and any
number of restarts write the same bits.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from detok_pipe.latents.errors import ConfigError, InputError
from detok_pipe.latents.manifest import Manifest
from detok_pipe.latents.plan import VIEWS, CachePlan, StoreFormat, shard_rows
from detok_pipe.latents.posterior import Posterior
from detok_pipe.latents.publish import PLAN
from detok_pipe.latents.stats import LatentStats
from detok_pipe.latents.writer import CacheWriter
from detok_pipe.pipelines.decode import BatchDecoder, DecodedBatch, default_threads, to_float
from detok_pipe.pipelines.devices import compute_threads
from detok_pipe.pipelines.given_stats import StatsChoice, chosen_stats
from detok_pipe.pipelines.host_copies import HostCopies
from detok_pipe.pipelines.images import ImageSource
from detok_pipe.pipelines.progress import progress

Precision = Literal["fp32", "bf16"]


class Encoder(Protocol):
    """A tokenizer ready to encode, such as ``trained.TrainedTokenizer``.

    Attributes:
        model: the encoding half of a ``tokenizer.contract.Tokenizer``.
        image_size: side in pixels of the images that it takes.
        identity: what identifies the encoder, with at least a "fingerprint".
        stats: the normalisation published with it, or None.
    """

    @property
    def model(self) -> Any: ...

    @property
    def image_size(self) -> int: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def stats(self) -> LatentStats | None: ...


@dataclass(frozen=True)
class Encoded:
    """What became of an encode.

    Attributes:
        images: images that this process encoded now.
        quarantined: unreadable images; of the whole cache where it is finished, otherwise those
            that this process met now.
        manifest: of the finished cache, or None while shards of other processes are missing.
    """

    images: int
    quarantined: int
    manifest: Manifest | None


def preprocessing(size: int) -> dict[str, Any]:
    """What is done to an image before the encoder, as a cache records it."""
    return {"crop": "adm-center", "size": size}


def sources_of(source: ImageSource) -> dict[str, Any]:
    """What identifies the images of a cache: their names and labels, and sizes of files."""
    return {**source.identity, "sizes": source.sizes_hash()}


def make_plan(
    tokenizer: Encoder,
    source: ImageSource,
    *,
    shards: int | None = None,
    format: StoreFormat = "webdataset",
    mirror: bool = True,
    std: bool = True,
    rows_per_record: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    threads: int | None = None,
    stats: StatsChoice | None = None,
) -> CachePlan:
    """The plan of the cache of ``source``.

    Args:
        shards: about how many; by default so that a shard has 4096 images.
        mirror: also encode each image's mirror image.
        std: also store the posterior's std, where the tokenizer has a posterior.
        rows_per_record: rows of a tar record or Zarr chunk.
        seed: of the order in which rows are written.
        threads: compute threads of a process on a CPU; by default as many as torch uses now.
        stats: see `chosen_stats`.

    Raises:
        ConfigError: a value is out of its range, or nothing is published with the tokenizer.
    """
    count = len(source)
    kind = torch.device(device).type
    settings: dict[str, Any] = {"device": kind, "max_pixels": source.max_pixels}
    if kind == "cpu":
        settings["threads"] = threads or torch.get_num_threads()
    return CachePlan(
        count=count,
        rows_per_shard=shard_rows(count, shards or max(1, count // 4096), rows_per_record),
        grid=tuple(tokenizer.model.grid),
        channels=tokenizer.model.channels,
        encoder=tokenizer.identity,
        preprocessing=preprocessing(tokenizer.image_size),
        sources=sources_of(source),
        class_names=tuple(source.class_names),
        views=VIEWS if mirror else VIEWS[:1],
        fields=("mean", "std") if std and tokenizer.model.has_posterior else ("mean",),
        format=format,
        rows_per_record=rows_per_record,
        seed=seed,
        batch_size=batch_size,
        dtype=precision,
        settings=settings,
        stats=chosen_stats(stats, tokenizer.stats, tokenizer.identity.get("name", "the tokenizer")),
    )


def check_made_from(plan: CachePlan, tokenizer: Encoder, source: ImageSource, where: Path) -> None:
    """Check that the cache at ``where`` was made from these images with this encoder.

    Raises:
        MismatchError: names the first field that differs, with both values.
    """
    theirs = replace(
        plan,
        encoder=tokenizer.identity,
        preprocessing=preprocessing(tokenizer.image_size),
        sources=sources_of(source),
        class_names=tuple(source.class_names),
    )
    plan.check_same(theirs, str(where), "give the tokenizer and the images that it was made from")


def planned_threads(out: Path) -> int | None:
    """Compute threads of the encode that was begun in ``out``, so that a process that joins or
    resumes it computes the same bits; None where there is none."""
    if not (out / PLAN).exists():
        return None
    return CacheWriter.resume(out).plan.settings.get("threads")


def encode(
    tokenizer: Encoder,
    source: ImageSource,
    out: Path,
    plan: CachePlan,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    strict: bool = False,
    decode_threads: int | None = None,
    quiet: bool = False,
) -> Encoded:
    """Encode the shards of this process that are missing in ``out``; the process that finds all
    shards there finishes the cache.

    Args:
        rank, world: this process and their number, which may change between calls.
        strict: stop at the first unreadable image instead of quarantining it.

    Raises:
        MismatchError: ``out`` was begun with another plan; names the field.
        InputError: an unreadable image with ``strict``. CacheError: no image is readable.
        StorageError: the disk is full or read-only; shards written before stay.
    """
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world} processes: it must be 0 ... {world - 1}")
    names = [source.name(i) for i in range(len(source))] if rank == 0 else None
    writer = CacheWriter.open(out, plan, paths=names)
    images = quarantined = 0
    if not writer.finished:
        images, quarantined = encode_shards(
            tokenizer,
            source,
            writer,
            range(rank, plan.shards, world),
            device=device,
            strict=strict,
            decode_threads=decode_threads,
            quiet=quiet,
        )
    if not writer.is_complete():
        return Encoded(images, quarantined, None)
    manifest = finish(writer, quiet=quiet)
    return Encoded(images, manifest.quarantined, manifest)


def finish(writer: CacheWriter, *, quiet: bool = False) -> Manifest:
    """``writer.finalize()`` with its progress shown."""
    shards = 0 if writer.finished else writer.plan.shards
    with progress("finalize", total=shards, unit="shards", quiet=quiet or not shards) as task:
        return writer.finalize(lambda shard: task.advance())


def encode_shards(
    tokenizer: Encoder,
    source: ImageSource,
    writer: CacheWriter,
    mine: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    strict: bool = False,
    decode_threads: int | None = None,
    quiet: bool = False,
) -> tuple[int, int]:
    """Encode and commit those of the shards ``mine`` that are missing, with the compute threads
    of the plan.

    Returns:
        Numbers of images and, of these, of unreadable ones.
    """
    missing = set(writer.missing())
    shards = [(shard, writer.rows(shard)) for shard in mine if shard in missing]
    images = sum(len(rows) for _, rows in shards)
    total = sum(len(writer.rows(shard)) for shard in mine)
    size = writer.plan.batch_size
    batches = (rows[i : i + size] for _, rows in shards for i in range(0, len(rows), size))
    decoder = BatchDecoder(
        source, tokenizer.image_size, threads=decode_threads or default_threads()
    )
    network = _Network(tokenizer.model, writer.plan, torch.device(device))
    quarantined = 0
    with (
        compute_threads(writer.plan.settings.get("threads")),
        closing(decoder.batches(batches)) as decoded,
        ThreadPoolExecutor(1, thread_name_prefix="commit") as committer,
        progress("encode", total=total, initial=total - images, quiet=quiet) as task,
    ):
        moments = network.moments(decoded)
        committing: Future[None] | None = None
        for shard, rows in shards:
            collected = _Shard(source)
            while collected.images < len(rows):
                collected.add(*next(moments), strict=strict)
                task.advance(collected.last, quarantined=str(quarantined + collected.lost))
            quarantined += collected.lost
            # One shard is written while the next is computed; more would only take memory.
            if committing:
                committing.result()
            committing = committer.submit(collected.commit, writer, shard)
        if committing:
            committing.result()
    return images, quarantined


@torch.inference_mode()
def moments_on_device(model: Any, images: Tensor, plan: CachePlan) -> dict[str, Tensor]:
    """images (B, 3, S, S) -> by view of ``plan``, posterior mean and std (2, B, N, C), fp32."""
    results = {}
    for view in plan.views:
        seen = images.flip(-1) if view == "mirror" else images
        with torch.autocast(images.device.type, torch.bfloat16, enabled=plan.dtype == "bf16"):
            moments = model.encode_moments(seen)
        posterior = Posterior(moments.float(), exact=not model.has_posterior)
        results[view] = torch.stack([posterior.mean, posterior.std])
    return results


Moments = dict[str, tuple[np.ndarray, np.ndarray]]
"""View -> posterior mean and standard deviation, each (B, N, C) fp32."""


class _Network:
    """The tokenizer's encoder as a stage between decoding and writing."""

    def __init__(self, model: Any, plan: CachePlan, device: torch.device) -> None:
        self._model = model
        self._plan = plan
        self._device = device

    def moments(self, batches: Iterable[DecodedBatch]) -> Iterator[tuple[DecodedBatch, Moments]]:
        """Moments of each batch; a GPU computes the next batch while one is looked at."""
        waiting: tuple[DecodedBatch, HostCopies] | None = None
        for batch in batches:
            images = to_float(batch.pixels, self._device)
            results = moments_on_device(self._model, images, self._plan)
            launched = batch, HostCopies(results)
            if waiting:
                yield self._fetched(*waiting)
            waiting = launched
        if waiting:
            yield self._fetched(*waiting)

    def _fetched(self, batch: DecodedBatch, results: HostCopies) -> tuple[DecodedBatch, Moments]:
        """The results on the host; what is not finite is tried once more in fp32."""
        arrays = {view: values.numpy() for view, values in results.wait().items()}
        for place in self._bad(arrays) if self._plan.dtype == "bf16" else ():
            image = to_float(batch.pixels[place : place + 1], self._device)
            again = moments_on_device(self._model, image, replace(self._plan, dtype="fp32"))
            for view, values in again.items():
                arrays[view][:, place] = values[:, 0].cpu().numpy()
        unreadable = dict(batch.unreadable)
        for place in self._bad(arrays):
            unreadable.setdefault(place, "its latents are not finite, in fp32 either")
        moments = {view: (values[0], values[1]) for view, values in arrays.items()}
        return replace(batch, unreadable=unreadable), moments

    @staticmethod
    def _bad(arrays: dict[str, np.ndarray]) -> list[int]:
        """Places in the batch that are not finite in some view."""
        finite = [np.isfinite(values).all((0, 2, 3)) for values in arrays.values()]
        return np.flatnonzero(~np.logical_and.reduce(finite)).tolist()


class _Shard:
    """The batches of one shard, until it is committed."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self._ids: list[np.ndarray] = []
        self._moments: list[Moments] = []
        self._quarantined: list[tuple[int, str, str]] = []
        self.images = 0
        self.last = 0

    @property
    def lost(self) -> int:
        """Unreadable images so far."""
        return len(self._quarantined)

    def add(self, batch: DecodedBatch, moments: Moments, *, strict: bool) -> None:
        for place, reason in sorted(batch.unreadable.items()):
            index = int(batch.indices[place])
            name = self._source.name(index)
            if strict:
                raise InputError(
                    f"{name} in {self._source.path}: {reason}; mend it, take it out of the image "
                    "set, or run without --strict to leave it out"
                )
            self._quarantined.append((index, name, reason))
        good = np.setdiff1d(np.arange(len(batch.indices)), list(batch.unreadable))
        self._ids.append(batch.indices[good])
        self._moments.append(
            {view: (mean[good], std[good]) for view, (mean, std) in moments.items()}
        )
        self.last = len(batch.indices)
        self.images += self.last

    def commit(self, writer: CacheWriter, shard: int) -> None:
        ids = np.concatenate(self._ids)
        moments = {}
        for view in writer.plan.views:
            parts = [part.pop(view) for part in self._moments]
            mean, std = (np.concatenate(field) for field in zip(*parts, strict=True))
            moments[view] = (mean, std)
        writer.commit(shard, moments, self._source.labels[ids], ids, self._quarantined)
