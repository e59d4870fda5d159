"""Convolutional KL autoencoders: SD-VAE, MAR-VAE, VA-VAE, through diffusers.

All three are the autoencoder of latent diffusion (Rombach et al. 2022) with other widths, and
diffusers' ``AutoencoderKL`` computes it. SD-VAE is published in diffusers' form; MAR-VAE (Li et
al. 2024) and VA-VAE (Yao et al. 2025) in that of latent diffusion, whose parameter names
`translated` knows.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from torch import Tensor, nn

from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.stats import LatentStats
from detok_pipe.tokenizer.contract import Built, Tokenizer


class KLVAE(Tokenizer):
    """A KL autoencoder. Parameter names are those of diffusers.

    Args:
        image_size: side of the images in pixels.
        network: options of ``diffusers.AutoencoderKL``.

    Raises:
        ConfigError: options that are unknown or do not fit together.
    """

    def __init__(self, *, image_size: int = 256, **network: Any) -> None:
        super().__init__()
        try:
            vae: Any = AutoencoderKL(**network)
        except (TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"no AutoencoderKL has these options: {error}") from error
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if image_size < 1 or image_size % factor:
            raise ConfigError(
                f"image_size {image_size} is no multiple of {factor}, the tokenizer's stride"
            )
        self.image_size = (image_size, image_size)
        self.grid = (image_size // factor, image_size // factor)
        self.channels = vae.config.latent_channels
        # Only the networks: tiling, slicing and sampling are not for here.
        self.encoder, self.decoder = vae.encoder, vae.decoder
        self.quant_conv: nn.Module = vae.quant_conv or nn.Identity()
        self.post_quant_conv: nn.Module = vae.post_quant_conv or nn.Identity()

    def encode_moments(self, images: Tensor) -> Tensor:
        self.check_shape("images", images, (3, *self.image_size))
        return self.quant_conv(self.encoder(images)).flatten(2).transpose(1, 2)  # (B, N, 2C)

    def decode(self, z: Tensor) -> Tensor:
        rows, columns = self.grid
        self.check_shape("latents", z, (rows * columns, self.channels))
        return self.decoder(self.post_quant_conv(z.transpose(1, 2).unflatten(2, self.grid)))


def build(config: Mapping[str, Any]) -> Built:
    """The autoencoder that a configuration in diffusers' form describes.

    ``scaling_factor``, ``shift_factor``, ``latents_mean`` and ``latents_std`` become its
    normalisation, ``sample_size`` (default 256) its images' side in pixels.

    Raises:
        ConfigError: an unknown option, or values that do not fit together.
    """
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    model = KLVAE(image_size=options.pop("sample_size", 256), **options)
    stats = _normalisation(model.channels, **options)
    encoder = {
        "norm_groups": options.get("norm_num_groups", 32),
        "activation": options.get("act_fn", "silu"),
    }
    return Built(model, stats, encoder)


def _normalisation(
    channels: int,
    *,
    scaling_factor: float = 0.18215,
    shift_factor: float | None = None,
    latents_mean: Sequence[float] | None = None,
    latents_std: Sequence[float] | None = None,
    **_: Any,
) -> LatentStats:
    mean = [shift_factor or 0.0] * channels if latents_mean is None else latents_mean
    std = [1.0] * channels if latents_std is None else latents_std
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(
            f"latents_mean and latents_std have {len(mean)} and {len(std)} values, the latents "
            f"{channels} channels"
        )
    if not scaling_factor > 0:
        raise ConfigError(f"scaling_factor must be a positive number, and is {scaling_factor}")
    return LatentStats(np.array(mean), np.array(std) / scaling_factor, source="published")


# What trains a KL-f16 autoencoder and is saved with it.
_TRAINING_PARTS = ("loss.", "foundation_model.", "linear_proj.")

_NAMES = [
    (r"nin_shortcut", "conv_shortcut"),
    (r"norm_out", "conv_norm_out"),
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1", "mid_block.attentions.0"),
    (r"(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
]
_ATTENTION_NAMES = [
    (r"\.norm\.", ".group_norm."),
    (r"\.(?:q|query)\.", ".to_q."),
    (r"\.(?:k|key)\.", ".to_k."),
    (r"\.(?:v|value)\.", ".to_v."),
    (r"\.(?:proj_out|proj_attn)\.", ".to_out.0."),
]


def translated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under diffusers' names of today, without what only training needs.

    Args:
        state: under the names of latent diffusion, of diffusers before 0.16 or of today. Other
            names stay as they are.
    """
    levels = len({key.split(".")[2] for key in state if key.startswith("decoder.up.")})
    return dict(
        _renamed(key, value, levels)
        for key, value in state.items()
        if not key.startswith(_TRAINING_PARTS)
    )


def _renamed(key: str, value: Tensor, levels: int) -> tuple[str, Tensor]:
    # Latent diffusion counts the decoder's levels from the image, diffusers from the latents.
    key = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", key)
    for pattern, name in _NAMES:
        key = re.sub(rf"\b{pattern}", name, key)
    if ".attentions." in key:
        for pattern, name in _ATTENTION_NAMES:
            key = re.sub(pattern, name, key)
        if value.ndim == 4 and value.shape[2:] == (1, 1):  # a 1 x 1 convolution is a linear map
            value = value[:, :, 0, 0]
    return key, value
