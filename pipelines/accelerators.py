"""Accelerate, set up as a training needs it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from detok_pipe.latents import atomic
from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines.config import Execution, Precision
from detok_pipe.pipelines.devices import resolve_device, resolve_precision
from detok_pipe.pipelines.processes import PATIENCE

PROJECT = "detok-pipe"
"""The project's name in the trackers."""


def make_accelerator(
    precision: Precision, execution: Execution, run: Path | None = None
) -> Accelerator:
    """Accelerate with the device, precision and trackers that were asked for.

    Args:
        run: the run directory, where trackers that write files write them.

    Raises:
        ConfigError: the device cannot be used, a tracker's package is missing, or sharding was
            asked for where there is nothing to shard over.
    """
    # Accelerate keeps its settings for the life of the process; a second run may have others.
    AcceleratorState._reset_state()
    # Without being told that it is on a CPU, Accelerate joins no processes there: each of
    # torchrun's would take itself for the only one.
    cpu = resolve_device(execution.device).type == "cpu"
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if execution.fsdp and (cpu or state.num_processes == 1):
        # Accelerate would quietly do something else.
        raise ConfigError(
            f"--fsdp shards a model over several GPUs, and this is {state.num_processes} process "
            f"on {state.device.type}; start several with accelerate launch, or leave it out"
        )
    # torch 2.14 announces another name, which Accelerate does not know yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    mixed = {"bf16": "bf16", "fp32": "no"}[resolve_precision(precision, state.device)]
    try:
        accelerator = Accelerator(
            mixed_precision=mixed,
            cpu=cpu,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    # No buffer that is trained with needs to be the same on all processes.
                    broadcast_buffers=False,
                    # Otherwise gradients are put together anew after a sitting's first step, and
                    # three processes and more then add them up in another order.
                    find_unused_parameters=execution.deterministic,
                )
            ],
            fsdp_plugin=sharding_plugin() if execution.fsdp else None,
            log_with=list(execution.trackers) or None,
            project_config=ProjectConfiguration(
                project_dir=str(run) if run else None,
                logging_dir=str(run / "trackers") if run else None,
            ),
        )
    except ValueError as error:
        raise ConfigError(f"trackers {','.join(execution.trackers)}: {error}") from error
    # Accelerate leaves out those whose package is not there without a word.
    missing = set(execution.trackers) - {str(name) for name in accelerator.log_with}
    if missing:
        raise ConfigError(
            f"--tracker {', '.join(sorted(missing))}: its package is not installed; pip install it"
        )
    return accelerator


def sharding_plugin() -> FullyShardedDataParallelPlugin:
    """Accelerate's FSDP2, which leaves the precision to autocast as other trainings do."""
    policy = MixedPrecisionPolicy()
    return FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=policy)


@contextmanager
def started_trackers(accelerator: Accelerator, run: Path) -> Iterator[None]:
    """Begin the trackers' logs of a run, and end them.

    Accelerate's own ``end_training`` would part the processes, and another training may follow.

    Raises:
        StorageError: the disk is full.
    """
    with atomic.storage_errors(run):
        accelerator.init_trackers(
            PROJECT, init_kwargs={"wandb": {"name": run.name, "dir": str(run)}}
        )
    try:
        yield
    finally:
        with atomic.storage_errors(run):
            for tracker in accelerator.trackers:
                tracker.finish()


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


@contextmanager
def tensor_float32(wanted: bool) -> Iterator[None]:
    """Let a GPU round the factors of fp32 matrix products, as cuDNN does in convolutions.

    For fp32 networks beside bf16 ones: a perceptual loss's would take most of a step without.
    """
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
