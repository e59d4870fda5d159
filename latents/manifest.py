"""The manifest of a finished latent cache: written last, checked whenever a cache is opened.

A manifest may come from someone else, so it is parsed into strict types, its paths must be plain
relative ones, and its extents must lie inside their files and cover each row exactly once.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from detok_pipe.latents.atomic import write_json
from detok_pipe.latents.errors import CacheError, ConfigError
from detok_pipe.latents.plan import (
    FIELDS,
    VIEWS,
    canonical_json,
    check_version,
)
from detok_pipe.latents.stats import LatentStats

MANIFEST = "manifest.json"
# Second copies of the manifest and the index, from which `verify --repair` restores them: what they
# say (the statistics above all) cannot be had again from normalised rows.
BACKUP = "backup"

Size = Annotated[int, Field(ge=0, lt=1 << 62)]
Positive = Annotated[int, Field(ge=1, lt=1 << 40)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Record):
    """A file of the cache: path relative to its folder, size, CRC-32C."""

    path: str
    bytes: Size
    crc32c: Annotated[int, Field(ge=0, lt=1 << 32)]


class Extent(_Record):
    """Rows in a file: record j begins at byte ``offset + j * stride`` and holds
    ``rows_per_record`` consecutive rows; the last record may be cut short."""

    file: str
    first_row: Size
    rows: Positive
    offset: Size
    stride: Size
    rows_per_record: Positive

    def end(self, row_bytes: int) -> int:
        """The first byte behind the last row."""
        records, rest = divmod(self.rows - 1, self.rows_per_record)
        return self.offset + records * self.stride + (rest + 1) * row_bytes


class StatsRecord(_Record):
    """JSON form of :class:`LatentStats`."""

    mean: list[float]
    std: list[float]
    count: int
    source: Literal["dataset", "given", "published"]
    views: list[str]


class Manifest(_Record):
    """Everything about a finished cache but its rows.

    ``encoder``, ``preprocessing`` and ``sources`` are the identities of the plan; ``stats`` is the
    normalisation that the rows have, ``measured`` the statistics of the unnormalised rows.
    ``arrays`` maps "view/field" to the extents of its rows. ``created_with`` (library versions) is
    recorded, never compared.
    """

    format_version: Literal[1]
    encode_version: Positive
    format: Literal["webdataset", "zarr"]
    count: Positive
    quarantined: Size
    grid: Annotated[list[Positive], Field(min_length=1, max_length=3)]
    channels: Positive
    views: list[Literal["image", "mirror"]]
    fields: list[Literal["mean", "std"]]
    dtype: Literal["float16"]
    condition: Literal["labels"]
    class_names: list[str]
    rows_per_shard: Positive
    rows_per_record: Positive
    seed: int
    stats: StatsRecord
    measured: StatsRecord
    encoder: dict[str, Any]
    preprocessing: dict[str, Any]
    sources: dict[str, Any]
    encoding: dict[str, Any]
    created_with: dict[str, Any]
    files: list[FileRecord]
    arrays: dict[str, list[Extent]]
    fingerprint: str
    digest: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.views not in (list(VIEWS), list(VIEWS[:1])):
            raise ValueError(f"views are {self.views}")
        if self.fields not in (list(FIELDS), list(FIELDS[:1])):
            raise ValueError(f"fields are {self.fields}")
        sizes = {record.path: record.bytes for record in self.files}
        if len(sizes) != len(self.files):
            raise ValueError("a file is listed twice")
        for path in sizes:
            check_relative(path)
        if set(self.arrays) != {f"{v}/{f}" for v in self.views for f in self.fields}:
            raise ValueError(f"arrays are {sorted(self.arrays)}")
        for name, extents in self.arrays.items():
            row = 0
            for extent in extents:
                if extent.file not in sizes:
                    raise ValueError(f"{name} lies in {extent.file}, which is not listed")
                if extent.first_row != row:
                    raise ValueError(f"{name} has a gap or an overlap at row {row}")
                if extent.end(self.row_bytes) > sizes[extent.file]:
                    raise ValueError(f"{name} reaches beyond the end of {extent.file}")
                row += extent.rows
            if row != self.count:
                raise ValueError(f"{name} has {row} rows, the cache {self.count}")
        for stats in (self.stats, self.measured):
            try:
                channels = LatentStats.from_json(stats.model_dump()).channels
            except ConfigError as error:
                raise ValueError(str(error)) from error
            if channels != self.channels:
                raise ValueError(f"statistics of {channels} channels, latents of {self.channels}")
        return self

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def row_shape(self) -> tuple[int, int]:
        """(N, C)."""
        return self.tokens, self.channels

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.channels * 2

    @property
    def latent_stats(self) -> LatentStats:
        return LatentStats.from_json(self.stats.model_dump())

    @property
    def measured_stats(self) -> LatentStats:
        return LatentStats.from_json(self.measured.model_dump())

    def identity(self) -> dict[str, Any]:
        """What the fingerprint covers: all that makes the rows, neither container nor release."""
        return {
            "encode_version": self.encode_version,
            "encoder": self.encoder,
            "preprocessing": self.preprocessing,
            "sources": self.sources,
            "grid": self.grid,
            "channels": self.channels,
            "views": self.views,
            "fields": self.fields,
            "dtype": self.dtype,
            "count": self.count,
            "seed": self.seed,
            "statistics": {"mean": self.stats.mean, "std": self.stats.std},
        }

    def sealed(self) -> Manifest:
        """A copy with its fingerprint and digest computed."""
        fingerprint = hashlib.sha256(canonical_json(self.identity())).hexdigest()
        with_print = self.model_copy(update={"fingerprint": fingerprint})
        return with_print.model_copy(update={"digest": with_print._digest()})

    def _digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def check_seal(self, where: str) -> None:
        """Checks that nobody changed the manifest after it was written.

        Raises:
            CacheError: its digest or fingerprint does not fit its content.
        """
        if self.sealed() != self:
            raise CacheError(
                f"{where} was changed after it was written: its digest does not fit its content; "
                "`detok-pipe verify --repair` restores it from its backup"
            )


def check_relative(path: str) -> None:
    """Checks that a name in a manifest is a plain relative path.

    Raises:
        ValueError: absolute, with "..", a drive, a backslash, or nothing.
    """
    parts = PurePosixPath(path).parts
    plain = parts and "/".join(parts) == path and not path.startswith("/")
    if not plain or ".." in parts or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"{path!r} is not a plain relative path")


def parse_manifest(value: Any, where: str) -> Manifest:
    """A manifest from JSON, checked.

    Raises:
        CacheError: of another version, not a manifest, inconsistent, or edited.
    """
    check_version(value, where)
    try:
        manifest = Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CacheError(
            f"{where} is damaged: {place + ': ' if place else ''}{first['msg']}"
        ) from error
    manifest.check_seal(where)
    return manifest


def read_json(path: Path) -> Any:
    """JSON of a file of a cache.

    Raises:
        CacheError: it is missing, cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path} is damaged: it is no JSON ({error})") from error


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of the cache in ``folder``.

    Raises:
        CacheError: missing, unreadable, damaged, edited, or of another version.
    """
    path = folder / name
    return parse_manifest(read_json(path), str(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publishes a sealed manifest: the backup first, so that a manifest always has one."""
    value = manifest.model_dump(mode="json")
    write_json(folder / BACKUP / MANIFEST, value)
    write_json(folder / MANIFEST, value)


def check_file(folder: Path, record: FileRecord) -> str | None:
    """What is wrong with a file's place and size, or None. Its hash is for :mod:`.verify`."""
    path = folder / record.path
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not path.resolve().is_relative_to(folder.resolve()):
        return "lies outside the cache (it is, or is under, a symbolic link)"
    if size != record.bytes:
        return f"has {size:,} bytes instead of {record.bytes:,}"
    return None
