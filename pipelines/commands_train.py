"""Commands about runs: training, evaluation of tokenizers, import and export, presets."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from detok_pipe.pipelines.cli_options import (
    FOLDER,
    PATH,
    Command,
    device_option,
    dry_run_option,
    out_option,
    quiet_option,
    set_option,
    tokenizer_option,
)


def _execution_options(function: Command) -> Command:
    """Options of how a run is carried out, the same for both trainers."""
    options = [
        click.option(
            "--micro-batch",
            type=click.IntRange(1),
            help="Rows a process computes at once; gradients add up to the global batch.",
        ),
        click.option(
            "--checkpoint-every",
            type=click.IntRange(1),
            default=1000,
            show_default=True,
            help="Steps between checkpoints.",
        ),
        click.option(
            "--log-every",
            type=click.IntRange(1),
            default=20,
            show_default=True,
            help="Steps between lines of metrics.jsonl.",
        ),
        click.option("--compile", "compile_", is_flag=True, help="Use torch.compile."),
        click.option(
            "--tracker",
            "trackers",
            multiple=True,
            default=["tensorboard"],
            show_default=True,
            help="Accelerate tracker (tensorboard, wandb, ...). May be repeated.",
        ),
        click.option(
            "--seed", type=click.IntRange(0), help="Seed; the preset's is 0. Same as --set seed=N."
        ),
        device_option,
        quiet_option,
        set_option,
        dry_run_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _execution(values: dict[str, Any]) -> Any:
    from detok_pipe.pipelines.config import Execution

    return Execution(
        device=values["device"],
        micro_batch=values["micro_batch"],
        log_every=values["log_every"],
        checkpoint_every=values["checkpoint_every"],
        compile=values["compile_"],
        trackers=tuple(values["trackers"]),
        quiet=values["quiet"],
    )


def _resolved(preset: Callable[[str], Any], name: str, values: dict[str, Any]) -> Any:
    from detok_pipe.pipelines.config import with_overrides

    overrides = list(values["overrides"])
    if values["seed"] is not None:
        overrides.append(f"seed={values['seed']}")
    return with_overrides(preset(name), overrides)


def _print_plan(config: Any, facts: dict[str, Any]) -> None:
    from detok_pipe.pipelines.config import to_json

    click.echo(json.dumps({"config": to_json(config), **facts}, indent=2))


@click.command("train-tok")
@click.argument("preset")
@click.option("--data", type=PATH, required=True, help="Class folders, a list file, or tars.")
@out_option("Run directory; the same command again goes on where it stopped.")
@click.option("--weights-dir", type=FOLDER, help="Where published weights lie (VGG16, ConvNeXt).")
@_execution_options
def train_tok(preset: str, data: Path, out: Path, weights_dir: Path | None, **values: Any) -> None:
    """Train the l-DeTok tokenizer of PRESET on images.

    \b
    Example:
      detok-pipe train-tok detok-bb --data imagenet/train --out runs/tok
      detok-pipe train-tok detok-sb --data photos --out runs/small --set "duration=20 epochs"
    """
    from detok_pipe.pipelines.images import open_images
    from detok_pipe.pipelines.presets import tokenizer_preset
    from detok_pipe.pipelines.train_tokenizer import describe, train_tokenizer

    config = _resolved(tokenizer_preset, preset, values)
    if values["dry_run"]:
        _print_plan(config, describe(config, open_images(data)))
    else:
        train_tokenizer(config, data, out, _execution(values), weights_dir=weights_dir)


@click.command("eval-tok")
@click.argument("run", type=FOLDER)
@click.option("--data", type=PATH, required=True, help="Images to rebuild, best held-out ones.")
@click.option("--limit", type=click.IntRange(2), help="Only so many images, evenly spread.")
@click.option(
    "--features",
    type=click.Choice(["inception", "efficientnet-lite2", "none"]),
    default="inception",
    show_default=True,
    help="Network of the distance: inception gives rFID, efficientnet-lite2 rFD-EffLite2.",
)
@click.option("--resolution", type=click.IntRange(32), help="Of efficientnet-lite2's input.")
@click.option("--lpips/--no-lpips", default=False, help="Also LPIPS (needs VGG16's weights).")
@click.option("--weights-dir", type=FOLDER, help="Where published weights lie.")
@click.option("--picture", type=PATH, help="Write originals above reconstructions to this PNG.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@device_option
@quiet_option
@click.pass_context
def eval_tok(
    context: click.Context,
    run: Path,
    data: Path,
    limit: int | None,
    features: str,
    resolution: int | None,
    lpips: bool,
    weights_dir: Path | None,
    picture: Path | None,
    batch_size: int,
    device: str | None,
    quiet: bool,
) -> None:
    """Measure how well the tokenizer of RUN rebuilds images, as JSON, and picture it.

    \b
    Example:
      detok-pipe eval-tok runs/tok --data imagenet/val
      detok-pipe eval-tok runs/tok --data photos --features none --picture rebuilt.png
    """
    from detok_pipe.evaluation.features import load_extractor
    from detok_pipe.pipelines import pictures
    from detok_pipe.pipelines.config import Execution
    from detok_pipe.pipelines.images import open_images
    from detok_pipe.pipelines.perceptual import lpips_term
    from detok_pipe.pipelines.reconstruct import (
        evaluate_tokenizer,
        evenly_spaced,
        load_squares,
        reconstruction_picture,
    )
    from detok_pipe.pipelines.trained import load_tokenizer
    from detok_pipe.pipelines.training import make_accelerator

    accelerator = make_accelerator("fp32", Execution(device=device, trackers=()))
    target = accelerator.device
    tokenizer = load_tokenizer(run, device=target)
    source = open_images(data)
    scores = evaluate_tokenizer(
        tokenizer.model,
        source,
        image_size=tokenizer.image_size,
        extractor=None
        if features == "none"
        else load_extractor(
            features, resolution=resolution, weights_dir=weights_dir, device=target
        ),
        lpips=lpips_term(weights_dir=weights_dir).to(target) if lpips else None,
        device=target,
        batch_size=batch_size,
        limit=limit,
        accelerator=accelerator,
        quiet=quiet,
    )
    if accelerator.is_main_process:
        if picture is not None:
            some = evenly_spaced(len(source), 16)
            pixels, _ = load_squares(source, some, tokenizer.image_size)
            drawn = reconstruction_picture(tokenizer.model, pixels, device=target)
            pictures.save(picture, drawn)
        click.echo(json.dumps(scores, indent=2))
    if scores["unreadable"]:
        context.exit(3)


@click.command("train-gen")
@click.argument("preset")
@click.option("--latents", type=FOLDER, required=True, help="A finished latent cache.")
@out_option("Run directory; the same command again goes on where it stopped.")
@_execution_options
def train_gen(preset: str, latents: Path, out: Path, **values: Any) -> None:
    """Train the generator of PRESET from a latent cache.

    \b
    Example:
      detok-pipe train-gen mar-l --latents cache --out runs/mar-l
      accelerate launch --num_processes 8 -m detok_pipe.pipelines.cli \\
        train-gen sit-b --latents cache --out runs/sit-b
      detok-pipe train-gen mar-b --latents cache --out runs/tiny --set model.width=256
    """
    from detok_pipe.latents.cache import open_cache
    from detok_pipe.pipelines.presets import generator_preset
    from detok_pipe.pipelines.train_generator import describe, train_generator

    config = _resolved(generator_preset, preset, values)
    if values["dry_run"]:
        _print_plan(config, describe(config, open_cache(latents)))
    else:
        train_generator(config, latents, out, _execution(values))


@click.command("import-checkpoint")
@click.argument("file", type=PATH)
@click.option("--as", "name", required=True, help="What it is: detok-bb, mar-l, sit-b, ...")
@out_option("Run directory to make.")
@click.option("--stats", type=PATH, help="Of a generator's latents: the released stats.pkl.")
@tokenizer_option(required=False)
@click.option("--grid", help="Of a generator's latents, as 16x16; default: a square one.")
@set_option
def import_checkpoint(
    file: Path,
    name: str,
    out: Path,
    stats: Path | None,
    tokenizer: Path | None,
    grid: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Make a run directory from the released checkpoint FILE; no code in it is run.

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
        if not all(part.isdigit() and int(part) for part in parts):
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
    from detok_pipe.pipelines import presets as table
    from detok_pipe.pipelines.config import to_json

    if name is None:
        for kind, entries in (
            ("tokenizers (train-tok)", table.TOKENIZER_PRESETS),
            ("generators (train-gen)", table.GENERATOR_PRESETS),
        ):
            click.echo(f"{kind}:")
            for preset, described in entries.items():
                click.echo(f"  {preset:20} {(described.__doc__ or '').splitlines()[0]}")
        others = sorted(set(table.generator_names()) - table.GENERATOR_PRESETS.keys())
        click.echo(f"other generators, with the common recipe: {', '.join(others)}")
        return
    recipe: Callable[[], Any] | None = {
        **table.TOKENIZER_PRESETS,
        **table.GENERATOR_PRESETS,
    }.get(name)
    if recipe is not None:
        click.echo(inspect.getdoc(recipe))
    config = recipe() if recipe is not None else table.generator_preset(name)
    click.echo(json.dumps(to_json(config), indent=2))
