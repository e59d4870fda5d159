"""MAETok: golden numbers with absolute and with learned rotary positions, and configurations."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from baseline_making import CONFIGS, small_state

from detok_pipe.latents.errors import ConfigError, MismatchError
from detok_pipe.tokenizer.maetok import build, translated

ROOT = Path(__file__).parents[1]
REFERENCE = Path(os.environ.get("DETOK_REFERENCE", ROOT.parent / "shared" / "reference"))
GOLDEN = {
    "image_size": 64,
    "base_image_size": 64,
    "codebook_embed_dim": 4,
    "encoder_model": "vit_small_patch14_dinov2.lvd142m",
    "decoder_model": "vit_small_patch14_dinov2.lvd142m",
    "num_latent_tokens": 8,
    "enc_patch_size": 16,
    "dec_patch_size": 16,
    "enc_token_drop": 0.4,
    "vq_mean": 0.0,
    "vq_std": 1.0,
}
FORMS = {
    "maetok_ape": {"use_ape": True},
    "maetok_rope_mixed": {"use_ape": False, "use_rope": True, "rope_mixed": True},
}


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_it_agrees_with_the_golden_files(form, golden_weights):
    model = build({**GOLDEN, **FORMS[form]}).model
    golden_weights(model, keep=("encoder.freqs_t", "decoder.freqs_t"))
    recorded = np.load(ROOT / "tests" / "data" / "baselines_golden.npz")
    latents = model.encode_moments(torch.from_numpy(recorded["image"]))
    wanted = torch.from_numpy(recorded[f"{form}/encoded"])
    torch.testing.assert_close(latents, wanted, rtol=0, atol=1e-5)
    decoded = model.decode(torch.from_numpy(recorded[f"{form}/latent"]))
    wanted = torch.from_numpy(recorded[f"{form}/decoded"])
    torch.testing.assert_close(decoded[:, :, ::4, 1::4], wanted, rtol=0, atol=1e-5)


@pytest.mark.skipif(not REFERENCE.exists(), reason="no reference folder")
@pytest.mark.parametrize("form", FORMS)
def test_published_names_and_shapes(form):
    tables = json.loads((REFERENCE / "state_dicts.json").read_text())
    with torch.device("meta"):
        state = build({**GOLDEN, **FORMS[form]}).model.state_dict()
    wanted = tables[f"baseline {form}"]["state_dict"]
    assert {key: list(value.shape) for key, value in state.items()} == wanted


@torch.inference_mode()
def test_latents_are_a_sequence_without_a_posterior():
    built = build(CONFIGS["maetok"])
    model = built.model.eval()
    assert (model.grid, model.channels, model.has_posterior) == ((8,), 5, False)
    assert model.encode_moments(torch.rand(2, 3, 32, 32)).shape == (2, 8, 5)
    assert model.decode(torch.rand(2, 8, 5)).shape == (2, 3, 32, 32)
    np.testing.assert_allclose(built.stats.normalize(np.full((1, 5), 0.75)), 1.0)
    assert built.stats.source == "published"
    with pytest.raises(MismatchError, match=r"\(8, 4\).*\(8, 5\)"):
        model.decode(torch.rand(2, 8, 4))


def test_parts_of_training_are_left_out_and_unknown_ones_are_not():
    state = small_state("maetok")
    extra = ("decoder_hog.model.norm.weight", "post_quant_conv_dino.bias", "repa_model.x")
    assert translated({**state, **dict.fromkeys(extra, torch.zeros(1))}).keys() == state.keys()
    assert "other.weight" in translated({**state, "other.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_model": "no_such_vit"}, "no_such_vit"),
        ({"encoder_model": "resnet18"}, "resnet18"),
        ({"enc_type": "cnn"}, "'cnn'; only 'vit'"),
        ({"rope_mixed": False}, "rope_mixed is off"),
        ({"vq_std": None}, "'vq_std'"),
        ({"image_size": 33}, "33 is no multiple"),
        ({"dec_patch_size": 16}, "dec_patch_size is 16 and enc_patch_size 8"),
    ],
)
def test_configurations_that_are_not_known(change, message):
    with pytest.raises(ConfigError, match=message):
        build({**CONFIGS["maetok"], **change})
