"""Commands about tokenizers: training and evaluation."""

import json
from pathlib import Path
from typing import Any

import click

from detok_pipe.pipelines.cli_options import FOLDER, PATH, device_option, out_option, quiet_option
from detok_pipe.pipelines.cli_train_options import (
    execution,
    execution_options,
    print_plan,
    resolved,
)


@click.command("train-tok")
@click.argument("preset")
@click.option("--data", type=PATH, required=True, help="Class folders, a list file, or tars.")
@out_option("Run directory; the same command again goes on where it stopped.")
@click.option("--weights-dir", type=FOLDER, help="Where published weights lie (VGG16, ConvNeXt).")
@execution_options
def train_tok(preset: str, data: Path, out: Path, weights_dir: Path | None, **values: Any) -> None:
    """Train the l-DeTok tokenizer of PRESET on images.

    \b
    Example:
      detok-pipe train-tok detok-bb --data imagenet/train --out runs/tok
      detok-pipe train-tok detok-sb --data photos --out runs/small --set "duration=20 epochs"
    """
    from detok_pipe.pipelines.images import open_images
    from detok_pipe.pipelines.tokenizer_presets import tokenizer_preset
    from detok_pipe.pipelines.train_tokenizer import describe, train_tokenizer

    config = resolved(tokenizer_preset, preset, values)
    if values["dry_run"]:
        print_plan(config, describe(config, open_images(data)))
    else:
        train_tokenizer(config, data, out, execution(values), weights_dir=weights_dir)


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
