"""The tokenizer's training losses, in fp32 whatever the surrounding autocast.

Images are given in [-1, 1], as the network produces them, and compared in [0, 1]. The weights'
defaults are the paper's: MSE + 1.0 perceptual + 1e-6 KL + 0.1 adversarial.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detok_pipe.latents.posterior import Posterior


def to_unit_range(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> fp32 in [0, 1]; values outside are kept."""
    return images.float() * 0.5 + 0.5


def reconstruction_losses(
    images: Tensor,
    reconstruction: Tensor,
    posterior: Posterior,
    *,
    perceptual: nn.Module | None = None,
    perceptual_weight: float = 1.0,
    kl_weight: float = 1e-6,
    discriminator: nn.Module | None = None,
    adversarial_weight: float = 0.1,
) -> dict[str, Tensor]:
    """What the tokenizer minimises, and its terms.

    Args:
        images, reconstruction: (B, 3, H, W) in [-1, 1].
        posterior: of the tokens that the encoder saw, (B, V, C) fp32.
        perceptual: maps (reconstruction, images), both fp32 in [0, 1], to a scalar.
        discriminator: maps images in [0, 1] to real-valued scores, higher for real ones; None
            before the epoch where the adversarial loss starts. Its parameters get no gradient
            here. Pass the bare module, not its distributed wrapper.

    Returns:
        fp32 scalars: "loss" (to differentiate) and its unweighted terms "mse", "kl" (nats an
        image: summed over tokens and channels, mean over the batch), and where they are used
        "perceptual" and "adversarial".
    """
    with torch.autocast(images.device.type, enabled=False):
        real, fake = to_unit_range(images), to_unit_range(reconstruction)
        terms = {"mse": F.mse_loss(fake, real), "kl": posterior.kl().mean()}
        loss = terms["mse"] + kl_weight * terms["kl"]
        if perceptual is not None:
            terms["perceptual"] = perceptual(fake, real)
            loss = loss + perceptual_weight * terms["perceptual"]
        if discriminator is not None:
            with without_gradients(discriminator):
                terms["adversarial"] = -discriminator(fake).mean()
            loss = loss + adversarial_weight * terms["adversarial"]
    return {"loss": loss, **terms}


def discriminator_losses(
    discriminator: nn.Module, images: Tensor, reconstruction: Tensor
) -> dict[str, Tensor]:
    """The hinge loss of the discriminator (Lim and Ye 2017, arXiv 1705.02894).

    0.5 (mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake))). Real and rebuilt images go
    through in two passes, so BatchNorm never mixes their statistics. The tokenizer gets no
    gradient.

    Args:
        images, reconstruction: (B, 3, H, W) in [-1, 1].

    Returns:
        fp32 scalars: "loss", and the mean scores "real" and "fake", without gradients.
    """
    with torch.autocast(images.device.type, enabled=False):
        real = discriminator(to_unit_range(images))
        fake = discriminator(to_unit_range(reconstruction.detach()))
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return {"loss": loss, "real": real.detach().mean(), "fake": fake.detach().mean()}


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Within, results of ``module`` carry no gradient to its parameters, only to its inputs."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
