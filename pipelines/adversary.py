"""The tokenizer's adversary: a discriminator that joins a training at a chosen step."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines.accumulation import accumulate
from detok_pipe.pipelines.config import TokenizerConfig
from detok_pipe.tokenizer.discriminator import SMALLEST_IMAGE, PatchDiscriminator
from detok_pipe.tokenizer.losses import discriminator_losses
from detok_pipe.tokenizer.model import parameter_groups


@dataclass
class Pairs:
    """Images and what the tokenizer made of them, (b, 3, H, W) each, in [-1, 1]."""

    images: Tensor
    rebuilt: Tensor
    ids: Tensor


class HingeLoss(nn.Module):
    """The discriminator's loss as one module, so that processes exchange gradients once."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: Tensor, rebuilt: Tensor) -> dict[str, Tensor]:
        """See `discriminator_losses`."""
        return discriminator_losses(self.discriminator, images, rebuilt)


class Adversary:
    """A PatchGAN and its optimizer, which has the tokenizer's settings and learning rate.

    Each process, and each micro-batch, normalises by the statistics of its own images, so with
    it a training depends (slightly) on how many there are.

    Raises:
        ConfigError: images that are too small for it.

    Attributes:
        start: the first step (from 0) in which it takes part; until then it is not run at all.
        discriminator: scores images in [0, 1]. optimizer: of its weights.
    """

    def __init__(self, config: TokenizerConfig, start: int, accelerator: Accelerator) -> None:
        if config.image_size < SMALLEST_IMAGE:
            raise ConfigError(
                f"the discriminator needs images of {SMALLEST_IMAGE} pixels and more: with "
                f"image_size {config.image_size} set adversarial_start=null"
            )
        self.start = start
        self.discriminator = PatchDiscriminator().to(accelerator.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.discriminator, config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            fused=True,
        )
        self._clip = config.clip
        self._accelerator = accelerator
        self._loss = accelerator.prepare_model(HingeLoss(self.discriminator))

    def update(self, pairs: Pairs, micro_batch: int | None) -> dict[str, Tensor]:
        """One optimizer step of the discriminator; returns what is worth logging of it."""
        values = accumulate(
            self._accelerator,
            self._loss,
            pairs,
            micro_batch,
            lambda part: self._loss(part.images, part.rebuilt),
        )
        norm = torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        named = {f"discriminator_{name}": value for name, value in values.items()}
        return {**named, "discriminator_gradient_norm": norm}
