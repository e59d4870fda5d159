"""PatchGAN discriminator (Isola et al. 2017, arXiv 1611.07004): a score for each patch."""

from torch import Tensor, nn

SMALLEST_IMAGE = 32
"""Side in pixels below which the default layers leave no score."""


class PatchDiscriminator(nn.Module):
    """Strided 4 x 4 convolutions with BatchNorm and LeakyReLU(0.2).

    Widths double at each layer up to 8 times ``width``; all layers but the last one before the
    scores halve the resolution. With the defaults a score sees 70 x 70 pixels.

    Args:
        width: channels after the first convolution.
        layers: convolutions with stride 2.
    """

    def __init__(self, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            previous, channels = channels, width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            modules += [
                nn.Conv2d(previous, channels, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.2),
            ]
        modules.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.main = nn.Sequential(*modules)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> scores (B, 1, h, w), higher for real ones."""
        return self.main(images)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)
