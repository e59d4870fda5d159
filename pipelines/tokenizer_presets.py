"""Tokenizer recipes by name; each docstring gives its exact command and what to expect.

The paper is "Latent Denoising Makes Good Visual Tokenizers", arXiv 2507.15856; figures are
FID with guidance on ImageNet 256 x 256 as published, not measured by this project.
"""

from collections.abc import Callable

from detok_pipe.pipelines.config import TokenizerConfig, unknown_name

TOKENIZER_PRESETS: dict[str, Callable[[], TokenizerConfig]] = {}


def _tokenizer(recipe: Callable[[], TokenizerConfig]) -> Callable[[], TokenizerConfig]:
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


@_tokenizer
def detok_bb() -> TokenizerConfig:
    """The final tokenizer: base encoder and decoder, gamma 3, masks up to 0.7, 200 epochs.

    detok-pipe train-tok detok-bb --data imagenet/train --out runs/detok-bb

    The paper adds an adversarial loss from epoch 100 on; with it, MAR-B reaches 2.43 and
    SiT-B 5.13 after 100 epochs.
    """
    return TokenizerConfig()


@_tokenizer
def detok_sb() -> TokenizerConfig:
    """The ablations' tokenizer: small encoder, base decoder, 50 epochs, no adversarial loss.

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
    return TokenizerConfig(encoder="small", duration="50 epochs", gamma=0.0, mask_ratio=0.0)
