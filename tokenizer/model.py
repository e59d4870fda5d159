"""The l-DeTok tokenizer: a ViT encoder and decoder around a Gaussian posterior of tokens.

Yang et al., "Latent Denoising Makes Good Visual Tokenizers" (arXiv 2507.15856). Parameter
names and numbers agree with the released checkpoints.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise
from detok_pipe.latents.posterior import Posterior
from detok_pipe.tokenizer.contract import Tokenizer
from detok_pipe.tokenizer.corruption import (
    add_noise,
    choose_visible,
    draw_mask_ratio,
    gather_tokens,
    visible_tokens,
)
from detok_pipe.tokenizer.layers import NORM_EPS, Block, PixelShuffle, ToMap, rope_table
from detok_pipe.tokenizer.sizes import Size


class TokenizerOutput(NamedTuple):
    """What a training step needs.

    Attributes:
        reconstruction: (B, 3, H, W) in about [-1, 1].
        posterior: of the visible tokens, (B, V, C).
        visible: V, how many tokens the encoder saw.
    """

    reconstruction: Tensor
    posterior: Posterior
    visible: int


class Encoder(nn.Module):
    """Images to the moments (mean, log variance) of each visible token."""

    rope: Tensor

    def __init__(self, grid: tuple[int, int], patch_size: int, channels: int, size: Size) -> None:
        super().__init__()
        width = size.width
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, width, patch_size, stride=patch_size), nn.Flatten(2)
        )
        self.positional_embedding = nn.Parameter(
            torch.randn(1, grid[0] * grid[1], width) * width**-0.5
        )
        self.ln_pre = nn.RMSNorm(width, eps=NORM_EPS)
        self.transformer = nn.ModuleList(Block(width, size.heads) for _ in range(size.depth))
        self.ln_post = nn.RMSNorm(width, eps=NORM_EPS)
        self.latent_head = nn.Linear(width, 2 * channels)
        self.register_buffer("rope", rope_table(grid, width // size.heads), persistent=False)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], keep (B, V) token numbers -> moments (B, V, 2C)."""
        x = self.patch_embed(images).transpose(1, 2)  # (B, N, width)
        x = x + self.positional_embedding
        rope = self.rope
        if keep is not None:
            x = gather_tokens(x, keep)  # (B, V, width)
            rope = rope[:, keep]  # (2, B, V, D)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x, rope)
        return self.latent_head(self.ln_post(x))


