"""Commands about latent caches: ``plan``, ``encode``, ``finalize``, ``info``, ``verify``,
``convert``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from detok_pipe.pipelines.cli_options import (
    FOLDER,
    PATH,
    Command,
    device_option,
    out_option,
    quiet_option,
    seed_option,
    tokenizer_option,
)
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice

DONE_WITH_QUARANTINE = 3
"""Exit code: everything is done, but some inputs were unreadable and are listed."""


def _cache_options(function: Command) -> Command:
    """What decides about the form of a cache, the same for ``plan`` and ``encode``."""
    options: list[Callable[[Any], Any]] = [
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
            "--mirror/--no-mirror", default=True, help="Also encode each image's mirror image."
        ),
        click.option(
            "--std/--no-std",
            default=True,
            help="Store the posterior's std too, which drawing samples needs.",
        ),
        click.option(
            "--rows-per-record",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Rows of a tar record or Zarr chunk.",
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
        seed_option,
        device_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _max_pixels_option(function: Command) -> Command:
    return click.option(
        "--max-pixels",
        type=click.IntRange(1),
        default=178_956_970,
        show_default=True,
        help="Larger images are quarantined.",
    )(function)


@click.command("encode")
@tokenizer_option()
@click.option("--data", type=PATH, required=True, help="Class folders, a list file, or tars.")
@click.option("--data-root", type=FOLDER, help="Where relative paths of a list file start.")
@out_option("The cache's folder; the same command again goes on where it stopped.")
@_cache_options
@_max_pixels_option
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Compute threads on a CPU. Default: those of the encode begun in --out, or torch's.",
)
@click.option("--strict", is_flag=True, help="Stop at the first unreadable image.")
@click.option(
    "--rank",
    type=click.IntRange(0),
    default=0,
    envvar="RANK",
    help="This process's number. Default: RANK, as accelerate launch and torchrun set it.",
)
@click.option(
    "--world",
    type=click.IntRange(1),
    default=1,
    envvar="WORLD_SIZE",
    help="How many processes there are. Default: WORLD_SIZE. It may change between calls.",
)
@quiet_option
@click.pass_context
def encode(
    context: click.Context,
    tokenizer: TokenizerChoice,
    data: Path,
    data_root: Path | None,
    out: Path,
    max_pixels: int,
    threads: int | None,
    strict: bool,
    rank: int,
    world: int,
    quiet: bool,
    device: str | None,
    **form: Any,
) -> None:
    """Write the latent cache of an image set.

    Exits with 3 if the cache is finished and some images were unreadable; those are listed in
    quarantine.jsonl.

    \b
    Example:
      detok-pipe encode --tokenizer runs/tok --data imagenet/train --out cache --shards 313
      detok-pipe encode --tokenizer sd-vae --data imagenet/train --out cache-sd
    Eight GPUs, and a Slurm array (no process waits for another; any may be restarted):
      torchrun --nproc_per_node 8 -m detok_pipe.pipelines.cli encode ...
      detok-pipe encode ... --rank $SLURM_ARRAY_TASK_ID --world $SLURM_ARRAY_TASK_COUNT
    """
    from detok_pipe.pipelines.devices import resolve_device
    from detok_pipe.pipelines.encode import encode as run
    from detok_pipe.pipelines.encode import make_plan, planned_threads
    from detok_pipe.pipelines.images import open_images
    from detok_pipe.pipelines.progress import say
    from detok_pipe.pipelines.tokenizers import open_tokenizer

    target = resolve_device(device)
    source = open_images(data, root=data_root, max_pixels=max_pixels)
    trained = open_tokenizer(tokenizer, device=target)
    threads = threads or planned_threads(out)
    plan = make_plan(trained, source, device=target, threads=threads, **form)
    say(f"{plan.count:,} images, {plan.shards} shards of {plan.rows_per_shard}", quiet=quiet)
    done = run(
        trained,
        source,
        out,
        plan,
        rank=rank,
        world=world,
        device=target,
        strict=strict,
        quiet=quiet,
    )
    if done.manifest is None:
        say(f"the shards of process {rank} are done; others are still missing", quiet=quiet)
        return
    click.echo(f"{out}: {done.manifest.count:,} images, fingerprint {done.manifest.fingerprint}")
    _exit_with_quarantine(context, out, done.manifest.quarantined)


@click.command("finalize")
@click.argument("cache", type=FOLDER)
@quiet_option
@click.pass_context
def finalize(context: click.Context, cache: Path, quiet: bool) -> None:
    """Finish a cache whose shards are all written. The last encode does this by itself.

    \b
    Example:
      detok-pipe finalize cache
    """
    from detok_pipe.latents.writer import CacheWriter
    from detok_pipe.pipelines.encode import finish

    manifest = finish(CacheWriter.resume(cache), quiet=quiet)
    click.echo(f"{cache}: {manifest.count:,} images, fingerprint {manifest.fingerprint}")
    _exit_with_quarantine(context, cache, manifest.quarantined)


@click.command("info")
@click.argument("cache", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(cache: Path, as_json: bool) -> None:
    """Describe a latent cache.

    \b
    Example:
      detok-pipe info cache
    """
    from detok_pipe.latents.verify import describe

    facts = describe(cache)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):{width}}  {_readable(value)}")


@click.command("verify")
@click.argument("cache", type=FOLDER)
@click.option("--hashes/--no-hashes", default=True, help="Read and hash every file.")
@click.option("--repair", is_flag=True, help="Mend it; needs --tokenizer and --data.")
@tokenizer_option(required=False)
@click.option("--data", type=PATH, help="The images that the cache was made from.")
@click.option("--data-root", type=FOLDER, help="Where relative paths of a list file start.")
@_max_pixels_option
@device_option
@quiet_option
@click.pass_context
def verify(
    context: click.Context,
    cache: Path,
    hashes: bool,
    repair: bool,
    tokenizer: TokenizerChoice | None,
    data: Path | None,
    data_root: Path | None,
    max_pixels: int,
    device: str | None,
    quiet: bool,
) -> None:
    """Check each shard of a latent cache, or mend it; exits with 2 if something is wrong.

    \b
    Example:
      detok-pipe verify cache
      detok-pipe verify cache --repair --tokenizer runs/tok --data imagenet/train
    """
    from detok_pipe.latents.verify import verify as check

    if repair and (tokenizer is None or data is None):
        raise click.UsageError("--repair needs --tokenizer and --data, to encode again")
    if tokenizer is not None and data is not None and repair:
        from detok_pipe.pipelines.devices import resolve_device
        from detok_pipe.pipelines.images import open_images
        from detok_pipe.pipelines.repair_cache import repair_cache
        from detok_pipe.pipelines.tokenizers import open_tokenizer

        target = resolve_device(device)
        source = open_images(data, root=data_root, max_pixels=max_pixels)
        trained = open_tokenizer(tokenizer, device=target)
        problems = repair_cache(cache, trained, source, device=target, quiet=quiet)
    else:
        problems = check(cache, hashes=hashes)
    for problem in problems:
        click.echo(str(problem))
    if problems:
        click.echo(f"{cache}: {len(problems)} problems", err=True)
        context.exit(2)
    if not quiet:
        click.echo(f"{cache}: every file is as it should be")


@click.command("convert")
@click.argument("cache", type=FOLDER)
@out_option("Folder of the converted cache.")
@click.option(
    "--format", type=click.Choice(["webdataset", "zarr"]), required=True, help="Of the new store."
)
@quiet_option
def convert(cache: Path, out: Path, format: Literal["webdataset", "zarr"], quiet: bool) -> None:
    """Convert a latent cache between WebDataset and Zarr, bit by bit the same rows.

    \b
    Example:
      detok-pipe convert cache --format zarr --out cache-zarr
    """
    from detok_pipe.latents.convert import convert as run

    manifest = run(cache, out, format)
    if not quiet:
        click.echo(f"{out}: {manifest.count:,} images as {format}")


@click.command("plan")
@click.option("--images", type=click.IntRange(1), required=True, help="How many there will be.")
@click.option(
    "--preset", default="detok-bb", show_default=True, help="Tokenizer preset to try the speed of."
)
@click.option("--processes", type=click.IntRange(1), default=1, help="Share the time among these.")
@_cache_options
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


def _exit_with_quarantine(context: click.Context, cache: Path, quarantined: int) -> None:
    if quarantined:
        click.echo(
            f"{quarantined} images were unreadable and are left out: {cache / 'quarantine.jsonl'}",
            err=True,
        )
        context.exit(DONE_WITH_QUARANTINE)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB ({count:,} bytes)"


def _readable(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple | dict):
        return json.dumps(value)
    return str(value)
