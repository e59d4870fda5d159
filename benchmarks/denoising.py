"""What latent denoising does to a decoder: two tokenizers, equal but for the corruption.

    python benchmarks/denoising.py                   # six trainings: about 12 minutes on one core
    python benchmarks/denoising.py --seeds 1         # four minutes

For each seed one tokenizer trains with noise (gamma 3) and masks (up to 0.7), one without either,
on the same drawings at 256 x 256, from the same weights, for the same steps. Then both rebuild
held-out drawings from latents with noise added and tokens hidden. Training with noise spreads the
latents, which alone would make a given noise harmless; so noise is measured in units of each
tokenizer's own latent std (and once more in absolute units). Where a decoder is given the noise in
a form that it did not see in training, it could fail for that reason; the baseline is therefore
scored on the additive form and on the interpolative one, and its better score counts.

Prints Markdown tables and writes denoising.png into --out.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image

from detok_pipe.pipelines import pictures
from detok_pipe.pipelines.config import Execution, TokenizerConfig
from detok_pipe.pipelines.corruption_study import CorruptionStudy, study_corruption
from detok_pipe.pipelines.emoji import make_emoji_images
from detok_pipe.pipelines.images import open_images
from detok_pipe.pipelines.reconstruct import evenly_spaced, load_squares
from detok_pipe.pipelines.train_tokenizer import train_tokenizer
from detok_pipe.pipelines.trained import load_tokenizer
from detok_pipe.tokenizer.model import LDeTok

DENOISING = TokenizerConfig(
    gamma=3.0,
    mask_ratio=0.7,
    encoder="128,2,4",
    decoder="128,3,4",
    identity_output=True,
    perceptual="none",
    global_batch=8,
    base_lr=6.4e-2,
    warmup=0.1,
    ema=0.99,
    ema_warmup=True,
)
BASELINE = dataclasses.replace(DENOISING, gamma=0.0, mask_ratio=0.0)
KINDS = {"denoising": DENOISING, "baseline": BASELINE}

RELATIVE = (0.0, 1.0, 2.0, 4.0)  # noise in units of the tokenizer's latent std
ABSOLUTE = (1.0, 2.0, 4.0)
HIDDEN = (0.0, 0.3, 0.5, 0.7)
SHOWN = ((0.0, 0.0), (2.0, 0.0), (0.0, 0.7), (2.0, 0.5))  # in the picture: noise, hidden
PICTURED = 6

Cells = dict[tuple[float, float], float]  # (noise, hidden) -> PSNR in dB


@dataclass(frozen=True)
class Measured:
    """One trained tokenizer: PSNR by noise in units of its latent std, and in absolute units."""

    latent_std: float
    relative: Cells
    absolute: Cells
    shown: CorruptionStudy


def measure(run: Path, forms: Sequence[float], pixels: np.ndarray) -> Measured:
    """Rebuild ``pixels`` with the noise in each of some forms (see `study_corruption`'s gamma)."""
    model = load_tokenizer(run).model
    assert isinstance(model, LDeTok)
    relative = [
        study_corruption(model, pixels, levels=RELATIVE, ratios=HIDDEN, gamma=gamma)
        for gamma in forms
    ]
    absolute = [
        study_corruption(model, pixels, levels=ABSOLUTE, ratios=(0.0,), gamma=gamma, unit=1.0)
        for gamma in forms
    ]
    return Measured(relative[0].latent_std, best(relative), best(absolute), relative[0])


def best(studies: Sequence[CorruptionStudy]) -> Cells:
    """PSNR of each cell, the best over the studies of one tokenizer."""
    found: Cells = {}
    for study in studies:
        for cell in study.cells:
            key = (cell.level, cell.hidden)
            found[key] = max(found.get(key, -np.inf), cell.psnr)
    return found


def cell_text(cells: dict[str, list[Cells]], key: tuple[float, float]) -> str:
    """Both means over the seeds, and the difference with its spread."""
    ours, theirs = ([c[key] for c in cells[kind]] for kind in KINDS)
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    spread = f" ± {statistics.stdev(gaps):.1f}" if len(gaps) > 1 else ""
    gap = statistics.mean(gaps)
    text = f"{statistics.mean(ours):.1f} / {statistics.mean(theirs):.1f} ({gap:+.1f}{spread})"
    return f"**{text}**" if gap >= 1 else text


def table(cells: dict[str, list[Cells]], levels: Iterable[float], hidden: Sequence[float]) -> str:
    """A Markdown table, noise down, share of hidden tokens across."""
    lines = ["| noise | " + " | ".join(f"{share:.0%} hidden" for share in hidden) + " |"]
    lines += ["|---" * (len(hidden) + 1) + "|"]
    for level in levels:
        texts = [cell_text(cells, (level, share)) for share in hidden]
        lines.append(f"| {level:g} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def picture(pixels: np.ndarray, studies: dict[str, CorruptionStudy]) -> Image.Image:
    """Some originals, then for each corruption what both decoders make of them."""
    some = slice(1, len(pixels), len(pixels) // PICTURED)
    rows = [pictures.ImageRow("original", [(image,) for image in pictures.to_images(pixels[some])])]
    for level, hidden in SHOWN:
        for kind, study in studies.items():
            images = pictures.to_images(study.cell(level, hidden).rebuilt[some])
            corruption = f"noise {level:g}" if level or not hidden else ""
            if hidden:
                corruption += f"{', ' if level else ''}{hidden:.0%} hidden"
            rows.append(pictures.ImageRow(f"{kind}: {corruption}", [(image,) for image in images]))
    return pictures.labelled_grid(rows, side=96).quantize(64)


@click.command(help=__doc__.splitlines()[0])
@click.option("--out", type=click.Path(path_type=Path), default="runs/denoising")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=450, show_default=True)
@click.option("--images", type=click.IntRange(8), default=32, help="Held-out drawings to rebuild.")
@click.option("--quiet", is_flag=True)
def main(out: Path, seeds: int, steps: int, images: int, quiet: bool) -> None:
    drawings = make_emoji_images(out / "images", quiet=quiet)
    held_out = open_images(drawings.held_out)
    pixels, _ = load_squares(held_out, evenly_spaced(len(held_out), images), DENOISING.image_size)
    execution = Execution(trackers=(), checkpoint_every=steps, keep_checkpoints=1, quiet=quiet)
    results: dict[str, list[Measured]] = {kind: [] for kind in KINDS}
    for seed in range(seeds):
        for kind, recipe in KINDS.items():
            run = out / f"{kind}-{seed}"
            config = dataclasses.replace(recipe, seed=seed, duration=f"{steps} steps")
            train_tokenizer(config, drawings.train, run, execution)
            forms = (config.gamma,) if config.gamma else (0.0, DENOISING.gamma)
            results[kind].append(measure(run, forms, pixels))
    relative = {kind: [one.relative for one in found] for kind, found in results.items()}
    absolute = {kind: [one.absolute for one in found] for kind, found in results.items()}
    for kind, found in results.items():
        stds = ", ".join(f"{one.latent_std:.2f}" for one in found)
        click.echo(f"latent std of {kind}: {stds}")
    click.echo(
        f"\nPSNR in dB, denoising / baseline (difference), mean over {seeds} seeds, "
        f"{len(pixels)} held-out drawings; bold where the difference is at least 1 dB.\n\n"
        f"Noise in units of the latent std:\n\n{table(relative, RELATIVE, HIDDEN)}\n\n"
        f"Noise in absolute units:\n\n{table(absolute, ABSOLUTE, (0.0,))}"
    )
    shown = {kind: found[0].shown for kind, found in results.items()}
    pictures.save(out / "denoising.png", picture(pixels, shown))


if __name__ == "__main__":
    main()
