"""Options that the commands about latent caches share, and what their values become."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from detok_pipe.pipelines.cli_options import FOLDER, NEW_FOLDER, PATH, seed_option, together

if TYPE_CHECKING:
    from detok_pipe.latents.place import Place
    from detok_pipe.pipelines.images import ImageSource


class Cache(click.ParamType):
    """A finished or unfinished cache to read: a path, or a URL, whose files are fetched first."""

    name = "cache"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        from detok_pipe.latents.place import Place

        place = Place(value)
        if not place.remote:
            return FOLDER.convert(value, param, ctx)
        return place.fetch(transfer_shown("fetch"))


class Images(click.ParamType):
    """Images to read: a path, or a URL, whose files are fetched first."""

    name = "images"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        from detok_pipe.latents.remote import is_remote, stage_files

        if not is_remote(value):
            return PATH.convert(value, param, ctx)
        return stage_files(value, transfer_shown("fetch"))


class CachePlace(click.ParamType):
    """Where a cache is, a path or a URL; nothing is fetched."""

    name = "cache"
    path_type = FOLDER

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> "Place":
        from detok_pipe.latents.place import Place

        if isinstance(value, Place):
            return value
        place = Place(value)
        if not place.remote:
            self.path_type.convert(value, param, ctx)
        return place


class Target(CachePlace):
    """Where a cache is to be written: a path, or a URL, which gets it when it is finished."""

    name = "folder"
    path_type = NEW_FOLDER


def transfer_shown(what: str, *, quiet: bool = False) -> Callable[[int, int], None]:
    """Prints how far a copy to or from a URL is, every few seconds."""
    from detok_pipe.pipelines.progress import SECONDS_BETWEEN_LINES, say

    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"{what}: {done:,}/{total:,} files", quiet=quiet)

    return show


CACHE = Cache()
CACHE_PLACE = CachePlace()
IMAGES = Images()

target_option = click.option(
    "--out",
    type=Target(),
    required=True,
    metavar="FOLDER|URL",
    help="The cache's folder, or a URL (s3://...) that gets the finished cache; the same command "
    "again goes on where it stopped.",
)
store_options = together(
    click.option(
        "--shards", type=click.IntRange(1), help="About how many. Default: 4096 images a shard."
    ),
    click.option(
        "--format",
        type=click.Choice(["webdataset", "zarr"]),
        default="webdataset",
        show_default=True,
        help="Of the store; convert changes it later.",
    ),
    click.option(
        "--rows-per-record",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="Rows of a tar record or Zarr chunk.",
    ),
    seed_option,
)
encoding_options = together(
    click.option("--mirror/--no-mirror", default=True, help="Also encode each mirror image."),
    click.option(
        "--std/--no-std",
        default=True,
        help="Store the posterior's std too, which drawing samples needs.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Images that the encoder computes at once.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        default="fp32",
        show_default=True,
        help="What the encoder computes in.",
    ),
)
stats_option = click.option(
    "--stats",
    metavar="FILE|published|dataset",
    help="Normalise with those of a file (a cache's manifest.json, safetensors with mean and std, "
    "or a released stats.pkl), those published with the tokenizer, or those of the whole set. "
    "Default: the published ones where there are any, else the set's.",
)
process_options = together(
    click.option(
        "--rank",
        type=click.IntRange(0),
        default=0,
        envvar="RANK",
        show_envvar=True,  # an error names it, too
        help="This process's number, which accelerate launch and torchrun set.",
    ),
    click.option(
        "--world",
        type=click.IntRange(1),
        default=1,
        envvar="WORLD_SIZE",
        show_envvar=True,
        help="How many processes there are. It may change between calls.",
    ),
)


def image_options(*, required: bool) -> Any:
    """``--data``, ``--data-root``, ``--max-pixels``: a source of images."""
    return together(
        click.option(
            "--data",
            type=IMAGES,
            required=required,
            metavar="PATH|URL",
            help="Class folders, a list file, or tars.",
        ),
        click.option("--data-root", type=FOLDER, help="Where relative paths of a list file start."),
        click.option(
            "--max-pixels",
            type=click.IntRange(1),
            default=178_956_970,
            show_default=True,
            help="Larger images are quarantined.",
        ),
    )


def opened_images(data: Path, data_root: Path | None, max_pixels: int) -> "ImageSource":
    """The source of :func:`image_options`."""
    from detok_pipe.pipelines.images import open_images

    return open_images(data, root=data_root, max_pixels=max_pixels)


def given_stats(value: str | None, channels: int) -> Any:
    """What ``--stats`` names, a ``given_stats.StatsChoice`` or None."""
    if value is None or value in ("published", "dataset"):
        return value
    from detok_pipe.pipelines.given_stats import read_stats

    return read_stats(Path(value), channels)
