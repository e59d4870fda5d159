"""Perceptual distances for training, built around feature networks that are passed in.

Every term maps (reconstruction, images), both (B, 3, H, W) fp32 in [0, 1], to a scalar, with
gradients for the reconstruction only. The networks are frozen and stay in evaluation mode;
their parameters are part of the module, so ``.to(device)`` moves them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detok_pipe.latents.errors import WeightsError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PerceptualTerm(nn.Module, ABC):
    """A distance of frozen features: normalises, then compares.

    Args:
        mean, std: per colour, of the normalisation that the network expects of [0, 1] images.
        size: side in pixels to which images are resized (bilinear, antialiased); None: as is.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: int | None) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [0, 1] -> scalar, the mean over the batch."""
        with torch.no_grad():
            wanted = self.features(self._prepared(images))
        return self.distance(self.features(self._prepared(reconstruction)), wanted)

    def train(self, mode: bool = True) -> Self:
        """Always evaluation mode: BatchNorm and dropout of a frozen network stay fixed."""
        return super().train(False)

    @abstractmethod
    def features(self, x: Tensor) -> list[Tensor]:
        """(B, 3, h, w) normalised -> what is compared."""

    @abstractmethod
    def distance(self, features: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Features of the reconstruction and of the images -> scalar."""

    def _prepared(self, x: Tensor) -> Tensor:
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = resized(x, self.size)
        return (x - self.mean) / self.std


