"""Options that several commands share, so that they read and behave alike everywhere."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from detok_pipe.pipelines.published_tokenizers import PUBLISHED_TOKENIZERS, TokenizerChoice

Command = TypeVar("Command", bound=Callable[..., Any])


class _NamedPath(click.Path):
    """A path, refused where it is empty: ``Path("")`` would be the working folder.

    Args:
        utf8: also refuse a name that is no UTF-8; the safetensors library opens no such path, and
            would fail only after the work whose result it should read.
    """

    def __init__(self, *, file_okay: bool = True, utf8: bool = False) -> None:
        super().__init__(file_okay=file_okay, path_type=Path)
        self.utf8 = utf8

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Path:
        name = os.fspath(value)
        if not name:
            self.fail("the path is empty; name a file or folder, or . for this one", param, ctx)
        if self.utf8 and name.encode(errors="ignore").decode() != name:
            self.fail(
                f"{click.format_filename(name)!r} is no UTF-8, which files of latents and weights "
                "need; choose another name",
                param,
                ctx,
            )
        return Path(os.fsdecode(super().convert(value, param, ctx)))


FOLDER = _NamedPath(file_okay=False)
"""A folder that a command reads or creates."""

NEW_FOLDER = _NamedPath(file_okay=False, utf8=True)
"""A folder for caches, runs or samples."""

PATH = _NamedPath()
"""A file or folder; whether it exists is checked where the error can say what to do."""

NUMBER = click.IntRange(0, 2**63 - 1)
"""A seed or the number of a sample: noise is a function of both, as 64-bit integers."""

_WEIGHTS = "detok_pipe.weights"


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which the help shows them."""

    def apply(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def seed_option(function: Command) -> Command:
    """``--seed``: every random number of the command follows from it."""
    return click.option(
        "--seed",
        type=NUMBER,
        default=0,
        show_default=True,
        help="Seed of all random numbers that this command draws.",
    )(function)


def device_option(function: Command) -> Command:
    """``--device``: where tensors live; the default is what Accelerate finds."""
    return click.option(
        "--device",
        default=None,
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, mps, ... Default: a GPU where there is one.",
    )(function)


def quiet_option(function: Command) -> Command:
    """``--quiet``: no progress, only results, warnings and errors."""
    return click.option(
        "-q", "--quiet", is_flag=True, help="Show no progress, only results and errors."
    )(function)


def set_option(function: Command) -> Command:
    """``--set key=value``: override one value of a preset; may be repeated."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override one value of the preset (typed and checked). May be repeated.",
    )(function)


def dry_run_option(function: Command) -> Command:
    """``--dry-run``: print the resolved configuration and what the step needs, and stop."""
    return click.option(
        "--dry-run",
        is_flag=True,
        help="Print the resolved configuration, parameters, disk and memory needed; do nothing.",
    )(function)


def out_option(help: str, *, required: bool = True) -> Callable[[Command], Command]:
    """``--out FOLDER``: where the command writes."""
    return click.option("--out", type=NEW_FOLDER, required=required, help=help)


def tokenizer_option(required: bool = True) -> Callable[[Command], Command]:
    """``--tokenizer NAME|RUN`` and ``--weights``, as one `TokenizerChoice`, or None."""
    named = click.option(
        "--tokenizer",
        metavar="NAME|RUN",
        required=required,
        callback=_choose,
        help=f"Run directory of a tokenizer, or {', '.join(PUBLISHED_TOKENIZERS)}.",
    )
    return lambda function: named(_weights_option(function))


def tokenizer_argument(function: Command) -> Command:
    """``TOKENIZER``, a name or a run directory, and ``--weights``, as one `TokenizerChoice`."""
    return click.argument("tokenizer", callback=_choose)(_weights_option(function))


def _weights_option(function: Command) -> Command:
    # Eager, so that it is there when the tokenizer is read.
    return click.option(
        "--weights",
        type=PATH,
        is_eager=True,
        expose_value=False,
        callback=_keep_weights,
        metavar="FILE|DIR",
        help="Of a published tokenizer. Default: the hub's cache, or a download.",
    )(function)


def _keep_weights(context: click.Context, _: click.Parameter, value: Path | None) -> None:
    context.meta[_WEIGHTS] = value


def _choose(context: click.Context, _: click.Parameter, name: str | None) -> TokenizerChoice | None:
    choice = TokenizerChoice(name, context.meta.get(_WEIGHTS))
    return choice if any(choice) else None
