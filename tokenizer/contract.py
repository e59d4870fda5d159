"""What every tokenizer offers: latents of images, and images of latents."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from detok_pipe.latents.errors import MismatchError
from detok_pipe.latents.stats import LatentStats


class Tokenizer(nn.Module, ABC):
    """A network between images and latents, which stay unnormalised on both sides.

    Attributes:
        image_size: (height, width) of its images in pixels.
        grid: (rows, columns) of latents, or (N,) for a sequence. channels: C of a latent.
        has_posterior: whether `encode_moments` gives a Gaussian; else the latents themselves.
    """

    image_size: tuple[int, int]
    grid: tuple[int, ...]
    channels: int
    has_posterior: bool = True

    @abstractmethod
    def encode_moments(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> (B, N, 2C), means and then log variances; where
        there is no posterior, the latents (B, N, C).

        Raises:
            MismatchError: images of another size.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """z (B, N, C), not normalised -> images (B, 3, H, W) in about [-1, 1], not clamped.

        Raises:
            MismatchError: latents of another shape.
        """

    @staticmethod
    def check_shape(what: str, given: Tensor, shape: tuple[int, ...]) -> None:
        """Check the shape of a batch without its first dimension.

        Raises:
            MismatchError: they differ; gives both.
        """
        # Convolutions and sums that broadcast would take many wrong shapes in silence.
        if given.shape[1:] != shape:
            raise MismatchError(
                f"{what} of shape {tuple(given.shape[1:])} do not fit this tokenizer, which "
                f"takes {shape}"
            )


@dataclass(frozen=True)
class Built:
    """A published tokenizer, built from its configuration, without its weights.

    Attributes:
        stats: its own normalisation.
        encoder: what its encoder computes with and neither weights nor shapes tell.
    """

    model: Tokenizer
    stats: LatentStats
    encoder: dict[str, Any]


def encoder_keys(state_dict: Iterable[str]) -> set[str]:
    """The keys of a tokenizer that latents depend on; the others belong to the decoder.

    Latent caches are known by the encoder alone: a tuned decoder leaves them valid.
    """
    return {key for key in state_dict if key.startswith(("encoder.", "quant_conv."))}
