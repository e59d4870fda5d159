"""KL autoencoders: golden numbers under published names, normalisation, other forms of weights."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from baseline_making import CONFIGS, latent_diffusion_shapes, rule_weights, small_state
from diffusers import AutoencoderKL

from detok_pipe.generators.state_dicts import fitted
from detok_pipe.latents.errors import ConfigError, MismatchError
from detok_pipe.pipelines.published_tokenizers import PUBLISHED_TOKENIZERS
from detok_pipe.tokenizer.kl_vae import build, translated

ROOT = Path(__file__).parents[1]
REFERENCE = Path(os.environ.get("DETOK_REFERENCE", ROOT.parent / "shared" / "reference"))
KL_F16 = (128, 128, 256, 256, 512)
# Name in the golden files, of the table, channels, attention in the decoder's lowest level.
LARGE = [("marvae", "mar-vae", 16, False), ("vavae", "va-vae", 32, True)]


def places(values: np.ndarray) -> torch.Tensor:
    """(B, C, h, w) -> (B, N, C)."""
    return torch.from_numpy(values).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("golden", "name", "channels", "attention"), LARGE)
@torch.inference_mode()
def test_kl_f16_agrees_with_the_golden_files(golden, name, channels, attention):
    shapes = latent_diffusion_shapes(channels, KL_F16, decoder_attention=attention)
    model = build({**PUBLISHED_TOKENIZERS[name].config, "sample_size": 64}).model.eval()
    model.load_state_dict(fitted(model, translated(rule_weights(shapes)), golden))
    recorded = np.load(ROOT / "tests" / "data" / "baselines_golden.npz")
    moments = model.encode_moments(torch.from_numpy(recorded["image"]))
    wanted = places(recorded[f"{golden}/encoded"])
    torch.testing.assert_close(moments, wanted, rtol=0, atol=1e-5)
    # Rounding alone is 1.3e-5 in fp32 on some processors; the network itself is within 1e-5.
    decoded = model.double().decode(places(recorded[f"{golden}/latent"]).double())
    wanted = torch.from_numpy(recorded[f"{golden}/decoded"]).double()
    torch.testing.assert_close(decoded[:, :, ::4, 1::4], wanted, rtol=0, atol=1e-5)


@pytest.mark.skipif(not REFERENCE.exists(), reason="no reference folder")
@pytest.mark.parametrize(("golden", "name", "channels", "attention"), LARGE)
def test_published_names_shapes_and_statistics(golden, name, channels, attention):
    described = latent_diffusion_shapes(channels, KL_F16, decoder_attention=attention)
    tables = json.loads((REFERENCE / "state_dicts.json").read_text())
    wanted = tables[f"baseline {golden}"]["state_dict"]
    assert {key: list(shape) for key, shape in described.items()} == wanted
    published = json.loads((REFERENCE / "vavae_latent_stats.json").read_text())
    config = PUBLISHED_TOKENIZERS["va-vae"].config
    assert [list(config["latents_mean"]), list(config["latents_std"])] == [
        published["mean"],
        published["std"],
    ]


def test_normalisation_is_that_of_the_configuration():
    for name, factor in (("sd-vae", 0.18215), ("mar-vae", 0.2325)):
        with torch.device("meta"):
            stats = build(PUBLISHED_TOKENIZERS[name].config).stats
        z = np.arange(2.0 * stats.channels).reshape(2, -1)
        np.testing.assert_allclose(stats.normalize(z), z * factor)
        assert stats.source == "published"
    small = {**CONFIGS["sd-vae"], **levels("sd-vae")}
    shifted = build({**small, "scaling_factor": 2.0, "shift_factor": 0.5}).stats
    np.testing.assert_allclose(shifted.normalize(np.full((1, 4), 1.5)), 2.0)
    given = build({**small, "latents_mean": [1] * 4, "latents_std": [2] * 4, "scaling_factor": 1.0})
    np.testing.assert_allclose(given.stats.normalize(np.full((1, 4), 5.0)), 2.0)


def levels(name: str) -> dict[str, object]:
    config = PUBLISHED_TOKENIZERS[name].config
    return {key: config[key] for key in ("down_block_types", "up_block_types")}


@torch.inference_mode()
def test_it_computes_what_autoencoder_kl_does_under_old_names_too():
    config = {key: value for key, value in CONFIGS["sd-vae"].items() if key != "_class_name"}
    theirs = AutoencoderKL(**config, **levels("sd-vae")).eval()
    state = theirs.state_dict()
    olds = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = dict(state)
    for new_name, old_name in olds.items():
        old = {key.replace(new_name, old_name): value for key, value in old.items()}
    assert old.keys() != state.keys()
    ours = build({**CONFIGS["sd-vae"], **levels("sd-vae")}).model.eval()
    ours.load_state_dict(fitted(ours, translated(old), "old"))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior = theirs.encode(images).latent_dist
    moments = ours.encode_moments(images)
    torch.testing.assert_close(moments, places(posterior.parameters.numpy()), rtol=0, atol=0)
    z = posterior.mean
    decoded = ours.decode(z.flatten(2).transpose(1, 2))
    torch.testing.assert_close(decoded, theirs.decode(z).sample, rtol=0, atol=0)
    assert (ours.grid, ours.channels, ours.has_posterior) == ((4, 4), 4, True)


def test_parts_of_training_are_left_out_and_unknown_ones_are_not():
    state = small_state("va-vae")
    more = {"loss.discriminator.weight": torch.zeros(1), "foundation_model.x": torch.zeros(1)}
    assert translated({**state, **more}).keys() == translated(state).keys()
    assert "other.weight" in translated({**state, "other.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 36}, "36 is no multiple of 8"),
        ({"unknown_option": 3}, "unknown_option"),
        ({"down_block_types": ["None"]}, "AutoencoderKL"),
        ({"latents_mean": [0.0]}, "1 and 4 values, the latents 4 channels"),
        ({"scaling_factor": 0}, "scaling_factor"),
    ],
)
def test_configurations_that_fit_no_network(change, message):
    with pytest.raises(ConfigError, match=message):
        build({**CONFIGS["sd-vae"], **levels("sd-vae"), **change})


def test_wrong_shapes_are_refused():
    model = build({**CONFIGS["sd-vae"], **levels("sd-vae")}).model
    with pytest.raises(MismatchError, match=r"\(3, 64, 64\).*\(3, 32, 32\)"):
        model.encode_moments(torch.zeros(1, 3, 64, 64))
    with pytest.raises(MismatchError, match=r"\(16, 16\).*\(16, 4\)"):
        model.decode(torch.zeros(1, 16, 16))
