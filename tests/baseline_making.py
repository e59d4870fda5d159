"""Small networks with the names and file forms of the published tokenizers, for tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from golden_making import rule_weight
from safetensors.torch import save_file
from torch import Tensor

from detok_pipe.tokenizer import kl_vae, maetok

SIDES = {"sd-vae": 32, "mar-vae": 64, "va-vae": 64, "maetok": 32}
"""Pixels of the small tokenizers' images."""
LATENTS = {
    "sd-vae": ((4, 4), 4),
    "mar-vae": ((4, 4), 4),
    "va-vae": ((4, 4), 6),
    "maetok": ((8,), 5),
}
"""Their grids and channels."""

_KL = {"layers_per_block": 1, "norm_num_groups": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd-vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [4, 4, 8, 8],
        "sample_size": 32,
        **_KL,
    },
    "mar-vae": {
        "latent_channels": 4,
        "block_out_channels": [4, 4, 4, 4, 8],
        "sample_size": 64,
        **_KL,
    },
    "va-vae": {
        "latent_channels": 6,
        "block_out_channels": [4, 4, 4, 4, 8],
        "latents_mean": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        "latents_std": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "sample_size": 64,
        **_KL,
    },
    "maetok": {
        "image_size": 32,
        "enc_patch_size": 8,
        "dec_patch_size": 8,
        "codebook_embed_dim": 5,
        "num_latent_tokens": 8,
        "encoder_model": "test_vit",
        "decoder_model": "test_vit",
        "use_ape": False,
        "use_rope": True,
        "rope_mixed": True,
        "enc_token_drop": 0.4,
        "vq_mean": 0.25,
        "vq_std": 0.5,
    },
}


def latent_diffusion_shapes(
    channels: int, widths: Sequence[int], *, blocks: int = 2, decoder_attention: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a KL autoencoder in latent diffusion's form, from its description."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    def block(name: str, before: int, after: int) -> None:
        add(f"{name}.norm1", before)
        add(f"{name}.conv1", after, before, 3, 3)
        add(f"{name}.norm2", after)
        add(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            add(f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        add(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", width, width, 1, 1)

    def middle(name: str, width: int) -> None:
        block(f"{name}.mid.block_1", width, width)
        attention(f"{name}.mid.attn_1", width)
        block(f"{name}.mid.block_2", width, width)

    lowest = len(widths) - 1
    add("encoder.conv_in", widths[0], 3, 3, 3)
    before = widths[0]
    for level, width in enumerate(widths):
        for number in range(blocks):
            block(f"encoder.down.{level}.block.{number}", before, width)
            before = width
            if level == lowest:
                attention(f"encoder.down.{level}.attn.{number}", width)
        if level != lowest:
            add(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    middle("encoder", before)
    add("encoder.norm_out", before)
    add("encoder.conv_out", 2 * channels, before, 3, 3)
    add("decoder.conv_in", before, channels, 3, 3)
    middle("decoder", before)
    for level in range(lowest, -1, -1):
        for number in range(blocks + 1):
            block(f"decoder.up.{level}.block.{number}", before, widths[level])
            before = widths[level]
            if level == lowest and decoder_attention:
                attention(f"decoder.up.{level}.attn.{number}", before)
        if level:
            add(f"decoder.up.{level}.upsample.conv", before, before, 3, 3)
    add("decoder.norm_out", before)
    add("decoder.conv_out", 3, before, 3, 3)
    add("quant_conv", 2 * channels, 2 * channels, 1, 1)
    add("post_quant_conv", channels, channels, 1, 1)
    return shapes


def rule_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {key: rule_weight(key, shape) for key, shape in shapes.items()}


def small_state(name: str) -> dict[str, Tensor]:
    """The state dict of a small tokenizer, under published names."""
    config = CONFIGS[name]
    if name in ("mar-vae", "va-vae"):
        shapes = latent_diffusion_shapes(
            config["latent_channels"],
            config["block_out_channels"],
            blocks=config["layers_per_block"],
            decoder_attention=name == "va-vae",
        )
        return rule_weights(shapes)
    if name == "sd-vae":
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 4}
        levels |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
        model = kl_vae.build({**levels, **config}).model
    else:
        model = maetok.build(config).model
    computed = dict(model.named_buffers())
    return {
        key: computed[key] if key in computed else rule_weight(key, value.shape)
        for key, value in model.state_dict().items()
    }


def write_small(name: str, folder: Path) -> Path:
    """A folder with a small tokenizer, in the file form in which the large one is published."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    state = small_state(name)
    if name == "mar-vae":
        torch.save({"model": state}, folder / "kl16.ckpt")
    elif name == "va-vae":
        training = {"loss.logvar": torch.zeros(()), "linear_proj.weight": torch.zeros(4, 6, 1, 1)}
        content = {"state_dict": {**state, **training}, "epoch": 3}
        torch.save(content, folder / "vavae-imagenet256-f16d32-dinov2.pt")
    else:
        file = "model" if name == "maetok" else "diffusion_pytorch_model"
        save_file(state, folder / f"{file}.safetensors")
    return folder
