"""The training loop that both trainers share.

A trainer gives :func:`fit` a function that makes one optimizer step on one global batch; the
loop adds the learning rate, the EMA, checkpoints, resumption, signals, the check for
non-finite losses, metrics, trackers and progress. Every random number follows from (seed,
step, position), never from how often the loop was entered: an interrupted run goes on as if
it had not been interrupted.
"""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detok_pipe.latents.errors import ConfigError, Interrupted, NonFiniteError
from detok_pipe.pipelines.config import Config, Execution, Precision
from detok_pipe.pipelines.devices import resolve_device, resolve_precision
from detok_pipe.pipelines.inspection import Inspection, inspect
from detok_pipe.pipelines.progress import progress, say
from detok_pipe.pipelines.run_directory import (
    Checkpoint,
    RunDirectory,
    load_optimizer_tensors,
    open_run,
    optimizer_tensors,
)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Batch(Protocol):
    """A batch is a dataclass of tensors with one row per image; ``ids`` are stream positions."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def ids(self) -> Tensor: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class Loader(Protocol):
    """An endless stream of batches (this process's slice of each global batch)."""

    def __iter__(self) -> Iterator[Any]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def make_accelerator(
    precision: Precision, execution: Execution, project: Path | None = None
) -> Accelerator:
    """Accelerate with the device, precision and trackers that were asked for.

    Raises:
        ConfigError: the device cannot be used, or a tracker's package is missing.
    """
    # Accelerate keeps its settings for the life of the process; a second run may have others.
    AcceleratorState._reset_state()
    # Without being told that it is on a CPU, Accelerate joins no processes there: each of
    # torchrun's would take itself for the only one.
    cpu = resolve_device(execution.device).type == "cpu"
    device = PartialState(cpu=cpu).device
    mixed = {"bf16": "bf16", "fp32": "no"}[resolve_precision(precision, device)]
    try:
        return Accelerator(
            mixed_precision=mixed,
            cpu=cpu,
            # No buffer that is trained with needs to be the same on all processes.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            log_with=list(execution.trackers) or None,
            project_dir=str(project) if project else None,
        )
    except ValueError as error:
        raise ConfigError(f"trackers {','.join(execution.trackers)}: {error}") from error


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Count denormal numbers as zero, which a CPU computes with many times faster.

    The state is the process's, so it is given back.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def start(config: Config, execution: Execution, out: Path) -> tuple[Accelerator, Config]:
    """What every training begins with: Accelerate, the resolved configuration, torch's seed.

    Raises:
        ConfigError: the global batch does not divide among the processes; see also
            :func:`make_accelerator`.
    """
    accelerator = make_accelerator(config.precision, execution, out)
    world = accelerator.num_processes
    if config.global_batch % world:
        raise ConfigError(
            f"global_batch {config.global_batch} is no multiple of the {world} processes"
        )
    torch.manual_seed(config.seed)
    precision = resolve_precision(config.precision, accelerator.device)
    return accelerator, dataclasses.replace(config, precision=precision)


def learning_rate(
    step: int, *, steps: int, peak: float, warmup: float, schedule: Literal["constant", "cosine"]
) -> float:
    """The rate of step ``step`` (from 0): a linear rise over the first share ``warmup``, then
    constant, or a cosine to zero at ``steps``."""
    warm = warmup * steps
    if step < warm:
        return peak * (step + 1) / warm if warm > 1 else peak
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def ema_decay(step: int, decay: float, warm: bool) -> float:
    """The EMA's decay at step ``step`` (from 0); warmed up it starts near 0.1 and rises."""
    return min(decay, (1 + step) / (10 + step)) if warm else decay


def micro_batches(batch: AnyBatch, size: int | None) -> Iterator[tuple[AnyBatch, float]]:
    """Slices of at most ``size`` rows, each with its share of the batch's rows."""
    rows = len(batch.ids)
    size = size or rows
    for start in range(0, rows, size):
        piece = slice(start, start + size)
        part = {f.name: getattr(batch, f.name)[piece] for f in dataclasses.fields(batch)}
        yield type(batch)(**part), len(part["ids"]) / rows


def accumulate(
    accelerator: Accelerator,
    model: nn.Module,
    batch: AnyBatch,
    micro_batch: int | None,
    losses: Callable[[AnyBatch], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Gradients of the mean loss over ``batch``, computed ``micro_batch`` rows at a time.

    ``losses`` maps a slice to named scalars, of which "loss" is differentiated; it must call
    ``model``. Gradients are exchanged between processes in the last slice only.

    Returns:
        The batch's mean of each named scalar, detached, on the device.
    """
    totals: dict[str, Tensor] = {}
    slices = list(micro_batches(batch, micro_batch))
    for number, (part, share) in enumerate(slices):
        last = number == len(slices) - 1
        with _synchronised(accelerator, model, last):
            values = losses(part)
            accelerator.backward(values["loss"] * share)
        for name, value in values.items():
            weighted = value.detach() * share
            totals[name] = totals[name] + weighted if name in totals else weighted
    return totals


@contextmanager
def _synchronised(accelerator: Accelerator, model: nn.Module, exchange: bool) -> Iterator[None]:
    if exchange:
        yield
    else:
        with accelerator.no_sync(model):
            yield


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in a list instead of dying in the middle of a step.

    A second SIGINT ends the process at once. Outside the main thread nothing is caught.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(signum)

    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def opened_run(accelerator: Accelerator, path: Path, **run: Any) -> Iterator[RunDirectory | None]:
    """The run directory on the main process (arguments as for ``open_run``), None on the others,
    which wait until it has been created and checked."""
    if accelerator.is_main_process:
        with open_run(path, **run) as directory:
            accelerator.wait_for_everyone()
            accelerator.init_trackers("trackers")
            yield directory
    else:
        accelerator.wait_for_everyone()
        accelerator.init_trackers("trackers")
        yield None
    accelerator.end_training()


@dataclass
class Parts:
    """The objects whose state makes a checkpoint; names are those of its files.

    Attributes:
        models: the networks being trained ("model", and "discriminator" where there is one).
        optimizers: their optimizers ("optimizer", ...).
        ema: the averaged copy of ``models["model"]``, stored as "ema".
        loader: the data stream, whose position is stored.
    """

    models: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: AveragedModel
    loader: Loader

    def save(self, run: RunDirectory, step: int) -> Path:
        """Write a checkpoint of ``step`` finished steps."""
        tensors = {name: model.state_dict() for name, model in self.models.items()}
        tensors["ema"] = self.ema.module.state_dict()
        tensors |= {name: optimizer_tensors(o) for name, o in self.optimizers.items()}
        return run.save_checkpoint(step, tensors, {"loader": self.loader.state()})

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        for name, model in self.models.items():
            model.load_state_dict(checkpoint.tensors(name))
        self.ema.module.load_state_dict(checkpoint.tensors("ema"))
        self.ema.n_averaged.fill_(checkpoint.step)
        for name, optimizer in self.optimizers.items():
            load_optimizer_tensors(optimizer, checkpoint.tensors(name))
        self.loader.load_state(checkpoint.progress["loader"])


def fit(
    name: str,
    *,
    accelerator: Accelerator,
    run: RunDirectory | None,
    parts: Parts,
    resume: Checkpoint | None,
    update: Callable[[Any, int], Mapping[str, Tensor]],
    steps: int,
    rate: Callable[[int], float],
    decay: Callable[[int], float],
    global_batch: int,
    seed: int,
    execution: Execution,
    inspections: Sequence[Inspection] = (),
    describe_ids: Callable[[Sequence[int]], str] | None = None,
) -> None:
    """Train to ``steps`` optimizer steps, from ``resume`` where there is one.

    Args:
        name: shown beside the progress bar.
        run: the run directory on the main process, None on the others.
        update: makes step number ``step`` on a batch and returns named scalars with "loss".
        rate: learning rate by step. decay: EMA decay by step.
        inspections: looks at the model at intervals; with or without them the same numbers
            come out.
        describe_ids: names the samples at some stream positions, for the error about a loss
            that is not finite.

    Raises:
        NonFiniteError: a loss is not finite; names the step and the ids. Nothing is saved then.
        Interrupted: SIGINT, SIGTERM or SIGUSR1; a checkpoint was written first.
    """
    start = resume.step if resume else 0
    if resume:
        parts.load(resume)
    if run:
        run.forget_metrics_after(start)
    if start >= steps:
        return
    if start:
        say(f"{name}: going on from step {start:,} of {steps:,}", quiet=execution.quiet)
    stream = iter(parts.loader)
    rank = accelerator.process_index
    pending: list[tuple[int, Tensor, Mapping[str, Tensor]]] = []
    # A stop is agreed on by all processes, which costs a collective; alone it costs nothing.
    agree_every = 1 if accelerator.num_processes == 1 else execution.log_every
    waited, since = 0.0, time.perf_counter()
    quiet = execution.quiet or not accelerator.is_main_process
    with (
        caught_signals() as signals,
        progress(name, total=steps, unit="steps", initial=start, quiet=quiet) as task,
    ):
        for step in range(start, steps):
            before = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - before
            # Dropout, the one draw that does not come from Noise, follows from this seed.
            state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))
            for optimizer in parts.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
            values = update(batch, step)
            parts.ema.multi_avg_fn = get_ema_multi_avg_fn(decay(step))
            parts.ema.update_parameters(parts.models["model"])
            pending.append((step, batch.ids, values))

            done = step + 1
            stop = done % agree_every == 0 and _any_process(accelerator, bool(signals))
            save = done % execution.checkpoint_every == 0 or done == steps or stop
            if save or done % execution.log_every == 0:
                means = _means(accelerator, pending, describe_ids)
                seconds = time.perf_counter() - since
                speed = global_batch * len(pending) / seconds
                record = {**means, "lr": rate(step), "images_per_second": speed}
                record["data_wait"] = waited / seconds
                task.advance(len(pending), loss=means["loss"], lr=rate(step))
                if run:
                    run.log(done, record)
                accelerator.log(record, step=done)
                pending.clear()
                waited, since = 0.0, time.perf_counter()
            if not stop and (found := inspect(inspections, done, steps)):
                if run:
                    run.log(done, found)
                accelerator.log(found, step=done)
            if save:
                if run:
                    parts.save(run, done)
                accelerator.wait_for_everyone()
            if stop and done < steps:
                raise Interrupted(
                    f"stopped at step {done:,} of {steps:,} with a checkpoint; "
                    "run the same command again to go on",
                    signals[0] if signals else signal.SIGTERM,
                )


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    total = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(total > 0)


def _means(
    accelerator: Accelerator,
    pending: list[tuple[int, Tensor, Mapping[str, Tensor]]],
    describe_ids: Callable[[Sequence[int]], str] | None,
) -> dict[str, float]:
    """Mean of each scalar over the pending steps and all processes: one wait for the device.

    Raises:
        NonFiniteError: in the first step with a loss that is not finite.
    """
    # A term may join in the middle: the discriminator's do.
    names = list(dict.fromkeys(name for _, _, values in pending for name in values))
    absent = torch.zeros_like(pending[0][2]["loss"], dtype=torch.float32)
    table = torch.stack(
        [
            torch.stack([values.get(name, absent).float() for name in names])
            for _, _, values in pending
        ]
    )
    mine = table.cpu()
    table = accelerator.reduce(table, "mean").cpu()  # (steps, names)
    for row, (step, ids, _) in enumerate(pending):
        if not torch.isfinite(table[row]).all():
            where = (
                _named(ids.tolist(), describe_ids)
                if not torch.isfinite(mine[row]).all()
                else "on another process"
            )
            bad = [n for n, value in zip(names, table[row], strict=True) if not value.isfinite()]
            raise NonFiniteError(
                f"{', '.join(bad)} of step {step + 1:,} is not finite ({where}); the last "
                "checkpoint is untouched. Lower the learning rate, or train in fp32"
            )
    counts = [sum(name in values for _, _, values in pending) for name in names]
    totals = table.sum(0).tolist()
    return {name: totals[i] / counts[i] for i, name in enumerate(names)}


def _named(ids: list[int], describe_ids: Callable[[Sequence[int]], str] | None) -> str:
    some, more = ids[:8], ", ..." if len(ids) > 8 else ""
    names = f": {describe_ids(some)}{more}" if describe_ids else ""
    return f"stream positions {', '.join(map(str, some))}{more}{names}"
