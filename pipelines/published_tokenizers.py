"""The published tokenizers that the paper compares with, in one table.

Each is known by a name, ``--tokenizer sd-vae``. Its normalisation is the published one, and part
of its configuration. ``tokenizers.py`` finds their weights and builds them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class PublishedTokenizer:
    """A tokenizer that others published.

    Attributes:
        title: what it is, in a line.
        module: of ``detok_pipe.tokenizer`` that builds it.
        latents: their form for images of 256 pixels: (rows, columns, C), or (N, C).
        parameters: of encoder and decoder.
        repository: on the hub. weights: the file's name there.
        config: network and normalisation, as a ``config.json`` has them.
        config_file: name of a ``config.json`` in the repository, whose values take precedence;
            None: it has none.
    """

    title: str
    module: Literal["kl_vae", "maetok"]
    latents: tuple[int, ...]
    parameters: int
    repository: str
    weights: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_file: str | None = None


class TokenizerChoice(NamedTuple):
    """What ``--tokenizer`` and ``--weights`` say.

    Attributes:
        name: of a published tokenizer, or a run directory; None: not said.
        weights: file or folder of a published tokenizer's weights; None: not said.
    """

    name: str | None
    weights: Path | None = None


def _kl_f16(channels: int, *, decoder_attention: bool, **normalisation: Any) -> dict[str, Any]:
    """Latent diffusion's KL-f16, as options of diffusers' AutoencoderKL."""
    first_up = "AttnUpDecoderBlock2D" if decoder_attention else "UpDecoderBlock2D"
    return {
        "latent_channels": channels,
        "block_out_channels": (128, 128, 256, 256, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        "up_block_types": (first_up,) + ("UpDecoderBlock2D",) * 4,
        **normalisation,
    }


# fmt: off
_VA_VAE_MEAN = (
    0.5984623, -0.49917176, 0.6440029, -0.0970839, -1.190963, -1.4331622, 0.46853292, 0.6259252,
    0.63195026, -0.4896733, -0.74451625, 1.1595623, 0.8456217, 0.5008238, 0.22926894,
    0.47535565, -0.43787342, 0.8316961, -0.0750857, 0.30632293, 0.46645293, -0.09140775,
    -0.82710165, 0.07807512, 1.4150785, 1.3792385, 0.2695843, -0.7573224, 0.28129938,
    -0.30919993, 0.07785388, 0.34966648,
)
_VA_VAE_STD = (
    3.846138, 4.2699146, 3.5768437, 3.5911105, 3.6230576, 3.481018, 3.3074617, 3.5092657,
    3.5540583, 3.6067245, 3.70579, 3.6314075, 3.6295316, 3.620502, 3.2590282, 3.186753,
    3.8258142, 3.599939, 3.2966352, 3.226129, 3.2191944, 3.1054573, 3.580496, 4.356914,
    3.308541, 3.2075875, 4.515047, 3.4869924, 3.0415804, 3.4868848, 4.4310327, 4.0881157,
)
# fmt: on

PUBLISHED_TOKENIZERS: dict[str, PublishedTokenizer] = {
    "sd-vae": PublishedTokenizer(
        title="the KL-f8 autoencoder of Stable Diffusion, fine-tuned, with averaged weights",
        module="kl_vae",
        latents=(32, 32, 4),
        parameters=83_653_863,
        repository="stabilityai/sd-vae-ft-ema",
        weights="diffusion_pytorch_model.safetensors",
        config_file="config.json",
        config={
            "latent_channels": 4,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "scaling_factor": 0.18215,
        },
    ),
    "mar-vae": PublishedTokenizer(
        title="the KL-f16 autoencoder of MAR",
        module="kl_vae",
        latents=(16, 16, 16),
        parameters=66_456_019,
        # MAR's authors link the same file from github.com/LTH14/mar, outside the hub.
        repository="xwen99/mar-vae-kl16",
        weights="kl16.ckpt",
        config=_kl_f16(16, decoder_attention=False, scaling_factor=0.2325),
    ),
    "va-vae": PublishedTokenizer(
        title="VA-VAE, KL-f16 aligned with DINOv2",
        module="kl_vae",
        latents=(16, 16, 32),
        parameters=69_836_067,
        repository="hustvl/vavae-imagenet256-f16d32-dinov2",
        weights="vavae-imagenet256-f16d32-dinov2.pt",
        config=_kl_f16(
            32,
            decoder_attention=True,
            scaling_factor=1.0,
            # Published beside the weights, as latents_stats.pt.
            latents_mean=_VA_VAE_MEAN,
            latents_std=_VA_VAE_STD,
        ),
    ),
    "maetok": PublishedTokenizer(
        title="MAETok-B-128, a masked autoencoder with a sequence of latents",
        module="maetok",
        latents=(128, 32),
        parameters=172_681_760,  # with learned rotary positions
        repository="MAETok/maetok-b-128",
        weights="model.safetensors",
        config_file="config.json",
    ),
}
