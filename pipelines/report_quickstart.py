"""The page of ``detok-pipe quickstart``: every stage, with what it made and what it measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from detok_pipe.pipelines.pictures import ImageRow
from detok_pipe.pipelines.plots import Curve, Measured, Metric, Sweep
from detok_pipe.pipelines.report import (
    Block,
    Cell,
    Disclosure,
    ImageGrid,
    KeyValues,
    Report,
    Section,
    Table,
    Text,
    cell_text,
    duration,
)
from detok_pipe.pipelines.report_parts import (
    ScoreRow,
    commands,
    curve_figure,
    score_table,
    settings,
    sweep_blocks,
    timings,
)

_BIAS = (
    "{distance} is a Fréchet distance of features of EfficientNet-lite2, not an FID, and compares "
    "only with itself. With {count} images and {dimensions} feature dimensions it is strongly "
    "biased upwards, so even held-out real images do not score zero: compare rows of equal "
    "count only. The kernel distance beside it is unbiased at any count and may fall below zero."
)
_OWN_IMAGES = (
    "detok-pipe train-tok detok-sb --data my-images/train --out runs/tok",
    "detok-pipe encode --tokenizer runs/tok --data my-images/train --out cache",
    "detok-pipe train-gen mar-b --latents cache --out runs/mar-b",
    "detok-pipe fid-stats my-images/train --out my-stats.npz",
    "detok-pipe sweep-cfg runs/mar-b --ref my-stats.npz",
    "detok-pipe report runs/mar-b",
)
_IMAGENET = (
    "detok-pipe train-tok detok-bb --data imagenet/train --out runs/tok",
    "detok-pipe encode --tokenizer runs/tok --data imagenet/train --out cache --shards 313",
    "detok-pipe verify cache",
    "detok-pipe train-gen mar-l --latents cache --out runs/mar-l",
    "detok-pipe sweep-cfg runs/mar-l --ref imagenet-256",
    "detok-pipe report runs/mar-l",
)


@dataclass(frozen=True)
class DataFacts:
    """The image set. ``counts`` is class name -> (training, held-out) images."""

    name: str
    credit: str
    image_size: int
    counts: Mapping[str, tuple[int, int]]
    examples: Sequence[ImageRow]


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer on held-out images. PSNR in dB; ``rfd`` by the page's distance."""

    parameters: int
    grid: Sequence[int]
    channels: int
    curves: Sequence[Curve]
    reconstructions: Sequence[ImageRow]
    psnr: Measured
    psnr_mean_image: Measured
    rfd: Measured
    rfd_name: str
    images: int


@dataclass(frozen=True)
class CacheFacts:
    """``info`` of the cache, the lines that ``verify`` printed, and of the conversion."""

    info: Mapping[str, Any]
    verify: str
    converted: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GeneratorFacts:
    """The generator and its samples.

    Attributes:
        samples: guidance scale -> rows by class; the best scale is shown open.
        by_scale: one row a scale; columns share class and noise.
        warnings: of the sweep.
    """

    name: str
    parameters: int
    curves: Sequence[Curve]
    sweep: Sweep
    samples: Mapping[float, Sequence[ImageRow]]
    by_scale: Sequence[ImageRow]
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class ProbeFacts:
    """Share of images whose class a classifier trained on real images names, in 0..1."""

    samples: float
    held_out: float
    chance: float


@dataclass(frozen=True)
class QuickstartFacts:
    """Everything on the page. ``metrics`` names first the distance, then the kernel distance.

    ``scores`` holds the trained model first; ``settings`` is group -> names and values.
    """

    preset: str
    device: str
    data: DataFacts
    tokenizer: TokenizerFacts
    cache: CacheFacts
    generator: GeneratorFacts
    probe: ProbeFacts
    metrics: Sequence[Metric]
    feature_dimensions: int
    scores: Sequence[ScoreRow]
    timings: Sequence[tuple[str, float]]
    settings: Mapping[str, Mapping[str, Any]]
    commands: Sequence[str]
    footer: str


