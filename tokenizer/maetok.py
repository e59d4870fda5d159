"""MAETok: a ViT autoencoder whose latents are a sequence, not a map (Chen et al. 2025).

The encoder reads the image together with learned latent tokens and returns the latter; the
decoder reads these with a mask token at each place of the image. Both are timm's ViT in the
layout of DINOv2 with a class token. Parameter names are those of the released checkpoints.
B images, N patches, K latent tokens, W width.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from timm import create_model
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.stats import LatentStats
from detok_pipe.tokenizer.contract import Built, Tokenizer
from detok_pipe.tokenizer.layers import PixelShuffle, ToMap, attend, rotate


class _Form(NamedTuple):
    """What the encoder and the decoder have in common.

    Attributes:
        vit: name of a timm ViT. image_size, patch_size: in pixels. latent_tokens: K.
        rotary: turn the image tokens' queries and keys by learned angles.
    """

    vit: str
    image_size: int
    patch_size: int
    latent_tokens: int
    rotary: bool

    @property
    def side(self) -> int:
        """Patches a side of the image."""
        return self.image_size // self.patch_size


class _Transformer(nn.Module):
    """A ViT over [class, N image tokens, K latent tokens]."""

    freqs_t_x: Tensor
    freqs_t_y: Tensor

    def __init__(self, form: _Form) -> None:
        super().__init__()
        # Any: timm declares the class token and positions as optional, which `_vit` rules out.
        self.model: Any = _vit(form)
        self.rotary = form.rotary
        width = self.model.embed_dim
        self.latent_pos_embed = nn.Parameter(torch.randn(1, form.latent_tokens, width) * 0.02)
        if form.rotary:
            # By axis (column, row), layer, and pair of channels, head after head.
            self.freqs = nn.Parameter(torch.randn(2, len(self.model.blocks), width // 2))
            place = torch.arange(form.side**2)
            self.register_buffer("freqs_t_x", (place % form.side).float())
            self.register_buffer("freqs_t_y", (place // form.side).float())

    def run(self, x: Tensor) -> Tensor:
        """(B, 1 + N + K, W) -> the same, after the blocks and the final norm."""
        if not self.rotary:
            for block in self.model.blocks:
                x = block(x)
            return self.model.norm(x)
        for block, rope in zip(self.model.blocks, self._ropes(), strict=True):
            x = x + block.ls1(_attention(block.attn, block.norm1(x), rope))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return self.model.norm(x)

    def _ropes(self) -> Tensor:
        """Cosines and signed sines for `rotate`, (layers, 2, N, W), head after head."""
        x, y = self.freqs.float()[:, :, None]  # (layers, 1, W / 2)
        angles = x * self.freqs_t_x[:, None] + y * self.freqs_t_y[:, None]
        angles = angles.repeat_interleave(2, dim=-1)
        sign = torch.tensor([-1.0, 1.0], device=angles.device).repeat(angles.shape[-1] // 2)
        return torch.stack([angles.cos(), angles.sin() * sign], dim=1)


class Encoder(_Transformer):
    """Images to K latent tokens."""

    def __init__(self, form: _Form, *, masked: bool) -> None:
        super().__init__(form)
        width = self.model.embed_dim
        self.latent_tokens = nn.Parameter(torch.randn(1, form.latent_tokens, width) * 0.02)
        if masked:  # of training alone, in which patches are hidden
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> (B, K, W)."""
        batch = len(images)
        x = self.model.patch_embed(images)  # (B, N, W)
        x = torch.cat([self.model.cls_token.expand(batch, -1, -1), x], dim=1)
        x = x + self.model.pos_embed
        latents = (self.latent_tokens + self.latent_pos_embed).expand(batch, -1, -1)
        x = self.run(torch.cat([x, latents.to(x.dtype)], dim=1))
        return x[:, -latents.shape[1] :]


class Decoder(_Transformer):
    """K latent tokens to images.

    Args:
        absolute: add the position embedding to the class and mask tokens.
    """

    def __init__(self, form: _Form, *, absolute: bool) -> None:
        super().__init__(form)
        width = self.model.embed_dim
        self.absolute = absolute
        self.patches = form.side**2
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.to_pixel = nn.ModuleDict({"model": nn.Linear(width, form.patch_size**2 * 3)})
        self.unpatchify = nn.Sequential(
            ToMap((form.side, form.side)), PixelShuffle(form.patch_size)
        )

    def forward(self, z: Tensor) -> Tensor:
        """z (B, K, W) -> images (B, 3, H, W)."""
        x = torch.cat([self.model.cls_token, self.mask_token.expand(-1, self.patches, -1)], dim=1)
        if self.absolute:
            x = x + self.model.pos_embed
        x = torch.cat([x.to(z.dtype).expand(len(z), -1, -1), z + self.latent_pos_embed], dim=1)
        x = self.run(x)[:, 1 : 1 + self.patches]
        return self.unpatchify(self.to_pixel["model"](x))


