"""Commands between images and scores: ``fid-stats`` and ``export-images``."""

from pathlib import Path
from typing import Any

import click

from detok_pipe.pipelines.cli_cache_options import IMAGES
from detok_pipe.pipelines.cli_options import (
    FOLDER,
    PATH,
    device_option,
    quiet_option,
    tokenizer_option,
)
from detok_pipe.pipelines.cli_score_options import (
    batch_size_option,
    decoder_of,
    feature_options,
    num_option,
    open_extractor,
    open_processes,
)
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice


@click.command("fid-stats")
@click.argument("images", type=IMAGES)
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
@batch_size_option
@feature_options
@device_option
@quiet_option
def fid_stats(images: Path, out: Path, size: int, **values: Any) -> None:
    """Compute reference statistics of IMAGES: class folders, a list file, tars, or an .npz.

    The same command again goes on where it stopped. An .npz that has statistics of the same
    network keeps them, and gets the features of its images.

    \b
    Example:
      detok-pipe fid-stats imagenet/train --out in256.npz
      detok-pipe fid-stats VIRTUAL_imagenet256_labeled.npz --out with-features.npz
    """
    from detok_pipe.evaluation.reference import read_reference
    from detok_pipe.pipelines import fid_stats as statistics
    from detok_pipe.pipelines.images import open_images

    processes = open_processes(values["device"])
    extractor = open_extractor(processes, **values)
    settings = {
        "keep_features": values["keep_features"],
        "batch_size": values["batch_size"],
        "processes": processes,
        "quiet": values["quiet"],
    }
    if images.suffix == ".npz":
        batch = read_reference(images)
        written = statistics.fid_stats_of_npz(batch, extractor, out, **settings)
    else:
        source = open_images(images)
        written = statistics.fid_stats(source, extractor, out, size=size, **settings)
    if processes.is_main:
        images_read = written.made_from["source"]["images"]
        click.echo(f"{out}: {extractor.name} reference of {images_read:,} images")


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
@num_option(1, help="The first N samples. Default: all.")
@batch_size_option
@device_option
@quiet_option
def export_images(
    samples: Path,
    tokenizer: TokenizerChoice | None,
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

    processes = open_processes(device)
    store = open_sample_store(samples)
    decoder = decoder_of(store, tokenizer, processes)
    count = export(
        store,
        decoder,
        out,
        form=form or ("npz" if out.suffix == ".npz" else "png"),
        count=num,
        batch_size=batch_size,
        processes=processes,
        quiet=quiet,
    )
    if processes.is_main:
        click.echo(f"{count:,} images in {out}")
