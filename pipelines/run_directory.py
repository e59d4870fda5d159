"""A run directory: configuration, checkpoints, metrics, and the lock of who uses it.

    config.json        every value resolved, versions, fingerprints of what the run was made from
    metrics.jsonl      one JSON object a line, with its step
    checkpoints/step-XXXXXXXX/
        model.safetensors, ema.safetensors, optimizer.safetensors, ...
        config.json         a copy of the run's: a checkpoint tells by itself what it is
        checkpoint.json     written last: step, progress, size and crc32c of each file

A checkpoint appears by one rename. Of the checkpoints stay the newest few, those of every n-th
step, and the best by loss or score, as asked for (see :func:`open_run`). One that does not match
its checksums is passed over with a warning and the one before it is used.
"""

import json
import os
import platform
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from detok_pipe.latents import atomic
from detok_pipe.latents.errors import (
    CheckpointError,
    ConfigError,
    LockedError,
    MismatchError,
    StorageError,
)
from detok_pipe.pipelines.sharding import as_sharded

CONFIG = "config.json"
METRICS = "metrics.jsonl"
_CHECKPOINT = "checkpoint.json"
BestBy = Literal["loss", "score"]

_SCORES = ("FID", "FD-", "val/rFID", "val/rFD-")  # of samples, and of reconstructions
_LIBRARIES = ("detok-pipe", "torch", "torchvision", "timm", "accelerate", "numpy", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files matched their checksums when it was opened."""

    path: Path
    step: int
    progress: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``<name>.safetensors``, on the CPU.

        Raises:
            CheckpointError: the file is missing or cut short.
        """
        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}); use another checkpoint"
            ) from error


def _verified(path: Path) -> Checkpoint:
    """Open one checkpoint, checking each file's size and checksum."""
    try:
        record = json.loads((path / _CHECKPOINT).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / _CHECKPOINT} is missing or cut short") from error
    for name, expected in record["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != expected["size"]:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes where {expected['size']} were written"
            )
        if atomic.crc32c_file(file) != expected["crc32c"]:
            raise CheckpointError(f"{file} does not match its checksum")
    return Checkpoint(path, record["step"], record["progress"])


