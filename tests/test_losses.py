"""Loss values against plain numpy, and where the gradients go."""

import numpy as np
import pytest
import torch
from torch import nn

from detok_pipe.latents.posterior import Posterior
from detok_pipe.tokenizer.discriminator import PatchDiscriminator
from detok_pipe.tokenizer.losses import (
    discriminator_losses,
    reconstruction_losses,
    without_gradients,
)


class Gap(nn.Module):
    """A stand-in for a perceptual distance that remembers what it was given."""

    def forward(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        self.seen = (reconstruction, images)
        return (reconstruction - images).abs().mean()


def batch() -> tuple[torch.Tensor, torch.Tensor, Posterior]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    rebuilt = (images + 0.1 * torch.randn(2, 3, 32, 32, generator=generator)).requires_grad_()
    return images, rebuilt, Posterior(torch.randn(2, 7, 8, generator=generator))


def test_values() -> None:
    images, rebuilt, posterior = batch()
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=4, layers=2)
    losses = reconstruction_losses(
        images,
        rebuilt,
        posterior,
        perceptual=Gap(),
        perceptual_weight=0.5,
        kl_weight=1e-3,
        discriminator=discriminator,
        adversarial_weight=0.2,
    )
    real, fake = ((x.detach().numpy() + 1) / 2 for x in (images, rebuilt))
    mean, logvar = posterior.mean.numpy(), posterior.logvar.numpy()
    scores = discriminator(torch.from_numpy(fake)).detach().numpy()
    expected = {
        "mse": np.square(real - fake).mean(),
        "kl": 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum() / 2,
        "perceptual": np.abs(real - fake).mean(),
        "adversarial": -scores.mean(),
    }
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4)
    total = (
        expected["mse"]
        + 1e-3 * expected["kl"]
        + 0.5 * expected["perceptual"]
        + 0.2 * expected["adversarial"]
    )
    assert losses["loss"].item() == pytest.approx(total, rel=1e-4)
    bare = reconstruction_losses(images, rebuilt, posterior)
    assert bare.keys() == {"loss", "mse", "kl"}


def test_the_losses_are_fp32_on_unit_images_under_autocast() -> None:
    images, rebuilt, posterior = batch()
    gap = Gap()
    exact = reconstruction_losses(images, rebuilt, posterior, perceptual=gap)
    with torch.autocast("cpu", torch.bfloat16):
        losses = reconstruction_losses(images, rebuilt, posterior, perceptual=gap)
        critic = discriminator_losses(PatchDiscriminator(width=4), images, rebuilt)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact[name])
    assert critic["loss"].dtype == torch.float32
    for seen in gap.seen:
        assert seen.dtype == torch.float32
    assert gap.seen[1].min() >= 0
    assert gap.seen[1].max() <= 1


def test_the_generator_term_gives_the_discriminator_no_gradient() -> None:
    images, rebuilt, posterior = batch()
    discriminator = PatchDiscriminator(width=4)
    losses = reconstruction_losses(images, rebuilt, posterior, discriminator=discriminator)
    losses["adversarial"].backward()
    assert rebuilt.grad is not None
    assert rebuilt.grad.abs().sum() > 0
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.requires_grad for p in discriminator.parameters())


def test_the_discriminators_loss_gives_the_tokenizer_no_gradient() -> None:
    images, rebuilt, _ = batch()
    discriminator = PatchDiscriminator(width=4)
    discriminator_losses(discriminator, images, rebuilt)["loss"].backward()
    assert rebuilt.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


def test_hinge() -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((1, 2, 3)) * 4 - 2

    def images(level: float) -> torch.Tensor:
        return torch.full((2, 3, 4, 4), level)

    # A score is 4 (level + 1)/2 - 2 = 2 level.
    losses = discriminator_losses(Mean(), images(0.25), images(-0.75))
    assert losses["real"].item() == pytest.approx(0.5)
    assert losses["fake"].item() == pytest.approx(-1.5)
    assert losses["loss"].item() == pytest.approx(0.5 * (0.5 + 0.0))
    losses = discriminator_losses(Mean(), images(1.0), images(0.5))
    assert losses["loss"].item() == pytest.approx(0.5 * (0.0 + 2.0))


def test_frozen_parameters_stay_frozen_and_others_come_back() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)

    def fail() -> None:
        with without_gradients(layer):
            assert not layer.weight.requires_grad
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad
