"""The kernel distance against torch-fidelity, a literal double sum, and repeated sampling."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from detok_pipe.evaluation.kernel_distance import kernel_distance, subset_kernel_distance
from detok_pipe.latents.errors import InputError, MismatchError, NonFiniteError


def test_subsets_equal_torch_fidelity() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((150, 12)), 1.2 * rng.standard_normal((130, 12)) + 0.1
    theirs = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=7, kid_subset_size=90, verbose=False
    )
    ours = subset_kernel_distance(x, y, subsets=7, subset_size=90)
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.standard_error == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_all_pairs_equal_the_double_sum() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((9, 3)), rng.standard_normal((7, 3)) + 0.5

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    among = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y).value == pytest.approx(within + among - 2 * across, rel=1e-12)


def test_unbiased_at_any_count_and_error_agrees_with_repeats() -> None:
    rng = np.random.default_rng(2)
    y = rng.standard_normal((500, 4))

    def repeats(count: int) -> tuple[list[float], list[float]]:
        scores = [
            kernel_distance(1.3 * rng.standard_normal((count, 4)) + 0.3, y) for _ in range(150)
        ]
        return [s.value for s in scores], [s.standard_error for s in scores]

    small, _ = repeats(25)
    large, errors = repeats(200)
    spread = np.std(small) / np.sqrt(150)
    assert np.mean(small) == pytest.approx(np.mean(large), abs=4 * spread)
    assert np.mean(errors) == pytest.approx(np.std(large), rel=0.2)


def test_bad_input_is_named() -> None:
    x = np.ones((10, 3))
    with pytest.raises(MismatchError, match="3 dimensions, reference features 4"):
        kernel_distance(x, np.ones((10, 4)))
    with pytest.raises(InputError, match="at least 1000 generated samples, got 10"):
        subset_kernel_distance(x, x)
    with pytest.raises(NonFiniteError):
        kernel_distance(np.full((10, 3), np.inf), x)
