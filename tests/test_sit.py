"""SiT against the reference's recorded numbers: network, loss, Euler and dopri5."""

from pathlib import Path

import numpy as np
import pytest
import torch

from detok_pipe.generators import flow
from detok_pipe.generators.sampling import Sampling
from detok_pipe.generators.sit import SiT
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise, ReplayNoise

TINY = {"grid": (4, 4), "channels": 4, "num_classes": 10, "width": 64, "depth": 2, "heads": 4}
SCALES = {"sample_cfg1": 1.0, "sample_cfg16": 1.6}


def tokens(image):
    return torch.as_tensor(image).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "data" / "dit_golden.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data}


@pytest.fixture(scope="module")
def model(golden_weights):
    return golden_weights(SiT(**TINY)).requires_grad_(False)


def test_network(model, golden):
    out = model.network(
        tokens(golden["sit_euler/latent"]), golden["sit_euler/t"], golden["sit_euler/labels"]
    )
    torch.testing.assert_close(out, tokens(golden["sit_euler/net_output"]), atol=1e-5, rtol=0)


def test_loss(model, golden):
    loss = model.losses(
        tokens(golden["sit_euler/latent"]),
        golden["sit_euler/labels"],
        golden["sit_euler/t"],
        tokens(golden["sit_euler/noise"]),
    )
    torch.testing.assert_close(loss, golden["sit_euler/loss"], atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", SCALES)
def test_euler_samples(model, golden, golden_draw, name):
    noise = ReplayNoise(2, [tokens(golden_draw(0, (2, 4, 4, 4)))])
    sampling = Sampling(guidance_scale=SCALES[name], steps=9, method="euler")
    z = model.sample(golden["sit_euler/labels"], sampling, noise)
    torch.testing.assert_close(z, tokens(golden[f"sit_euler/{name}"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCALES)
def test_dopri5_samples_under_one_control_for_the_batch(model, golden, golden_draw, name):
    velocity = model.velocity(golden["sit_dopri5/labels"], Sampling(guidance_scale=SCALES[name]))
    start = tokens(golden_draw(0, (2, 4, 4, 4)))
    z = flow.dopri5(velocity, start, per_image=False)
    torch.testing.assert_close(z, tokens(golden[f"sit_dopri5/{name}"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCALES)
def test_dopri5_per_image_stays_within_its_own_error(model, golden, golden_draw, name):
    """What `sample` does: each image's result is that of the reference for it alone."""
    noise = ReplayNoise(2, [tokens(golden_draw(0, (2, 4, 4, 4)))])
    sampling = Sampling(guidance_scale=SCALES[name], method="dopri5")
    z = model.sample(golden["sit_dopri5/labels"], sampling, noise)
    torch.testing.assert_close(z, tokens(golden[f"sit_dopri5/{name}"]), atol=3e-3, rtol=0)
    for i in range(2):
        velocity = model.velocity(golden["sit_dopri5/labels"][i : i + 1], sampling)
        start = tokens(golden_draw(0, (2, 4, 4, 4)))[i : i + 1]
        alone = flow.dopri5(velocity, start, per_image=False)
        torch.testing.assert_close(z[i : i + 1], alone, atol=1e-5, rtol=0)


def test_dopri5_guides_each_image_by_its_own_time(model):
    """Guidance in the second half only: rows on both sides of it meet in one evaluation."""
    condition = torch.tensor([1, 2, 3])
    sampling = Sampling(guidance_scale=3.0, guidance_interval=(0.5, 1.0))
    velocity = model.velocity(condition, sampling)
    x = torch.randn(3, 16, 4)
    mixed = velocity(x, np.array([0.2, 0.7, 1.01]), torch.arange(3))
    time = torch.tensor([0.2, 0.7, 1.01])
    cond = model.network(x, time, condition)
    null = model.network(x, time, torch.full((3,), -1))
    torch.testing.assert_close(mixed[0], cond[0])
    torch.testing.assert_close(mixed[1:], (null + 3.0 * (cond - null))[1:])


def test_temperature_is_refused(model):
    with pytest.raises(ConfigError, match=r"temperature 0\.9"):
        model.sample(torch.tensor([0]), Sampling(temperature=0.9), Noise(0, [0]))
