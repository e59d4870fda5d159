"""Commands that show: ``quickstart`` and ``report``."""

from pathlib import Path

import click

from detok_pipe.pipelines.cli_options import (
    FOLDER,
    NEW_FOLDER,
    PATH,
    device_option,
    quiet_option,
    seed_option,
    tokenizer_option,
)
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice


@click.command("quickstart")
@click.option(
    "--out",
    type=NEW_FOLDER,
    help="Where everything goes.  [default: runs/quickstart, with --fast runs/quickstart-fast]",
)
@click.option(
    "--preset",
    type=click.Choice(["cpu", "cpu-fp32", "fast", "gpu"]),
    help="Size of everything. Default: gpu where there is one, else cpu, or cpu-fp32 (fewer "
    "steps) on a processor without fast bf16.",
)
@click.option("--fast", is_flag=True, help="The same as --preset fast: a minute, and it looks it.")
@seed_option
@device_option
@quiet_option
def quickstart(
    out: Path | None, preset: str | None, fast: bool, seed: int, device: str | None, quiet: bool
) -> None:
    """Run the whole pipeline on real pictures and write a page about it.

    \b
    Draws the Twemoji set, trains a small tokenizer on it, writes and checks the latent
    cache, trains a small MAR from the cache, sweeps the guidance scale, scores the samples.
    Run again, it goes on where it was, or ends at once.

    \b
    Example:
      detok-pipe quickstart
      detok-pipe quickstart --fast
    """
    from detok_pipe.latents.errors import ConfigError
    from detok_pipe.pipelines.demo_presets import DEMOS
    from detok_pipe.pipelines.devices import resolve_device, resolve_precision
    from detok_pipe.pipelines.quickstart import Quickstart
    from detok_pipe.pipelines.quickstart_page import summary

    if fast and preset not in (None, "fast"):
        raise ConfigError(f"--fast is --preset fast; it does not go with --preset {preset}")
    chosen_device = resolve_device(device)
    chosen = "fast" if fast else preset
    if chosen is None and chosen_device.type == "cuda":
        chosen = "gpu"
    elif chosen is None:
        fast_bf16 = resolve_precision("auto", chosen_device) == "bf16"
        chosen = "cpu" if fast_bf16 else "cpu-fp32"
    out = out or Path("runs/quickstart-fast" if chosen == "fast" else "runs/quickstart")
    Quickstart(out, chosen, DEMOS[chosen], seed=seed, device=chosen_device, quiet=quiet).run()
    click.echo(summary(out))


@click.command("report")
@click.argument("run", type=FOLDER)
@click.option(
    "--sweep",
    "sweeps",
    type=FOLDER,
    multiple=True,
    help="Folder of a sweep. May be repeated.  [default: those in RUN]",
)
@tokenizer_option(required=False)
@click.option("--out", type=PATH, help="Page.  [default: RUN/report.html]")
@device_option
@quiet_option
def report(
    run: Path,
    sweeps: tuple[Path, ...],
    tokenizer: TokenizerChoice | None,
    out: Path | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Write one self-contained HTML page about a generator run.

    \b
    Example:
      detok-pipe report runs/mar-l
    """
    from detok_pipe.pipelines.devices import resolve_device
    from detok_pipe.pipelines.report import write_report
    from detok_pipe.pipelines.report_facts import gather_run
    from detok_pipe.pipelines.report_run import run_page

    facts = gather_run(run, sweeps=sweeps, tokenizer=tokenizer, device=resolve_device(device))
    path = write_report(out or run / "report.html", run_page(facts))
    if not quiet:
        click.echo(f"{path}: open it in a browser")
