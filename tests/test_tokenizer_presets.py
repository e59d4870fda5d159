"""The paper's tokenizer recipes: their values, and that they are told apart and listed."""

import shlex

import pytest

from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines.cli import COMMANDS, group
from detok_pipe.pipelines.tokenizer_presets import (
    TOKENIZER_PRESETS,
    list_presets,
    tokenizer_preset,
)

COMMON = {
    "global_batch": 1024,
    "base_lr": 1e-4,
    "warmup": 0.25,
    "betas": (0.9, 0.95),
    "weight_decay": 1e-4,
    "clip": 3.0,
    "ema": 0.999,
    "perceptual": "lpips+convnext",
    "perceptual_weight": 1.0,
    "kl_weight": 1e-6,
    "adversarial_weight": 0.1,
    "flip": True,
    "image_size": 256,
    "decoder_only": False,
}
ABLATION = {**COMMON, "encoder": "small", "decoder": "base", "duration": "50 epochs"}
CLEAN = {"gamma": 0.0, "mask_ratio": 0.0}
PLAIN = {"adversarial_start": None}

EXPECTED = {
    "detok-bb": {
        **COMMON,
        "encoder": "base",
        "gamma": 3.0,
        "mask_ratio": 0.7,
        "noise": "interpolative",
        "mask": "random",
        "duration": "200 epochs",
        "adversarial_start": "100 epochs",
    },
    "detok-decoder": {
        **COMMON,
        **CLEAN,
        "decoder_only": True,
        "perceptual_weight": 0.1,
        "base_lr": 5e-5,
        "warmup": 0.05,
        "duration": "100 epochs",
        "adversarial_start": "0 epochs",
    },
    "detok-sb": {**ABLATION, **PLAIN, "gamma": 3.0, "mask_ratio": 0.7, "mask": "random"},
    "detok-sb-baseline": {**ABLATION, **PLAIN, **CLEAN},
    "detok-sb-gamma-4": {**ABLATION, **PLAIN, **CLEAN, "gamma": 4.0, "noise": "interpolative"},
    "detok-sb-additive-3": {**ABLATION, **PLAIN, **CLEAN, "gamma": 3.0, "noise": "additive"},
    "detok-sb-mask-0.9": {**ABLATION, **PLAIN, **CLEAN, "mask_ratio": 0.9, "mask": "random"},
    "detok-sb-mask-0.3-constant": {
        **ABLATION,
        **PLAIN,
        **CLEAN,
        "mask_ratio": 0.3,
        "mask": "constant",
    },
    "detok-sb-decoder": {
        **ABLATION,
        **PLAIN,
        **CLEAN,
        "decoder_only": True,
        "duration": "10 epochs",
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values(name: str) -> None:
    config = tokenizer_preset(name)
    assert {key: getattr(config, key) for key in EXPECTED[name]} == EXPECTED[name]


def test_the_sweeps_start_at_the_baseline() -> None:
    assert tokenizer_preset("detok-sb-gamma-0") == tokenizer_preset("detok-sb-baseline")
    configs = [recipe() for name, recipe in TOKENIZER_PRESETS.items() if name[-7:] != "gamma-0"]
    assert len(set(configs)) == len(configs) == 27


@pytest.mark.parametrize("name", TOKENIZER_PRESETS)
def test_the_commands_in_the_description_are_real(name: str) -> None:
    text = TOKENIZER_PRESETS[name].__doc__ or ""
    commands = [part.split("\n\n")[0] for part in text.split("detok-pipe ")[1:]]
    assert f"train-tok {name} " in " ".join(commands[-1].split())
    for command in commands:
        verb, *arguments = shlex.split(command)
        assert verb in COMMANDS
        group.get_command(None, verb).make_context(verb, arguments)


def test_the_list_names_all() -> None:
    listed = dict(list_presets())
    plain = [name for name in TOKENIZER_PRESETS if name in listed]
    assert len(listed) == len(plain) + 4
    assert listed["detok-sb-mask-N"].endswith("N: 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9.")
    assert all(summary.endswith(".") for summary in listed.values())


def test_an_unknown_name_is_told_its_neighbours() -> None:
    with pytest.raises(ConfigError, match="detok-sb-gamma-4"):
        tokenizer_preset("detok-sb-gamma-5")
