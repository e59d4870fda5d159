"""Precision and recall against torch-fidelity and a case whose answer is known."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from detok_pipe.evaluation import precision_recall as module
from detok_pipe.evaluation.precision_recall import precision_recall
from detok_pipe.latents.errors import InputError, MismatchError


@pytest.mark.parametrize("rows", [16, 1024])
def test_equals_torch_fidelity(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    rng = np.random.default_rng(0)
    generated = (0.8 * rng.standard_normal((120, 6))).astype(np.float32)
    real = rng.standard_normal((90, 6)).astype(np.float32)
    ours = precision_recall(generated, real)
    theirs = prc_features_to_metric(
        torch.from_numpy(generated), torch.from_numpy(real), verbose=False
    )
    # Sorted, because releases of torch-fidelity disagree about which of the two is which.
    assert sorted(ours) == pytest.approx(sorted([theirs["precision"], theirs["recall"]]), rel=1e-6)
    assert ours.precision != ours.recall


def test_which_is_which() -> None:
    """All samples in one of two real clusters: every one is good, half of the real is covered."""
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((2, 200, 2)) * 0.1
    real = np.concatenate([left - 5, right + 5])
    generated = rng.standard_normal((200, 2)) * 0.05 + 5
    result = precision_recall(generated, real)
    assert result.precision > 0.95
    assert 0.3 < result.recall <= 0.5


def test_bad_input_is_named() -> None:
    with pytest.raises(MismatchError, match="2 dimensions, real features 3"):
        precision_recall(np.ones((9, 2)), np.ones((9, 3)))
    with pytest.raises(InputError, match="more generated samples than that, got 3"):
        precision_recall(np.ones((3, 2)), np.ones((9, 2)))
