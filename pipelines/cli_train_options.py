"""Options that both trainers share, and what their values become."""

import json
from collections.abc import Callable
from typing import Any

import click

from detok_pipe.pipelines.cli_options import (
    Command,
    device_option,
    dry_run_option,
    quiet_option,
    set_option,
)


def execution_options(function: Command) -> Command:
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


def execution(values: dict[str, Any]) -> Any:
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


def resolved(preset: Callable[[str], Any], name: str, values: dict[str, Any]) -> Any:
    from detok_pipe.pipelines.config import with_overrides

    overrides = list(values["overrides"])
    if values["seed"] is not None:
        overrides.append(f"seed={values['seed']}")
    return with_overrides(preset(name), overrides)


def print_plan(config: Any, facts: dict[str, Any]) -> None:
    from detok_pipe.pipelines.config import to_json

    click.echo(json.dumps({"config": to_json(config), **facts}, indent=2))
