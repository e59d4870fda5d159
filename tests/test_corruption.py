"""Masks and latent noise: laws and invariants."""

import math

import numpy as np
import pytest
import torch

from detok_pipe.latents.errors import ConfigError
from detok_pipe.tokenizer.corruption import (
    add_noise,
    choose_visible,
    draw_mask_ratio,
    gather_tokens,
    visible_tokens,
)


def test_random_mask_ratio_law() -> None:
    uniform = (np.arange(8000) + 0.5) / 8000
    ratios = np.array([draw_mask_ratio(u, 0.7) for u in uniform])
    # U(-0.1, 0.7): one draw in eight is negative and masks nothing; the rest is uniform.
    assert (ratios == 0).mean() == pytest.approx(1 / 8)
    assert ratios.max() < 0.7
    assert ratios[ratios > 0].mean() == pytest.approx(0.35, abs=1e-3)
    assert ratios[ratios > 0].var() == pytest.approx(0.7**2 / 12, rel=1e-2)


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.125, 0.5, math.nextafter(1, 0)])
def test_no_mask_and_constant_mask(uniform: float) -> None:
    assert draw_mask_ratio(uniform, 0.0) == 0.0
    assert draw_mask_ratio(uniform, 0.7, "constant") == 0.7


def test_visible_tokens_is_the_exact_ceiling() -> None:
    for tokens in range(1, 1025):
        exact = [-(tokens * (percent - 100) // 100) for percent in range(100)]
        assert [visible_tokens(tokens, percent / 100) for percent in range(100)] == exact


def test_choice_keeps_the_lowest_scores_and_can_be_undone() -> None:
    scores = torch.rand(3, 16)
    keep, restore = choose_visible(scores, 5)
    lowest, _ = scores.sort(dim=1)
    assert torch.equal(scores.gather(1, keep), lowest[:, :5])
    x = torch.randn(3, 16, 2)
    hidden = scores.argsort(1)[:, 5:]
    shuffled = torch.cat([gather_tokens(x, keep), gather_tokens(x, hidden)], dim=1)
    assert torch.equal(gather_tokens(shuffled, restore), x)


@pytest.mark.parametrize("kind", ["interpolative", "additive"])
def test_noise_moments(kind: str) -> None:
    z = torch.full((2, 64, 64), 2.0)
    eps = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = add_noise(z, eps, torch.tensor([0.25, 1.0]), 3.0, kind)
    means = {"interpolative": [1.5, 0.0], "additive": [2.0, 2.0]}[kind]
    torch.testing.assert_close(noisy.mean((1, 2)), torch.tensor(means), atol=0.15, rtol=0)
    torch.testing.assert_close(noisy.std((1, 2)), torch.tensor([0.75, 3.0]), atol=0, rtol=0.05)
    assert torch.equal(add_noise(z, eps, 0.0, 3.0, kind), z)


def test_unknown_values_are_named() -> None:
    z = torch.zeros(1, 1, 1)
    with pytest.raises(ConfigError, match=r"'gaussian'.*interpolative, additive"):
        add_noise(z, z, 0.5, 1.0, "gaussian")
    with pytest.raises(ConfigError, match=r"'often'.*random, constant"):
        draw_mask_ratio(0.5, 0.5, "often")
    with pytest.raises(ConfigError, match=r"\[0, 1\), and is 1.0"):
        draw_mask_ratio(0.5, 1.0)
