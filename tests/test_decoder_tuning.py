"""Training the decoder of a trained tokenizer alone."""

import dataclasses

import pytest
import torch
from tokenizer_making import (
    PLAIN,
    QUIET,
    assert_same,
    at_step,
    files,
    kill,
)

from detok_pipe.latents.errors import ConfigError, Interrupted, MismatchError
from detok_pipe.pipelines.config import TokenizerConfig
from detok_pipe.pipelines.train_tokenizer import train_tokenizer
from detok_pipe.pipelines.trained import load_tokenizer

pytestmark = pytest.mark.usefixtures("small_discriminator")


def tuning(**changes) -> TokenizerConfig:
    """A recipe for the decoder alone; its network is not that of the runs here."""
    return dataclasses.replace(
        TokenizerConfig(
            decoder_only=True,
            perceptual="none",
            global_batch=4,
            duration="4 steps",
            precision="fp32",
            gamma=0.0,
            mask_ratio=0.0,
            adversarial_start="2 steps",
            base_lr=6.4e-2,
            ema=0.5,
        ),
        **changes,
    )


def test_decoder_tuning_leaves_the_encoder_as_it_was(
    tokenizer_images, tmp_path, finished_tokenizer
) -> None:
    out = tmp_path / "tuned"
    train_tokenizer(tuning(), tokenizer_images, out, QUIET, finetune=finished_tokenizer)
    before, after = load_tokenizer(finished_tokenizer), load_tokenizer(out)
    assert after.identity == before.identity
    assert after.decoder != before.decoder
    old, new = before.model.state_dict(), after.model.state_dict()
    for name, value in new.items():
        # No token is hidden, so the mask token is not used.
        same = name.startswith("encoder.") or name == "decoder.mask_token"
        assert torch.equal(value, old[name]) == same, name
    # The optimizer holds moments of the decoder only.
    moments = {key.split(".")[0] for key in files(out, 4)["optimizer"]}
    assert len(moments) == len(list(after.model.decoder.parameters()))


def test_decoder_tuning_resumes_bit_for_bit(
    tokenizer_images, tmp_path, finished_tokenizer, monkeypatch
) -> None:
    train_tokenizer(
        tuning(), tokenizer_images, tmp_path / "whole", QUIET, finetune=finished_tokenizer
    )
    with monkeypatch.context() as patch:
        at_step(patch, 2, kill)
        with pytest.raises(Interrupted):
            train_tokenizer(
                tuning(), tokenizer_images, tmp_path / "parts", QUIET, finetune=finished_tokenizer
            )
    train_tokenizer(
        tuning(), tokenizer_images, tmp_path / "parts", QUIET, finetune=finished_tokenizer
    )
    assert_same(files(tmp_path / "parts", 4), files(tmp_path / "whole", 4))


def test_tuning_needs_a_run_and_a_recipe_for_it(
    tokenizer_images, tmp_path, finished_tokenizer
) -> None:
    with pytest.raises(ConfigError, match="--finetune-decoder"):
        train_tokenizer(tuning(), tokenizer_images, tmp_path / "a", QUIET)
    with pytest.raises(ConfigError, match="trains the encoder too"):
        train_tokenizer(PLAIN, tokenizer_images, tmp_path / "b", QUIET, finetune=finished_tokenizer)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    train_tokenizer(
        tuning(), tokenizer_images, tmp_path / "tuned", QUIET, finetune=finished_tokenizer
    )
    other = dataclasses.replace(PLAIN, seed=1, duration="1 step")
    train_tokenizer(other, tokenizer_images, tmp_path / "other", QUIET)
    with pytest.raises(MismatchError, match="tuned from"):
        train_tokenizer(
            tuning(), tokenizer_images, tmp_path / "tuned", QUIET, finetune=tmp_path / "other"
        )
