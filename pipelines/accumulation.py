"""One global batch as several passes through the network, and how large each may be."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn

from detok_pipe.latents.errors import ConfigError


class Loader(Protocol):
    """An endless stream of batches (this process's slice of each global batch)."""

    def __iter__(self) -> Iterator[Any]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Batch(Protocol):
    """A batch is a dataclass of tensors with one row per image; ``ids`` are stream positions."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def ids(self) -> Tensor: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)


def rows_of(batch: AnyBatch, rows: slice) -> AnyBatch:
    """Some rows of a batch."""
    return type(batch)(**{f.name: getattr(batch, f.name)[rows] for f in dataclasses.fields(batch)})


def micro_batches(batch: AnyBatch, size: int | None) -> Iterator[tuple[AnyBatch, float]]:
    """Slices of at most ``size`` rows, each with its share of the batch's rows."""
    rows = len(batch.ids)
    size = size or rows
    for start in range(0, rows, size):
        part = rows_of(batch, slice(start, start + size))
        yield part, len(part.ids) / rows


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


def largest_micro_batch(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Loader,
    loss: Callable[[Any], Tensor],
) -> int:
    """The largest micro-batch that every process has memory for: its whole part of the global
    batch, or a half, a quarter, ... of it. Leaves loader and gradients as they were.

    While it tries, the memory that the optimizer will take for its two moments is held, and a
    tenth of a GPU's, for batches that need more than the one tried.

    Args:
        model: as it is called in training, not sharded. loss: of a slice; it must call ``model``.

    Raises:
        ConfigError: not even one row fits, or the model is sharded.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError(
            "--micro-batch auto cannot try sizes of a sharded model: with --fsdp give a number"
        )
    state = loader.state()
    batch = next(iter(loader))
    loader.load_state(state)
    size = len(batch.ids)

    def halve() -> int:
        nonlocal size
        size = size // 2 if size == 1 else -(-size // 2)
        return size

    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=halve)
    def probe(size: int) -> int:
        held = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        if accelerator.device.type == "cuda":
            _, total = torch.cuda.mem_get_info(accelerator.device)
            held.append(torch.empty(total // 10, dtype=torch.uint8, device=accelerator.device))
        # A process without memory must not leave others waiting for its gradients.
        with accelerator.no_sync(model):
            accelerator.backward(loss(rows_of(batch, slice(size))))
        return size

    try:
        fits = probe()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        fits = 0
    for parameter in model.parameters():
        parameter.grad = None
    everywhere = accelerator.gather(torch.tensor([fits], device=accelerator.device)).min()
    if not everywhere:
        raise ConfigError("--micro-batch auto: not even one row fits into the memory of a GPU")
    return int(everywhere)
