"""Inception score (Salimans et al. 2016): how sure and how varied the predicted classes are."""

import numpy as np
import scipy.special

from detok_pipe.evaluation.frechet import check_finite
from detok_pipe.latents.errors import InputError


def inception_score(
    logits: np.ndarray, *, splits: int = 10, seed: int = 2020
) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))) over splits, as torch-fidelity computes it.

    The samples are shuffled with ``seed`` first, as there.

    Args:
        logits: (N, K).

    Returns:
        Mean and standard deviation (divisor ``splits``) of the splits' scores.

    Raises:
        InputError: fewer samples than splits.
        NonFiniteError: a logit is not finite.
    """
    count = len(logits)
    if count < splits:
        raise InputError(f"an inception score in {splits} splits needs as many samples: {count}")
    check_finite(logits)
    # The legacy generator, because this is the order in which torch-fidelity shuffles.
    order = np.random.RandomState(seed).permutation(count)
    scores = []
    for i in range(splits):
        rows = order[i * count // splits : (i + 1) * count // splits]
        p = scipy.special.softmax(logits[rows].astype(np.float64), axis=1)  # (n, K)
        scores.append(np.exp(scipy.special.rel_entr(p, p.mean(0)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
