"""Kernel distance (KID on Inception features): unbiased at any number of samples.

Binkowski et al. 2018: the squared maximum mean discrepancy with the kernel
k(x, y) = (x.y / D + 1)^3, diagonal terms left out. Slightly negative values are possible and
mean that the two sets cannot be told apart.
"""

import math
from dataclasses import dataclass

import numpy as np

from detok_pipe.evaluation.frechet import check_finite
from detok_pipe.latents.errors import InputError, MismatchError

_ROWS = 512


@dataclass(frozen=True)
class KernelScore:
    """Kernel distance and its spread.

    Attributes:
        value: the estimate.
        standard_error: of the estimate for `kernel_distance`; for `subset_kernel_distance` the
            standard deviation over subsets, as torch-fidelity reports it.
    """

    value: float
    standard_error: float


def kernel_distance(generated: np.ndarray, reference: np.ndarray) -> KernelScore:
    """Unbiased estimate from all pairs of generated (N, D) and reference (M, D) features.

    The standard error is that of the generated samples, to first order (the reference counts as
    fixed): sd of 2 (mean_j k(x_i, x_j) - mean_j k(x_i, y_j)), over sqrt(N). It is too small where
    the two distributions nearly agree.

    Raises:
        MismatchError, InputError, NonFiniteError: see `_checked`.
    """
    generated, reference = _checked(generated, reference, least=2)
    within = _row_means(generated, generated, without_diagonal=True)  # (N,)
    across = _row_means(generated, reference)  # (N,)
    among = _row_means(reference, reference, without_diagonal=True)  # (M,)
    value = within.mean() + among.mean() - 2 * across.mean()
    spread = (2 * (within - across)).std(ddof=1) / math.sqrt(len(generated))
    return KernelScore(float(value), float(spread))


def subset_kernel_distance(
    generated: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelScore:
    """KID as usually reported: mean and spread over random subsets, drawn as torch-fidelity does.

    Raises:
        InputError: fewer samples than `subset_size`.
        MismatchError, NonFiniteError: see `_checked`.
    """
    generated, reference = _checked(generated, reference, least=subset_size)
    # The legacy generator, because these are the subsets that torch-fidelity draws.
    random = np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        x = generated[random.choice(len(generated), subset_size, replace=False)]
        y = reference[random.choice(len(reference), subset_size, replace=False)]
        values[i] = (
            _row_means(x, x, without_diagonal=True).mean()
            + _row_means(y, y, without_diagonal=True).mean()
            - 2 * _row_means(x, y).mean()
        )
    return KernelScore(float(values.mean()), float(values.std()))


def _checked(
    generated: np.ndarray, reference: np.ndarray, *, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both as fp64.

    Raises:
        MismatchError: different dimensions.
        InputError: fewer than ``least`` rows.
        NonFiniteError: a feature is not finite.
    """
    if generated.shape[1] != reference.shape[1]:
        raise MismatchError(
            f"generated features have {generated.shape[1]} dimensions, reference features "
            f"{reference.shape[1]}: they come from different networks"
        )
    for name, rows in (("generated", generated), ("reference", reference)):
        if len(rows) < least:
            raise InputError(
                f"the kernel distance needs at least {least} {name} samples, got {len(rows)}"
            )
        check_finite(rows)
    return generated.astype(np.float64), reference.astype(np.float64)


def _row_means(x: np.ndarray, y: np.ndarray, *, without_diagonal: bool = False) -> np.ndarray:
    """Mean over j of k(x_i, y_j), (N,), in blocks of rows; without j = i where x is y."""
    dimensions = x.shape[1]
    sums = np.concatenate(
        [
            ((x[start : start + _ROWS] @ y.T / dimensions + 1) ** 3).sum(1)
            for start in range(0, len(x), _ROWS)
        ]
    )
    if without_diagonal:
        diagonal = ((x * x).sum(1) / dimensions + 1) ** 3
        return (sums - diagonal) / (len(y) - 1)
    return sums / len(y)
