"""The ``detok-pipe`` command: finds the commands, and turns errors into exit codes.

Commands live in ``commands_*.py`` and are imported only when asked for, so that
``detok-pipe -h`` answers at once. Exit codes: 0 done, 2 user error, 3 done but some
inputs were quarantined, 130, 138 and 143 interrupted (SIGINT, SIGUSR1, SIGTERM) with the work
saved.
"""

import faulthandler
import importlib
import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn

import click

from detok_pipe.latents.errors import DetokError, Interrupted

COMMANDS = {
    "quickstart": ("commands_demo", "The whole pipeline on real pictures, in ten minutes."),
    "train-tok": ("commands_tokenizer", "Train an l-DeTok tokenizer."),
    "eval-tok": ("commands_tokenizer", "Measure and picture a tokenizer's reconstructions."),
    "plan": ("commands_cache", "Estimate disk and time of an encode before it starts."),
    "encode": ("commands_cache", "Write the latent cache of an image set."),
    "finalize": ("commands_cache", "Finish a cache whose shards are all written."),
    "info": ("commands_check", "Describe a latent cache."),
    "verify": ("commands_check", "Check each shard of a latent cache."),
    "check-cache": ("commands_check", "Compare a cache with what its images give now."),
    "convert": ("commands_cache", "Convert a latent cache between WebDataset and Zarr."),
    "import-cache": ("commands_cache", "Make a verified cache of another project's."),
    "train-gen": ("commands_generator", "Train a generator from a latent cache."),
    "runs": ("commands_runs", "Tabulate runs and overlay their loss curves."),
    "sample": ("commands_score", "Draw sample latents from a generator."),
    "score": ("commands_score", "Score a sample store against reference statistics."),
    "sweep-cfg": ("commands_score", "Find the best guidance scale, then score there."),
    "fid-stats": ("commands_images", "Compute reference statistics from images."),
    "export-images": ("commands_images", "Decode a sample store to PNG, npz or WebDataset."),
    "report": ("commands_demo", "Write one self-contained HTML page about a run."),
    "import-checkpoint": ("commands_released", "Make a run directory from a released .pth."),
    "export-checkpoint": ("commands_released", "Write a run's weights in the released form."),
    "tokenizers": ("commands_released", "List the published tokenizers and their weights."),
    "presets": ("commands_released", "List the presets, or show one."),
}
"""Command -> (module, one-line help), in the order in which a user needs them."""

# How torch words, in a RuntimeError, that memory ran out (its OutOfMemoryError of GPUs is one).
_HOST_MEMORY = ("DefaultCPUAllocator: ", "Storage size calculation overflowed")
_DEVICE_MEMORY = ("CUDA out of memory", "MPS backend out of memory", "CUDA error: out of memory")


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"detok_pipe.pipelines.{COMMANDS[cmd_name][0]}")
        return getattr(module, cmd_name.replace("-", "_"))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="detok-pipe", prog_name="detok-pipe")
def group() -> None:
    """Latent caches and image generators on l-DeTok latents.

    \b
    First time?   detok-pipe quickstart
    Own images:   train-tok -> encode -> train-gen -> sweep-cfg
    """


def _raise_on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise Interrupted("terminated by SIGTERM; run the same command again to go on", signum)


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning as this program shows it: its place in the code tells a user nothing."""
    return f"warning: {' '.join(str(message).split())}\n"


def _shown(error: Exception) -> str | None:
    """The line for an error that this program does not raise itself and a user can act on: a file
    that the system refuses, or memory that ran out; None: a defect, which keeps its traceback."""
    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, OSError):
        named = error.filename is not None and error.strerror is not None
        return f"{error.filename}: {error.strerror}" if named else None
    if isinstance(error, MemoryError) or any(words in lines[0] for words in _HOST_MEMORY):
        return (
            f"not enough memory: {lines[0].rpartition('DefaultCPUAllocator: ')[2]}; a smaller "
            "batch or network needs less: see --dry-run of the training"
        )
    if any(words in lines[0] for words in _DEVICE_MEMORY):
        return (
            f"not enough memory: {lines[0]}; give a smaller --micro-batch, or auto, or of commands "
            "without it a smaller --batch-size"
        )
    return None


def _part_processes() -> None:
    """Leave the group of processes, where there is one, at an end that all of them come to."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with a code of the table in this module's docstring."""
    # Where a cache's file is cut short while it is mapped, the system ends the process: say where.
    if not faulthandler.is_enabled():
        faulthandler.enable()
    signal.signal(signal.SIGTERM, _raise_on_sigterm)
    warnings.formatwarning = _one_line
    try:
        code = group.main(args=arguments, prog_name="detok-pipe", standalone_mode=False)
        _part_processes()
    except click.exceptions.Abort:
        click.echo("interrupted; run the same command again to go on", err=True)
        code = 128 + signal.SIGINT
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command again to go on", err=True)
        code = 128 + signal.SIGINT
    except click.ClickException as error:
        error.show()
        code = 2
    except DetokError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except (OSError, MemoryError, RuntimeError) as error:
        message = _shown(error)
        if message is None:
            raise
        click.echo(f"error: {message}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
