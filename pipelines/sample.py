"""Stage three, first half: draw latents from a generator into a sample store.

Sample number i has the label ``classes[i mod len(classes)]`` and the noise of (seed, i), so it
is the same whatever the number of processes or restarts, and two guidance scales share labels
and noise. Within a shard the batches are fixed: with the same batch size, to the last bit.
"""

import copy
import dataclasses
import gc
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detok_pipe.generators.generator import Generator
from detok_pipe.generators.registry import default_sampling
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError, NonFiniteError
from detok_pipe.latents.noise import Noise
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.pipelines.config import Precision
from detok_pipe.pipelines.devices import compile_errors, resolve_precision
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import progress
from detok_pipe.pipelines.trained import TrainedGenerator

ROWS_PER_SHARD = 250
"""Samples a shard: seconds of work, and divides the counts that are commonly scored."""


def sampling_of(generator: TrainedGenerator, **changes: Any) -> Sampling:
    """The generator's published sampling options, at a given scale, with changes (None: no change).

    Raises:
        ConfigError: a value out of its range.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    name, scale = generator.record["config"]["generator"], given.get("guidance_scale")
    published = default_sampling(name, scale)
    return dataclasses.replace(published, **given)


def sampled_classes(generator: TrainedGenerator) -> list[int]:
    """The labels that the generator was trained on; [-1], no label, where there were none."""
    trained = generator.record["config"].get("classes")
    if trained is None:
        return list(range(generator.record["latents"]["num_classes"])) or [-1]
    return [generator.class_names.index(name) for name in trained]


def labels_of(ids: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """The label of each sample number, int64: any run of len(classes) numbers is balanced."""
    return np.asarray(classes, dtype=np.int64)[ids % len(classes)]


@torch.inference_mode()
def sample(
    generator: TrainedGenerator,
    out: Path,
    *,
    count: int,
    sampling: Sampling,
    seed: int = 0,
    first: int = 0,
    classes: Sequence[int] | None = None,
    stop: int | None = None,
    batch_size: int = 64,
    rows_per_shard: int = ROWS_PER_SHARD,
    precision: Precision = "auto",
    compiled: bool = False,
    processes: Processes | None = None,
    name: str = "sample",
    quiet: bool = False,
) -> SampleStore:
    """Draw samples ``first`` to ``first + count`` into the store ``out``, or the missing ones.

    Args:
        generator: on the device where it is to run.
        classes: labels to go through; by default all that it was trained on.
        stop: draw only the shards that begin before this row; the store stays unfinished.
        precision: of the networks; see `resolve_precision` for "auto". The chain's state and the
            noise are fp32 always.
        compiled: compile the networks first (a minute), which gives the same to rounding.
        name: shown beside the progress.

    Returns:
        The store. Other processes' shards are there after ``processes.wait()``.

    Raises:
        MismatchError: the store holds samples of other settings; the field is named.
        NonFiniteError: the generator gave NaN or infinite latents, or beyond fp16's range.
        ConfigError: no samples, numbers beyond 64 bits, a label that the generator does not know,
            a sampling option that it does not use, or ``compiled`` where torch.compile does not
            work.
        StorageError: the disk is full; shards written before stay.
    """
    processes = processes or Processes(device=next(generator.model.parameters()).device)
    classes = sampled_classes(generator) if classes is None else list(classes)
    sampling = generator.model.resolved(sampling)
    _check(generator, first, count, classes)
    dtype = resolve_precision(precision, processes.device)
    identity = {
        **generator.identity,
        "model": generator.record["config"]["model"],
        "sampling": json.loads(json.dumps(dataclasses.asdict(sampling))),
        "seed": seed,
        "first": first,
        "dtype": dtype,
        "classes": classes,
    }
    store = SampleStore.open(
        out,
        identity,
        count=count,
        grid=generator.grid,
        channels=generator.stats.channels,
        rows_per_shard=rows_per_shard,
        stats=generator.stats,
        extra={
            "class_names": generator.class_names,
            "generator_run": str(generator.path.resolve()),
            "label": "classes[(first + i) mod len(classes)]",
            "batch_size": batch_size,
        },
    )
    model = _prepared(generator.model, dtype, compiled)
    stop = count if stop is None else stop
    pending = [part for part in store.pending(processes.rank, processes.world) if part[1] < stop]
    wanted = sum(
        min(start + rows_per_shard, count) - start
        for shard, start in enumerate(range(0, min(stop, count), rows_per_shard))
        if processes.mine(shard)
    )
    missing = sum(end - start for _, start, end in pending)
    quiet = quiet or not processes.is_main
    with progress(
        name, total=wanted, initial=wanted - missing, unit="samples", quiet=quiet
    ) as task:
        for shard, start, end in pending:
            rows = []
            for begin in range(start, end, batch_size):
                ids = first + np.arange(begin, min(begin + batch_size, end), dtype=np.int64)
                labels = torch.from_numpy(labels_of(ids, classes)).to(processes.device)
                noise = Noise(seed, ids, device=processes.device)
                with compile_errors() if compiled else nullcontext():
                    z = model.sample(labels, sampling, noise)
                rows.append(_checked(z.cpu().numpy(), ids, generator.model, sampling))
                task.advance(len(ids))
            store.commit(shard, np.concatenate(rows))
    if compiled:  # refers to itself; a sweep's copies would else gather on the device
        del model
        gc.collect()
    return store


def _check(generator: TrainedGenerator, first: int, count: int, classes: list[int]) -> None:
    if count < 1:
        raise ConfigError(f"the number of samples must be at least 1, got {count}")
    if first + count > 2**63:
        raise ConfigError(
            f"samples {first} to {first + count - 1}: their numbers must be less than 2^63; lower "
            "the first, or their count"
        )
    known = generator.record["latents"]["num_classes"]
    for label in classes:
        if not -1 <= label < known:
            raise ConfigError(
                f"class {label}: the generator has {known} classes, numbered from 0 (-1: no class)"
            )
    if not classes:
        raise ConfigError("no classes to sample")


def _prepared(model: Generator, dtype: str, compiled: bool) -> Generator:
    """The network as it samples, its weights cast once; ``model`` stays as it is."""
    if dtype == "fp32" and not compiled:
        return model
    prepared = copy.deepcopy(model)
    if dtype == "bf16":
        prepared.to(torch.bfloat16)
    if compiled:
        prepared.compile_sampler()
    return prepared


def _checked(z: np.ndarray, ids: np.ndarray, model: Generator, sampling: Sampling) -> np.ndarray:
    """Latents (b, N, C) fp32 of the samples ``ids``, if all can be stored."""
    broken = ~(np.abs(z) <= np.finfo(np.float16).max).all(axis=(1, 2))
    if broken.any():
        bound = "clip" in model.sampling_options and sampling.clip is None
        raise NonFiniteError(
            f"{int(broken.sum())} of {len(ids)} samples, first number {int(ids[broken.argmax()])}, "
            "are NaN, infinite or beyond fp16 at guidance scale "
            f"{sampling.guidance_scale:g}; {'bound the predictions with --clip 4, ' * bound}lower "
            "the scale, use --precision fp32, or train longer"
        )
    return z
