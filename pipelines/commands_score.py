"""Commands that sample and score: ``sample``, ``score``, ``sweep-cfg``, ``fid-stats``,
``export-images``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from detok_pipe.pipelines.cli_options import (
    FOLDER,
    PATH,
    Command,
    device_option,
    out_option,
    quiet_option,
    seed_option,
    tokenizer_option,
)

if TYPE_CHECKING:
    from detok_pipe.generators.sampling import Sampling
    from detok_pipe.pipelines.processes import Processes
    from detok_pipe.pipelines.trained import TrainedGenerator


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def _num_option(least: int, **settings: Any) -> Callable[[Command], Command]:
    # torchrun and accelerate take --num for one of their own options, wherever it stands.
    return click.option("-n", "--num", type=click.IntRange(least), **settings)


_sampling_options = _together(
    click.option(
        "--schedule",
        type=click.Choice(["constant", "linear"]),
        help="How the scale moves while tokens are revealed.",
    ),
    click.option(
        "--interval",
        nargs=2,
        type=float,
        metavar="LOW HIGH",
        help="Guidance only while the progress, 0 to 1, is in this range.",
    ),
    click.option("--guided-channels", type=click.IntRange(1), help="Guide the first N channels."),
    click.option("--temperature", type=float, help="Factor on the noise of diffusion steps."),
    click.option("--steps", type=click.IntRange(1), help="Steps of diffusion or ODE."),
    click.option("--iterations", type=click.IntRange(1), help="MAR: steps that reveal tokens."),
    click.option("--method", type=click.Choice(["euler", "dopri5"]), help="SiT: ODE solver."),
)
_generator_options = _together(
    click.option(
        "--ema/--no-ema", default=True, show_default=True, help="Averaged or last weights."
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16"]),
        default="auto",
        show_default=True,
        help="Of the generator; auto is bf16 on a GPU.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Images at once.",
    ),
)
_feature_options = _together(
    click.option(
        "--features",
        type=click.Choice(["inception", "efficientnet-lite2"]),
        default="inception",
        show_default=True,
        help="Feature network: inception gives FID, the other FD-EffLite2.",
    ),
    click.option(
        "--resolution",
        type=click.IntRange(32, 1024),
        help="efficientnet-lite2: side to which images are resized (260).",
    ),
    click.option(
        "--weights-dir", type=FOLDER, help="Folder with the Inception weights; else torch hub's."
    ),
)
_reference_options = _together(
    click.option(
        "--ref",
        "reference",
        type=PATH,
        required=True,
        help="Reference statistics (.npz): ADM's, pytorch-fid's, clean-fid's or fid-stats'.",
    ),
    click.option("--ref-sha256", help="SHA-256 that the reference must have, or its first digits."),
)


def _processes(device: str | None) -> "Processes":
    from detok_pipe.pipelines.config import Execution
    from detok_pipe.pipelines.processes import Processes
    from detok_pipe.pipelines.training import make_accelerator

    return Processes(make_accelerator("fp32", Execution(device=device, trackers=())))


def _sampling(generator: "TrainedGenerator", scale: float | None, **values: Any) -> "Sampling":
    from detok_pipe.pipelines.sample import sampling_of

    return sampling_of(
        generator,
        guidance_scale=scale,
        guidance_schedule=values["schedule"],
        guidance_interval=values["interval"] or None,
        guided_channels=values["guided_channels"],
        temperature=values["temperature"],
        steps=values["steps"],
        iterations=values["iterations"],
        method=values["method"],
    )


@click.command("sample")
@click.argument("run", type=FOLDER)
@_num_option(1, help="Number of samples.", required=True)
@click.option("--cfg", type=float, help="Guidance scale. Default: the generator's published one.")
@click.option("--first", type=click.IntRange(0), default=0, help="First sample number.")
@click.option(
    "--class", "classes", type=int, multiple=True, help="Only this class number. May be repeated."
)
@out_option("Sample store; the same command again goes on where it stopped.")
@_sampling_options
@_generator_options
@seed_option
@device_option
@quiet_option
def sample(run: Path, num: int, cfg: float | None, out: Path, **values: Any) -> None:
    """Draw latents from the generator RUN into a sample store.

    \b
    Example:
      detok-pipe sample runs/mar-l --num 50000 --cfg 3.4 --out samples
      torchrun --nproc_per_node 8 -m detok_pipe.pipelines.cli \\
        sample runs/mar-l -n 50000 --cfg 3.4 --out samples
    """
    from detok_pipe.pipelines.sample import sample as draw
    from detok_pipe.pipelines.trained import load_generator

    processes = _processes(values["device"])
    generator = load_generator(run, device=processes.device, ema=values["ema"])
    draw(
        generator,
        out,
        count=num,
        sampling=_sampling(generator, cfg, **values),
        seed=values["seed"],
        first=values["first"],
        classes=values["classes"] or None,
        batch_size=values["batch_size"],
        precision=values["precision"],
        processes=processes,
        quiet=values["quiet"],
    )
    processes.wait()
    if processes.is_main:
        click.echo(f"{num:,} samples in {out}")


@click.command("score")
@click.argument("samples", type=FOLDER)
@_reference_options
@tokenizer_option(required=False)
@_num_option(2, help="Score the first N samples. Default: all.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images at once."
)
@_feature_options
@device_option
@quiet_option
def score(
    samples: Path,
    reference: Path,
    ref_sha256: str | None,
    tokenizer: Path | None,
    num: int | None,
    batch_size: int,
    features: str,
    resolution: int | None,
    weights_dir: Path | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Score the sample store SAMPLES against reference statistics.

    Adds a line with every setting to SAMPLES/scores.jsonl.

    \b
    Example:
      detok-pipe score samples --ref adm_in256_stats.npz
      detok-pipe score samples --ref mine.npz --features efficientnet-lite2 --resolution 128
    """
    from detok_pipe.evaluation.features import load_extractor
    from detok_pipe.evaluation.reference import read_reference
    from detok_pipe.latents.sample_store import open_sample_store
    from detok_pipe.pipelines import score as scoring
    from detok_pipe.pipelines.find_tokenizer import find_tokenizer
    from detok_pipe.pipelines.sweep import SCORES
    from detok_pipe.pipelines.sweep_output import score_table

    processes = _processes(device)
    store = open_sample_store(samples)
    target = read_reference(reference, sha256=ref_sha256)
    decoder = find_tokenizer(
        store.identity["tokenizer"],
        Path(store.extra["generator_run"]),
        tokenizer,
        device=processes.device,
    )
    extractor = load_extractor(
        features, resolution=resolution, weights_dir=weights_dir, device=processes.device
    )
    _, record = scoring.score(
        store,
        decoder,
        extractor,
        target,
        count=num,
        batch_size=batch_size,
        processes=processes,
        quiet=quiet,
    )
    if processes.is_main:
        scoring.append_record(samples / SCORES, record)
        click.echo(score_table(record))
        for note in record["notes"]:
            click.echo(f"note: {note}", err=True)


