"""Commands that look at latent caches: ``info``, ``verify``, ``check-cache``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from detok_pipe.pipelines.cli_cache_options import (
    CACHE,
    CACHE_PLACE,
    image_options,
    opened_images,
    transfer_shown,
)
from detok_pipe.pipelines.cli_options import (
    FOLDER,
    PATH,
    device_option,
    quiet_option,
    tokenizer_option,
)
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice

if TYPE_CHECKING:
    from detok_pipe.latents.place import Place


@click.command("info")
@click.argument("cache", type=CACHE_PLACE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(cache: "Place", as_json: bool) -> None:
    """Describe a latent cache. Of one at a URL the manifest and the index are fetched.

    \b
    Example:
      detok-pipe info cache
    """
    facts = cache.describe()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):{width}}  {_readable(value)}")


@click.command("verify")
@click.argument("cache", type=CACHE_PLACE)
@click.option("--hashes/--no-hashes", default=True, help="Read and hash every file.")
@click.option("--repair", is_flag=True, help="Mend it; needs --tokenizer and --data.")
@tokenizer_option(required=False)
@image_options(required=False)
@device_option
@quiet_option
@click.pass_context
def verify(
    context: click.Context,
    cache: "Place",
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

    A cache at a URL is copied to the staging folder first, where each file's checksum is checked as
    it arrives. The copy stays, and a later call reads that again: of the files at the URL it only
    compares names and sizes. --repair mends the copy, then sends what is wrong at the URL.

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
        from detok_pipe.pipelines.repair_cache import repair_cache
        from detok_pipe.pipelines.tokenizers import open_tokenizer

        target = resolve_device(device)
        source = opened_images(data, data_root, max_pixels)
        trained = open_tokenizer(tokenizer, device=target)
        folder = cache.fetch_whole_files(transfer_shown("fetch", quiet=quiet))
        problems = repair_cache(folder, trained, source, device=target, quiet=quiet)
        if not problems:
            cache.publish(transfer_shown("send", quiet=quiet))
    else:
        folder = cache.fetch_whole_files(transfer_shown("fetch", quiet=quiet))
        problems = check(folder, hashes=hashes)
    there = cache.problems()
    # What is missing there is missing in the copy too.
    named = {problem.file for problem in there}
    problems = there + [problem for problem in problems if problem.file not in named]
    if cache.remote and not quiet:
        click.echo(
            f"files were read from the copy in {folder}; of those at {cache} names and sizes were "
            "compared (remove the copy to have all of them fetched and hashed)"
        )
    for problem in problems:
        click.echo(str(problem))
    if problems:
        click.echo(f"{cache}: {len(problems)} problems", err=True)
        context.exit(2)
    if not quiet:
        click.echo(f"{cache}: every file is as it should be")


@click.command("check-cache")
@click.argument("cache", type=CACHE)
@tokenizer_option()
@image_options(required=True)
@click.option(
    "--num", "-n", type=click.IntRange(1), default=8, show_default=True, help="Images to compare."
)
@click.option(
    "--generator", type=FOLDER, help="Run directory of a generator whose loss to compare."
)
@click.option(
    "--out",
    type=PATH,
    default="check-cache.png",
    show_default=True,
    help="The picture: images, cached rows decoded, reconstructions without the cache.",
)
@device_option
@click.pass_context
def check_cache(
    context: click.Context,
    cache: Path,
    tokenizer: TokenizerChoice,
    data: Path,
    data_root: Path | None,
    max_pixels: int,
    num: int,
    generator: Path | None,
    out: Path,
    device: str | None,
) -> None:
    """Compare a cache with what its images give now, before days of training on it.

    Encodes some images afresh, decodes the cached rows beside them, and prints how far they are
    apart; with --generator also a generator's loss on both. Exits with 2 where they differ by
    more than rounding.

    \b
    Example:
      detok-pipe check-cache cache --tokenizer runs/tok --data imagenet/train
    """
    from detok_pipe.latents.cache import open_cache
    from detok_pipe.pipelines.check_cache import check_cache as run
    from detok_pipe.pipelines.devices import resolve_device
    from detok_pipe.pipelines.pictures import save
    from detok_pipe.pipelines.tokenizers import open_tokenizer
    from detok_pipe.pipelines.trained import load_generator

    target = resolve_device(device)
    trained = open_tokenizer(tokenizer, device=target)
    result = run(
        open_cache(cache),
        trained,
        opened_images(data, data_root, max_pixels),
        num=num,
        generator=None if generator is None else load_generator(generator, device=target),
        device=target,
    )
    save(out, result.picture)
    for line in result.lines():
        click.echo(line)
    click.echo(f"picture: {out}")
    if result.problems:
        for problem in result.problems:
            click.echo(f"error: {problem}", err=True)
        context.exit(2)


def _readable(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple | dict):
        return json.dumps(value)
    return str(value)