def quickstart_page(facts: QuickstartFacts) -> Report:
    """The page of a finished quickstart."""
    total = sum(seconds for _, seconds in facts.timings)
    best = facts.scores[0]
    distance = facts.metrics[0].name
    headline: list[tuple[str, Cell]] = [
        ("time, all stages", duration(total)),
        ("PSNR of held-out reconstructions, dB", facts.tokenizer.psnr),
        (f"{distance} of the samples", best.metrics.get(distance)),
        ("samples recognised as their class", _percent(facts.probe.samples)),
    ]
    return Report(
        title="From pictures to a generator in one run",
        lead="A tokenizer, a latent cache and a generator, trained one after the other on "
        f"{facts.data.name}, on {facts.device}. This is a demonstration at a small size (preset "
        f"{facts.preset}): it shows that every stage works, not how good the method gets.",
        headline=headline,
        sections=[
            Section("The images", _data(facts.data)),
            Section("The tokenizer", _tokenizer(facts.tokenizer)),
            Section("The latent cache", _cache(facts.cache)),
            Section("The generator", _generator(facts.generator)),
            Section("Guidance", _guidance(facts)),
            Section("Samples", _samples(facts.generator)),
            Section("Scores", _scores(facts)),
            Section("Time and settings", [timings(facts.timings), *settings(facts.settings)]),
            Section("What to type next", _next(facts)),
        ],
        data={
            "scores": [asdict(row) for row in facts.scores],
            "sweep": asdict(facts.generator.sweep),
            "probe": asdict(facts.probe),
            "psnr": facts.tokenizer.psnr,
            "psnr_mean_image": facts.tokenizer.psnr_mean_image,
            "rfd": facts.tokenizer.rfd,
            "timings": dict(facts.timings),
        },
        footer=facts.footer,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _data(data: DataFacts) -> list[Block]:
    train = sum(pair[0] for pair in data.counts.values())
    held_out = sum(pair[1] for pair in data.counts.values())
    return [
        Text(
            f"{train + held_out:,} images of {len(data.counts)} classes, {data.image_size} pixels "
            f"square. {train:,} serve for training; {held_out:,} were held out of everything "
            "and serve only to measure."
        ),
        ImageGrid(
            data.examples,
            alt="Training images by class",
            caption=f"Training images by class. {data.credit}",
            size=64,
        ),
        Disclosure(
            "Images in each class",
            [
                Table(
                    columns=["Class", "Training", "Held out"],
                    rows=[[name, *pair] for name, pair in data.counts.items()],
                    caption="Images in each class.",
                )
            ],
        ),
    ]


def _tokenizer(facts: TokenizerFacts) -> list[Block]:
    shape = " x ".join(str(side) for side in facts.grid)
    return [
        Text(
            f"An l-DeTok autoencoder with {facts.parameters:,} parameters turns an image into "
            f"{shape} tokens of {facts.channels} numbers. In training its latents were blended "
            "with noise and part of the image was hidden; such latents are easier to generate."
        ),
        ImageGrid(
            facts.reconstructions,
            alt="Held-out images above, their reconstructions below",
            caption="Held-out images, which training never saw: the original above, what the "
            "tokenizer rebuilds from its latents below.",
            levels=("original", "rebuilt"),
        ),
        Table(
            columns=["Held-out images shown as", "PSNR, dB ↑", f"r{facts.rfd_name} ↓"],
            rows=[
                ["their reconstructions", facts.psnr, facts.rfd],
                ["the mean training image", facts.psnr_mean_image, None],
            ],
            caption=f"Reconstruction of {facts.images:,} held-out images, beside the mean image "
            "as the least that any tokenizer must beat.",
            highlight=0,
        ),
        Disclosure("Training curve", [curve_figure(facts.curves, caption="Tokenizer loss.")]),
    ]


def _cache(facts: CacheFacts) -> list[Block]:
    blocks: list[Block] = [
        Text(
            "Each image was encoded once. The cache keeps the posterior's mean and standard "
            "deviation, normalised by channel, for the image and its mirror image, in a "
            "shuffled order. Every generator run reads it from here."
        ),
        KeyValues(facts.info),
        commands(facts.verify.strip().splitlines(), caption="What `detok-pipe verify` found."),
    ]
    if facts.converted:
        blocks.append(Disclosure("The same cache, converted", [KeyValues(facts.converted)]))
    return blocks


def _generator(facts: GeneratorFacts) -> list[Block]:
    return [
        Text(
            f"{facts.name}, {facts.parameters:,} parameters, trained from the cache alone: "
            "no image is read and no tokenizer runs at this stage."
        ),
        curve_figure(facts.curves, caption=f"Training loss of {facts.name}."),
    ]


def _guidance(facts: QuickstartFacts) -> list[Block]:
    return [
        Text(
            "Guidance pushes each prediction away from what the model would say without a class. "
            "Its scale is chosen by measurement: 1 is no guidance, too much costs variety."
        ),
        *sweep_blocks([facts.generator.sweep], facts.metrics, facts.generator.warnings),
    ]


def _samples(facts: GeneratorFacts) -> list[Block]:
    best = facts.sweep.best
    blocks: list[Block] = []
    chosen = best if best in facts.samples else next(iter(facts.samples), None)
    if chosen is not None:
        blocks.append(
            ImageGrid(
                facts.samples[chosen],
                alt=f"Samples by class at guidance scale {chosen:g}",
                caption=f"Samples by class at guidance scale {chosen:g}, in the order of their "
                "seeds: none was picked.",
            )
        )
    if facts.by_scale:
        blocks.append(
            ImageGrid(
                facts.by_scale,
                alt="Samples by guidance scale",
                caption="The same classes and the same noise at several guidance scales.",
                size=64,
            )
        )
    blocks.extend(
        Disclosure(
            f"Samples by class at scale {scale:g}",
            [
                ImageGrid(
                    rows,
                    alt=f"Samples by class at guidance scale {scale:g}",
                    caption=f"Guidance scale {scale:g}.",
                )
            ],
        )
        for scale, rows in sorted(facts.samples.items())
        if scale != chosen
    )
    return blocks


def _scores(facts: QuickstartFacts) -> list[Block]:
    return [
        score_table(
            facts.scores,
            facts.metrics,
            caption="Distance to the training images, smaller is better. The trained model stands "
            "beside what it must beat and beside real images as the floor.",
            highlight=0,
        ),
        Text(
            _BIAS.format(
                distance=facts.metrics[0].name,
                count=cell_text(facts.scores[0].images),
                dimensions=cell_text(facts.feature_dimensions),
            ),
            tone="note",
        ),
        Table(
            columns=["A classifier trained on the real images", "Names the right class"],
            rows=[
                ["of the samples", _percent(facts.probe.samples)],
                ["of held-out real images", _percent(facts.probe.held_out)],
                ["by chance", _percent(facts.probe.chance)],
            ],
            caption="Do samples look like the class they were asked for?",
            highlight=0,
        ),
    ]


def _next(facts: QuickstartFacts) -> list[Block]:
    return [
        commands(facts.commands, caption="This page again, and its stages one by one."),
        commands(
            _OWN_IMAGES,
            caption="Your own images: a folder with one folder of images a class. Each command "
            "resumes when it is run again; `--dry-run` of a trainer says what it will need.",
        ),
        commands(
            _IMAGENET,
            caption="ImageNet at 256 pixels with the paper's recipes (needs GPUs; start with "
            "`accelerate launch` on several).",
        ),
    ]
