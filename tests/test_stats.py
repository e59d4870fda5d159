import json

import numpy as np
import pytest
import torch

from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.posterior import Posterior
from detok_pipe.latents.stats import LatentStats, StatsAccumulator


def latents(rows=37, seed=0):
    rng = np.random.default_rng(seed)
    offsets = np.array([0.0, 1000.0, -3.0])
    scales = np.array([1.0, 0.01, 50.0])
    return (rng.standard_normal((rows, 5, 3)) * scales + offsets).astype(np.float32)


def test_accumulated_in_any_pieces_equals_direct_float64():
    z = latents()
    direct = z.reshape(-1, 3).astype(np.float64)
    for cuts in ([], [1], [5, 6, 30]):
        total = StatsAccumulator(3)
        for part in np.split(z, cuts):
            one = StatsAccumulator(3)
            one.update(part)
            total.merge(StatsAccumulator.from_json(json.loads(json.dumps(one.to_json()))))
        assert total.rows == 37
        stats = total.finish(count=37, views=("image",))
        np.testing.assert_allclose(stats.mean, direct.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats.std, direct.std(0), rtol=1e-9)
        assert (stats.count, stats.source, stats.views) == (37, "dataset", ("image",))


def test_normalises_arrays_and_tensors_alike_and_back():
    z = latents()
    stats = LatentStats(z.mean((0, 1)), z.std((0, 1)))
    array = stats.normalize(z)
    tensor = stats.normalize(torch.from_numpy(z))
    assert array.dtype == np.float32
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(array, tensor.numpy())
    np.testing.assert_allclose(array.std((0, 1)), 1.0, rtol=1e-3)
    np.testing.assert_allclose(stats.denormalize(array), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(LatentStats.identity(3).normalize(z), z)


def test_json_keeps_every_bit():
    stats = LatentStats(np.array([0.1, 1 / 3]), np.array([1e-9, 7.0]), 5, "published", ("image",))
    back = LatentStats.from_json(json.loads(json.dumps(stats.to_json())))
    assert back == stats
    assert hash(back) == hash(stats)
    assert back.same_transform(LatentStats(stats.mean, stats.std))
    assert back != LatentStats(stats.mean, stats.std)


def test_constant_channel_is_only_shifted():
    total = StatsAccumulator(2)
    total.update(np.full((4, 1, 2), 3.0, np.float32))
    stats = total.finish(count=4)
    np.testing.assert_array_equal(stats.std, [1.0, 1.0])
    np.testing.assert_array_equal(stats.mean, [3.0, 3.0])


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.0], [0.0]), ([0.0], [-1.0]), ([0.0], [np.nan]), ([0.0, 0.0], [1.0]), ([], [])],
)
def test_bad_statistics_are_refused(mean, std):
    with pytest.raises(ConfigError):
        LatentStats(np.array(mean), np.array(std))


def test_wrong_channels_and_records_are_refused():
    with pytest.raises(ConfigError, match="5 channels, their statistics 3"):
        LatentStats.identity(3).normalize(np.zeros((2, 5), np.float32))
    for value in ({}, {"mean": [0.0]}, {"mean": "x", "std": [1.0]}, []):
        with pytest.raises(ConfigError):
            LatentStats.from_json(value)
    with pytest.raises(ConfigError, match="no latents"):
        StatsAccumulator(2).finish(count=0)


def test_posterior_matches_torch_distributions():
    moments = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    posterior = Posterior(moments)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    standard = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(normal, standard).sum((1, 2))
    torch.testing.assert_close(posterior.kl(), kl)
    eps = torch.ones(3, 4, 3)
    torch.testing.assert_close(posterior.sample(eps), posterior.mean + posterior.std)


def test_posterior_clamps_the_log_variance():
    posterior = Posterior(torch.tensor([[0.0, 0.0, -1e4, 1e4]]))
    assert posterior.logvar.tolist() == [[-30.0, 20.0]]
    assert torch.isfinite(posterior.kl()).all()


def test_exact_latents_are_a_posterior_without_spread():
    z = torch.randn(2, 5, 3)
    posterior = Posterior(z, exact=True)
    assert torch.equal(posterior.mean, z)
    assert not posterior.std.any()
    assert torch.equal(posterior.sample(torch.randn_like(z)), z)