def checkpoint_paths(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, unchecked."""
    return sorted((run / "checkpoints").glob("step-????????"))


def checkpoint_step(path: Path) -> int:
    """The number of finished steps that a checkpoint folder is named after."""
    return int(path.name.removeprefix("step-"))


def checkpoint_metrics(path: Path) -> dict[str, float]:
    """What was measured when a checkpoint was written; nothing where that cannot be read."""
    try:
        return json.loads((path / _CHECKPOINT).read_text()).get("metrics", {})
    except (OSError, json.JSONDecodeError):
        return {}


def score_of(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    """Name and value of the Fréchet distance among some metrics, of whatever network."""
    return next(((n, v) for n, v in metrics.items() if n.startswith(_SCORES)), None)


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Args:
        run: a run directory, or one checkpoint's folder, which is then the one.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
    """
    if (run / _CHECKPOINT).exists():
        return _verified(run)
    paths = checkpoint_paths(run)
    failure: CheckpointError | None = None
    for path in reversed(paths):
        try:
            return _verified(path)
        except CheckpointError as error:
            failure = error
            warnings.warn(f"{error}; using the checkpoint before it", stacklevel=2)
    if failure is not None:
        raise CheckpointError(
            f"no checkpoint of {run} is whole ({failure}); "
            f"remove {run / 'checkpoints'} to start anew"
        )
    return None


def read_config(run: Path, kind: str | None = None) -> dict[str, Any]:
    """``config.json`` of a run of ``kind``, "tokenizer" or "generator" (None: of either).

    Raises:
        CheckpointError: there is no such run, or it is of another kind.
    """
    file = run / CONFIG
    try:
        record = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        command = {"tokenizer": "train-tok", "generator": "train-gen"}.get(str(kind), "a trainer")
        raise CheckpointError(
            f"{run} is no run directory: it has no {CONFIG}. Name the folder that was given to "
            f"{command} as --out"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if kind is not None and record.get("kind") != kind:
        raise CheckpointError(f"{run} holds a {record.get('kind')} run; a {kind} run is needed")
    return record


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, in order; a last line cut short by a kill is left out."""
    file = run / METRICS
    records = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


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


class RunDirectory:
    """A run directory opened for writing by the main process; see :func:`open_run`."""

    def __init__(
        self,
        path: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        keep_best: BestBy | None = None,
    ) -> None:
        self.path = path
        self._keep = keep
        self._keep_every = keep_every
        self._keep_best = keep_best

    def save_checkpoint(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        progress: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Write a checkpoint whole, then remove those that need not stay.

        Args:
            metrics: what was measured at this step; the best checkpoint is chosen by it.

        Raises:
            StorageError: the disk is full; older checkpoints are untouched.
        """
        target = self.path / "checkpoints" / f"step-{step:08d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.atomic_folder(target) as folder:
            shutil.copyfile(self.path / CONFIG, folder / CONFIG)
            for name, group in tensors.items():
                file = folder / f"{name}.safetensors"
                try:
                    save_file({key: value.contiguous() for key, value in group.items()}, file)
                except SafetensorError as error:
                    raise StorageError(
                        f"{target} cannot be written ({error}); earlier checkpoints are untouched. "
                        "Free some disk space and run the same command again"
                    ) from error
            files = {
                file.name: {"size": file.stat().st_size, "crc32c": atomic.crc32c_file(file)}
                for file in sorted(folder.iterdir())
            }
            record = {"step": step, "progress": progress, "metrics": dict(metrics or {})}
            atomic.write_json(folder / _CHECKPOINT, {**record, "files": files})
        self._remove_old()
        return target

    def _remove_old(self) -> None:
        best = self._best()
        for path in checkpoint_paths(self.path)[: -self._keep]:
            every_nth = self._keep_every and checkpoint_step(path) % self._keep_every == 0
            if not every_nth and path != best:
                shutil.rmtree(path)

    def _best(self) -> Path | None:
        """The checkpoint with the lowest loss or score, the newer one of two that are equal."""
        if self._keep_best is None:
            return None
        values = []
        for path in checkpoint_paths(self.path):
            metrics = checkpoint_metrics(path)
            score = score_of(metrics)
            value = metrics.get("loss") if self._keep_best == "loss" else score and score[1]
            if value is not None:
                values.append((value, -checkpoint_step(path), path))
        return min(values)[2] if values else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl``."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will do again."""
        kept = [r for r in read_metrics(self.path) if r["step"] <= step]
        atomic.write_text(self.path / METRICS, "".join(json.dumps(r) + "\n" for r in kept))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute; recorded, never compared."""
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in _LIBRARIES}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the directory's lock; it goes with the process, however that ends.

    Raises:
        LockedError: another process holds it; host and process are named.
    """
    lock = filelock.FileLock(path / ".lock", timeout=0)
    holder = path / ".lock-holder"
    try:
        lock.acquire()
    except filelock.Timeout:
        who = holder.read_text().strip() if holder.exists() else "another process"
        raise LockedError(
            f"{path} is in use by {who}; wait for it, or give another --out"
        ) from None
    try:
        atomic.write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def compare_config(
    path: Path, stored: dict[str, Any], wanted: dict[str, Any], *, extend: bool = False
) -> None:
    """Check that a run directory belongs to this configuration and these inputs.

    Args:
        extend: allow a duration that makes more steps than the stored one.

    Raises:
        MismatchError: fields that change the result differ; each is named with both values.
    """
    longer = wanted.get("steps", 0) >= stored.get("steps", 0)
    differing, hint = [], ""
    for section in ("config", "inputs"):
        old, new = stored.get(section, {}), wanted.get(section, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) == new.get(key) or (key == "duration" and extend and longer):
                continue
            if key == "duration":
                hint = (
                    f"; --extend allows a longer duration ({stored.get('steps')} steps there)"
                    if longer
                    else f"; a run cannot be made shorter ({stored.get('steps')} steps there)"
                )
            differing.append(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now")
    if differing:
        raise MismatchError(
            f"{path} was started with other settings ({'; '.join(differing)}). "
            f"Run with the same settings to resume it, or give another --out{hint}"
        )


@contextmanager
def open_run(
    path: Path,
    *,
    kind: str,
    config: dict[str, Any],
    inputs: dict[str, Any],
    extra: Mapping[str, Any] | None = None,
    keep: int,
    keep_every: int | None = None,
    keep_best: BestBy | None = None,
    extend: bool = False,
) -> Iterator[RunDirectory]:
    """Create or resume a run directory, locked while open. For the main process only.

    Args:
        path: the directory.
        kind: "tokenizer" or "generator".
        config: the resolved configuration; it must equal the stored one.
        inputs: fingerprints of what the run reads; they must equal the stored ones.
        extra: facts worth keeping with the run (class names, latent statistics, ...).
        keep: the newest so many checkpoints stay.
        keep_every: so do those of each so many steps.
        keep_best: so does the one with the lowest loss or Fréchet distance.
        extend: allow a longer duration than the stored one, and store it.

    Raises:
        MismatchError: the directory belongs to another configuration or other inputs.
        LockedError: another process uses it.
        ConfigError: the path is a file, or a folder with other things in it.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--out {path} is a file; give a folder")
    if path.is_dir() and not (path / CONFIG).exists():
        strangers = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
        if strangers:
            raise ConfigError(
                f"--out {path} is no run directory and not empty (it holds {strangers[0]}); "
                "give an empty or a new folder"
            )
    with atomic.storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        record = {"kind": kind, "config": config, "inputs": inputs, **(extra or {})}
        record["versions"] = versions()
        # Before the first checkpoint, a run that was begun is begun again.
        if not (path / CONFIG).exists():
            atomic.write_json(path / CONFIG, record)
        else:
            stored = read_config(path, kind)
            compare_config(path, stored, record, extend=extend)
            if not checkpoint_paths(path):
                atomic.write_json(path / CONFIG, record)
            elif stored["config"] != record["config"]:
                earlier = {
                    "duration": stored["config"]["duration"],
                    "steps": stored.get("steps"),
                    "command": stored.get("command"),
                    "versions": stored.get("versions"),
                }
                extended = [*stored.get("extended", []), earlier]
                atomic.write_json(path / CONFIG, {**stored, **record, "extended": extended})
        atomic.remove_temporaries(path / "checkpoints")
        yield RunDirectory(path, keep=keep, keep_every=keep_every, keep_best=keep_best)
