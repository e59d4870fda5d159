"""The command about many runs."""

from pathlib import Path

import click

from detok_pipe.pipelines.cli_options import FOLDER, PATH


@click.command("runs")
@click.argument("folder", type=FOLDER)
@click.option(
    "--plot", type=PATH, metavar="PNG", help="Also draw their loss curves in one picture."
)
def runs(folder: Path, plot: Path | None) -> None:
    """Tabulate the runs in FOLDER: model, cache, step, loss, best score.

    The score is the lowest Fréchet distance that was measured while training (--score-every) or
    by sweep-cfg.

    \b
    Example:
      detok-pipe runs runs
      detok-pipe runs runs --plot losses.png
    """
    from detok_pipe.pipelines.runs import find_runs, runs_table, write_curves

    found = find_runs(folder)
    click.echo(runs_table(found))
    if plot is not None:
        write_curves(found, plot)
        click.echo(f"curves in {plot}")
