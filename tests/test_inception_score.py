"""The inception score against torch-fidelity and known values."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from detok_pipe.evaluation.inception_score import inception_score
from detok_pipe.latents.errors import InputError, NonFiniteError


def test_equals_torch_fidelity() -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((203, 17)).astype(np.float32)
    theirs = isc_features_to_metric(torch.from_numpy(logits))
    mean, std = inception_score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_known_values() -> None:
    certain = 200.0 * np.eye(5)[np.arange(500) % 5]
    assert inception_score(certain, splits=1)[0] == pytest.approx(5)
    assert inception_score(np.zeros((50, 5)))[0] == pytest.approx(1)
    # One class alone underflows to probability 0 in every other: still 1, not NaN.
    assert inception_score(1e4 * np.eye(5)[np.zeros(20, int)])[0] == pytest.approx(1)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="10 splits"):
        inception_score(np.zeros((9, 5)))
    with pytest.raises(NonFiniteError):
        inception_score(np.full((20, 5), np.nan))
