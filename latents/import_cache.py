"""Latents that other projects have cached, turned into a verified cache.

| kind | what it is | what is stored |
|---|---|---|
| mar | one npz an image in class folders: ``moments`` and ``moments_flip`` (2C, h, w), mean and log variance | mean and std, both views |
| lightningdit | safetensors shards: ``latents``, ``latents_flip`` (B, C, h, w), ``labels`` (B,) | one frozen posterior sample, both views, no std |
| edm2 | one npy an image (2C, h, w), mean and std, labels in ``dataset.json`` (EDM2, REPA) | mean and std, the image alone |

Values are taken as they are, unscaled. The rows are then normalised like any other cache's.
"""  # noqa: E501

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from detok_pipe.latents.errors import InputError, input_errors
from detok_pipe.latents.manifest import Manifest, read_json
from detok_pipe.latents.names import printable
from detok_pipe.latents.plan import (
    FIELDS,
    ROWS_PER_RECORD,
    VIEWS,
    CachePlan,
    StoreFormat,
    canonical_json,
    shard_rows,
)
from detok_pipe.latents.posterior import LOGVAR_MAX, LOGVAR_MIN
from detok_pipe.latents.publish import label_end
from detok_pipe.latents.stats import LatentStats
from detok_pipe.latents.writer import CacheWriter

Kind = Literal["mar", "lightningdit", "edm2"]
Item = dict[str, np.ndarray]  # "view/field" -> (C, h, w)


@dataclass(frozen=True)
class ForeignCache:
    """A cache of another project.

    Attributes:
        path: its folder. kind: its form.
        names: of the images, (N,), printable. labels: (N,) int32, -1 where unknown.
        class_names: by label; empty where only numbers are known.
        views, fields: what it holds. read: item i; raises anything where its file is damaged.
        sizes: bytes of each file, in the order of the names (a file may hold many images).
    """

    path: Path
    kind: Kind
    names: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    views: tuple[str, ...]
    fields: tuple[str, ...]
    read: Callable[[int], Item]
    sizes: list[int]

    def identity(self) -> dict[str, Any]:
        """Of the list of images: names, labels and sizes of files."""
        listed = [self.names, self.labels.tolist(), self.sizes]
        return {
            "kind": self.kind,
            "hash": hashlib.sha256(canonical_json(listed)).hexdigest(),
            "count": len(self.names),
        }

    def item(self, i: int) -> Item:
        """Item i.

        Raises:
            InputError: it cannot be read; says why, without its name.
        """
        with input_errors("it cannot be read"):
            return self.read(i)

    def shape(self) -> tuple[int, ...]:
        """(C, h, w) of the first item that can be read, or (C, N).

        Raises:
            InputError: none can be, or it is of another shape.
        """
        reason: InputError | None = None
        for i in range(len(self.names)):
            try:
                shape = self.item(i)["image/mean"].shape
            except InputError as error:
                reason = reason or error
                continue
            if len(shape) not in (2, 3) or 0 in shape:
                raise InputError(f"{self.path}: latents of shape {shape}; expected (C, h, w)")
            return shape
        raise InputError(
            f"{self.path}: none of {len(self.names)} items can be read; first: {reason}"
        )


