"""DiT against the reference's recorded numbers, and its own options."""

from pathlib import Path

import numpy as np
import pytest
import torch

from detok_pipe.generators.dit import DiT
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.noise import Noise, ReplayNoise

TINY = {"grid": (4, 4), "channels": 4, "num_classes": 10, "width": 64, "depth": 2, "heads": 4}


def tokens(image):
    return torch.as_tensor(image).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "data" / "dit_golden.npz") as data:
        return {k.removeprefix("dit/"): torch.from_numpy(data[k]) for k in data if k[:4] == "dit/"}


@pytest.fixture(scope="module")
def model(golden_weights):
    return golden_weights(DiT(**TINY)).requires_grad_(False)


def test_network(model, golden):
    out = model.network(tokens(golden["latent"]), golden["t"], golden["labels"])
    torch.testing.assert_close(out, tokens(golden["net_output"]), atol=1e-5, rtol=0)


def test_loss(model, golden):
    loss = model.losses(
        tokens(golden["latent"]), golden["labels"], golden["t"], tokens(golden["noise"])
    )
    largest = golden["loss"].max()
    torch.testing.assert_close(loss / largest, golden["loss"] / largest, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1, 2])
def test_samples(model, golden, golden_draw, scale):
    noise = ReplayNoise(2, [tokens(golden_draw(k, (2, 4, 4, 4))) for k in range(6)])
    z = model.sample(golden["labels"], Sampling(guidance_scale=scale, steps=5), noise)
    expected = tokens(golden[f"sample_cfg{scale}"])
    # An unclipped chain grows; only its relative size means something.
    largest = expected.abs().max()
    torch.testing.assert_close(z / largest, expected / largest, atol=1e-6, rtol=0)


def test_guidance_on_the_first_channels_leaves_the_others_conditional(model, golden):
    """One reverse step from the same start: channel 3 moves as without guidance."""
    condition = golden["labels"]
    outcomes = {
        name: model.sample(condition, Sampling(steps=1, **options), Noise(0, [0, 1]))
        for name, options in {
            "off": {},
            "three": {"guidance_scale": 4.0, "guided_channels": 3},
            "all": {"guidance_scale": 4.0},
        }.items()
    }
    assert torch.equal(outcomes["three"][..., :3], outcomes["all"][..., :3])
    torch.testing.assert_close(outcomes["three"][..., 3], outcomes["off"][..., 3])
    assert (outcomes["all"][..., 3] - outcomes["off"][..., 3]).abs().max() > 1e-4


def test_temperature_is_the_size_of_the_noise(model, golden):
    def sample(**options):
        return model.sample(golden["labels"], Sampling(steps=2, **options), Noise(0, [0, 1]))

    cold, mild, warm = (sample(temperature=value) for value in (0.0, 0.5, 1.0))
    assert not torch.allclose(cold, warm, rtol=1e-2)
    # One noisy step, then the network; so nearly half-way, but not exactly.
    assert (mild - (cold + warm) / 2).norm() < 0.1 * (warm - cold).norm()


def test_training_steps_cover_the_schedule(model):
    seen, rows = [], 512
    losses = model.losses
    try:
        model.losses = lambda z, condition, t, eps: seen.append(t) or losses(z, condition, t, eps)
        rows = 512
        model.loss(
            torch.zeros(rows, 16, 4), torch.zeros(rows, dtype=torch.long), Noise(0, range(rows))
        )
    finally:
        del model.losses
    (t,) = seen
    assert t.dtype == torch.int64
    assert 0 <= t.min() < 20
    assert 980 < t.max() <= 999
