"""Fixtures that several modules' tests share; golden files' weights and noise follow a rule."""

import os
import signal
import subprocess
import zlib

import numpy as np
import pytest
import torch
from golden_making import rule_weight
from image_making import random_images


@pytest.fixture(scope="module", autouse=True)
def usual_sigterm():
    """The command line, which tests call here, sets its own handler for the rest of a process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def golden_weights():
    """Fill a module with the golden files' weights, put it in evaluation mode and return it.

    `keep` names the start of keys that hold computed values.
    """

    def fill(model, keep=("rope.",)):
        state = model.state_dict()
        filled = {k: v if k.startswith(keep) else rule_weight(k, v.shape) for k, v in state.items()}
        model.load_state_dict(filled)
        return model.eval()

    return fill


@pytest.fixture(scope="session")
def golden_draw():
    """The k-th Gaussian draw of a golden sampler, fp32."""

    def draw(k, shape):
        rng = np.random.default_rng(zlib.crc32(f"noise/{k}".encode()))
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    return draw


@pytest.fixture
def one_thread():
    """Small networks run faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs that can be resized and made read-only."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if os.name != "posix" or os.geteuid() != 0 or not mount("size=4k"):
        pytest.skip("mounting a tmpfs needs root")
    yield path, mount
    # Lazily: a file that a failed test left open or mapped is no second failure.
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="session")
def tokenizer_images(tmp_path_factory):
    """Ten images for small tokenizers to train on."""
    return random_images(tmp_path_factory.mktemp("images"), 10, (36, 40))


@pytest.fixture
def small_discriminator(monkeypatch):
    """Discriminators in training are small."""
    from tokenizer_making import shrink_discriminator

    shrink_discriminator(monkeypatch)


@pytest.fixture(scope="session")
def finished_tokenizer(tokenizer_images, tmp_path_factory):
    """A run with a small discriminator, trained in one sitting."""
    from tokenizer_making import ADVERSARIAL, QUIET, shrink_discriminator

    from detok_pipe.pipelines.train_tokenizer import train_tokenizer

    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        shrink_discriminator(patch)
        train_tokenizer(ADVERSARIAL, tokenizer_images, out, QUIET)
    return out
