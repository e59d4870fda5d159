"""Commands about generators: training."""

from pathlib import Path
from typing import Any

import click

from detok_pipe.pipelines.cli_options import FOLDER, out_option
from detok_pipe.pipelines.cli_train_options import (
    execution,
    execution_options,
    print_plan,
    resolved,
)


@click.command("train-gen")
@click.argument("preset")
@click.option("--latents", type=FOLDER, required=True, help="A finished latent cache.")
@out_option("Run directory; the same command again goes on where it stopped.")
@execution_options
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
    from detok_pipe.pipelines.generator_presets import generator_preset
    from detok_pipe.pipelines.train_generator import describe, train_generator

    config = resolved(generator_preset, preset, values)
    if values["dry_run"]:
        print_plan(config, describe(config, open_cache(latents)))
    else:
        train_generator(config, latents, out, execution(values))
