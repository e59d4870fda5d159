"""A tokenizer's training that is stopped, by a signal, a damaged file or a loss, and goes on."""

import pytest
from tokenizer_making import ADVERSARIAL, PLAIN, QUIET, START, assert_same, at_step, files, kill

from detok_pipe.latents.errors import Interrupted, NonFiniteError
from detok_pipe.pipelines.checkpoints import checkpoint_paths, latest_checkpoint
from detok_pipe.pipelines.image_loader import ImageLoader
from detok_pipe.pipelines.images import open_images
from detok_pipe.pipelines.train_tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("small_discriminator")


@pytest.mark.parametrize("step", [1, START, START + 1])
def test_interrupted_equals_uninterrupted(
    tokenizer_images, tmp_path, finished_tokenizer, monkeypatch, step
) -> None:
    out = tmp_path / "parts"
    with monkeypatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Interrupted):
            train_tokenizer(ADVERSARIAL, tokenizer_images, out, QUIET)
    assert latest_checkpoint(out).step == step + 1
    train_tokenizer(ADVERSARIAL, tokenizer_images, out, QUIET)
    assert_same(files(out), files(finished_tokenizer))
    assert "num_batches_tracked" in "".join(files(out)["discriminator"])


@pytest.mark.parametrize("name", ["discriminator", "discriminator_optimizer", "ema"])
def test_a_checkpoint_cut_short_is_passed_over(
    tokenizer_images, tmp_path, finished_tokenizer, name
) -> None:
    out = tmp_path / "run"
    train_tokenizer(ADVERSARIAL, tokenizer_images, out, QUIET)
    damaged = checkpoint_paths(out)[-1] / f"{name}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=f"{name}.*using the checkpoint before it"):
        train_tokenizer(ADVERSARIAL, tokenizer_images, out, QUIET)
    assert_same(files(out), files(finished_tokenizer))


def test_a_loss_that_is_not_finite_names_the_images(
    tokenizer_images, tmp_path, monkeypatch
) -> None:
    at_step(monkeypatch, 4, lambda values: {**values, "loss": values["loss"] * float("nan")})
    with pytest.raises(NonFiniteError, match=r"step 5 .*\d\.png") as stopped:
        train_tokenizer(PLAIN, tokenizer_images, tmp_path / "run", QUIET)
    loader = ImageLoader(open_images(tokenizer_images), 32, 4, PLAIN.seed)
    assert ", ".join(loader.names(range(16, 20))) in str(stopped.value)
    assert latest_checkpoint(tmp_path / "run").step == 4