@click.command("sweep-cfg")
@click.argument("run", type=FOLDER)
@_reference_options
@tokenizer_option(required=False)
@out_option("Where to write. Default: RUN/sweep.", required=False)
@click.option("--scales", help="Scales with commas: 3,3.5,4. Default: the published grid.")
@_num_option(4, help="Samples a scale.", default=10_000, show_default=True)
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
@_sampling_options
@_generator_options
@_feature_options
@seed_option
@device_option
@quiet_option
def sweep_cfg(run: Path, **values: Any) -> None:
    """Find the best guidance scale of the generator RUN, then score there and at scale 1.

    Writes sweep.json, sweep.png, samples-by-scale.png and all samples. The same command again
    goes on where it stopped.

    \b
    Example:
      detok-pipe sweep-cfg runs/mar-l --ref adm_in256_stats.npz
      detok-pipe sweep-cfg runs/sit-b --ref adm_in256_stats.npz --search halving
    """
    from detok_pipe.evaluation.features import load_extractor
    from detok_pipe.evaluation.reference import read_reference
    from detok_pipe.latents.sample_store import open_sample_store
    from detok_pipe.pipelines import sweep_output
    from detok_pipe.pipelines.find_tokenizer import find_tokenizer
    from detok_pipe.pipelines.sweep import plan_for, search_path, sweep
    from detok_pipe.pipelines.trained import load_generator

    processes = _processes(values["device"])
    reference = read_reference(values["reference"], sha256=values["ref_sha256"])
    generator = load_generator(run, device=processes.device, ema=values["ema"])
    tokenizer = find_tokenizer(
        generator.identity["tokenizer"], run, values["tokenizer"], device=processes.device
    )
    extractor = load_extractor(
        values["features"],
        resolution=values["resolution"],
        weights_dir=values["weights_dir"],
        device=processes.device,
    )
    plan = plan_for(
        generator,
        scales=_scales(values["scales"]),
        sampling=_sampling(generator, None, **values),
        unguided_temperature=values["unguided_temperature"],
        count=values["num"],
        final_count=values["final_num"],
        search=values["search"],
        seed=values["seed"],
        precision=values["precision"],
        batch_size=values["batch_size"],
    )
    out = values["out"] or run / "sweep"
    result = sweep(
        plan,
        generator,
        tokenizer,
        extractor,
        reference,
        out,
        processes=processes,
        quiet=values["quiet"],
    )
    if processes.is_main:
        stores = [(scale, open_sample_store(search_path(out, scale))) for scale in plan.scales]
        sweep_output.write_grid(sweep_output.scale_grid(stores, tokenizer), out)
        sweep_output.write_plot(result, out)
        click.echo(sweep_output.sweep_table(result))
        for warning in result["warnings"]:
            click.echo(f"warning: {warning}", err=True)


