"""A run directory: configuration, checkpoints, metrics, and the lock of who uses it.

config.json        every value resolved, versions, fingerprints of what the run was made from
metrics.jsonl      one JSON object a line, with its step
checkpoints/        see ``checkpoints.py``
samples/            pictures made while training
trackers/           TensorBoard's files
"""

import json
import os
import platform
import reprlib
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
from torch import Tensor

from detok_pipe.latents import atomic
from detok_pipe.latents.errors import (
    CheckpointError,
    ConfigError,
    LockedError,
    MismatchError,
)
from detok_pipe.latents.plan import first_difference
from detok_pipe.pipelines.checkpoints import (
    CONFIG,
    BestBy,
    checkpoint_paths,
    remove_checkpoints,
    write_checkpoint,
)

METRICS = "metrics.jsonl"
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 200  # whole paths and hashes, the beginning of long lists
_SECTIONS = {
    "tokenizer": ("config", "inputs", "versions"),
    "generator": ("config", "inputs", "latents", "versions"),
}
"""What a run's ``config.json`` must hold, by kind, each a record itself."""
_LIBRARIES = ("detok-pipe", "torch", "torchvision", "timm", "accelerate", "numpy", "safetensors")


def read_config(run: Path, kind: str | None = None) -> dict[str, Any]:
    """``config.json`` of a run of ``kind``, "tokenizer" or "generator" (None: of either).

    Raises:
        CheckpointError: there is no such run, it is of another kind, or a part is missing.
    """
    file = run / CONFIG
    try:
        record = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        command = {"tokenizer": "train-tok", "generator": "train-gen"}.get(str(kind), "a trainer")
        raise CheckpointError(
            f"{run} is no run directory: it has no {CONFIG}. Name the folder that was given to "
            f"{command} as --out"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{file} is not that of a run")
    if kind is not None and record.get("kind") != kind:
        raise CheckpointError(f"{run} holds a {record.get('kind')} run; a {kind} run is needed")
    for section in _SECTIONS.get(str(record.get("kind")), ()):
        if not isinstance(record.get(section), dict):
            raise CheckpointError(
                f"{file} is damaged: it holds no {section}, which every {record['kind']} run has; "
                "restore it from a copy, or make the run again in another folder"
            )
    return record


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, in order; lines that were damaged, or cut short by a kill,
    are left out."""
    file = run / METRICS
    records = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


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
        target = write_checkpoint(self.path, step, tensors, progress, metrics or {})
        remove_checkpoints(self.path, step, self._keep, self._keep_every, self._keep_best)
        return target

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl``."""
        file = self.path / METRICS
        with atomic.storage_errors(file), file.open("a") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")

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
        with atomic.storage_errors(path):
            lock.acquire()
    except filelock.Timeout:
        try:
            who = holder.read_text("utf-8")
        except FileNotFoundError:  # it has not signed yet, or has just left
            who = "another process"
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
    path: Path,
    stored: dict[str, Any],
    wanted: dict[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    extend: bool = False,
) -> None:
    """Check that a run directory belongs to this configuration and these inputs.

    Args:
        stored, wanted: records of a run. What an input is made of, "made of", only explains in
            which field one differs from the other.
        defaults: of the configuration: the values of settings that the stored one does not have,
            because they came later.
        extend: allow a duration that makes more steps than the stored one.

    Raises:
        MismatchError: fields that change the result differ; each is named with both values, of
            a group of fields the first.
    """
    longer = wanted.get("steps", 0) >= stored.get("steps", 0)
    differing, hint = [], ""
    for section in ("config", "inputs"):
        old, new = stored.get(section, {}), wanted.get(section, {})
        if section == "config":
            old = {**(defaults or {}), **old}
        for key in sorted(old.keys() | new.keys()):
            difference = first_difference(old.get(key), new.get(key), key)
            if difference is None or (key == "duration" and extend and longer):
                continue
            if key == "duration":
                hint = (
                    f"; --extend allows a longer duration ({stored.get('steps')} steps there)"
                    if longer
                    else f"; a run cannot be made shorter ({stored.get('steps')} steps there)"
                )
            text = _both(difference)
            made_of = [record.get("made of", {}).get(key) for record in (stored, wanted)]
            if None not in made_of and (inner := first_difference(*made_of)):
                text += f" ({_both(inner)})"
            differing.append(text)
    if differing:
        raise MismatchError(
            f"{path} was started with other settings ({'; '.join(differing)}). "
            f"Run with the same settings to resume it, or give another --out{hint}"
        )


def _both(difference: tuple[str, Any, Any]) -> str:
    name, there, now = difference
    return f"{name}: {_brief.repr(there)} there, {_brief.repr(now)} now"


@contextmanager
def open_run(
    path: Path,
    *,
    kind: str,
    config: dict[str, Any],
    inputs: dict[str, Any],
    defaults: Mapping[str, Any] | None = None,
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
        defaults: see `compare_config`.
        inputs: fingerprints of what the run reads; they must equal the stored ones.
        extra: facts worth keeping with the run (class names, latent statistics, ...).
        keep: the newest so many checkpoints stay.
        keep_every: so do those of each so many steps.
        keep_best: so does the one with the lowest loss or Fréchet distance.
        extend: allow a longer duration than the stored one, and store it.

    Raises:
        MismatchError: the directory belongs to another configuration or other inputs.
        LockedError: another process uses it.
        CheckpointError: its configuration is damaged.
        StorageError: the disk is full or read-only, or a link that leads nowhere is in the way.
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
        atomic.make_folder(path)
    with locked(path):
        record = {"kind": kind, "config": config, "inputs": inputs, **(extra or {})}
        record["versions"] = versions()
        # Before the first checkpoint, a run that was begun is begun again.
        if not (path / CONFIG).exists():
            atomic.write_json(path / CONFIG, record)
        else:
            stored = read_config(path, kind)
            compare_config(path, stored, record, defaults=defaults, extend=extend)
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
