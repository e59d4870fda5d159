"""Perceptual terms against the lpips package and against plain computations."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision.transforms.v2.functional as vision
from torch import Tensor, nn

from detok_pipe.latents.errors import WeightsError
from detok_pipe.tokenizer.perceptual import (
    LPIPS,
    FeatureDistance,
    LogitsDistance,
    PerceptualTerm,
    WeightedMean,
    resized,
    unit_vectors,
)


def pair(size: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, other = torch.rand(2, 2, 3, size, size, generator=generator)
    return (0.7 * images + 0.3 * other).requires_grad_(), images


class Classifier(nn.Module):
    """A small network with what must stay fixed: BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 6, 7)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


@pytest.fixture(scope="module")
def vgg_features() -> nn.Sequential:
    """VGG16's convolutions with random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        features = timm.create_model("vgg16").features
    features = features.to_empty(device="cpu")
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.05)
    return features


def test_lpips_equals_the_package(vgg_features: nn.Sequential, monkeypatch) -> None:
    package = pytest.importorskip("lpips")
    monkeypatch.setattr(
        package.pretrained_networks.tv,
        "vgg16",
        lambda **_: nn.ModuleDict({"features": vgg_features}),
    )
    theirs = package.LPIPS(net="vgg", verbose=False)
    file = Path(package.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    heads = LPIPS.heads_of(torch.load(file, weights_only=True, map_location="cpu"))
    ours = LPIPS(vgg_features, heads)

    rebuilt, images = pair()
    expected = theirs(rebuilt, images, normalize=True).mean()
    value = ours(rebuilt, images)
    assert value.item() > 0.01
    torch.testing.assert_close(value, expected, atol=0, rtol=1e-5)
    (gradient,) = torch.autograd.grad(value, rebuilt)
    (wanted,) = torch.autograd.grad(expected, rebuilt)
    torch.testing.assert_close(gradient, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)

    small = LPIPS(vgg_features, heads, size=32)
    resized = [vision.resize(x, [32, 32], antialias=True) for x in (rebuilt, images)]
    torch.testing.assert_close(
        small(rebuilt, images), theirs(*resized, normalize=True).mean(), atol=0, rtol=1e-4
    )


def test_lpips_refuses_other_networks(vgg_features: nn.Sequential) -> None:
    heads = [torch.ones(1, n, 1, 1) for n in (64, 128, 256, 512, 512)]
    with pytest.raises(WeightsError, match="no VGG16"):
        LPIPS(vgg_features[:20], heads)
    with pytest.raises(WeightsError, match=r"\[64, 128, 256, 512\] channels"):
        LPIPS(vgg_features, heads[:4])
    with pytest.raises(WeightsError, match=r"lack lin0.model.1.weight"):
        LPIPS.heads_of({})


@pytest.mark.parametrize(("height", "width", "size"), [(48, 48, 32), (40, 56, 32), (20, 24, 32)])
def test_resizing_is_torchvisions(height: int, width: int, size: int) -> None:
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    wanted = vision.resize(x, [size, size], antialias=True)
    torch.testing.assert_close(resized(x, size), wanted, atol=1e-6, rtol=1e-5)


def test_unit_vectors_of_zeros_have_a_finite_gradient() -> None:
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    y = unit_vectors(x)
    y.square().sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_logits_distance() -> None:
    classifier = Classifier()
    term = LogitsDistance(classifier)
    rebuilt, images = pair()

    def logits(x: Tensor) -> Tensor:
        x = vision.resize(x, [224, 224], antialias=True)
        return classifier(vision.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    expected = (logits(rebuilt) - logits(images)).square().mean()
    torch.testing.assert_close(term(rebuilt, images), expected, atol=0, rtol=1e-4)


def test_logits_distance_takes_a_convnext() -> None:
    rebuilt, images = pair(32)
    term = LogitsDistance(timm.create_model("convnext_atto"), size=64)
    assert term(images, images).item() == 0
    assert term(rebuilt, images).item() > 0


def test_feature_distance() -> None:
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite2")
    term = FeatureDistance(network, stages=(0, 2))
    rebuilt, images = pair(64)
    maps = [
        network.forward_intermediates(x * 2 - 1, intermediates_only=True) for x in (rebuilt, images)
    ]
    expected = 0.0
    for stage in (0, 2):
        a, b = (nn.functional.normalize(m[stage], dim=1) for m in maps)
        expected += (a - b).square().sum(1).mean().item() / 2
    assert term(rebuilt, images).item() == pytest.approx(expected, rel=1e-4)
    assert term(images, images).item() == 0
    with pytest.raises(WeightsError, match="Classifier"):
        FeatureDistance(Classifier())


@pytest.mark.parametrize("kind", [LogitsDistance, FeatureDistance])
def test_networks_are_frozen_and_only_the_reconstruction_gets_a_gradient(kind) -> None:
    network = Classifier() if kind is LogitsDistance else timm.create_model("resnet10t")
    term: PerceptualTerm = kind(network)
    term.train()
    rebuilt, images = pair(32)
    images.requires_grad_()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    first = term(rebuilt, images)
    first.backward()
    assert rebuilt.grad is not None
    assert rebuilt.grad.abs().sum() > 0
    assert images.grad is None
    assert all(p.grad is None and not p.requires_grad for p in term.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(first, term(rebuilt, images))


def test_weighted_mean_is_the_recipes_combination() -> None:
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
            return torch.tensor(self.value)

    mixed = WeightedMean([(1.0, Constant(2.0)), (0.1, Constant(5.0))])
    assert mixed(*pair(4)).item() == pytest.approx((1.0 * 2.0 + 0.1 * 5.0) / 1.1)
