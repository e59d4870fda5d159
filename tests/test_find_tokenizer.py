"""Which tokenizer decodes latents, where a published one's weights were not the hub's."""

import json
from pathlib import Path

import pytest
from score_making import tiny_tokenizer

from detok_pipe.latents.errors import ConfigError, MismatchError
from detok_pipe.pipelines import find_tokenizer as module
from detok_pipe.pipelines.find_tokenizer import find_tokenizer, run_of, tokenizer_if_any
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice

ENCODER = {"name": "sd-vae", "fingerprint": "mine", "weights": "mine"}


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub whose weights are other than those that made the latents."""
    other = tiny_tokenizer()
    other.identity.update({"name": "sd-vae", "fingerprint": "hub", "weights": "hub"})
    monkeypatch.setattr(module, "open_tokenizer", lambda *_, **__: other)


def test_other_weights_than_the_hub_s_are_to_be_named_again(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"is 'hub'.* 'mine'; .* with --weights"):
        find_tokenizer(ENCODER, tmp_path)
    with pytest.raises(MismatchError, match=r"'mine'$"):
        find_tokenizer(ENCODER, tmp_path, named=TokenizerChoice("sd-vae", tmp_path))


def test_pictures_that_nobody_asked_for_are_left_out(tmp_path: Path) -> None:
    tokenizer, missing = tokenizer_if_any(ENCODER, tmp_path)
    assert tokenizer is None
    assert "--weights" in missing
    with pytest.raises(MismatchError):
        tokenizer_if_any(ENCODER, tmp_path, wanted=True)


def test_weights_alone_need_to_know_the_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not say.*--tokenizer"):
        find_tokenizer({"fingerprint": "mine"}, tmp_path, named=TokenizerChoice(None, tmp_path))


def test_a_checkpoint_stands_for_its_run(tmp_path: Path) -> None:
    run = tmp_path / "gen"
    checkpoint = run / "checkpoints" / "step-00000004"  # which may have been removed
    assert run_of(checkpoint) == run
    assert run_of(run) == run
    # A folder of runs may be called checkpoints, too.
    assert run_of(tmp_path / "checkpoints" / "gen") == tmp_path / "checkpoints" / "gen"
    with pytest.raises(ConfigError, match=f"no tokenizer in {tmp_path} made"):
        find_tokenizer({"fingerprint": "mine"}, checkpoint)
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"tokenizer": ENCODER}))
    with pytest.raises(MismatchError, match="is 'hub'"):  # sd-vae, as the run's record says
        find_tokenizer({"fingerprint": "mine"}, checkpoint)
