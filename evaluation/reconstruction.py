"""How well a tokenizer rebuilds images: PSNR and SSIM, a batch at a time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detok_pipe.evaluation.features import check_images
from detok_pipe.latents.errors import InputError

MAX_PSNR = 100.0
"""dB given to an image that is rebuilt exactly, whose PSNR would be infinite."""

_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(original: Tensor, rebuilt: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of uint8 images (B, 3, H, W), (B,) fp64."""
    check_images(original)
    check_images(rebuilt)
    error = (_double(original) - _double(rebuilt)).square().mean((1, 2, 3))
    return (10 * torch.log10(255.0**2 / error)).clamp_max(MAX_PSNR)


def ssim(original: Tensor, rebuilt: Tensor) -> Tensor:
    """Structural similarity of each pair of uint8 images (B, 3, H, W), (B,) fp64.

    Wang et al. 2004: 11 x 11 Gaussian window of sigma 1.5 around every pixel that has a whole
    window, mean over pixels and channels.

    Raises:
        InputError: a side is shorter than the window.
    """
    check_images(original)
    check_images(rebuilt)
    if min(original.shape[-2:]) < _WINDOW:
        raise InputError(
            f"SSIM needs images of at least {_WINDOW} pixels a side, got {tuple(original.shape)}"
        )
    x, y = _double(original), _double(rebuilt)
    mu_x, mu_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mu_x.square()
    var_y = _blurred(y * y) - mu_y.square()
    covariance = _blurred(x * y) - mu_x * mu_y
    similarity = ((2 * mu_x * mu_y + _C1) * (2 * covariance + _C2)) / (
        (mu_x.square() + mu_y.square() + _C1) * (var_x + var_y + _C2)
    )
    return similarity.mean((1, 2, 3))


def _double(images: Tensor) -> Tensor:
    """As fp64, on the host where the device knows no such numbers."""
    return (images.cpu() if images.device.type == "mps" else images).double()


def _blurred(images: Tensor) -> Tensor:
    """Gaussian window, without padding: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    offsets = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    kernel = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, _WINDOW)
    rows = F.conv2d(images, kernel, groups=images.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=images.shape[1])


@dataclass
class ReconstructionMetrics:
    """Sums of PSNR and SSIM over a stream of image pairs."""

    count: int = 0
    psnr_sum: float = 0.0
    ssim_sum: float = 0.0

    def update(self, original: Tensor, rebuilt: Tensor) -> None:
        """Add pairs of uint8 images (B, 3, H, W)."""
        if original.shape != rebuilt.shape:
            raise ValueError(f"shapes {tuple(original.shape)} and {tuple(rebuilt.shape)} differ")
        self.count += len(original)
        self.psnr_sum += psnr(original, rebuilt).sum().item()
        self.ssim_sum += ssim(original, rebuilt).sum().item()

    def merge(self, other: "ReconstructionMetrics") -> None:
        """Add what another process counted."""
        self.count += other.count
        self.psnr_sum += other.psnr_sum
        self.ssim_sum += other.ssim_sum

    def result(self) -> dict[str, float]:
        """Means over images: {"psnr": dB, "ssim": share, "count": images}.

        Raises:
            InputError: no images were added.
        """
        if not self.count:
            raise InputError("no images to compare")
        return {
            "psnr": self.psnr_sum / self.count,
            "ssim": self.ssim_sum / self.count,
            "count": self.count,
        }
