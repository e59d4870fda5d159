"""Tokenizer recipes by name; each docstring gives its exact command and what to expect.

The paper is "Latent Denoising Makes Good Visual Tokenizers", arXiv 2507.15856; figures are
FID with guidance on ImageNet 256 x 256 as published, not measured by this project. Its ablations
share one setting: small encoder, base decoder, 50 epochs, no adversarial loss.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from detok_pipe.pipelines.config import TokenizerConfig, unknown_name

Recipe = Callable[[], TokenizerConfig]

TOKENIZER_PRESETS: dict[str, Recipe] = {}


def _tokenizer(recipe: Recipe) -> Recipe:
    TOKENIZER_PRESETS[recipe.__name__.replace("_", "-")] = recipe
    return recipe


def tokenizer_preset(name: str) -> TokenizerConfig:
    """The configuration of a tokenizer recipe.

    Raises:
        ConfigError: unknown name; near names are listed.
    """
    if name not in TOKENIZER_PRESETS:
        raise unknown_name("tokenizer preset", name, list(TOKENIZER_PRESETS))
    return TOKENIZER_PRESETS[name]()


def list_presets() -> Iterator[tuple[str, str]]:
    """Each recipe's name and first line; the members of a sweep share an entry, called N."""
    members = {sweep.member(value): sweep for sweep in SWEEPS for value in sweep.values}
    for name, recipe in TOKENIZER_PRESETS.items():
        if name not in members:
            yield name, (recipe.__doc__ or "").splitlines()[0]
    for sweep in SWEEPS:
        values = ", ".join(f"{value:g}" for value in sweep.values)
        yield sweep.name.format("N"), f"{sweep.summary} N: {values}."


@_tokenizer
def detok_bb() -> TokenizerConfig:
    """The final tokenizer: base encoder and decoder, 200 epochs, an adversary from epoch 100 on.

    detok-pipe train-tok detok-bb --data imagenet/train --out runs/detok-bb

    Interpolative noise of gamma 3 and random masks of up to 0.7. Published: MAR-B 2.43,
    RandomAR-B 5.22, RasterAR-B 4.46, SiT-B 5.13 after 100 epochs.
    """
    return TokenizerConfig(adversarial_start="100 epochs")


@_tokenizer
def detok_decoder() -> TokenizerConfig:
    """The released decoder's tuning: 100 epochs of a trained tokenizer's decoder alone.

    detok-pipe train-tok detok-decoder --finetune-decoder runs/detok-bb --data imagenet/train
    --out runs/detok-bb-tuned

    On clean latents of all tokens, with an adversary from the start. The encoder stays as it is, so
    caches and samples of runs/detok-bb are decoded by either. Published for MAR after 800 epochs,
    tuned and not: B 1.55 and 1.61, L 1.35 and 1.43.
    """
    return TokenizerConfig(
        decoder_only=True,
        gamma=0.0,
        mask_ratio=0.0,
        perceptual_weight=0.1,
        base_lr=5e-5,
        warmup=0.05,
        duration="100 epochs",
        adversarial_start="0 epochs",
    )


@_tokenizer
def detok_sb() -> TokenizerConfig:
    """The ablations' joint noising: gamma 3 and masks of up to 0.7.

    detok-pipe train-tok detok-sb --data imagenet/train --out runs/detok-sb

    Published: SiT-B 5.50, MAR-B 2.65 after 100 epochs.
    """
    return TokenizerConfig(encoder="small", duration="50 epochs")


@_tokenizer
def detok_sb_baseline() -> TokenizerConfig:
    """The ablations' baseline: as detok-sb, without latent noise and without masks.

    detok-pipe train-tok detok-sb-baseline --data imagenet/train --out runs/baseline

    Published: SiT-B 6.97, MAR-B 3.31 after 100 epochs.
    """
    return dataclasses.replace(detok_sb(), gamma=0.0, mask_ratio=0.0)


@_tokenizer
def detok_sb_decoder() -> TokenizerConfig:
    """After a constant mask ratio: 10 epochs of the decoder alone, on all tokens.

    detok-pipe train-tok detok-sb-mask-0.7-constant --data imagenet/train --out runs/constant
    detok-pipe train-tok detok-sb-decoder --finetune-decoder runs/constant --data imagenet/train
    --out runs/constant-tuned

    A decoder that was always shown the same share of tokens has never seen them all. The paper
    gives the duration; the other values are those of the ablations.
    """
    return dataclasses.replace(detok_sb_baseline(), decoder_only=True, duration="10 epochs")


@dataclass(frozen=True)
class Sweep:
    """Recipes of the paper that differ in one number.

    Attributes:
        name: of a member, with {} where the number goes. summary: one line on all of them.
        values: the numbers. recipe: from a number to its configuration.
    """

    name: str
    summary: str
    values: tuple[float, ...]
    recipe: Callable[[float], TokenizerConfig]

    def member(self, value: float) -> str:
        """The name of one member."""
        return self.name.format(f"{value:g}")


_TENTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

SWEEPS = (
    Sweep(
        "detok-sb-gamma-{}",
        "Interpolative noise of gamma N without masks; 0 is the baseline.",
        (0.0, 1.0, 2.0, 3.0, 4.0),
        lambda gamma: dataclasses.replace(detok_sb_baseline(), gamma=gamma),
    ),
    Sweep(
        "detok-sb-additive-{}",
        "Additive noise of gamma N without masks.",
        (1.0, 2.0, 3.0, 4.0),
        lambda gamma: dataclasses.replace(detok_sb_baseline(), gamma=gamma, noise="additive"),
    ),
    Sweep(
        "detok-sb-mask-{}",
        "Random mask ratios up to N without noise.",
        _TENTHS,
        lambda ratio: dataclasses.replace(detok_sb_baseline(), mask_ratio=ratio),
    ),
    Sweep(
        "detok-sb-mask-{}-constant",
        "Mask ratio N in every batch, without noise; to be followed by detok-sb-decoder.",
        _TENTHS,
        lambda ratio: dataclasses.replace(detok_sb_baseline(), mask_ratio=ratio, mask="constant"),
    ),
)
"""The paper plots these; read their figures there."""


def _member(sweep: Sweep, value: float) -> Recipe:
    def recipe() -> TokenizerConfig:
        return sweep.recipe(value)

    name = sweep.member(value)
    summary = sweep.summary.replace(" N", f" {value:g}")
    recipe.__doc__ = (
        f"{summary}\n\ndetok-pipe train-tok {name} --data imagenet/train --out runs/{name}"
    )
    return recipe


TOKENIZER_PRESETS |= {
    sweep.member(value): _member(sweep, value) for sweep in SWEEPS for value in sweep.values
}
