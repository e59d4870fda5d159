"""Options that the commands of sampling and scoring share, and the processes that they run in."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from detok_pipe.pipelines.cli_options import FOLDER, PATH, Command, together

if TYPE_CHECKING:
    from detok_pipe.evaluation.features import FeatureExtractor
    from detok_pipe.evaluation.reference import Reference
    from detok_pipe.latents.sample_store import SampleStore
    from detok_pipe.pipelines.processes import Processes
    from detok_pipe.pipelines.published_tokenizers import TokenizerChoice
    from detok_pipe.pipelines.trained import TrainedTokenizer


def batch_size_option(function: Command) -> Command:
    """``--batch-size``: how many images or samples the networks take at once."""
    return click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Images at once.",
    )(function)


def num_option(least: int, **settings: Any) -> Callable[[Command], Command]:
    """``--num``: how many samples."""
    # torchrun and accelerate take --num for one of their own options, wherever it stands.
    return click.option("--num", "-n", type=click.IntRange(least), **settings)


sampling_options = together(
    click.option(
        "--schedule",
        "guidance_schedule",
        type=click.Choice(["constant", "linear"]),
        help="How the scale moves while tokens are revealed.",
    ),
    click.option(
        "--interval",
        "guidance_interval",
        nargs=2,
        type=float,
        metavar="LOW HIGH",
        help="Guidance only while the progress, 0 to 1, is in this range.",
    ),
    click.option("--guided-channels", type=click.IntRange(1), help="Guide the first N channels."),
    click.option("--temperature", type=float, help="Factor on the noise of diffusion steps."),
    click.option(
        "--clip",
        type=float,
        help="Bound on the predicted latents in diffusion steps, in their standard deviations; "
        "generators that were trained briefly need it (4).",
    ),
    click.option("--steps", type=click.IntRange(1), help="Steps of diffusion or ODE."),
    click.option(
        "--num-iter",
        "iterations",
        type=click.IntRange(1),
        help="MAR: iterations that reveal tokens (one a token, up to 256, as in the published "
        "scores; 64 are up to 4 times faster).",
    ),
    click.option("--method", type=click.Choice(["euler", "dopri5"]), help="SiT: ODE solver."),
)
generator_options = together(
    click.option(
        "--ema/--no-ema", default=True, show_default=True, help="Averaged or last weights."
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16"]),
        default="auto",
        show_default=True,
        help="Of the generator; auto is bf16 where that is faster.",
    ),
    click.option(
        "--compile",
        "compiled",
        is_flag=True,
        help="Compile the sampler first (about a minute): worth it for thousands of samples.",
    ),
    batch_size_option,
)
feature_options = together(
    click.option(
        "--features",
        type=click.Choice(["inception", "efficientnet-lite2"]),
        default="inception",
        show_default=True,
        help="Feature network: inception gives FID, the other FD-EffLite2.",
    ),
    click.option(
        "--resolution",
        type=click.IntRange(64, 1024),
        help="efficientnet-lite2: side to which images are resized (260).",
    ),
    click.option(
        "--weights-dir",
        type=FOLDER,
        help="Where published files are looked for first (Inception weights, reference "
        "statistics); then in torch hub's folder; else they are downloaded there.",
    ),
)
reference_options = together(
    click.option(
        "--ref",
        "reference",
        type=PATH,
        required=True,
        help="Reference statistics: an .npz of ADM, pytorch-fid, clean-fid or fid-stats, or "
        "imagenet-256 for ADM's published one.",
    ),
    click.option("--ref-sha256", help="SHA-256 that the reference must have, or its first digits."),
)


def open_processes(device: str | None) -> "Processes":
    """The processes that torchrun or accelerate started, or this one alone."""
    from detok_pipe.pipelines.accelerators import make_accelerator
    from detok_pipe.pipelines.config import Execution
    from detok_pipe.pipelines.processes import Processes

    return Processes(make_accelerator("fp32", Execution(device=device, trackers=())))


def open_extractor(
    processes: "Processes",
    *,
    features: str,
    resolution: int | None,
    weights_dir: Path | None,
    **_: Any,
) -> "FeatureExtractor":
    """The feature network that `feature_options` chose."""
    from detok_pipe.evaluation.features import load_extractor

    with processes.main_first():
        return load_extractor(
            features, resolution=resolution, weights_dir=weights_dir, device=processes.device
        )


def open_reference(
    processes: "Processes",
    *,
    reference: Path,
    ref_sha256: str | None,
    weights_dir: Path | None,
    **_: Any,
) -> "Reference":
    """The reference that `reference_options` chose."""
    from detok_pipe.evaluation.reference import find_reference

    with processes.main_first():
        return find_reference(reference, sha256=ref_sha256, weights_dir=weights_dir)


def decoder_of(
    store: "SampleStore", tokenizer: "TokenizerChoice | None", processes: "Processes"
) -> "TrainedTokenizer":
    """The tokenizer that was named, or one beside the generator's run or the samples."""
    from detok_pipe.pipelines.find_tokenizer import find_tokenizer

    encoder, run = {"fingerprint": store.identity["tokenizer"]}, store.extra["generator_run"]
    return find_tokenizer(encoder, Path(run), store.path, named=tokenizer, device=processes.device)
