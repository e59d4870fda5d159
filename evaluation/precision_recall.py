"""Improved precision and recall (Kynkäänniemi et al. 2019) from k-nearest-neighbour balls.

Precision: share of generated samples inside a ball around a real sample (quality). Recall: share
of real samples inside a ball around a generated one (coverage). A ball's radius is the distance
to the k-th nearest other sample of the same set.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detok_pipe.evaluation.frechet import check_finite
from detok_pipe.latents.errors import InputError, MismatchError

_ROWS = 1024


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    generated: np.ndarray,
    real: np.ndarray,
    *,
    neighbours: int = 3,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """Precision and recall of generated (N, D) against real (M, D) features.

    Distances are fp32, a block of rows at a time on ``device``.

    Raises:
        MismatchError: different dimensions.
        InputError: not more samples than ``neighbours``.
        NonFiniteError: a feature is not finite.
    """
    if generated.shape[1] != real.shape[1]:
        raise MismatchError(
            f"generated features have {generated.shape[1]} dimensions, real features "
            f"{real.shape[1]}: they come from different networks"
        )
    for name, rows in (("generated", generated), ("real", real)):
        if len(rows) <= neighbours:
            raise InputError(
                f"precision and recall with {neighbours} neighbours need more {name} samples than "
                f"that, got {len(rows)}"
            )
        check_finite(rows)
    x = torch.as_tensor(generated, dtype=torch.float32, device=device)
    y = torch.as_tensor(real, dtype=torch.float32, device=device)
    return PrecisionRecall(_inside(x, y, neighbours), _inside(y, x, neighbours))


def _inside(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Share of ``points`` (N, D) inside at least one of the balls around ``centres`` (M, D)."""
    # A sample is its own nearest neighbour, so the k-th other one is number k + 1.
    radii = torch.cat(
        [
            torch.cdist(rows, centres).kthvalue(neighbours + 1, dim=1).values
            for rows in centres.split(_ROWS)
        ]
    )  # (M,)
    inside = torch.cat(
        [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(_ROWS)]
    )  # (N,)
    return int(inside.sum()) / len(inside)  # MPS has no fp64