class LPIPS(PerceptualTerm):
    """LPIPS with VGG16 (Zhang et al. 2018, arXiv 1801.03924), version 0.1.

    Unit-normalised activations of the five stages, squared differences weighted by channel,
    averaged over positions and summed over stages. Equal to the ``lpips`` package on the same
    weights, except that the gradient is finite where all channels of a position are zero.

    Args:
        features: convolutional part of torchvision's or timm's VGG16 (``vgg16().features``).
        heads: the five weight vectors, any shape with 64, 128, 256, 512, 512 numbers.
        size: see `PerceptualTerm`.

    Raises:
        WeightsError: features or heads of another network.
    """

    # The package's normalisation of [-1, 1] images, carried over to [0, 1].
    _SHIFT = (-0.030, -0.088, -0.188)
    _SCALE = (0.458, 0.448, 0.450)
    # Activations after these modules: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
    _TAPS = (3, 8, 15, 22, 29)
    _CHANNELS = (64, 128, 256, 512, 512)

    def __init__(
        self, features: nn.Sequential, heads: Sequence[Tensor], *, size: int | None = None
    ) -> None:
        super().__init__(
            [(shift + 1) / 2 for shift in self._SHIFT],
            [scale / 2 for scale in self._SCALE],
            size,
        )
        taps = [features[tap] if tap < len(features) else None for tap in self._TAPS]
        if not all(isinstance(module, nn.ReLU) for module in taps):
            raise WeightsError("LPIPS: the feature network is no VGG16 without batch normalisation")
        if [head.numel() for head in heads] != list(self._CHANNELS):
            raise WeightsError(
                f"LPIPS: the heads have {[head.numel() for head in heads]} channels, and those "
                f"of VGG16 have {list(self._CHANNELS)}"
            )
        self.network = features[: self._TAPS[-1] + 1].requires_grad_(False)
        self.heads = nn.ParameterList(
            nn.Parameter(head.detach().float().reshape(-1, 1, 1), requires_grad=False)
            for head in heads
        )
        self.eval()

    @staticmethod
    def heads_of(state_dict: Mapping[str, Tensor]) -> list[Tensor]:
        """The heads in the file that the ``lpips`` package carries (``v0.1/vgg.pth``).

        Raises:
            WeightsError: it has none.
        """
        keys = [f"lin{stage}.model.1.weight" for stage in range(5)]
        if missing := [key for key in keys if key not in state_dict]:
            raise WeightsError(f"LPIPS: the head weights lack {', '.join(missing)}")
        return [state_dict[key] for key in keys]

    def features(self, x: Tensor) -> list[Tensor]:
        """(B, 3, h, w) -> five maps of unit vectors."""
        maps = []
        for number, module in enumerate(self.network):
            x = module(x)
            if number in self._TAPS:
                maps.append(unit_vectors(x))
        return maps

    def distance(self, features: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Weighted squared differences -> scalar."""
        total = features[0].new_zeros(())
        for head, a, b in zip(self.heads, features, wanted, strict=True):
            total = total + ((a - b).square() * head).sum(1).mean()
        return total


class LogitsDistance(PerceptualTerm):
    """Mean squared difference of a classifier's logits; the recipe's is ConvNeXt-S at 224.

    Args:
        classifier: maps (B, 3, 224, 224) normalised with ImageNet's mean and std to logits,
            such as timm's or torchvision's ``convnext_small``.
    """

    def __init__(self, classifier: nn.Module, *, size: int = 224) -> None:
        super().__init__(IMAGENET_MEAN, IMAGENET_STD, size)
        self.network = classifier.requires_grad_(False)
        self.eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """(B, 3, h, w) -> [logits (B, K)]."""
        return [self.network(x)]

    def distance(self, features: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Mean squared difference -> scalar."""
        return F.mse_loss(features[0], wanted[0])


class FeatureDistance(PerceptualTerm):
    """LPIPS without learned heads on the stages of a timm network, for use without downloads.

    Unit-normalised activations, squared difference summed over channels (0 to 4), averaged over
    positions and stages. Meant for EfficientNet-lite2, whose weights come with a package.

    Args:
        network: a timm network with ``forward_intermediates``.
        stages: numbers of the stages to compare. For EfficientNet-lite2 these have strides
            2, 4, 8, 16, 32; leaving out the last ones skips their computation.
        mean, std: what the network expects; 0.5 for EfficientNet-lite2.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        stages: Sequence[int] = (0, 1, 2, 3),
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        size: int | None = None,
    ) -> None:
        super().__init__(mean, std, size)
        if not hasattr(network, "forward_intermediates"):
            raise WeightsError(
                f"the perceptual network {type(network).__name__} is no timm network that gives "
                "intermediate features"
            )
        self.network: Any = network.requires_grad_(False)
        self.stages = list(stages)
        self.eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """(B, 3, h, w) -> a map of unit vectors a stage."""
        maps = self.network.forward_intermediates(
            x, indices=self.stages, stop_early=True, intermediates_only=True
        )
        return [unit_vectors(stage) for stage in maps]

    def distance(self, features: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Mean over stages and positions of the squared distance -> scalar."""
        terms = [(a - b).square().sum(1).mean() for a, b in zip(features, wanted, strict=True)]
        return torch.stack(terms).mean()


class WeightedMean(nn.Module):
    """Weighted mean of perceptual terms: sum(w term) / sum(w).

    The recipe is (1.0 LPIPS + 0.1 ConvNeXt-S logits) / 1.1.
    """

    def __init__(self, terms: Iterable[tuple[float, nn.Module]]) -> None:
        super().__init__()
        weights, modules = zip(*terms, strict=True)
        self.weights = [weight / sum(weights) for weight in weights]
        self.terms = nn.ModuleList(modules)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [0, 1] -> scalar."""
        values = [
            weight * term(reconstruction, images)
            for weight, term in zip(self.weights, self.terms, strict=True)
        ]
        return torch.stack(values).sum()


def resized(x: Tensor, size: int) -> Tensor:
    """(B, C, h, w) -> (B, C, size, size), bilinear and antialiased.

    As two matrix products, because the gradient of torch's interpolation on a GPU differs from
    run to run.
    """
    rows, columns = (_resizing(side, size, x.device) for side in x.shape[-2:])
    return rows @ x @ columns.T


@torch.no_grad()
def _resizing(side: int, size: int, device: torch.device) -> Tensor:
    """The (size, side) matrix that resizes a column of ``side`` pixels."""
    columns = torch.eye(side, device=device)[None, None]
    return F.interpolate(columns, size=(size, side), mode="bilinear", antialias=True)[0, 0]


def unit_vectors(x: Tensor) -> Tensor:
    """(B, C, h, w) divided by its length over the channels; a zero vector stays zero."""
    # vector_norm's gradient at zero is zero, where that of sqrt(sum of squares) is not a number.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
