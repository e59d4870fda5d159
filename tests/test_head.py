"""The diffusion head, against the recorded numbers and a plain float64 reading of one step."""

import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from detok_pipe.generators.diffusion import schedule
from detok_pipe.generators.head import DiffusionHead
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.noise import Noise

GOLDEN = Path(__file__).parent / "data" / "head_golden.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def head(golden_weights):
    return golden_weights(DiffusionHead(4, 64, width=32, depth=2)).requires_grad_(False)


def test_network(head, golden):
    out = head.net(golden["x_t"], golden["t"], golden["condition"])
    torch.testing.assert_close(out, golden["net_output"], rtol=0, atol=1e-5)


def test_losses(head, golden):
    mse, vlb = head.losses(
        golden["x_0"], golden["condition"], golden["t"][None], golden["noise"][None]
    )
    for ours, key in ((mse, "mse"), (vlb, "vb"), (mse + vlb, "loss")):
        atol = 1e-6 * float(golden[key].max())
        torch.testing.assert_close(ours, golden[key], rtol=0, atol=atol)


@pytest.mark.parametrize("key", ["sample_cfg1_temperature09", "sample_cfg3"])
def test_samples(head, golden, golden_draw, key):
    draws = torch.stack([golden_draw(k, (6, 4)) for k in range(6)])
    if key == "sample_cfg3":
        condition = torch.cat((golden["condition"], golden["null_condition"]))
        out = head.sampler(Sampling(steps=5))(condition, draws, 3.0)
    else:
        out = head.sampler(Sampling(steps=5, temperature=0.9))(golden["condition"], draws)
    atol = 1e-6 * float(golden[key].abs().max())
    torch.testing.assert_close(out, golden[key], rtol=0, atol=atol)


def plain_step(net, i, steps, x, conditions, draw, scale, temperature):
    """One guided DDPM step in float64; returns (x_{i-1}, std of both halves)."""
    table = schedule("cosine", steps)
    kept = np.cumprod(1 - table.betas)
    t = torch.full((len(x),), int(table.timestep_map[i]))
    (eps, v), (eps_null, v_null) = (net(x, t, c).chunk(2, -1) for c in conditions)
    eps = eps_null + scale * (eps - eps_null)
    mean = (x - table.betas[i] / math.sqrt(1 - kept[i]) * eps) / math.sqrt(1 - table.betas[i])
    low = math.log(table.betas[i] * (1 - kept[i - 1]) / (1 - kept[i]))
    high = math.log(table.betas[i])
    stds = [torch.exp(0.5 * ((h + 1) / 2 * high + (1 - h) / 2 * low)) for h in (v, v_null)]
    return mean + temperature * stds[0] * draw, stds


def test_one_step_shows_temperature_noise_and_variance(head, golden, golden_draw):
    """In a whole unclipped chain these three would hide below the tolerance."""
    i, steps, temperature, scale = 50, 100, 0.9, 3.0
    sampler = head.sampler(Sampling(steps=steps, temperature=temperature))
    conditions = golden["condition"], golden["null_condition"]
    x, draw = golden["x_t"], golden_draw(0, (6, 4))
    y = sampler.time[i] + head.net.cond_embed(torch.cat(conditions))
    parts = sampler.modulations(torch.nn.functional.silu(y))
    guided = torch.tensor(scale)
    ours = sampler.step(i, x, parts.unflatten(-1, (-1, 32)), draw, guided).double()

    exact = DiffusionHead(4, 64, width=32, depth=2).double().requires_grad_(False)
    exact.load_state_dict(head.state_dict())
    half = [c.double() for c in conditions]
    x, draw = x.double(), draw.double()
    # The time features are fp32 by definition; everything else here is float64.
    right, (std, std_null) = plain_step(exact.net, i, steps, x, half, draw, scale, temperature)
    assert float((ours - right).abs().max()) < 3e-6
    wrong = {
        "temperature": right + 0.1 * std * draw,
        "no noise": right - temperature * std * draw,
        "the null half's variance": right + temperature * (std_null - std) * draw,
    }
    for mistake, value in wrong.items():
        assert float((value - right).abs().max()) > 5e-5, mistake


def test_steps_ahead_do_not_show(head, golden, golden_draw, monkeypatch):
    draws = torch.stack([golden_draw(k, (6, 4)) for k in range(11)])
    sampler = head.sampler(Sampling(steps=10, clip=3.0))
    whole = sampler(golden["condition"], draws)
    monkeypatch.setattr("detok_pipe.generators.head_sampler._ROWS_AHEAD_CPU", 18)
    torch.testing.assert_close(sampler(golden["condition"], draws), whole, rtol=0, atol=1e-5)


def test_loss_averages_independent_draws(head):
    """`loss` is the mean of `losses` at the noise that the names promise."""
    x_0, condition = torch.randn(3, 5, 4), torch.randn(3, 5, 64)
    noise = Noise(0, [7, 8, 9])
    t = noise.uniform("head/t", (4, 5)).mul(1000).long()
    eps = noise.normal("head/noise", (4, 5, 4))
    terms = []
    for b in range(3):
        for k in range(4):
            mse, vlb = head.losses(x_0[b], condition[b], t[b, k][None], eps[b, k][None])
            terms.append(mse + vlb)
    expected = torch.cat(terms).mean()
    torch.testing.assert_close(head.loss(x_0, condition, noise), expected, rtol=1e-5, atol=0)


def test_starts_at_zero():
    """A new head predicts no noise and the middle of the variance's range."""
    net = DiffusionHead(4, 16, width=32, depth=2).net
    assert not net(torch.randn(3, 4), torch.arange(3), torch.randn(3, 16)).any()


def test_bf16_weights(head, golden, golden_draw):
    low = DiffusionHead(4, 64, width=32, depth=2).bfloat16().requires_grad_(False)
    low.load_state_dict(head.state_dict())
    draws = torch.stack([golden_draw(k, (6, 4)) for k in range(6)])
    out = low.sampler(Sampling(steps=5, clip=3.0))(golden["condition"].bfloat16(), draws)
    exact = head.sampler(Sampling(steps=5, clip=3.0))(golden["condition"], draws)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_compiled_steps_are_the_same(head, golden, golden_draw, monkeypatch, backend):
    """To rounding; on another number of rows, and without guidance, too."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = copy.deepcopy(head)
    compiled.compile_sampler()
    condition = torch.cat((golden["condition"], golden["null_condition"]))
    draws = torch.stack([golden_draw(k, (6, 4)) for k in range(6)])
    how = Sampling(steps=5, clip=3.0, temperature=0.9)
    for rows, scale in ((6, 3.0), (4, 3.0), (6, 1.0)):
        picked = torch.cat((condition[:rows], condition[6 : 6 + rows]))
        picked = picked if scale != 1.0 else picked[:rows]
        expected = head.sampler(how)(picked, draws[:, :rows], scale)
        out = compiled.sampler(how)(picked, draws[:, :rows], scale)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
