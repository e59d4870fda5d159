"""Commands that write latent caches: ``plan``, ``encode``, ``finalize``, ``convert``,
``import-cache``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from detok_pipe.pipelines.cli_cache_options import (
    CACHE,
    Target,
    encoding_options,
    given_stats,
    image_options,
    opened_images,
    process_options,
    stats_option,
    store_options,
    target_option,
    transfer_shown,
)
from detok_pipe.pipelines.cli_options import (
    FOLDER,
    device_option,
    quiet_option,
    tokenizer_option,
)
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice

if TYPE_CHECKING:
    from detok_pipe.latents.manifest import Manifest
    from detok_pipe.latents.place import Place

DONE_WITH_QUARANTINE = 3
"""Exit code: everything is done, but some inputs were unreadable and are listed."""


@click.command("encode")
@tokenizer_option()
@image_options(required=True)
@target_option
@store_options
@encoding_options
@stats_option
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Compute threads on a CPU. Default: those of the encode begun in --out, or torch's.",
)
@click.option("--strict", is_flag=True, help="Stop at the first unreadable image.")
@process_options
@device_option
@quiet_option
@click.pass_context
def encode(
    context: click.Context,
    tokenizer: TokenizerChoice,
    data: Path,
    data_root: Path | None,
    max_pixels: int,
    out: "Place",
    stats: str | None,
    threads: int | None,
    strict: bool,
    rank: int,
    world: int,
    device: str | None,
    quiet: bool,
    **form: Any,
) -> None:
    """Write the latent cache of an image set.

    Exits with 3 if the cache is finished and some images were unreadable; those are listed in
    quarantine.jsonl. Under accelerate launch or torchrun, the launcher then shows a failed process,
    although the cache is whole.

    Several processes share the shards by their numbers, without a coordinator: none waits for
    another, any may be killed and started again, and their number may change. On several nodes
    --out is a folder that all of them see (with a URL, the staging folder $DETOK_STAGING is).
    The process that writes the last shard finishes the cache; if it is killed just then, the
    same command again or `detok-pipe finalize` does.

    \b
    Example:
      detok-pipe encode --tokenizer runs/tok --data imagenet/train --out cache --shards 313
      detok-pipe encode --tokenizer sd-vae --data imagenet/train --out cache-sd
      detok-pipe encode --tokenizer runs/tok --data s3://set/tars --out s3://set/cache
    Eight GPUs of one node:
      accelerate launch --num_processes 8 -m detok_pipe.pipelines.cli encode ...
    Two nodes of eight, and sixteen jobs of a Slurm array with one GPU each:
      srun bash -c 'accelerate launch --num_processes 16 --num_machines 2 \\
        --machine_rank $SLURM_NODEID --main_process_ip $HEAD_NODE --main_process_port 29500 \\
        -m detok_pipe.pipelines.cli encode ...'
      sbatch --array 0-15 --gpus 1 --wrap 'detok-pipe encode ... \\
        --rank $SLURM_ARRAY_TASK_ID --world $SLURM_ARRAY_TASK_COUNT'
    """
    from detok_pipe.pipelines.devices import resolve_device
    from detok_pipe.pipelines.encode import encode as run
    from detok_pipe.pipelines.encode import make_plan, planned_threads
    from detok_pipe.pipelines.progress import say
    from detok_pipe.pipelines.tokenizers import open_tokenizer

    target = resolve_device(device)
    source = opened_images(data, data_root, max_pixels)
    trained = open_tokenizer(tokenizer, device=target)
    folder = out.begin(transfer_shown("fetch", quiet=quiet))
    plan = make_plan(
        trained,
        source,
        device=target,
        threads=threads or planned_threads(folder),
        stats=given_stats(stats, trained.model.channels),
        **form,
    )
    kinds = f"{len(source.class_names):,} classes" if source.class_names else "unlabelled"
    say(
        f"{plan.count:,} images, {kinds}, {plan.shards} shards of {plan.rows_per_shard}",
        quiet=quiet,
    )
    done = run(
        trained,
        source,
        folder,
        plan,
        rank=rank,
        world=world,
        device=target,
        strict=strict,
        quiet=quiet,
    )
    _finished(context, out, done.manifest, rank, quiet)


@click.command("finalize")
@click.argument("cache", type=Target())
@quiet_option
@click.pass_context
def finalize(context: click.Context, cache: "Place", quiet: bool) -> None:
    """Finish a cache whose shards are all written. The last encode does this by itself.

    CACHE is the --out of that encode; of a URL, the shards are in the staging folder
    $DETOK_STAGING.

    \b
    Example:
      detok-pipe finalize cache
      detok-pipe finalize s3://set/cache
    """
    from detok_pipe.latents.writer import CacheWriter
    from detok_pipe.pipelines.encode import finish

    manifest = finish(CacheWriter.resume(cache.folder), quiet=quiet)
    _finished(context, cache, manifest, 0, quiet)


@click.command("convert")
@click.argument("cache", type=CACHE)
@target_option
@click.option(
    "--format", type=click.Choice(["webdataset", "zarr"]), required=True, help="Of the new store."
)
@quiet_option
def convert(cache: Path, out: "Place", format: Literal["webdataset", "zarr"], quiet: bool) -> None:
    """Convert a latent cache between WebDataset and Zarr, bit by bit the same rows.

    \b
    Example:
      detok-pipe convert cache --format zarr --out cache-zarr
    """
    from detok_pipe.latents.convert import convert as run
    from detok_pipe.latents.verify import describe
    from detok_pipe.pipelines.progress import progress

    folder = out.begin(transfer_shown("fetch", quiet=quiet))
    total = describe(cache)["shards"]
    with progress("convert", total=total, unit="shards", quiet=quiet) as task:
        manifest = run(cache, folder, format, progress=lambda shard: task.advance())
    out.publish(transfer_shown("send", quiet=quiet))
    click.echo(f"{out}: {manifest.count:,} images as {format}")


@click.command("import-cache")
@click.argument("source", type=FOLDER)
@target_option
@tokenizer_option(required=False)
@store_options
@stats_option
@process_options
@quiet_option
@click.pass_context
def import_cache(
    context: click.Context,
    source: Path,
    out: "Place",
    tokenizer: TokenizerChoice | None,
    rank: int,
    world: int,
    quiet: bool,
    shards: int | None,
    format: Literal["webdataset", "zarr"],
    rows_per_record: int,
    seed: int,
    stats: str | None,
) -> None:
    """Make a verified cache of one that another project wrote.

    SOURCE is a folder of MAR's npz files, of LightningDiT's safetensors shards, or of EDM2's or
    REPA's npy files; which one is found out. --tokenizer names the encoder that made it, whose
    identity the new cache takes, and the normalisation published with it: check-cache then shows
    whether that is true. Items that cannot be read are quarantined.

    \b
    Example:
      detok-pipe import-cache mar-cached --tokenizer mar-vae --out cache
    """
    from detok_pipe.latents.errors import MismatchError
    from detok_pipe.latents.import_cache import import_cache as run
    from detok_pipe.latents.import_cache import open_foreign
    from detok_pipe.pipelines.given_stats import chosen_stats
    from detok_pipe.pipelines.progress import progress, say
    from detok_pipe.pipelines.tokenizers import open_tokenizer

    encoder = None if tokenizer is None else open_tokenizer(tokenizer)
    foreign = open_foreign(source)
    channels, *grid = foreign.shape()
    name = f"--tokenizer {tokenizer.name}" if tokenizer else "a cache without --tokenizer"
    if encoder is not None and encoder.model.channels != channels:
        raise MismatchError(
            f"the latents in {source} have {channels} channels, those of {name} "
            f"{encoder.model.channels}; name the tokenizer that made them"
        )
    if encoder is not None and tuple(encoder.model.grid) != tuple(grid):
        raise MismatchError(
            f"the latents in {source} lie on a grid of {tuple(grid)}, those of {name} on one of "
            f"{tuple(encoder.model.grid)}; name the tokenizer that made them"
        )
    say(f"{source}: {len(foreign.names):,} items of {foreign.kind}", quiet=quiet)
    folder = out.begin(transfer_shown("fetch", quiet=quiet))
    with progress("import", total=len(foreign.names), quiet=quiet) as task:
        manifest = run(
            foreign,
            folder,
            encoder=None if encoder is None else encoder.identity,
            stats=chosen_stats(
                given_stats(stats, channels), None if encoder is None else encoder.stats, name
            ),
            store_format=format,
            shards=shards,
            rows_per_record=rows_per_record,
            seed=seed,
            rank=rank,
            world=world,
            progress=task.advance,
        )
    _finished(context, out, manifest, rank, quiet)


@click.command("plan")
@click.option("--images", type=click.IntRange(1), required=True, help="How many there will be.")
@click.option(
    "--preset", default="detok-bb", show_default=True, help="Tokenizer preset to try the speed of."
)
@click.option("--processes", type=click.IntRange(1), default=1, help="Share the time among these.")
@store_options
@encoding_options
@device_option
def plan(images: int, preset: str, processes: int, device: str | None, **form: Any) -> None:
    """Estimate disk and time of an encode, from a few seconds' trial on this machine.

    \b
    Example:
      detok-pipe plan --images 1281167 --shards 313 --processes 8
    """
    from detok_pipe.pipelines.devices import resolve_device
    from detok_pipe.pipelines.encode import make_plan
    from detok_pipe.pipelines.estimate import TypicalImages, estimate, untrained
    from detok_pipe.pipelines.tokenizer_presets import tokenizer_preset

    target = resolve_device(device)
    tokenizer = untrained(tokenizer_preset(preset), target)
    result = estimate(
        tokenizer, make_plan(tokenizer, TypicalImages(images), device=target, **form), device=target
    )
    hours = result.seconds / processes / 3600
    for name, value in (
        ("images", f"{result.images:,}"),
        ("shards", f"{result.shards:,}"),
        ("files", f"{result.files:,}"),
        ("cache", _gigabytes(result.cache_bytes)),
        ("disk while finishing", _gigabytes(result.peak_bytes)),
        ("encoder, measured", f"{result.encoder_rate:,.1f} images/s on {target}"),
        ("decoding, measured", f"{result.decoder_rate:,.1f} images/s"),
        ("time, estimated", f"{hours:,.2f} hours with {processes} such processes"),
    ):
        click.echo(f"{name:22}{value}")


def _finished(
    context: click.Context, out: "Place", manifest: "Manifest | None", rank: int, quiet: bool
) -> None:
    """Sends a finished cache where it belongs, says so, and exits with the fitting code."""
    from detok_pipe.latents.publish import QUARANTINE
    from detok_pipe.pipelines.progress import say

    if manifest is None:
        say(f"the shards of process {rank} are done; others are still missing", quiet=quiet)
        return
    out.publish(transfer_shown("send", quiet=quiet))
    click.echo(f"{out}: {manifest.count:,} images, fingerprint {manifest.fingerprint}")
    if manifest.quarantined:
        click.echo(
            f"{manifest.quarantined} images were unreadable and are left out: "
            f"{out.folder / QUARANTINE}",
            err=True,
        )
        context.exit(DONE_WITH_QUARANTINE)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB ({count:,} bytes)"
