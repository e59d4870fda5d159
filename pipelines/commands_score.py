"""Commands that sample and score: ``sample``, ``score``, ``sweep-cfg``."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from detok_pipe.pipelines.cli_options import (
    FOLDER,
    NUMBER,
    device_option,
    out_option,
    quiet_option,
    seed_option,
    tokenizer_option,
)
from detok_pipe.pipelines.cli_score_options import (
    batch_size_option,
    decoder_of,
    feature_options,
    generator_options,
    num_option,
    open_extractor,
    open_processes,
    open_reference,
    reference_options,
    sampling_options,
)
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice

if TYPE_CHECKING:
    from detok_pipe.generators.sampling import Sampling
    from detok_pipe.pipelines.trained import TrainedGenerator

Number = TypeVar("Number", int, float)


def _sampling(generator: "TrainedGenerator", scale: float | None, **values: Any) -> "Sampling":
    """The sampling options of a command line; None stands for what is not given there."""
    from detok_pipe.generators.sampling import Sampling
    from detok_pipe.latents.errors import ConfigError
    from detok_pipe.pipelines.sample import sampling_of

    given = {field.name: values.get(field.name) for field in dataclasses.fields(Sampling)}
    # The generator refuses them too, but does not know what they are called here.
    model, parameters = generator.model, click.get_current_context().command.params
    flags = {p.name: p.opts[0] for p in parameters if p.name in given}
    for name, value in given.items():
        if name not in model.sampling_options and value not in (None, getattr(Sampling, name)):
            used = sorted(flags[option] for option in model.sampling_options & flags.keys())
            raise ConfigError(
                f"{flags[name]}: {model.title} does not use this option; leave it out (it uses "
                f"{', '.join(used)})"
            )
    return sampling_of(generator, **given | {"guidance_scale": scale})


@click.command("sample")
@click.argument("run", type=FOLDER)
@num_option(1, help="Number of samples.", required=True)
@click.option("--cfg", type=float, help="Guidance scale. Default: the generator's published one.")
@click.option("--first", type=NUMBER, default=0, help="First sample number.")
@click.option(
    "--classes", help="Class numbers with commas, gone through in turn: 207,360. Default: all."
)
@out_option("Sample store; the same command again goes on where it stopped.")
@tokenizer_option(required=False)
@sampling_options
@generator_options
@seed_option
@device_option
@quiet_option
def sample(run: Path, num: int, cfg: float | None, out: Path, **values: Any) -> None:
    """Draw latents from the generator RUN into a sample store.

    Sample i is of class CLASSES[i mod their count]. With the tokenizer, which is looked for beside
    RUN, the first samples are drawn as a picture, OUT/preview.png.

    \b
    Example:
      detok-pipe sample runs/mar-l --num 50000 --cfg 3.4 --out samples
      detok-pipe sample runs/mar-l -n 16 --classes 207,360 --num-iter 64 --out dogs-and-otters
      torchrun --nproc_per_node 8 -m detok_pipe.pipelines.cli \\
        sample runs/mar-l -n 50000 --cfg 3.4 --out samples
    """
    from detok_pipe.pipelines.find_tokenizer import tokenizer_if_any
    from detok_pipe.pipelines.preview import write_preview
    from detok_pipe.pipelines.sample import sample as draw
    from detok_pipe.pipelines.trained import load_generator

    processes = open_processes(values["device"])
    generator = load_generator(run, device=processes.device, ema=values["ema"])
    tokenizer, missing = tokenizer_if_any(
        {"fingerprint": generator.identity["tokenizer"]},
        run,
        named=values["tokenizer"],
        device=processes.device,
    )
    store = draw(
        generator,
        out,
        count=num,
        sampling=_sampling(generator, cfg, **values),
        seed=values["seed"],
        first=values["first"],
        classes=_numbers("--classes", values["classes"], int, "207,360"),
        batch_size=values["batch_size"],
        precision=values["precision"],
        compiled=values["compiled"],
        processes=processes,
        quiet=values["quiet"],
    )
    processes.wait()
    if processes.is_main:
        click.echo(f"{num:,} samples in {out}")
        if tokenizer is None:
            click.echo(f"no preview: {missing}", err=True)
        else:
            click.echo(f"preview: {write_preview(store, tokenizer)}")


@click.command("score")
@click.argument("samples", type=FOLDER)
@reference_options
@tokenizer_option(required=False)
@num_option(2, help="Score the first N samples. Default: all.")
@batch_size_option
@feature_options
@device_option
@quiet_option
def score(samples: Path, tokenizer: TokenizerChoice | None, num: int | None, **values: Any) -> None:
    """Score the sample store SAMPLES against reference statistics.

    Adds a line with every setting to SAMPLES/scores.jsonl.

    \b
    Example:
      detok-pipe score samples --ref imagenet-256
      detok-pipe score samples --ref mine.npz --features efficientnet-lite2 --resolution 128
    """
    from detok_pipe.latents.sample_store import open_sample_store
    from detok_pipe.pipelines import score as scoring
    from detok_pipe.pipelines.sweep import SCORES
    from detok_pipe.pipelines.sweep_output import score_table

    processes = open_processes(values["device"])
    store = open_sample_store(samples)
    _, record = scoring.score(
        store,
        decoder_of(store, tokenizer, processes),
        open_extractor(processes, **values),
        open_reference(processes, **values),
        count=num,
        batch_size=values["batch_size"],
        processes=processes,
        quiet=values["quiet"],
    )
    if processes.is_main:
        scoring.append_record(samples / SCORES, record)
        click.echo(score_table(record))
        for note in record["notes"]:
            click.echo(f"note: {note}", err=True)


@click.command("sweep-cfg")
@click.argument("run", type=FOLDER)
@reference_options
@tokenizer_option(required=False)
@out_option(
    "Where to write. Default: RUN/sweep, or RUN/sweep-step-N for RUN/checkpoints/step-N.",
    required=False,
)
@click.option("--scales", help="Scales with commas: 3,3.5,4. Default: the published grid.")
@num_option(4, help="Samples a scale.", default=10_000, show_default=True)
@click.option(
    "--final-num",
    type=click.IntRange(0),
    default=50_000,
    show_default=True,
    help="Samples of the scores at the best scale and at scale 1; 0: none.",
)
@click.option(
    "--search",
    type=click.Choice(["grid", "halving"]),
    default="grid",
    show_default=True,
    help="halving drops scales early and takes under half the samples.",
)
@click.option("--unguided-temperature", type=float, help="Temperature of the score at scale 1.")
@sampling_options
@generator_options
@feature_options
@seed_option
@device_option
@quiet_option
def sweep_cfg(run: Path, **values: Any) -> None:
    """Find the best guidance scale of the generator RUN, then score there and at scale 1.

    Writes sweep.json, sweep.png, samples-by-scale.png and all samples. The same command again
    goes on where it stopped. RUN may be one of a run's checkpoints.

    \b
    Example:
      detok-pipe sweep-cfg runs/mar-l --ref imagenet-256
      detok-pipe sweep-cfg runs/mar-l/checkpoints/step-00100000 --ref imagenet-256
      detok-pipe sweep-cfg runs/sit-b --ref imagenet-256 --search halving
    """
    from detok_pipe.latents.sample_store import open_sample_store
    from detok_pipe.pipelines import sweep_output
    from detok_pipe.pipelines.find_tokenizer import find_tokenizer
    from detok_pipe.pipelines.sweep import plan_for, search_path, sweep
    from detok_pipe.pipelines.trained import load_generator

    processes = open_processes(values["device"])
    reference = open_reference(processes, **values)
    generator = load_generator(run, device=processes.device, ema=values["ema"])
    tokenizer = find_tokenizer(
        {"fingerprint": generator.identity["tokenizer"]},
        run,
        named=values["tokenizer"],
        device=processes.device,
    )
    extractor = open_extractor(processes, **values)
    plan = plan_for(
        generator,
        scales=_numbers("--scales", values["scales"], float, "3,3.5,4"),
        sampling=_sampling(generator, None, **values),
        unguided_temperature=values["unguided_temperature"],
        count=values["num"],
        final_count=values["final_num"],
        search=values["search"],
        seed=values["seed"],
        precision=values["precision"],
        batch_size=values["batch_size"],
    )
    out = values["out"] or _sweep_folder(run)
    result = sweep(
        plan,
        generator,
        tokenizer,
        extractor,
        reference,
        out,
        processes=processes,
        compiled=values["compiled"],
        quiet=values["quiet"],
    )
    if processes.is_main:
        stores = [(scale, open_sample_store(search_path(out, scale))) for scale in plan.scales]
        sweep_output.write_grid(sweep_output.scale_grid(stores, tokenizer), out)
        sweep_output.write_plot(result, out)
        click.echo(sweep_output.sweep_table(result))
        for warning in result["warnings"]:
            click.echo(f"warning: {warning}", err=True)


def _sweep_folder(run: Path) -> Path:
    """Where a sweep of ``run`` goes by default: never into a checkpoint, which its run removes."""
    from detok_pipe.pipelines.find_tokenizer import run_of

    whole = run_of(run)
    return run / "sweep" if whole == run else whole / f"sweep-{run.resolve().name}"


def _numbers(
    option: str, text: str | None, number: Callable[[str], Number], example: str
) -> list[Number] | None:
    """The numbers of an option that takes several, with commas; None where it was not given."""
    from detok_pipe.latents.errors import ConfigError

    try:
        return None if text is None else [number(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: write numbers with commas, as {example}") from None
