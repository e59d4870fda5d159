"""Small trainings of tokenizers, and what they leave."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from detok_pipe.pipelines import train_tokenizer as trainer
from detok_pipe.pipelines.config import Execution, TokenizerConfig
from detok_pipe.tokenizer.discriminator import PatchDiscriminator
from detok_pipe.tokenizer.losses import reconstruction_losses

STEPS, START = 6, 3
PLAIN = TokenizerConfig(
    image_size=32,
    patch_size=8,
    channels=4,
    encoder="16,1,2",
    decoder="16,1,2",
    perceptual="none",
    global_batch=4,
    duration=f"{STEPS} steps",
    base_lr=6.4e-2,
    ema=0.9,
    precision="fp32",
)
ADVERSARIAL = dataclasses.replace(PLAIN, adversarial_start=f"{START} steps")
QUIET = Execution(
    device="cpu", trackers=(), quiet=True, log_every=2, checkpoint_every=2, keep_checkpoints=9
)


def shrink_discriminator(patch: pytest.MonkeyPatch) -> None:
    """Train with the same layers of few channels, for speed."""
    patch.setattr(
        "detok_pipe.pipelines.adversary.PatchDiscriminator", lambda: PatchDiscriminator(width=4)
    )


def files(run: Path, step: int = STEPS) -> dict[str, dict[str, Tensor]]:
    """All tensors of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {file.stem: load_file(file) for file in folder.glob("*.safetensors")}


def assert_same(first: object, second: object) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def at_step(monkeypatch, wanted: int, action) -> None:
    """Call ``action(losses)`` on what step ``wanted`` of the next training computes."""
    steps = iter(range(10**6))

    def losses(*arguments, **settings):
        values = reconstruction_losses(*arguments, **settings)
        return action(values) if next(steps) == wanted else values

    monkeypatch.setattr(trainer, "reconstruction_losses", losses)


def kill(values):
    os.kill(os.getpid(), signal.SIGTERM)
    return values
