"""Options that both trainers share, and what their values become."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import click

from detok_pipe.pipelines.cli_options import (
    NUMBER,
    device_option,
    dry_run_option,
    quiet_option,
    set_option,
    together,
)


class MicroBatch(click.ParamType):
    """A number of rows, or "auto"."""

    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return value if value == "auto" else click.IntRange(1).convert(value, param, ctx)


execution_options = together(
    click.option(
        "--micro-batch",
        type=MicroBatch(),
        help="Rows a process computes at once, or auto: as many as its memory takes. Gradients add "
        "up to the global batch.",
    ),
    click.option(
        "--checkpoint-every",
        type=click.IntRange(1),
        default=1000,
        show_default=True,
        help="Steps between checkpoints.",
    ),
    click.option(
        "--keep",
        "keep_checkpoints",
        type=click.IntRange(1),
        default=2,
        show_default=True,
        help="The newest N checkpoints stay.",
    ),
    click.option(
        "--keep-every",
        type=click.IntRange(1),
        help="So do those of each N steps, a multiple of --checkpoint-every.",
    ),
    click.option(
        "--keep-best",
        type=click.Choice(["loss", "score"]),
        help="So does the one with the lowest loss, or Fréchet distance where that is measured.",
    ),
    click.option(
        "--extend",
        is_flag=True,
        help="Go on with a run beyond the duration it was started with: give the longer one, by "
        "--set duration=... From there on the learning rate follows the longer schedule.",
    ),
    click.option(
        "--log-every",
        type=click.IntRange(1),
        default=20,
        show_default=True,
        help="Steps between lines of metrics.jsonl.",
    ),
    click.option("--compile", "compile", is_flag=True, help="Use torch.compile."),
    click.option(
        "--activation-checkpointing",
        is_flag=True,
        help="Compute activations again in the backward pass: less memory, more time, same "
        "results.",
    ),
    click.option(
        "--deterministic",
        is_flag=True,
        help="Take only GPU kernels, and one order of adding up the processes' gradients, that "
        "give the same bits each time, which are slower: a resumed run then equals an "
        "uninterrupted one exactly, as one process or two do on a CPU anyway.",
    ),
    click.option(
        "--tracker",
        "trackers",
        multiple=True,
        default=["tensorboard"],
        show_default=True,
        help="Accelerate tracker (tensorboard, wandb, ...), or none. May be repeated.",
    ),
    click.option("--seed", type=NUMBER, help="Seed; the preset's is 0. Same as --set seed=N."),
    device_option,
    quiet_option,
    set_option,
    dry_run_option,
)
"""Options of how a run is carried out, the same for both trainers."""


def execution(values: dict[str, Any]) -> Any:
    """The `Execution` that the options' values say."""
    from detok_pipe.pipelines.config import Execution

    trackers = tuple(name for name in values["trackers"] if name != "none")
    known = {field.name for field in dataclasses.fields(Execution)}
    return Execution(**{k: v for k, v in values.items() if k in known} | {"trackers": trackers})


def resolved(
    preset: Callable[[str], Any], name: str, values: dict[str, Any], **own: str | None
) -> Any:
    """The configuration of the preset ``name`` with ``--set`` and ``--seed`` applied.

    ``own`` are other settings that have an option of their own; None: not given.

    Raises:
        ConfigError: a setting is given by its option and by ``--set``, or see ``with_overrides``.
    """
    from detok_pipe.latents.errors import ConfigError
    from detok_pipe.pipelines.config import with_overrides

    own = {"seed": values["seed"], **own}
    own = {key: value for key, value in own.items() if value is not None}
    for override in values["overrides"]:
        key = override.partition("=")[0].strip()
        if key in own:
            raise ConfigError(f"--set {override} and --{key} {own[key]}: give one of them")
    given = [f"{key}={value}" for key, value in own.items()]
    return with_overrides(preset(name), [*values["overrides"], *given])


def print_plan(config: Any, facts: dict[str, Any]) -> None:
    """Print what ``--dry-run`` tells, as JSON."""
    from detok_pipe.pipelines.config import to_json

    click.echo(json.dumps({"config": to_json(config), **facts}, indent=2))