class MAETok(Tokenizer):
    """The MAETok tokenizer. It has no posterior: an image has one latent.

    Args:
        image_size, patch_size: in pixels. channels: C of a latent token.
        latent_tokens: K. encoder, decoder: names of timm ViTs.
        rotary: learned rotary positions. absolute: absolute positions in the decoder (the
            encoder has them always).
        masked: whether the weights hold the mask token of the encoder's training.

    Raises:
        ConfigError: a name that is no timm ViT, or sizes that do not fit together.
    """

    has_posterior = False

    def __init__(
        self,
        *,
        image_size: int = 256,
        patch_size: int = 16,
        channels: int = 32,
        latent_tokens: int = 128,
        encoder: str = "vit_base_patch14_dinov2.lvd142m",
        decoder: str = "vit_base_patch14_dinov2.lvd142m",
        rotary: bool = False,
        absolute: bool = True,
        masked: bool = True,
    ) -> None:
        super().__init__()
        if min(image_size, patch_size) < 1 or image_size % patch_size:
            raise ConfigError(f"image_size {image_size} is no multiple of patch_size {patch_size}")
        self.image_size = (image_size, image_size)
        self.grid = (latent_tokens,)
        self.channels = channels
        form = _Form(encoder, image_size, patch_size, latent_tokens, rotary)
        self.encoder = Encoder(form, masked=masked)
        self.quant_conv = nn.Linear(self.encoder.model.embed_dim, channels)
        self.decoder = Decoder(form._replace(vit=decoder), absolute=absolute)
        self.post_quant_conv = nn.Linear(channels, self.decoder.model.embed_dim)

    def encode_moments(self, images: Tensor) -> Tensor:
        self.check_shape("images", images, (3, *self.image_size))
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        self.check_shape("latents", z, (*self.grid, self.channels))
        return self.decoder(self.post_quant_conv(z))


def _vit(form: _Form) -> VisionTransformer:
    try:
        model = create_model(
            form.vit,
            img_size=form.image_size,
            patch_size=form.patch_size,
            num_classes=0,
            dynamic_img_size=False,
        )
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"timm has no ViT {form.vit!r}: {error}") from error
    if not isinstance(model, VisionTransformer) or model.num_prefix_tokens != 1:
        raise ConfigError(f"{form.vit} is no ViT with one class token, which MAETok needs")
    return model


def _attention(attention: Attention, x: Tensor, rope: Tensor) -> Tensor:
    """timm's attention with the image tokens' queries and keys rotated.

    Args:
        x: (B, 1 + N + K, W). rope: (2, N, W) as `rotate` has it.
    """
    heads = attention.num_heads
    qk, v = attention.qkv(x).unflatten(-1, (3, -1)).split((2, 1), dim=2)  # (B, L, 2 and 1, W)
    first, last = 1, 1 + rope.shape[1]
    turned = rotate(qk[:, first:last], rope)
    qk = torch.cat([qk[:, :first].float(), turned, qk[:, last:].float()], dim=1)
    q, k = qk.unflatten(-1, (heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, D) each
    x = attend(q, k, v.squeeze(2).unflatten(-1, (heads, -1)).transpose(1, 2))
    return attention.proj(x.transpose(1, 2).flatten(2))


# Settings of a config.json that we know in one form only.
_FIXED = {
    "enc_type": "vit",
    "dec_type": "vit",
    "to_pixel": "linear",
    "dec_cls_token": True,
    "enc_tuning_method": "full",
    "dec_tuning_method": "full",
}

_TRAINING_PARTS = re.compile(
    r"(decoder|post_quant_conv|to_pixel)_(hog|dino|clip)\."
    r"|(repa_model|projection|hog_generator|clip_model)\."
    r"|(clip_)?(de_)?scale\."
)


def build(config: Mapping[str, Any]) -> Built:
    """The tokenizer that a published ``config.json`` describes; settings of training are not read.

    Raises:
        ConfigError: a setting is missing, or has a form that is not known.
    """

    def of(key: str, default: Any = None) -> Any:
        value = config.get(key, default)
        if value is None:
            raise ConfigError(f"the configuration of MAETok states no {key!r}")
        return value

    for key, known in _FIXED.items():
        if of(key, known) != known:
            raise ConfigError(f"{key} is {config[key]!r}; only {known!r} is known for MAETok")
    rotary, image_size, patch_size = of("use_rope", False), of("image_size"), of("enc_patch_size")
    if rotary and not of("rope_mixed", False):
        raise ConfigError("rope_mixed is off; only learned (mixed) rotary positions are known")
    for key, other, value in (
        ("base_image_size", "image_size", image_size),
        ("dec_patch_size", "enc_patch_size", patch_size),
    ):
        if of(key, value) != value:
            raise ConfigError(f"{key} is {config[key]} and {other} {value}; they must agree")
    model = MAETok(
        image_size=image_size,
        patch_size=patch_size,
        channels=of("codebook_embed_dim"),
        latent_tokens=of("num_latent_tokens"),
        encoder=of("encoder_model"),
        decoder=of("decoder_model"),
        rotary=rotary,
        absolute=of("use_ape", True),
        masked=of("enc_token_drop", 0.0) > 0,
    )
    mean, std = (np.full(model.channels, of(key), np.float64) for key in ("vq_mean", "vq_std"))
    stats = LatentStats(mean, std, source="published")
    return Built(model, stats, {"vit": config["encoder_model"]})


def translated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict without what only training needs; names are our names."""
    return {key: value for key, value in state.items() if not _TRAINING_PARTS.match(key)}
