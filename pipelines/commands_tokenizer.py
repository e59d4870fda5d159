"""Commands about tokenizers: training and evaluation."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from detok_pipe.pipelines.cli_cache_options import IMAGES
from detok_pipe.pipelines.cli_options import (
    FOLDER,
    PATH,
    device_option,
    out_option,
    quiet_option,
    together,
    tokenizer_argument,
)
from detok_pipe.pipelines.cli_score_options import open_processes
from detok_pipe.pipelines.cli_train_options import (
    execution,
    execution_options,
    print_plan,
    resolved,
)
from detok_pipe.pipelines.config import Perceptual
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice

PICTURE_SIDE = 128
"""Images in pictures are shrunk to so many pixels."""


def numbers(below: float) -> Callable[[click.Context, click.Parameter, str], list[float]]:
    """Reads numbers that are written with commas, from 0 up to, not including, ``below``."""

    def read(_: click.Context, option: click.Parameter, text: str) -> list[float]:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            raise click.BadParameter(f"{text!r}: write numbers with commas, as 0,0.5") from None
        if not all(0 <= value < below for value in values):
            raise click.BadParameter(f"{text}: the numbers must be at least 0 and below {below:g}")
        return values

    return read


measure_options = together(
    click.option(
        "--features",
        type=click.Choice(["inception", "efficientnet-lite2", "none"]),
        default="inception",
        show_default=True,
        help="Network of the distance: inception gives rFID, efficientnet-lite2 rFD-EffLite2.",
    ),
    click.option(
        "--resolution", type=click.IntRange(64, 1024), help="Of efficientnet-lite2's input (260)."
    ),
    click.option("--lpips/--no-lpips", default=False, help="Also LPIPS (needs VGG16's weights)."),
    click.option(
        "--weights-dir",
        type=FOLDER,
        help="Where published weights lie (VGG16, ConvNeXt, Inception); else torch hub's folder.",
    ),
)


@click.command("train-tok")
@click.argument("preset")
@click.option(
    "--data",
    type=IMAGES,
    required=True,
    metavar="PATH|URL",
    help="Class folders, a list file, or tars.",
)
@out_option("Run directory; the same command again goes on where it stopped.")
@click.option(
    "--finetune-decoder",
    "finetune",
    type=FOLDER,
    metavar="RUN",
    help="Tokenizer run whose decoder alone is trained, by a preset for that; RUN is only read.",
)
@click.option(
    "--val-data",
    type=IMAGES,
    metavar="PATH|URL",
    help="Images to score and picture the tokenizer on while it trains.",
)
@click.option("--val-limit", type=click.IntRange(2), help="Score only so many of them.")
@click.option(
    "--perceptual",
    type=click.Choice(get_args(Perceptual)),
    help="Networks of the perceptual loss; the presets' is lpips+convnext. Same as "
    "--set perceptual=NAME.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(1),
    default=5000,
    show_default=True,
    help="Steps between pictures, and between scores where there is --val-data.",
)
@measure_options
@execution_options
def train_tok(
    preset: str,
    data: Path,
    out: Path,
    finetune: Path | None,
    val_data: Path | None,
    val_limit: int | None,
    eval_every: int,
    features: str,
    resolution: int | None,
    lpips: bool,
    weights_dir: Path | None,
    perceptual: Perceptual | None,
    **values: Any,
) -> None:
    """Train the l-DeTok tokenizer of PRESET on images.

    \b
    Example:
      detok-pipe train-tok detok-bb --data imagenet/train --val-data imagenet/val --out runs/tok
      detok-pipe train-tok detok-sb --data photos --out runs/small --set "duration=20 epochs"
      detok-pipe train-tok detok-decoder --finetune-decoder runs/tok --data imagenet/train \\
        --out runs/tok-tuned
    """
    from detok_pipe.latents.errors import ConfigError
    from detok_pipe.pipelines.images import open_images
    from detok_pipe.pipelines.tokenizer_inspection import Validation
    from detok_pipe.pipelines.tokenizer_presets import tokenizer_preset
    from detok_pipe.pipelines.train_tokenizer import (
        NETWORK,
        describe,
        train_tokenizer,
        with_network_of,
    )

    if val_limit is not None and val_data is None:
        raise ConfigError(
            f"--val-limit {val_limit} is of --val-data; give that too, or leave this out"
        )
    for override in values["overrides"]:
        if finetune is not None and override.partition("=")[0].strip() in NETWORK:
            raise ConfigError(
                f"--set {override}: the network is that of --finetune-decoder {finetune}; "
                "leave it out"
            )
    config = resolved(tokenizer_preset, preset, values, perceptual=perceptual)
    config = with_network_of(config, finetune)
    if values["dry_run"]:
        print_plan(config, describe(config, open_images(data)))
        return
    validation = Validation(
        every=eval_every,
        data=val_data,
        limit=val_limit,
        features=features,
        resolution=resolution,
        lpips=lpips,
        weights_dir=weights_dir,
    )
    train_tokenizer(
        config,
        data,
        out,
        execution(values),
        finetune=finetune,
        validation=validation,
        weights_dir=weights_dir,
    )


@click.command("eval-tok")
@tokenizer_argument
@click.option(
    "--data",
    type=IMAGES,
    required=True,
    metavar="PATH|URL",
    help="Images to rebuild, best held-out ones.",
)
@click.option("--limit", type=click.IntRange(2), help="Only so many images, evenly spread.")
@measure_options
@click.option("--picture", type=PATH, help="Write originals above reconstructions to this PNG.")
@click.option(
    "--corruption",
    type=PATH,
    metavar="PNG",
    help="Also rebuild 32 images from noisy and partly hidden latents: PSNR in the JSON, and this "
    "picture. For l-DeTok tokenizers.",
)
@click.option(
    "--noise-levels",
    "levels",
    default="0,0.5,1,2",
    show_default=True,
    callback=numbers(below=math.inf),
    help="Of --corruption, in units of the tokenizer's latent std.",
)
@click.option(
    "--hidden",
    default="0,0.3,0.5,0.7",
    show_default=True,
    callback=numbers(below=1),
    help="Of --corruption: shares of the tokens.",
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@device_option
@quiet_option
@click.pass_context
def eval_tok(
    context: click.Context,
    tokenizer: TokenizerChoice,
    data: Path,
    limit: int | None,
    features: str,
    resolution: int | None,
    lpips: bool,
    weights_dir: Path | None,
    picture: Path | None,
    corruption: Path | None,
    levels: list[float],
    hidden: list[float],
    batch_size: int,
    device: str | None,
    quiet: bool,
) -> None:
    """Measure how well TOKENIZER, a run or a published one, rebuilds images, as JSON.

    \b
    Example:
      detok-pipe eval-tok runs/tok --data imagenet/val
      detok-pipe eval-tok runs/tok --data photos --features none --corruption corrupted.png
      detok-pipe eval-tok sd-vae --data imagenet/val --picture rebuilt.png
    """
    from detok_pipe.pipelines import pictures
    from detok_pipe.pipelines.corruption_study import study_run
    from detok_pipe.pipelines.images import open_images
    from detok_pipe.pipelines.reconstruct import (
        evaluate_tokenizer,
        evenly_spaced,
        load_squares,
        open_measures,
        reconstruction_picture,
    )
    from detok_pipe.pipelines.tokenizers import open_tokenizer

    processes = open_processes(device)
    measured = open_tokenizer(tokenizer, device=processes.device)
    source = open_images(data)
    measures = open_measures(
        processes, features=features, resolution=resolution, lpips=lpips, weights_dir=weights_dir
    )
    # Pictures come first: they take seconds, and what is wrong with them shows at once.
    study = None
    if processes.is_main and (picture is not None or corruption is not None):
        pixels, _ = load_squares(source, evenly_spaced(len(source), 32), measured.image_size)
        if picture is not None:
            drawn = reconstruction_picture(
                measured.model, pixels[::2], side=PICTURE_SIDE, device=processes.device
            )
            pictures.save(picture, drawn)
        if corruption is not None:
            study = study_run(
                measured, pixels, levels=levels, ratios=hidden, device=processes.device
            )
            rows = study.rows(pixels, slice(None, None, 4))
            pictures.save(corruption, pictures.labelled_grid(rows, side=PICTURE_SIDE))
    scores = evaluate_tokenizer(
        measured.model,
        source,
        image_size=measured.image_size,
        **measures,
        device=processes.device,
        batch_size=batch_size,
        limit=limit,
        accelerator=processes.accelerator,
        quiet=quiet,
    )
    if study is not None:
        scores["corruption"] = study.to_json()
    if processes.is_main:
        click.echo(json.dumps(scores, indent=2))
    if scores["unreadable"]:
        context.exit(3)
