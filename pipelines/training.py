"""The training loop that both trainers share.

A trainer gives :func:`train` a function that makes one optimizer step on one global batch; the
loop adds the learning rate, the EMA, checkpoints, resumption, signals, the check for
non-finite losses, metrics, trackers and progress. Every random number follows from (seed,
step, position), never from how often the loop was entered: an interrupted run goes on as if
it had not been interrupted.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detok_pipe.latents import atomic
from detok_pipe.latents.errors import ConfigError, Interrupted
from detok_pipe.pipelines.accelerators import make_accelerator, started_trackers
from detok_pipe.pipelines.accumulation import Loader
from detok_pipe.pipelines.checkpoints import (
    Checkpoint,
    latest_checkpoint,
    load_optimizer_tensors,
    load_weights,
    optimizer_tensors,
)
from detok_pipe.pipelines.config import Config, Execution, to_json
from detok_pipe.pipelines.devices import memory_used, resolve_precision
from detok_pipe.pipelines.ema import Ema, ema_decay
from detok_pipe.pipelines.inspection import Inspection, inspect
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import progress, say
from detok_pipe.pipelines.readings import DescribeIds, Readings
from detok_pipe.pipelines.run_directory import RunDirectory, open_run
from detok_pipe.pipelines.sharding import whole_on_host
from detok_pipe.pipelines.signals import Agreement, caught_signals


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
    if execution.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first use
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(config.seed)
    precision = resolve_precision(config.precision, accelerator.device)
    return accelerator, dataclasses.replace(config, precision=precision)


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
    ema: Ema
    loader: Loader

    def save(
        self,
        processes: Processes,
        run: RunDirectory | None,
        step: int,
        metrics: Mapping[str, float],
    ) -> None:
        """Write a checkpoint of ``step`` finished steps; every process has to call.

        Raises:
            StorageError: the disk is full; older checkpoints are untouched.
        """
        tensors = {name: model.state_dict() for name, model in self.models.items()}
        tensors["ema"] = self.ema.module.state_dict()
        tensors |= {name: optimizer_tensors(o) for name, o in self.optimizers.items()}
        tensors = {name: whole_on_host(group, processes.is_main) for name, group in tensors.items()}

        def write() -> None:
            assert run is not None
            run.save_checkpoint(step, tensors, {"loader": self.loader.state()}, metrics)

        processes.on_main(write)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: it is of other networks.
        """
        for name, model in [*self.models.items(), ("ema", self.ema.module)]:
            load_weights(model, checkpoint.tensors(name), checkpoint.path / name)
        for name, optimizer in self.optimizers.items():
            load_optimizer_tensors(optimizer, checkpoint.tensors(name))
        self.loader.load_state(checkpoint.progress["loader"])


def train(
    name: str,
    config: Config,
    execution: Execution,
    out: Path,
    *,
    accelerator: Accelerator,
    parts: Parts,
    update: Callable[[Any, int], Mapping[str, Tensor]],
    steps: int,
    kind: str,
    inputs: Mapping[str, Any],
    facts: Mapping[str, Any],
    inspections: Sequence[Inspection] = (),
    describe_ids: DescribeIds | None = None,
) -> None:
    """Make or resume the run directory ``out``, and train to ``steps`` steps; see :func:`fit`.

    Args:
        kind: "tokenizer" or "generator".
        inputs: fingerprints of what the run is made from; a resumed run must have the same.
        facts: what else is worth keeping in ``config.json``.

    Raises:
        MismatchError, LockedError, ConfigError: see ``open_run``.
        CheckpointError: the checkpoints are damaged, or of another network.
    """
    parameters = sum(p.numel() for p in parts.models["model"].parameters())
    record = {**facts, "steps": steps, "parameters": parameters, "command": sys.argv}
    with opened_run(
        accelerator,
        out,
        kind=kind,
        config=to_json(config),
        defaults=to_json(type(config)()),
        inputs=inputs,
        extra=record,
        keep=execution.keep_checkpoints,
        keep_every=execution.keep_every,
        keep_best=execution.keep_best,
        extend=execution.extend,
    ) as run:
        fit(
            name,
            accelerator=accelerator,
            run=run,
            parts=parts,
            resume=latest_checkpoint(out),
            update=update,
            steps=steps,
            rate=lambda step: learning_rate(
                step,
                steps=steps,
                peak=config.lr,
                warmup=config.warmup,
                schedule=config.lr_schedule,
            ),
            decay=lambda step: ema_decay(step, config.ema, config.ema_warmup),
            global_batch=config.global_batch,
            seed=config.seed,
            execution=execution,
            inspections=inspections,
            describe_ids=describe_ids,
        )


