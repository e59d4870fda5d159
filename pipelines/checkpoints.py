"""Checkpoints of a run: written whole, checked when they are read, kept by a rule.

    checkpoints/step-XXXXXXXX/
        model.safetensors, ema.safetensors, optimizer.safetensors, ...
        config.json         a copy of the run's: a checkpoint tells by itself what it is
        checkpoint.json     written last: step, progress, metrics, size and crc32c of each file

A checkpoint appears and goes by one rename, so a run can be read while it trains. Of the
checkpoints stay the newest few, those of every n-th step, and the best by loss or score, as asked
for (see :func:`remove_checkpoints`). One that does not match its checksums is passed over with a
warning and the one before it is used.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detok_pipe.latents import atomic
from detok_pipe.latents.errors import CheckpointError, StorageError
from detok_pipe.pipelines.sharding import as_sharded

CONFIG = "config.json"
BestBy = Literal["loss", "score"]
_CHECKPOINT = "checkpoint.json"
_SCORES = ("FID", "FD-", "val/rFID", "val/rFD-")  # of samples, and of reconstructions


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files matched their checksums when it was opened."""

    path: Path
    step: int
    progress: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``<name>.safetensors``, on the CPU.

        Raises:
            CheckpointError: the file is missing or cut short, or the checkpoint has been removed.
        """
        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch maps files, too
            if not self.path.exists():
                raise CheckpointError(
                    f"{self.path} was removed before it was loaded, as its run goes on training; "
                    "run the same command again"
                ) from error
            raise CheckpointError(
                f"{file} cannot be read ({error}); use another checkpoint"
            ) from error


def _verified(path: Path) -> Checkpoint:
    """Open one checkpoint, checking each file's size and checksum."""
    try:
        record = json.loads((path / _CHECKPOINT).read_bytes())
        sums = {name: (file["size"], file["crc32c"]) for name, file in record["files"].items()}
        checkpoint = Checkpoint(path, record["step"], record["progress"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / _CHECKPOINT} is missing or damaged") from error
    for name, (size, crc32c) in sums.items():
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                raise CheckpointError(f"{file} has {found} bytes where {size} were written")
            if atomic.crc32c_file(file) != crc32c:
                raise CheckpointError(f"{file} does not match its checksum")
        except OSError as error:
            raise CheckpointError(f"{file} is missing or cannot be read: {error}") from error
    return checkpoint


def checkpoint_paths(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, unchecked."""
    return sorted((run / "checkpoints").glob("step-????????"))


def checkpoint_step(path: Path) -> int:
    """The number of finished steps that a checkpoint folder is named after."""
    return int(path.name.removeprefix("step-"))


def checkpoint_metrics(path: Path) -> dict[str, float]:
    """What was measured when a checkpoint was written; nothing where that cannot be read."""
    try:
        return json.loads((path / _CHECKPOINT).read_bytes())["metrics"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def score_of(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    """Name and value of the Fréchet distance among some metrics, of whatever network."""
    return next(((n, v) for n, v in metrics.items() if n.startswith(_SCORES)), None)


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    The run may be in training: of a checkpoint that is removed meanwhile, there is a newer one.

    Args:
        run: a run directory, or one checkpoint's folder, which is then the one.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    if (run / _CHECKPOINT).exists():
        return _verified(run)
    damaged: dict[Path, CheckpointError] = {}
    while paths := [path for path in checkpoint_paths(run) if path not in damaged]:
        try:
            return _verified(paths[-1])
        except CheckpointError as error:
            if paths[-1] in checkpoint_paths(run):
                damaged[paths[-1]] = error
                warnings.warn(f"{error}; using the checkpoint before it", stacklevel=2)
    if damaged:
        oldest = next(reversed(damaged.values()))
        raise CheckpointError(
            f"no checkpoint of {run} is whole ({oldest}); "
            f"remove {run / 'checkpoints'} to start anew"
        )
    return None


def write_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    progress: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> Path:
    """Write a checkpoint of a run directory, whole.

    Raises:
        StorageError: the disk is full; nothing is left of it then.
    """
    target = run / "checkpoints" / f"step-{step:08d}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.atomic_folder(target) as folder:
        shutil.copyfile(run / CONFIG, folder / CONFIG)
        for name, group in tensors.items():
            try:
                save_file(
                    {key: value.contiguous() for key, value in group.items()},
                    folder / f"{name}.safetensors",
                )
            except SafetensorError as error:
                raise StorageError(
                    f"{target} cannot be written ({error}); earlier checkpoints are untouched. "
                    "Free some disk space and run the same command again"
                ) from error
        files = {
            file.name: {"size": file.stat().st_size, "crc32c": atomic.crc32c_file(file)}
            for file in sorted(folder.iterdir())
        }
        record = {"step": step, "progress": progress, "metrics": dict(metrics), "files": files}
        atomic.write_json(folder / _CHECKPOINT, record)
    return target


def remove_checkpoints(
    run: Path, written: int, keep: int, keep_every: int | None, keep_best: BestBy | None
) -> None:
    """Remove the checkpoints that need not stay.

    Args:
        written: the step of the one just written; later ones were damaged, and passed over when
            the run went on, and must not take its place.
        keep: the newest so many stay. keep_every: so do those of each so many steps.
        keep_best: so does the one with the lowest loss or Fréchet distance.

    Raises:
        StorageError: the disk is read-only.
    """
    for path in checkpoint_paths(run):
        if checkpoint_step(path) > written:
            atomic.remove_folder(path)
    best = _best(run, keep_best) if keep_best is not None else None
    for path in checkpoint_paths(run)[:-keep]:
        every_nth = keep_every and checkpoint_step(path) % keep_every == 0
        if not every_nth and path != best:
            atomic.remove_folder(path)


def _best(run: Path, by: BestBy) -> Path | None:
    """The checkpoint with the lowest loss or score, the newer one of two that are equal.

    Scores are those of the network that scored last; others' are not comparable.
    """
    found = []
    for path in checkpoint_paths(run):
        metrics = checkpoint_metrics(path)
        if by == "score":
            measured = score_of(metrics)
        else:
            measured = ("loss", metrics["loss"]) if "loss" in metrics else None
        if measured is not None:
            found.append((*measured, path))
    values = [
        (value, -checkpoint_step(path), path) for name, value, path in found if name == found[-1][0]
    ]
    return min(values)[2] if values else None


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Load whole tensors into a network, which may be sharded.

    Raises:
        CheckpointError: names or shapes do not fit; ``where`` is named.
    """
    current = model.state_dict()
    for name in sorted(current.keys() | tensors.keys()):
        there, here = (
            tuple(state[name].shape) if name in state else "missing" for state in (tensors, current)
        )
        if there != here:
            raise CheckpointError(
                f"{where} is of another network: {name} is {there} there and {here} here"
            )
    model.load_state_dict({name: as_sharded(v, current[name]) for name, v in tensors.items()})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors; its settings follow from the configuration."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`optimizer_tensors`, for whole tensors and parameters that may be
    sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        like = parameters[int(index)]
        # Moments have their parameter's shape; the step counter is a number.
        moment = tensor.shape == like.shape
        state.setdefault(int(index), {})[name] = as_sharded(tensor, like) if moment else tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
