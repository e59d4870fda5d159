"""Writing a latent cache: shards by any number of processes, then one ``finalize``.

Process r of W writes the raw shards k with k mod W = r that have no commit record yet. A raw shard
(`_raw/`, fp32, unnormalised) is written whole; its commit record (`_commit/`) comes last and is
created exclusively, so the first of two writers of a shard wins. ``finalize`` merges the statistics
in the order of the shards, normalises each row once, in fp32, and publishes. So the bytes depend
on the plan and the encoder's output alone, not on processes, restarts or kills.

Rows of quarantined images leave holes, which the last rows fill: the arrays stay dense.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from detok_pipe.latents.atomic import (
    TEMPORARY_PREFIX,
    crc32c_pieces,
    create_exclusive,
    storage_errors,
    write_bytes,
    write_pieces,
)
from detok_pipe.latents.errors import CacheError, ConfigError, NonFiniteError
from detok_pipe.latents.manifest import MANIFEST, Manifest, read_json, read_manifest
from detok_pipe.latents.plan import CachePlan, canonical_json
from detok_pipe.latents.publish import (
    COMMITS,
    PLAN,
    RAW,
    SOURCES,
    Contents,
    Quarantined,
    clean_up,
    label_end,
    needs_clean_up,
    publish,
    working_lock,
)
from detok_pipe.latents.raw_rows import RawRows, dense_rows, raw_pieces
from detok_pipe.latents.stats import StatsAccumulator

# view -> (mean, std), each (R, N, C); the std may be None in a plan without it
Moments = Mapping[str, tuple[np.ndarray, np.ndarray | None]]


class CacheWriter:
    """The writing side of a cache that is not finished yet (or just was)."""

    def __init__(self, path: Path, plan: CachePlan) -> None:
        self.path = path
        self.plan = plan
        self._order = plan.order()
        self._digest = plan.digest()

    @classmethod
    def open(
        cls, path: Path | str, plan: CachePlan, *, paths: Sequence[str] | None = None
    ) -> CacheWriter:
        """Begins the cache at ``path``, or goes on with one that was begun with the same plan.

        Args:
            path: the cache's folder; new, empty, or a cache of this plan.
            plan: must be the same for every process and restart.
            paths: the images' paths by source number, kept in ``sources.jsonl``.

        Raises:
            MismatchError: begun with another plan; names the field and both values.
            ConfigError: the folder holds something else.
            StorageError: the disk is full or read-only.
        """
        path = Path(path)
        if not (path / PLAN).exists():
            _check_empty(path)
        if not create_exclusive(path / PLAN, plan.to_bytes()):
            found = CachePlan.from_json(read_json(path / PLAN), str(path / PLAN))
            found.check_same(plan, str(path))
        if paths is not None and not (path / SOURCES).exists():
            if len(paths) != plan.count:
                raise ConfigError(f"{len(paths)} paths for {plan.count} images")
            lines = (json.dumps({"path": p}, ensure_ascii=False) + "\n" for p in paths)
            data = "".join(lines).encode("utf-8", "surrogateescape")
            write_bytes(path / SOURCES, data)
        return cls(path, plan)

    @classmethod
    def resume(cls, path: Path | str) -> CacheWriter:
        """Goes on with the plan found in the folder: for ``finalize`` on its own.

        Raises:
            CacheError: there is no plan, or it is damaged.
        """
        path = Path(path)
        if not (path / PLAN).exists():
            raise CacheError(f"{path} is no latent cache: it has no {PLAN}")
        return cls(path, CachePlan.from_json(read_json(path / PLAN), str(path / PLAN)))

    @property
    def finished(self) -> bool:
        """Whether the manifest is published."""
        return (self.path / MANIFEST).exists()

    def missing(self) -> list[int]:
        """Shards without a commit record."""
        if self.finished:
            return []
        return [k for k in range(self.plan.shards) if not self.has_commit(k)]

    def pending(self, rank: int = 0, world: int = 1) -> list[int]:
        """Shards that process ``rank`` of ``world`` must still write."""
        return [k for k in self.missing() if k % world == rank]

    def is_complete(self) -> bool:
        """Whether every shard is committed: time for :meth:`finalize`."""
        return not self.missing()

    def rows(self, shard: int) -> np.ndarray:
        """Source numbers (R,) int64 of a shard, in the order in which they are written."""
        first = shard * self.plan.rows_per_shard
        return self._order[first : first + self.plan.rows_per_shard]

    def commit(
        self,
        shard: int,
        moments: Moments,
        labels: np.ndarray,
        source_ids: np.ndarray,
        quarantined: Sequence[tuple[int, str, str]] = (),
    ) -> None:
        """Writes a shard; when it returns, the shard survives anything.

        Args:
            shard: its number.
            moments: by view, posterior mean and std, fp32, (R, N, C) of the R readable images
                (std may be None in a plan without it).
            labels: (R,) numbers of classes, -1 where unlabelled.
            source_ids: (R,) source numbers, in the order of :meth:`rows`.
            quarantined: (source number, path, reason) of the others of :meth:`rows`.

        Raises:
            NonFiniteError: a value is not finite; names the image.
            ConfigError: shapes, source numbers or labels do not fit the plan.
            StorageError: the disk is full or read-only.
        """
        tensors = self._checked(shard, moments, labels, source_ids, quarantined)
        pieces = raw_pieces(tensors)
        # Two writers of a shard must not share a file: bits may differ between devices.
        name = f"{shard:05d}-{uuid.uuid4().hex}.safetensors"
        raw = self.path / RAW / name
        try:
            # Hashed and summed while the disk is at work: it takes about as long.
            with ThreadPoolExecutor(1, thread_name_prefix="raw-shard") as pool:
                written = pool.submit(write_pieces, raw, pieces)
                record = {
                    "plan": self._digest,
                    "shard": shard,
                    "raw": name,
                    "bytes": sum(len(piece) for piece in pieces),
                    "crc32c": crc32c_pieces(pieces),
                    "stats": self._stats(tensors).to_json(),
                    "labels": np.asarray(labels).tolist(),
                    "quarantined": [[int(i), path, reason] for i, path, reason in quarantined],
                }
            written.result()
            first = create_exclusive(self._commit_path(shard), canonical_json(record))
        except FileNotFoundError:
            # Another process committed this shard and the rest, finished the cache and tidied up.
            if self.finished:
                return
            raise
        if not first:
            raw.unlink(missing_ok=True)

    def finalize(self, progress: Callable[[int], None] = lambda shard: None) -> Manifest:
        """Normalises, writes the final shards and the manifest; does nothing when that is done.

        Any process may call it; others that do at the same time wait and get the same manifest.

        Args:
            progress: called with each final shard's number once it is on the disk.

        Raises:
            CacheError: shards are missing or damaged; says which and how to go on.
            NonFiniteError: a row does not fit into fp16 with the given statistics.
            StorageError: the disk is full or read-only.
        """
        if not self.finished or needs_clean_up(self.path):
            with working_lock(self.path):
                if not self.finished:
                    self._finalize(progress)
                clean_up(self.path)
        return read_manifest(self.path)

    def _finalize(self, progress: Callable[[int], None]) -> None:
        missing = self.missing()
        if missing:
            raise CacheError(unfinished_message(self.path, len(missing), self.plan.shards))
        commits = [self.commit_record(k) for k in range(self.plan.shards)]
        total = StatsAccumulator(self.plan.channels)
        for commit in commits:
            total.merge(StatsAccumulator.from_json(commit["stats"]))
        quarantined = tuple(Quarantined(*q) for c in commits for q in c["quarantined"])
        count = self.plan.count - len(quarantined)
        if not count:
            raise CacheError(
                f"{self.path}: none of the {self.plan.count} images could be encoded; the first: "
                f"{quarantined[0].path}: {quarantined[0].reason}"
            )
        measured = total.finish(count=count, views=self.plan.views)
        stats = self.plan.stats if self.plan.stats is not None else measured
        ids = [self._valid_ids(k, commits[k]) for k in range(self.plan.shards)]
        shard_of, row_of = dense_rows(
            self.plan.rows_per_shard, [self._valid(k, commits[k]) for k in range(len(commits))]
        )
        starts = np.concatenate([[0], np.cumsum([len(i) for i in ids])[:-1]])
        flat = starts[shard_of] + row_of
        labels = np.concatenate([np.array(c["labels"], np.int32) for c in commits])[flat]
        source_ids = np.concatenate(ids)[flat]
        row_shape = (self.plan.tokens, self.plan.channels)
        raw = RawRows(
            self.path, dict(enumerate(commits)), shard_of, row_of, source_ids, stats, row_shape
        )

        def after_shard(shard: int) -> None:
            raw.release(shard, self.plan.rows_per_shard)
            progress(shard)

        contents = Contents(self.plan, stats, measured, labels, source_ids, quarantined)
        publish(self.path, contents, raw, after_shard=after_shard)

    def has_commit(self, shard: int) -> bool:
        """Whether a shard is committed."""
        return self._commit_path(shard).exists()

    def _commit_path(self, shard: int) -> Path:
        return self.path / COMMITS / f"{shard:05d}.json"

    def commit_record(self, shard: int) -> dict[str, Any]:
        """The record of a committed shard.

        Raises:
            CacheError: it is damaged or of another plan.
        """
        path = self._commit_path(shard)
        record = read_json(path)
        if record.get("plan") != self._digest or record.get("shard") != shard:
            raise CacheError(f"{path} is of another plan; remove it and encode again")
        return dict(record)

    def _valid(self, shard: int, commit: Mapping[str, Any]) -> np.ndarray:
        """Which of the rows of a shard were encoded, (R,) bool."""
        return ~np.isin(self.rows(shard), [q[0] for q in commit["quarantined"]])

    def _valid_ids(self, shard: int, commit: Mapping[str, Any]) -> np.ndarray:
        return self.rows(shard)[self._valid(shard, commit)]

    def _checked(
        self,
        shard: int,
        moments: Moments,
        labels: np.ndarray,
        source_ids: np.ndarray,
        quarantined: Sequence[tuple[int, str, str]],
    ) -> dict[str, np.ndarray]:
        """The arrays of a raw shard by "view.field", fp32 (R, N, C)."""
        expected = self.rows(shard)
        lost = np.array([i for i, _, _ in quarantined], np.int64)
        if (
            not np.array_equal(expected[~np.isin(expected, lost)], source_ids)
            or not np.isin(lost, expected).all()
            or len(lost) + len(source_ids) != len(expected)
        ):
            raise ConfigError(
                f"shard {shard}: encoded and quarantined images are not those of the plan, each "
                "once and in its order"
            )
        if len(labels) != len(source_ids):
            raise ConfigError(f"shard {shard}: {len(labels)} labels for {len(source_ids)} rows")
        end = label_end(self.plan.class_names)
        for image, label in zip(source_ids, labels, strict=True):
            if not -1 <= label < end:
                raise ConfigError(
                    f"shard {shard}: image {image} has the label {label}; possible are -1 "
                    f"(unlabelled) to {end - 1}"
                )
        shape = (len(source_ids), self.plan.tokens, self.plan.channels)
        tensors: dict[str, np.ndarray] = {}
        if set(moments) != set(self.plan.views):
            raise ConfigError(f"moments of views {sorted(moments)}, planned {self.plan.views}")
        for view in self.plan.views:
            for field, values in zip(("mean", "std"), moments[view], strict=True):
                if field not in self.plan.fields:
                    continue
                values = np.ascontiguousarray(values, np.float32)
                if values.shape != shape:
                    raise ConfigError(f"{view}/{field} has shape {values.shape}, planned {shape}")
                finite = np.isfinite(values).all((1, 2))
                if not finite.all():
                    bad = int(source_ids[int(np.argmin(finite))])
                    raise NonFiniteError(f"the {field} of image {bad} ({view}) is not finite")
                tensors[f"{view}.{field}"] = values
        return tensors

    def _stats(self, tensors: Mapping[str, np.ndarray]) -> StatsAccumulator:
        """The statistics of a raw shard's means, over its views."""
        stats = StatsAccumulator(self.plan.channels)
        for view in self.plan.views:
            stats.update(tensors[f"{view}.mean"])
        return stats


def unfinished_message(path: Path, missing: int, shards: int) -> str:
    """What to tell someone who uses a cache too early."""
    if missing:
        what = f"{missing} of its {shards} shards are missing; run the same encode command again"
    else:
        what = f"all its shards are there; run `detok-pipe finalize {path}`"
    return f"the latent cache {path} is not finished: {what}"


def _check_empty(path: Path) -> None:
    with storage_errors(path):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; a latent cache is a folder")
        names = [] if not path.exists() else sorted(p.name for p in path.iterdir())
    others = [n for n in names if not n.startswith(TEMPORARY_PREFIX) and n != PLAN]
    if others:
        raise ConfigError(
            f"{path} is not empty ({others[0]}) and holds no latent cache; choose a new folder"
        )
