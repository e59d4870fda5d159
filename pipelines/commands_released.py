"""Commands about recipes and released checkpoints."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from detok_pipe.pipelines.cli_options import FOLDER, PATH, out_option, set_option, tokenizer_option
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice


@click.command("import-checkpoint")
@click.argument("file", type=PATH)
@click.option("--as", "name", required=True, help="What it is: detok-bb, mar-l, sit-b, ...")
@out_option("Run directory to make.")
@click.option(
    "--stats",
    type=PATH,
    help="Of a generator's latents: the released stats.pkl, or .safetensors with mean and std. "
    "Default: a published tokenizer's own.",
)
@tokenizer_option(required=False)
@click.option("--grid", help="Of a generator's latents, as 16x16; default: a square one.")
@set_option
def import_checkpoint(
    file: Path,
    name: str,
    out: Path,
    stats: Path | None,
    tokenizer: TokenizerChoice | None,
    grid: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Make a run directory from the released checkpoint FILE; no code in it is run.

    A generator needs --tokenizer; --stats, --tokenizer and --grid are for generators alone.

    \b
    Example:
      detok-pipe import-checkpoint detok-BB.pth --as detok-bb --out runs/tok
      detok-pipe import-checkpoint mar-l.pth --as mar-l --stats stats.pkl \\
        --tokenizer runs/tok --out runs/mar-l
    """
    from detok_pipe.latents.errors import ConfigError
    from detok_pipe.pipelines.released import import_checkpoint as run

    sides = None
    if grid is not None:
        parts = grid.lower().split("x")
        if not all(part.isdecimal() and int(part) for part in parts):
            raise ConfigError(f"--grid {grid}: write it as 16x16, or as 128 for a sequence")
        sides = tuple(int(part) for part in parts)
    run(file, name, out, overrides=overrides, stats=stats, tokenizer=tokenizer, grid=sides)
    click.echo(f"{out}: {name} from {file}")


@click.command("export-checkpoint")
@click.argument("run", type=FOLDER)
@click.option("--out", type=PATH, required=True, help="The .pth to write.")
def export_checkpoint(run: Path, out: Path) -> None:
    """Write the newest weights of RUN, and their EMA, as the released .pth files are.

    \b
    Example:
      detok-pipe export-checkpoint runs/mar-l --out mar-l.pth
    """
    from detok_pipe.pipelines.released import export_checkpoint as write

    write(run, out)
    click.echo(f"{out}: model and model_ema of {run}")


@click.command("presets")
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List the recipes, or show one with all its values.

    \b
    Example:
      detok-pipe presets
      detok-pipe presets mar-l
    """
    from detok_pipe.generators.registry import generator_names
    from detok_pipe.pipelines.config import to_json
    from detok_pipe.pipelines.generator_presets import GENERATOR_PRESETS, generator_preset
    from detok_pipe.pipelines.tokenizer_presets import TOKENIZER_PRESETS, list_presets

    if name is None:
        generators = [(n, (r.__doc__ or "").splitlines()[0]) for n, r in GENERATOR_PRESETS.items()]
        for kind, entries in (
            ("tokenizers (train-tok)", list_presets()),
            ("generators (train-gen)", generators),
        ):
            click.echo(f"{kind}:")
            for preset, summary in entries:
                click.echo(f"  {preset:24} {summary}")
        others = sorted(set(generator_names()) - GENERATOR_PRESETS.keys())
        click.echo(f"other generators, with the common recipe: {', '.join(others)}")
        return
    recipe: Callable[[], Any] | None = {
        **TOKENIZER_PRESETS,
        **GENERATOR_PRESETS,
    }.get(name)
    if recipe is not None:
        click.echo(inspect.getdoc(recipe))
    config = recipe() if recipe is not None else generator_preset(name)
    click.echo(json.dumps(to_json(config), indent=2))


@click.command("tokenizers")
def tokenizers() -> None:
    """List the published tokenizers: latents at 256 pixels, parameters, weights.

    \b
    Example:
      detok-pipe tokenizers
      detok-pipe encode --tokenizer va-vae --data imagenet/train --out cache
    """
    from detok_pipe.pipelines.hub_weights import cached, where_to_get
    from detok_pipe.pipelines.published_tokenizers import PUBLISHED_TOKENIZERS

    for name, published in PUBLISHED_TOKENIZERS.items():
        latents = " x ".join(map(str, published.latents))
        millions = f"{published.parameters / 1e6:.1f} M parameters"
        click.echo(f"{name}: {published.title}; {latents}, {millions}")
        missing = f"not here; downloaded at their first use, or {where_to_get(published)}"
        click.echo(f"  weights: {cached(published, published.weights) or missing}")
    click.echo("l-DeTok tokenizers go by their run directories: train-tok, import-checkpoint")
