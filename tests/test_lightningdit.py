"""LightningDiT against the reference's recorded numbers, its times, rotary table and options."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from detok_pipe.generators import flow
from detok_pipe.generators.attention import rotate
from detok_pipe.generators.lightningdit import LightningDiT, RotaryTable
from detok_pipe.generators.registry import default_sampling
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise, ReplayNoise

TINY = {"grid": (4, 4), "channels": 4, "num_classes": 10, "width": 64, "depth": 2, "heads": 4}


def tokens(image):
    return torch.as_tensor(image).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "qk_norm"])
def case(request, golden_weights):
    name = "lightningdit_qknorm" if request.param else "lightningdit"
    with np.load(Path(__file__).parent / "data" / "dit_golden.npz") as data:
        golden = {
            key.removeprefix(name + "/"): torch.from_numpy(data[key])
            for key in data
            if key.startswith(name + "/")
        }
    model = golden_weights(LightningDiT(**TINY, qk_norm=request.param))
    return model.requires_grad_(False), golden


def test_network(case):
    model, golden = case
    out = model.network(tokens(golden["latent"]), golden["t"], golden["labels"])
    torch.testing.assert_close(out, tokens(golden["net_output"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1, 2])
def test_samples(case, golden_draw, scale):
    """At the registry's interval, from the 9 warped points of the record."""
    model, golden = case
    noise = ReplayNoise(2, [tokens(golden_draw(0, (2, 4, 4, 4)))])
    sampling = replace(default_sampling("lightningdit-b"), guidance_scale=float(scale), steps=9)
    z = model.sample(golden["labels"], sampling, noise)
    torch.testing.assert_close(z, tokens(golden[f"sample_cfg{scale}"]), atol=1e-5, rtol=0)


def test_training_times_are_logit_normal():
    t = LightningDiT(**TINY).training_times(Noise(1, range(4000)))
    assert kstest(torch.logit(t).numpy(), "norm").pvalue > 1e-3


def test_cosine_loss_is_an_option():
    torch.manual_seed(0)
    z, eps = torch.randn(2, 3, 16, 4)
    t, condition = torch.rand(3), torch.tensor([0, 1, -1])
    plain = LightningDiT(**TINY)
    extra = LightningDiT(**TINY, cosine_loss=True)
    with torch.no_grad():
        for weight in plain.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    extra.load_state_dict(plain.state_dict())
    velocity = plain.network(flow.path(z, eps, t), t, condition)
    target = flow.velocity_target(z, eps)
    cosine = (velocity * target).sum(-1) / (velocity.norm(dim=-1) * target.norm(dim=-1))
    difference = extra.losses(z, condition, t, eps) - plain.losses(z, condition, t, eps)
    torch.testing.assert_close(difference, 1 - cosine.mean(1), atol=1e-5, rtol=1e-5)


def test_rotary_table_depends_on_offsets_only():
    """q . k after rotation is the same for all pairs of places at one distance."""
    table = RotaryTable((3, 5), 16)
    q, k = torch.randn(2, 1, 1, 1, 16)
    q, k = (rotate(part.expand(1, 1, 15, 16), table())[0, 0] for part in (q, k))
    scores = (q @ k.T).reshape(3, 5, 3, 5)
    torch.testing.assert_close(scores[0, 1, 2, 4], scores[0, 0, 2, 3])
    torch.testing.assert_close(scores[1, 0, 0, 2], scores[2, 1, 1, 3])
    assert not torch.isclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])


def test_sequences_have_no_rotary_embedding():
    model = LightningDiT(**{**TINY, "grid": (6,)})
    assert not [key for key in model.state_dict() if key.startswith("rope")]
    with pytest.raises(ConfigError, match="head width 6"):
        LightningDiT(**{**TINY, "width": 24})