def _scales(text: str | None) -> list[float] | None:
    from detok_pipe.latents.errors import ConfigError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--scales {text}: write numbers with commas, as 3,3.5,4") from None


@click.command("fid-stats")
@click.argument("images", type=PATH)
@click.option("--out", type=PATH, required=True, help="The .npz to write.")
@click.option(
    "--size",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Side in pixels of the ADM centre crop. An .npz of images keeps its own.",
)
@click.option(
    "--keep-features",
    type=click.IntRange(0),
    default=10_000,
    show_default=True,
    help="Images whose features stay in the file, for KID, precision and recall.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images at once."
)
@_feature_options
@device_option
@quiet_option
def fid_stats(
    images: Path,
    out: Path,
    size: int,
    keep_features: int,
    batch_size: int,
    features: str,
    resolution: int | None,
    weights_dir: Path | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Compute reference statistics of IMAGES: class folders, a list file, tars, or an .npz.

    \b
    Example:
      detok-pipe fid-stats imagenet/train --out in256.npz
      detok-pipe fid-stats VIRTUAL_imagenet256_labeled.npz --out with-features.npz
    """
    from detok_pipe.evaluation.features import load_extractor
    from detok_pipe.evaluation.reference import read_reference
    from detok_pipe.pipelines import fid_stats as statistics
    from detok_pipe.pipelines.images import open_images

    processes = _processes(device)
    extractor = load_extractor(
        features, resolution=resolution, weights_dir=weights_dir, device=processes.device
    )
    if images.suffix == ".npz":
        found = read_reference(images)
        written = processes.on_main(
            lambda: statistics.fid_stats_of_npz(
                found,
                extractor,
                out,
                keep_features=keep_features,
                batch_size=batch_size,
                quiet=quiet,
            )
        )
    else:
        written = statistics.fid_stats(
            open_images(images),
            extractor,
            out,
            size=size,
            keep_features=keep_features,
            batch_size=batch_size,
            processes=processes,
            quiet=quiet,
        )
    if processes.is_main:
        click.echo(f"{extractor.name} statistics of {written.made_from['count']:,} images in {out}")


@click.command("export-images")
@click.argument("samples", type=FOLDER)
@tokenizer_option(required=False)
@click.option("--out", type=PATH, required=True, help="A new folder, or a name ending in .npz.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["png", "npz", "webdataset"]),
    help="Default: npz where --out ends in .npz, else png.",
)
@_num_option(1, help="The first N samples. Default: all.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images at once."
)
@device_option
@quiet_option
def export_images(
    samples: Path,
    tokenizer: Path | None,
    out: Path,
    form: Any,
    num: int | None,
    batch_size: int,
    device: str | None,
    quiet: bool,
) -> None:
    """Decode the sample store SAMPLES to PNG, npz (ADM's form) or WebDataset.

    \b
    Example:
      detok-pipe export-images samples --out pictures
      detok-pipe export-images samples --out samples.npz
    """
    from detok_pipe.latents.sample_store import open_sample_store
    from detok_pipe.pipelines.export_images import export_images as export
    from detok_pipe.pipelines.find_tokenizer import find_tokenizer

    processes = _processes(device)
    store = open_sample_store(samples)
    decoder = find_tokenizer(
        store.identity["tokenizer"],
        Path(store.extra["generator_run"]),
        tokenizer,
        device=processes.device,
    )
    count = processes.on_main(
        lambda: export(
            store,
            decoder,
            out,
            form=form or ("npz" if out.suffix == ".npz" else "png"),
            count=num,
            batch_size=batch_size,
            quiet=quiet,
        )
    )
    if processes.is_main:
        click.echo(f"{count:,} images in {out}")
