"""Fréchet distance against scipy and torch-fidelity; standard errors against repeats."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from detok_pipe.evaluation.frechet import (
    FeatureMoments,
    FeatureStats,
    FrechetReference,
    feature_stats,
    paired_difference,
)
from detok_pipe.latents.errors import InputError, MismatchError, NonFiniteError


def _mixed(rng: np.random.Generator, rows: int, mixing: np.ndarray, mean: float) -> np.ndarray:
    return rng.standard_normal((rows, len(mixing))) @ mixing + mean


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = _mixed(rng, 300, rng.standard_normal((24, 24)), 0.3)
    return first, _mixed(rng, 500, rng.standard_normal((24, 24)), 0.0)


def _by_sqrtm(x: FeatureStats, y: FeatureStats) -> float:
    root = scipy.linalg.sqrtm(x.sigma @ y.sigma).real
    return float(((x.mu - y.mu) ** 2).sum() + np.trace(x.sigma + y.sigma - 2 * root))


def test_equals_scipy_and_torch_fidelity(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = pair
    ours = FrechetReference(feature_stats(y)).score(x).value
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(torch.from_numpy(x)),
        fid_features_to_statistics(torch.from_numpy(y)),
        verbose=False,
    )["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert ours == pytest.approx(_by_sqrtm(feature_stats(x), feature_stats(y)), rel=1e-9)


def test_distance_to_itself_is_zero_and_symmetric(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = map(feature_stats, pair)
    scale = np.trace(x.sigma)
    assert abs(FrechetReference(x).distance(x)) < 1e-9 * scale
    assert FrechetReference(x).distance(y) == pytest.approx(FrechetReference(y).distance(x))


def test_moments_do_not_depend_on_the_batches(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, _ = pair
    x = x + 1000.0  # a large mean, where sums of squares would lose digits
    first, second = FeatureMoments(), FeatureMoments()
    for rows in np.split(x[:200], [1, 30, 77]):
        first.update(rows)
    second.update(x[200:])
    first.merge(second)
    first.merge(FeatureMoments())
    stats = first.finish()
    assert stats.count == 300
    np.testing.assert_allclose(stats.mu, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.sigma, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_standard_errors_agree_with_repeated_sampling() -> None:
    rng = np.random.default_rng(1)
    dimensions, rows, repeats = 8, 600, 300
    real_mix = np.eye(dimensions) + 0.2 * rng.standard_normal((dimensions, dimensions))
    reference = FrechetReference(feature_stats(_mixed(rng, 20_000, real_mix, 0.0)))
    values, errors, differences, paired_errors = [], [], [], []
    for _ in range(repeats):
        noise = rng.exponential(size=(rows, dimensions)) - 1  # skewed: no Gaussian assumed
        one = reference.score(noise @ (1.3 * real_mix) + 0.4)
        two = reference.score(noise @ (1.2 * real_mix) + 0.35)
        difference, error = paired_difference(one, two)
        assert one.standard_error is not None
        assert error is not None
        values.append(one.value)
        errors.append(one.standard_error)
        differences.append(difference)
        paired_errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.12)
    assert np.mean(paired_errors) == pytest.approx(np.std(differences), rel=0.12)
    assert np.mean(paired_errors) < 0.5 * np.mean(errors)


def test_influence_is_the_derivative_of_the_distance(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    """Moving weight towards one sample changes the distance by its influence."""
    x, y = pair
    reference = FrechetReference(feature_stats(y))
    score = reference.score(x)
    assert score.influence is not None
    weight, mu = 1e-6, x.mean(0)
    population = np.cov(x, rowvar=False, bias=True)
    for i in (0, 17):
        moved_mu = (1 - weight) * mu + weight * x[i]
        second = (1 - weight) * (population + np.outer(mu, mu)) + weight * np.outer(x[i], x[i])
        moved = FeatureStats(moved_mu, second - np.outer(moved_mu, moved_mu), None)
        start = FeatureStats(mu, population, None)
        slope = (reference.distance(moved) - reference.distance(start)) / weight
        # phi uses the unbiased covariance, the slope the population's: N / (N - 1) apart.
        assert score.influence[i] == pytest.approx(slope, rel=0.02, abs=0.5)


def test_fewer_samples_than_dimensions_have_no_interval() -> None:
    rng = np.random.default_rng(2)
    reference = FrechetReference(feature_stats(rng.standard_normal((100, 32))))
    score = reference.score(rng.standard_normal((32, 32)))
    assert score.standard_error is None
    assert "32 samples are not more than the 32 feature dimensions" in score.note
    assert paired_difference(score, score) == (0.0, None)
    assert reference.score(rng.standard_normal((33, 32))).standard_error is not None


def test_singular_reference_has_finite_errors() -> None:
    rng = np.random.default_rng(3)
    reference = FrechetReference(feature_stats(rng.standard_normal((10, 16))))
    score = reference.score(rng.standard_normal((200, 16)))
    assert score.standard_error is not None
    assert 0 < score.standard_error < 1


def test_prediction_removes_most_of_the_difference_in_bias() -> None:
    """A narrow model is less biased, so few samples favour it; the prediction does not."""
    rng = np.random.default_rng(5)
    spectrum = np.arange(1, 65) ** -0.8  # falls like that of real features
    reference = FrechetReference(FeatureStats(np.zeros(64), np.diag(spectrum), None))
    noise = rng.standard_normal((400, 64)) * np.sqrt(spectrum)
    few, many, predictions = [], [], []
    for features in (0.78 * noise, 1.1 * noise):
        score = reference.score(features[:100])
        few.append(score.value)
        many.append(reference.score(features).value)
        predictions.append(reference.predicted(features[:100], score, 400))
    assert few[0] < few[1]
    assert many[0] > many[1]
    np.testing.assert_allclose(predictions, many, rtol=0.1)
    assert predictions[0] > predictions[1]


def test_bad_input_is_named() -> None:
    features = np.ones((8, 4))
    features[5, 2] = np.nan
    with pytest.raises(NonFiniteError, match="the first is number 5"):
        feature_stats(features)
    with pytest.raises(InputError, match="at least 2 images"):
        feature_stats(np.ones((1, 4)))
    rng = np.random.default_rng(4)
    reference = FrechetReference(feature_stats(rng.standard_normal((50, 4))))
    with pytest.raises(MismatchError, match="5 dimensions, the reference has 4"):
        reference.score(rng.standard_normal((50, 5)))
    with pytest.raises(MismatchError, match=r"must be \(D,\) and \(D, D\)"):
        FrechetReference(FeatureStats(np.zeros(4), np.eye(5), None))
    with pytest.raises(NonFiniteError, match="the reference has NaN"):
        FrechetReference(FeatureStats(np.zeros(2), np.full((2, 2), np.nan), None))
    with pytest.raises(MismatchError, match="equal sample counts, got 50 and 60"):
        paired_difference(
            reference.score(rng.standard_normal((50, 4))),
            reference.score(rng.standard_normal((60, 4))),
        )