class Decoder(nn.Module):
    """Latents, some of them hidden, to images."""

    rope: Tensor

    def __init__(self, grid: tuple[int, int], patch_size: int, channels: int, size: Size) -> None:
        super().__init__()
        width = size.width
        self.decoder_embed = nn.Linear(channels, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.positional_embedding = nn.Parameter(
            torch.randn(1, grid[0] * grid[1], width) * width**-0.5
        )
        self.ln_pre = nn.RMSNorm(width, eps=NORM_EPS)
        self.transformer = nn.ModuleList(Block(width, size.heads) for _ in range(size.depth))
        self.ln_post = nn.RMSNorm(width, eps=NORM_EPS)
        self.ffn = nn.Sequential(
            ToMap(grid), nn.Conv2d(width, patch_size**2 * 3, 1), PixelShuffle(patch_size)
        )
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("rope", rope_table(grid, width // size.heads), persistent=False)

    def forward(self, z: Tensor, restore: Tensor | None = None) -> Tensor:
        """z (B, V, C), restore (B, N) from `choose_visible` -> images (B, 3, H, W)."""
        x = self.decoder_embed(z)  # (B, V, width)
        batch, visible, _ = x.shape
        # Appended also where no token is hidden, so that the mask token has a gradient (of
        # zeros) in every step: distributed training waits for all parameters.
        hidden = self.positional_embedding.shape[1] - visible
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(batch, hidden, -1)], dim=1)
        if restore is not None:
            x = gather_tokens(x, restore)
        x = self.ln_pre(x + self.positional_embedding)  # (B, N, width)
        for block in self.transformer:
            x = block(x, self.rope)
        return self.conv_out(self.ffn(self.ln_post(x)))


class LDeTok(Tokenizer):
    """The l-DeTok tokenizer.

    Args:
        image_size: side of the square images in pixels, or (height, width).
        patch_size: side of a token's patch in pixels; divides the image size.
        channels: C, of a token's latent.
        encoder, decoder: "small", "base", "large", "xl", or width, depth, heads as a tuple or
            a text "128,4,4".
        identity_output: start the last convolution as the identity instead of the published
            small numbers, through which a short training learns slowly.

    Attributes:
        grid: (rows, columns) of tokens. tokens: N = rows * columns. channels: C.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        channels: int = 16,
        encoder: str | tuple[int, int, int] = "base",
        decoder: str | tuple[int, int, int] = "base",
        identity_output: bool = False,
    ) -> None:
        super().__init__()
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        if height < 1 or width < 1 or height % patch_size or width % patch_size:
            raise ConfigError(f"image_size {image_size} is no multiple of patch_size {patch_size}")
        self.image_size = (height, width)
        self.grid = (height // patch_size, width // patch_size)
        self.tokens = self.grid[0] * self.grid[1]
        self.channels = channels
        self.encoder = Encoder(self.grid, patch_size, channels, Size.parse(encoder))
        self.decoder = Decoder(self.grid, patch_size, channels, Size.parse(decoder))
        self.apply(_initialise)
        if identity_output:
            nn.init.dirac_(self.decoder.conv_out.weight)

    def encode_moments(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> (B, N, 2C): means, then log variances.

        Raises:
            MismatchError: images of another size.
        """
        self.check_shape("images", images, (3, *self.image_size))
        return self.encoder(images)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, N, C), not normalised -> images (B, 3, H, W) in about [-1, 1], not clamped.

        Raises:
            MismatchError: latents of another shape.
        """
        self.check_shape("latents", z, (self.tokens, self.channels))
        return self.decoder(z)

    def forward(
        self,
        images: Tensor,
        noise: Noise,
        *,
        gamma: float = 0.0,
        noise_kind: str = "interpolative",
        mask_ratio: float = 0.0,
        mask_kind: str = "random",
    ) -> TokenizerOutput:
        """Encode, draw from the posterior, corrupt and rebuild: the training pass.

        Noise: "mask_ratio" (shared), "mask_tokens", "posterior", "tau", "latent_noise". The
        latent noise has a level tau ~ U(0, 1) an image; with gamma 0 nothing is added and
        latents are not shrunk either.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            gamma, noise_kind: see `add_noise`. mask_ratio, mask_kind: see `draw_mask_ratio`.
        """
        ratio = draw_mask_ratio(float(noise.shared_uniform("mask_ratio")), mask_ratio, mask_kind)
        tau = noise.uniform("tau", ()) if gamma else 0.0
        return self.rebuild(
            images,
            noise,
            tau=tau,
            gamma=gamma,
            noise_kind=noise_kind,
            hidden=ratio,
            sample_posterior=True,
        )

    def rebuild(
        self,
        images: Tensor,
        noise: Noise,
        *,
        tau: Tensor | float = 0.0,
        gamma: float = 0.0,
        noise_kind: str = "interpolative",
        hidden: float = 0.0,
        sample_posterior: bool = False,
    ) -> TokenizerOutput:
        """Encode and decode with a corruption that is given, as in evaluation.

        Noise: "mask_tokens", "posterior", "latent_noise", each only where it is used.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            tau: noise level, one number or (B,). gamma: its scale; 0 leaves the latents alone.
            hidden: share of the tokens to hide, in [0, 1).
            sample_posterior: decode a sample of the posterior rather than its mean.
        """
        self.check_shape("images", images, (3, *self.image_size))
        visible = visible_tokens(self.tokens, hidden)
        keep = restore = None
        if visible < self.tokens:
            scores = noise.uniform("mask_tokens", (self.tokens,))
            keep, restore = choose_visible(scores, visible)
        posterior = Posterior(self.encoder(images, keep).float())
        shape = (visible, self.channels)
        z = posterior.mean
        if sample_posterior:
            z = posterior.sample(noise.normal("posterior", shape))
        if gamma:
            z = add_noise(z, noise.normal("latent_noise", shape), tau, gamma, noise_kind)
        return TokenizerOutput(self.decoder(z, restore), posterior, visible)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: no decay on vectors (biases, norms), position embeddings, mask token.

    Parameters that need no gradient are left out, so a frozen encoder has no optimizer state.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim < 2 or name.endswith(("positional_embedding", "mask_token"))
            (others if is_vector else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
