"""Commands about generators: training."""

from pathlib import Path
from typing import Any, Literal

import click

from detok_pipe.pipelines.cli_cache_options import CACHE
from detok_pipe.pipelines.cli_options import FOLDER, PATH, out_option, tokenizer_option
from detok_pipe.pipelines.cli_score_options import feature_options
from detok_pipe.pipelines.cli_train_options import (
    execution,
    execution_options,
    print_plan,
    resolved,
)
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice


@click.command("train-gen")
@click.argument("preset")
@click.option(
    "--latents",
    type=CACHE,
    required=True,
    metavar="FOLDER|URL",
    help="A finished latent cache; one at a URL (s3://...) is first copied to this machine.",
)
@click.option("--verify", is_flag=True, help="First read and hash every file of the cache.")
@out_option("Run directory; the same command again goes on where it stopped.")
@click.option(
    "--init-from",
    type=FOLDER,
    metavar="RUN",
    help="Begin with the weights of another generator run of the same network, or of one of its "
    "checkpoints (RUN/checkpoints/step-...).",
)
@click.option(
    "--init-weights",
    type=click.Choice(["ema", "model"]),
    default="ema",
    show_default=True,
    help="Which weights of it: the averaged or the last ones.",
)
@click.option(
    "--val-every",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Steps between losses of the averaged weights on the rows that --set holdout=N keeps out.",
)
@click.option(
    "--sample-every",
    type=click.IntRange(0),
    default=5000,
    show_default=True,
    help="Steps between sample grids in OUT/samples, of the averaged weights; 0: none.",
)
@click.option(
    "--score-every",
    type=click.IntRange(1),
    help="Steps between Fréchet distances of a small sample set; needs --score-ref.",
)
@click.option(
    "--score-ref", type=PATH, help="Reference statistics to score against (see fid-stats)."
)
@click.option(
    "--score-num", type=click.IntRange(2), default=1000, show_default=True, help="Samples a score."
)
@feature_options
@tokenizer_option(required=False)
@click.option(
    "--fsdp",
    is_flag=True,
    help="Shard the model over the GPUs, where it outgrows one (MAR-H, the XL and H sizes).",
)
@execution_options
def train_gen(
    preset: str,
    latents: Path,
    verify: bool,
    out: Path,
    init_from: Path | None,
    init_weights: Literal["ema", "model"],
    val_every: int,
    sample_every: int,
    score_every: int | None,
    score_ref: Path | None,
    score_num: int,
    features: str,
    resolution: int | None,
    weights_dir: Path | None,
    tokenizer: TokenizerChoice | None,
    **values: Any,
) -> None:
    """Train the generator of PRESET from a latent cache.

    SIGINT, SIGTERM and SIGUSR1 end the training with a checkpoint and the exit codes 130, 143
    and 138; the same command goes on from there.

    \b
    Example:
      detok-pipe train-gen mar-l --latents cache --out runs/mar-l
      accelerate launch --num_processes 8 -m detok_pipe.pipelines.cli \\
        train-gen sit-b --latents cache --out runs/sit-b
      detok-pipe train-gen mar-b --latents cache --out runs/tiny --set model.width=256
      detok-pipe train-gen sit-b --latents cache --out runs/sit-b --extend \\
        --set "duration=200 epochs"
    """
    from detok_pipe.latents.cache import open_cache
    from detok_pipe.pipelines.generator_inspection import Preview
    from detok_pipe.pipelines.generator_presets import generator_preset
    from detok_pipe.pipelines.train_generator import Beginning, describe, train_generator

    config = resolved(generator_preset, preset, values)
    if values["dry_run"]:
        print_plan(config, describe(config, open_cache(latents)))
        return
    train_generator(
        config,
        latents,
        out,
        execution(values),
        begin=Beginning(init_from, init_weights) if init_from is not None else None,
        preview=Preview(
            val_every=val_every,
            sample_every=sample_every or None,
            score_every=score_every,
            tokenizer=tokenizer,
            reference=score_ref,
            count=score_num,
            features=features,
            resolution=resolution,
            weights_dir=weights_dir,
        ),
        verify=verify,
    )
