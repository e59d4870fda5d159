"""Schedules, losses and the DDPM step, against recorded tables and plain float64 formulas."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from detok_pipe.generators.diffusion import GaussianDiffusion, ReverseChain, schedule
from detok_pipe.generators.guidance import combine, scale_at
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError

GOLDEN = Path(__file__).parent / "data" / "diffusion_tables_golden.npz"
# The file keeps every so many entries of a table, and its last one.
STRIDES = {1000: 25, 250: 5, 100: 5, 5: 1}


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", STRIDES)
def test_tables(name, steps):
    table = schedule(name, steps)
    with np.load(GOLDEN, allow_pickle=False) as golden:
        for field in ("betas", "timestep_map", "posterior_log_variance_clipped"):
            ours = getattr(table, field)
            ours = np.append(ours[:: STRIDES[steps]], ours[-1])
            np.testing.assert_allclose(ours, golden[f"{name}_{steps}_{field}"], rtol=1e-12)


def test_one_step_keeps_the_first_number():
    assert schedule("cosine", 1).timestep_map.tolist() == [0]


def plain_terms(name, x_0, eps, t, predicted, v):
    """The two loss terms of one row, float64, by the textbook: means and variances at x_t."""
    betas = schedule(name).betas
    kept = np.cumprod(1 - betas)
    before = kept[t - 1] if t else 1.0
    variance = betas * (1 - np.append(1.0, kept[:-1])) / (1 - kept)
    low, high = math.log(variance[max(t, 1)]), math.log(betas[t])
    x_t = math.sqrt(kept[t]) * x_0 + math.sqrt(1 - kept[t]) * eps
    implied = (x_t - math.sqrt(1 - kept[t]) * predicted) / math.sqrt(kept[t])
    to_x_0 = math.sqrt(before) * betas[t] / (1 - kept[t])
    to_x_t = math.sqrt(1 - betas[t]) * (1 - before) / (1 - kept[t])
    true_mean, mean = (to_x_0 * start + to_x_t * x_t for start in (x_0, implied))
    log_variance = (v + 1) / 2 * high + (1 - v) / 2 * low
    if t:
        term = 0.5 * (log_variance - low - 1 + np.exp(low - log_variance))
        term = term + 0.5 * (true_mean - mean) ** 2 / np.exp(log_variance)
    else:
        std = np.exp(log_variance / 2)

        def cdf(z):
            return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

        upper, lower = cdf((x_0 - mean + 1 / 255) / std), cdf((x_0 - mean - 1 / 255) / std)
        bins = np.where(x_0 < -0.999, upper, np.where(x_0 > 0.999, 1 - lower, upper - lower))
        term = -np.log(np.maximum(bins, 1e-12))
    return ((predicted - eps) ** 2).mean(), (term / math.log(2)).mean()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_losses_against_the_textbook(name):
    rng = np.random.default_rng(0)
    t = np.array([0, 0, 0, 1, 10, 300, 700, 950])
    x_0, eps, error = rng.standard_normal((3, len(t), 6))
    x_0[1], x_0[2] = 1.5, -1.5  # the open bins
    predicted, v = eps + 0.01 * error, rng.uniform(-1.5, 1.5, (len(t), 6))
    rows = [torch.tensor(a, dtype=torch.float32) for a in (x_0, eps)]
    outputs = [torch.tensor(a, dtype=torch.float32) for a in (predicted, v)]
    mse, vlb = GaussianDiffusion(name).losses(*rows, torch.tensor(t), *outputs)
    plain = [plain_terms(name, *row) for row in zip(x_0, eps, t, predicted, v, strict=True)]
    np.testing.assert_allclose(mse, [row[0] for row in plain], rtol=1e-4)
    np.testing.assert_allclose(vlb, [row[1] for row in plain], rtol=2e-4, atol=1e-6)


def test_vlb_trains_the_variance_only():
    predicted = torch.randn(3, 4, requires_grad=True)
    v = torch.zeros(3, 4, requires_grad=True)
    t = torch.tensor([0, 5, 500])
    _, vlb = GaussianDiffusion("cosine").losses(
        torch.randn(3, 4), torch.randn(3, 4), t, predicted, v
    )
    vlb.sum().backward()
    assert predicted.grad is None
    assert (v.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("clip", [None, 2.0])
def test_reverse_step_against_the_textbook(clip):
    steps, i = 100, 50
    rng = np.random.default_rng(1)
    x, eps, v, draw = rng.standard_normal((4, 5, 3))
    betas = schedule("cosine", steps).betas
    kept = np.cumprod(1 - betas)
    implied = (x - math.sqrt(1 - kept[i]) * eps) / math.sqrt(kept[i])
    if clip is not None:
        assert (np.abs(implied) > clip).any()
        implied = implied.clip(-clip, clip)
    mean = (
        math.sqrt(kept[i - 1]) * betas[i] * implied
        + math.sqrt(1 - betas[i]) * (1 - kept[i - 1]) * x
    ) / (1 - kept[i])
    low = math.log(betas[i] * (1 - kept[i - 1]) / (1 - kept[i]))
    log_variance = (v + 1) / 2 * math.log(betas[i]) + (1 - v) / 2 * low
    expected = mean + 0.9 * np.exp(log_variance / 2) * draw
    chain = ReverseChain("cosine", steps, temperature=0.9, clip=clip)
    ours = chain.step(i, *(torch.tensor(a, dtype=torch.float32) for a in (x, eps, v, draw)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)
    last = chain.step(0, torch.ones(1), torch.ones(1), torch.ones(1), torch.tensor([9.0]))
    assert float(last) == pytest.approx((1 - math.sqrt(1 - kept[0])) / math.sqrt(kept[0]))


def test_wrong_schedules():
    with pytest.raises(ConfigError, match="linear or cosine"):
        schedule("quadratic", 10)
    with pytest.raises(ConfigError, match="1 to 1000"):
        schedule("cosine", 1001)


def test_guidance_scale():
    linear = Sampling(guidance_scale=3.0, guidance_schedule="linear")
    assert [scale_at(linear, p) for p in (0.0, 0.25, 1.0)] == [1.0, 1.5, 3.0]
    interval = Sampling(guidance_scale=3.0, guidance_interval=(0.2, 0.6))
    assert [scale_at(interval, p) for p in (0.1, 0.2, 0.6, 0.7)] == [1.0, 3.0, 3.0, 1.0]


def test_guidance_on_some_channels():
    cond, null = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    guided = null + 2.5 * (cond - null)
    torch.testing.assert_close(combine(cond, null, 2.5), guided)
    part = combine(cond, null, 2.5, 3)
    torch.testing.assert_close(part[..., :3], guided[..., :3])
    assert torch.equal(part[..., 3:], cond[..., 3:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_schedule": "cosine"}, "constant or linear"),
        ({"guidance_interval": (0.5, 0.1)}, "low <= high"),
        ({"temperature": -0.1}, "temperature"),
        ({"clip": 0.0}, "clip"),
        ({"clip": math.inf}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"steps": 0}, "steps"),
        ({"iterations": 0}, "iterations"),
        ({"guided_channels": 0}, "guided_channels"),
        ({"method": "heun"}, "euler or dopri5"),
    ],
)
def test_wrong_sampling(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
