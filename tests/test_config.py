import dataclasses

import pytest

from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines.config import (
    Execution,
    GeneratorConfig,
    TokenizerConfig,
    duration_in_steps,
    from_json,
    to_json,
    with_overrides,
)


def test_overrides_are_typed_by_their_field():
    changed = with_overrides(
        TokenizerConfig(),
        ["gamma=2", "betas=0.9,0.99", "encoder=192,4,6", "flip=false", "perceptual=none"],
    )
    assert changed == TokenizerConfig(
        gamma=2.0, betas=(0.9, 0.99), encoder="192,4,6", flip=False, perceptual="none"
    )
    assert isinstance(changed.gamma, float)


def test_overrides_reach_into_the_model_and_accept_none():
    changed = with_overrides(
        GeneratorConfig(clip=1.0), ["model.width=256", "model.dropout=0", "clip=null"]
    )
    assert changed.model == {"width": 256, "dropout": 0}
    assert changed.clip is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gama=2", ["gama", "gamma"]),
        ("gamma=high", ["gamma=high", "number"]),
        ("gamma", ["key=value"]),
        ("perceptual=vgg", ["efficientnet-lite2"]),
        ("duration=3 parsecs", ["3 parsecs", "100 epochs"]),
        ("image_size=100", ["100", "16"]),
        ("patch_size=0", ["patch_size", "positive"]),
        ("kl_weight=-1", ["kl_weight", "-1"]),
        ("perceptual_size=0", ["perceptual_size", "null"]),
        ("mask_ratio=1", ["mask_ratio", "1"]),
        ("base_lr=-1", ["base_lr", "-1"]),
        ("weight_decay=-0.1", ["weight_decay", "-0.1"]),
        ("betas=0.9,1.5", ["betas", "1.5"]),
        ("clip=0", ["clip", "null"]),
        ("seed=-1", ["seed", "-1"]),
        ("seed=9223372036854775808", ["seed", "less than 2^63", "9223372036854775808"]),
        ("channels=99999999999999999999", ["channels must be less than 2^63"]),
        ("seed=" + "9" * 5000, ["seed", "integer"]),
        ("duration=1e9999 steps", ["duration", "1e9999", "finite"]),
        ("adversarial_start=1e9999 steps", ["duration", "1e9999", "finite"]),
        ("base_lr=inf", ["base_lr", "finite", "inf"]),
        ("weight_decay=Infinity", ["weight_decay", "finite", "inf"]),
        ("betas.0=0.9", ["betas", "entries", "betas=value"]),
        ("gamma.x=3", ["gamma", "entries", "gamma=value"]),
    ],
)
def test_a_wrong_override_says_what_is_wrong(override, words):
    with pytest.raises(ConfigError) as error:
        with_overrides(TokenizerConfig(), [override])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("limit=-5", "limit must be positive, and is -5"),
        ("classes=[1,2]", "valid string"),
        ("model.width=9223372036854775808", r"model\.width must be less than 2\^63"),
        ("model.dropout=NaN", "model must be finite"),
        ("model=" + "[" * 100_000, "valid dictionary"),
    ],
)
def test_a_wrong_override_of_a_generator_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(GeneratorConfig(), [override])


@pytest.mark.parametrize(
    ("text", "classes"),
    [("a, b", ("a", "b")), ('["a, b"]', ("a, b",)), ("1,2", ("1", "2")), ("12", ("12",))],
)
def test_lists_are_json_or_have_commas(text, classes):
    assert with_overrides(GeneratorConfig(), [f"classes={text}"]).classes == classes


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("7 steps", 7), ("1 epoch", 4), ("2.5 epochs", 10), ("1 kimages", 4), ("1image", 1)],
)
def test_durations_round_up_to_whole_batches(duration, steps):
    assert duration_in_steps(duration, images=1000, global_batch=256) == steps


@pytest.mark.parametrize("config", [TokenizerConfig(), GeneratorConfig(classes=("a", "b"))])
def test_a_configuration_survives_json(config):
    assert from_json(type(config), to_json(config), where="x") == config


def test_a_key_of_a_newer_version_is_refused():
    with pytest.raises(ConfigError, match=r"run/config.json.*frobnicate"):
        from_json(GeneratorConfig, {"frobnicate": 1}, where="run/config.json")


def test_the_learning_rate_follows_the_global_batch():
    assert TokenizerConfig(global_batch=1024).lr == pytest.approx(4e-4)


@pytest.mark.parametrize(
    "field", ["log_every", "checkpoint_every", "keep_checkpoints", "micro_batch"]
)
def test_execution_refuses_counts_below_one(field):
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(Execution(), **{field: 0})
