"""The perceptual term's published weights: found by checksum, loaded, or refused.

The files here are made up, in the published form.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from detok_pipe.evaluation.weights import sha256_file
from detok_pipe.latents.errors import ConfigError, WeightsError
from detok_pipe.pipelines import perceptual
from detok_pipe.pipelines.perceptual import lpips_term, perceptual_term
from detok_pipe.tokenizer.perceptual import LPIPS, LogitsDistance

CPU = torch.device("cpu")


def small_vgg16() -> nn.Module:
    """VGG16's convolutions, and one small layer in place of its large ones."""
    network = torchvision.models.VGG(nn.Sequential(), num_classes=1, init_weights=False)
    network.features = torchvision.models.vgg.make_layers(
        torchvision.models.vgg.cfgs["D"], batch_norm=False
    )
    network.classifier = nn.Sequential(nn.Linear(2, 2))
    return network


def small_convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with made-up weights under the published names."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(small_vgg16().state_dict(), folder / perceptual.VGG16.name)
    torch.save(small_convnext().state_dict(), folder / perceptual.CONVNEXT_SMALL.name)
    return folder


@pytest.fixture(autouse=True)
def small_networks(monkeypatch, weights, tmp_path) -> None:
    """The made-up files are taken for the published ones, and nothing is downloaded."""
    monkeypatch.setattr(torchvision.models, "vgg16", small_vgg16)
    monkeypatch.setattr(torchvision.models, "convnext_small", small_convnext)
    for name in ("VGG16", "CONVNEXT_SMALL"):
        file = getattr(perceptual, name)
        url = f"file://{tmp_path}/nowhere/{file.name}"
        digest = sha256_file(weights / file.name)
        changed = dataclasses.replace(file, sha256=digest, url=url)
        monkeypatch.setattr(perceptual, name, changed)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_the_recipes_term_has_the_files_weights(weights: Path) -> None:
    term = perceptual_term("lpips+convnext", 32, CPU, weights)
    assert term.weights == pytest.approx([1 / 1.1, 0.1 / 1.1])
    lpips, logits = term.terms
    assert isinstance(lpips, LPIPS)
    assert isinstance(logits, LogitsDistance)
    stored = torch.load(weights / perceptual.VGG16.name, weights_only=True)
    torch.testing.assert_close(lpips.network[28].weight, nn.Parameter(stored["features.28.weight"]))
    stored = torch.load(weights / perceptual.CONVNEXT_SMALL.name, weights_only=True)
    torch.testing.assert_close(dict(logits.network.state_dict()), stored)
    assert not any(p.requires_grad for p in term.parameters())
    assert not any(p.is_meta for p in term.parameters())
    images = torch.rand(2, 3, 32, 32)
    assert term(images, images).item() == 0
    assert term(1 - images, images).item() > 0


def test_images_too_small_for_the_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 pixels and more, not 8"):
        perceptual_term("lpips", 8, CPU)
    assert perceptual_term("none", 8, CPU) is None


def test_the_hubs_folder_is_looked_in_too(weights: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / perceptual.VGG16.name).write_bytes((weights / perceptual.VGG16.name).read_bytes())
    assert lpips_term(size=32).size == 32
    with pytest.raises(WeightsError, match=r"convnext_small.*efficientnet-lite2"):
        perceptual_term("lpips+convnext", 32, CPU)


def test_other_heads_of_lpips_are_refused(weights: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "weights" / "v0.1"
    folder.mkdir(parents=True)
    torch.save({}, folder / "vgg.pth")
    monkeypatch.setattr(perceptual.resources, "files", lambda package: tmp_path)
    with pytest.raises(WeightsError, match=r"vgg\.pth has the SHA-256"):
        lpips_term(weights_dir=weights)


def test_other_files_under_these_names_are_refused(weights: Path, tmp_path: Path, monkeypatch):
    other = tmp_path / perceptual.VGG16.name
    other.write_bytes((weights / perceptual.VGG16.name).read_bytes()[:-100])
    with pytest.raises(WeightsError, match="SHA-256"):
        lpips_term(weights_dir=tmp_path)
    torch.save(small_convnext().state_dict(), other)
    same = dataclasses.replace(perceptual.VGG16, sha256=sha256_file(other))
    monkeypatch.setattr(perceptual, "VGG16", same)
    with pytest.raises(WeightsError, match=r"is not the VGG16 weights of LPIPS"):
        lpips_term(weights_dir=tmp_path)