@contextmanager
def opened_run(accelerator: Accelerator, path: Path, **run: Any) -> Iterator[RunDirectory | None]:
    """The run directory on the main process (arguments as for ``open_run``), None on the others,
    which wait until it has been created and checked; its errors are everyone's."""
    opened: list[RunDirectory] = []
    with ExitStack() as stack:
        Processes(accelerator).on_main(
            lambda: opened.append(stack.enter_context(open_run(path, **run)))
        )
        stack.enter_context(started_trackers(accelerator, path))
        yield opened[0] if opened else None


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
    describe_ids: DescribeIds | None = None,
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
    quiet = execution.quiet or not accelerator.is_main_process
    if start:
        say(f"{name}: going on from step {start:,} of {steps:,}", quiet=quiet)
    processes = Processes(accelerator)
    agreement = Agreement(processes.world)
    # Of several processes all must stop after the same step, which they have to talk about.
    agree_every = 1 if processes.world == 1 else execution.log_every
    readings = Readings(accelerator, describe_ids)
    stream = iter(parts.loader)
    clock = _Clock()
    with (
        caught_signals() as signals,
        progress(name, total=steps, unit="steps", initial=start, quiet=quiet) as task,
    ):
        for step in range(start, steps):
            with clock.waiting():
                batch = next(stream)
            # Dropout, the one draw that does not come from Noise, follows from this seed.
            state = np.random.SeedSequence([seed, step, accelerator.process_index])
            torch.manual_seed(int(state.generate_state(1, np.uint64)[0]))
            for optimizer in parts.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
            readings.add(step, batch.ids, update(batch, step))
            parts.ema.update(parts.models["model"], decay(step))

            done = step + 1
            stop = done % agree_every == 0 and agreement.highest(signals[0] if signals else 0)
            save = done % execution.checkpoint_every == 0 or done == steps or bool(stop)
            look = not stop and any(each.due(done, steps) for each in inspections)
            if save or look or done % execution.log_every == 0:
                readings.send()
            metrics: dict[str, float] = {}
            arrived = list(readings.arrived(wait=save or look))
            if arrived:
                facts = {
                    **clock.read(sum(reading.steps for reading in arrived), global_batch),
                    "memory_gib": memory_used(accelerator.device) / 2**30,
                }
            for reading in arrived:
                metrics = {**reading.means, "lr": rate(reading.step - 1), **facts}
                _log(accelerator, run, reading.step, metrics)
                task.advance(reading.steps, **_shown(metrics))
            if look:
                found = inspect(inspections, done, steps)
                _log(accelerator, run, done, found)
                metrics |= found
            if save:
                parts.save(processes, run, done, metrics)
            if save or look:
                clock.restart()
            if stop and done < steps:
                raise Interrupted(
                    f"stopped at step {done:,} of {steps:,} with a checkpoint; "
                    "run the same command again to go on",
                    stop,
                )


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


class _Clock:
    """Times the steps between two readings, and the share in which they waited for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def read(self, steps: int, global_batch: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        facts = {
            "images_per_second": global_batch * steps / seconds,
            "data_wait": self._waited / seconds,
        }
        self.restart()
        return facts


def _log(
    accelerator: Accelerator, run: RunDirectory | None, step: int, values: Mapping[str, float]
) -> None:
    if run and values:
        run.log(step, values)
        with atomic.storage_errors(run.path):
            accelerator.log(dict(values), step=step)


def _shown(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """What stands beside the progress bar."""
    return {
        "loss": metrics["loss"],
        "lr": metrics["lr"],
        "images/s": f"{metrics['images_per_second']:,.0f}",
        "data wait": f"{metrics['data_wait']:.1%}",
        "memory": f"{metrics['memory_gib']:.1f} GiB",
    }