def open_foreign(path: Path | str) -> ForeignCache:
    """Recognises what lies in a folder.

    Raises:
        InputError: nothing that is known, or nothing at all.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is no folder")
    shards = sorted(path.rglob("*.safetensors"))
    if shards:
        return _open_lightningdit(path, shards)
    files = sorted(path.rglob("*.npz"))
    if files:
        return _open_mar(path, files)
    files = sorted(p for p in path.rglob("*.npy") if "label" not in p.name)
    if files:
        return _open_edm2(path, files)
    raise InputError(
        f"{path} holds no cache that can be imported: neither .npz files (MAR), .safetensors "
        "shards (LightningDiT) nor .npy files (EDM2, REPA)"
    )


def import_cache(
    source: ForeignCache | Path | str,
    target: Path | str,
    *,
    encoder: Mapping[str, Any] | None = None,
    store_format: StoreFormat = "webdataset",
    shards: int | None = None,
    rows_per_record: int = ROWS_PER_RECORD,
    seed: int = 0,
    stats: LatentStats | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> Manifest | None:
    """Writes a verified cache of another project's one. The same call goes on where it stopped.

    Args:
        source: what :func:`open_foreign` gave, or the folder.
        encoder: identity of the encoder that made it, as a tokenizer states it; without one, the
            cache is identified by its files alone, and no tokenizer will be found to fit it.
        shards: about how many; by default 4096 images each.
        stats: normalise with these instead of the set's own statistics.
        progress: called with the number of images after each shard.

    Returns:
        The manifest, or None while shards of other processes are missing.

    Raises:
        InputError: nothing that is known, or no readable image. Bad items are quarantined.
        MismatchError, CacheError, StorageError: see :class:`CacheWriter`.
    """
    foreign = source if isinstance(source, ForeignCache) else open_foreign(source)
    shape = foreign.shape()
    count = len(foreign.names)
    identity = foreign.identity()
    plan = CachePlan(
        count=count,
        rows_per_shard=shard_rows(count, shards or max(1, count // 4096), rows_per_record),
        rows_per_record=rows_per_record,
        grid=shape[1:],
        channels=shape[0],
        encoder=dict(encoder or {"imported": identity}),
        preprocessing={"imported": foreign.kind},
        sources=identity,
        class_names=foreign.class_names,
        views=foreign.views,
        fields=foreign.fields,
        format=store_format,
        seed=seed,
        stats=stats,
    )
    writer = CacheWriter.open(target, plan, paths=foreign.names)
    for shard in writer.pending(rank, world):
        _import_shard(foreign, writer, shard, shape)
        progress(len(writer.rows(shard)))
    return writer.finalize() if writer.is_complete() else None


def _import_shard(
    foreign: ForeignCache, writer: CacheWriter, shard: int, shape: tuple[int, ...]
) -> None:
    ids: list[int] = []
    items: list[Item] = []
    quarantined: list[tuple[int, str, str]] = []
    for i in writer.rows(shard).tolist():
        try:
            item = _checked(foreign.item(i), shape)
        except InputError as error:
            quarantined.append((i, foreign.names[i], str(error)))
            continue
        ids.append(i)
        items.append(item)
    empty = np.empty((0, *shape), np.float32)

    def rows(view: str, field: str) -> np.ndarray:
        """(R, N, C) from channels first."""
        values = np.stack([item[f"{view}/{field}"] for item in items]) if items else empty
        return values.reshape(len(values), shape[0], -1).transpose(0, 2, 1)

    moments = {
        view: (rows(view, "mean"), rows(view, "std") if "std" in foreign.fields else None)
        for view in foreign.views
    }
    writer.commit(shard, moments, foreign.labels[ids], np.array(ids, np.int64), quarantined)


def _checked(item: Item, shape: tuple[int, ...]) -> Item:
    for name, values in item.items():
        if values.shape != shape:
            raise InputError(f"{name} has shape {values.shape} instead of {shape}")
        if not np.isfinite(values).all():
            raise InputError(f"{name} is not finite")
    return item


def _checked_labels(labels: Sequence[Any], path: Path) -> np.ndarray:
    """Labels (N,) int32 of what a file gives.

    Raises:
        InputError: one is no whole number, or outside what a cache can hold.
    """
    end = label_end(())
    for label in labels:
        if not isinstance(label, int) or not -1 <= label < end:
            raise InputError(
                f"{path}: {str(label)[:80]} is no label; labels must be whole numbers from -1 "
                f"(unlabelled) to {end - 1}"
            )
    return np.array(labels, np.int32)


def _halves(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if moments.ndim == 4 and moments.shape[0] == 1:
        moments = moments[0]
    if moments.dtype.kind != "f" or moments.ndim < 2 or moments.shape[0] % 2:
        raise ValueError(f"moments of shape {moments.shape}, {moments.dtype}")
    first, second = np.split(moments.astype(np.float32), 2)
    return first, second


def _open_mar(root: Path, files: list[Path]) -> ForeignCache:
    classes = sorted({p.parent.relative_to(root).as_posix() for p in files})
    flat = classes == ["."]
    number = {name: -1 if flat else i for i, name in enumerate(classes)}
    labels = [number[p.parent.relative_to(root).as_posix()] for p in files]

    def read(i: int) -> Item:
        item: Item = {}
        with np.load(files[i], allow_pickle=False) as arrays:
            for view, name in zip(VIEWS, ("moments", "moments_flip"), strict=True):
                mean, logvar = _halves(arrays[name])
                item[f"{view}/mean"] = mean
                item[f"{view}/std"] = np.exp(0.5 * np.clip(logvar, LOGVAR_MIN, LOGVAR_MAX))
        return item

    return ForeignCache(
        root,
        "mar",
        [printable(p.relative_to(root).as_posix()) for p in files],
        np.array(labels, np.int32),
        () if flat else tuple(map(printable, classes)),
        VIEWS,
        FIELDS,
        read,
        [p.stat().st_size for p in files],
    )


def _open_lightningdit(root: Path, files: list[Path]) -> ForeignCache:
    names: list[str] = []
    labels: list[np.ndarray] = []
    places: list[tuple[Path, int]] = []
    for path in files:
        with (
            input_errors(f"{path} is no shard of latents"),
            safe_open(path, framework="pt") as file,
        ):
            found = _checked_labels(file.get_tensor("labels").tolist(), path)
            rows = file.get_slice("latents").get_shape()[0]
        if len(found) != rows:
            raise InputError(f"{path} has {len(found)} labels for {rows} latents")
        labels.append(found)
        names += [f"{path.relative_to(root).as_posix()}#{row}" for row in range(rows)]
        places += [(path, row) for row in range(rows)]

    def read(i: int) -> Item:
        path, row = places[i]
        with safe_open(path, framework="pt") as file:  # numpy has no bfloat16
            return {
                f"{view}/mean": file.get_slice(name)[row : row + 1][0].float().numpy()
                for view, name in zip(VIEWS, ("latents", "latents_flip"), strict=True)
            }

    sizes = [p.stat().st_size for p in files]
    every = np.concatenate(labels)
    return ForeignCache(root, "lightningdit", names, every, (), VIEWS, ("mean",), read, sizes)


def _open_edm2(root: Path, files: list[Path]) -> ForeignCache:
    labels = np.full(len(files), -1, np.int32)
    listed = root / "dataset.json"
    names = [p.relative_to(root).as_posix() for p in files]
    if listed.exists():
        value = read_json(listed)
        try:
            known = {str(name): label for name, label in (value["labels"] or [])}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{listed} does not list labels as EDM2 does: {error!r}") from error
        labels = _checked_labels([known.get(name, -1) for name in names], listed)

    def read(i: int) -> Item:
        mean, std = _halves(np.load(files[i], allow_pickle=False))
        if (std < 0).any():
            raise ValueError("a standard deviation is negative")
        return {"image/mean": mean, "image/std": std}

    sizes = [p.stat().st_size for p in files]
    names = list(map(printable, names))
    return ForeignCache(root, "edm2", names, labels, (), VIEWS[:1], FIELDS, read, sizes)
