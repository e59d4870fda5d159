"""The PatchGAN's shape, receptive field and normalisation."""

import torch
from torch import nn

from detok_pipe.tokenizer.discriminator import PatchDiscriminator


def test_form() -> None:
    model = PatchDiscriminator()
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [
        (64, 3, 4, 4),
        (128, 64, 4, 4),
        (256, 128, 4, 4),
        (512, 256, 4, 4),
        (1, 512, 4, 4),
    ]
    assert sum(p.numel() for p in model.parameters()) == 2_765_633
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 3
    assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}
    assert PatchDiscriminator(width=4)(torch.rand(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert PatchDiscriminator(width=4)(torch.rand(2, 3, 32, 32)).shape == (2, 1, 2, 2)


def test_a_score_sees_70_pixels() -> None:
    model = PatchDiscriminator(width=4).eval()
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    model(images)[0, 0, 7, 7].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator()
    conv, norm = model.main[5], model.main[6]
    assert abs(conv.weight.std().item() - 0.02) < 0.001
    assert abs(norm.weight.mean().item() - 1) < 0.01
    assert not norm.bias.any()
