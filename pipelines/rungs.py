"""The search over guidance scales: a grid is one rung, halving three, with fewer scales on each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detok_pipe.evaluation.frechet import paired_difference
from detok_pipe.pipelines.score import Scores

SURELY = 2.0
"""Paired standard errors by which a scale must be worse to be dropped."""

SHARES = (4, 2)
"""Ninths of the scales that may go on after each rung of `halving_counts`: the whole search then
takes under half of a grid's samples."""


def halving_counts(count: int) -> tuple[int, ...]:
    """Samples a scale on each rung of a halving search that ends with ``count``."""
    return count // 4, count // 2, count


def search(
    scales: Sequence[float],
    counts: Sequence[int],
    score_at: Callable[[float, int], Scores],
) -> tuple[list[dict[str, Any]], float]:
    """Find the best of ``scales``.

    Args:
        counts: samples a scale on each rung: one rung is a grid; for halving `halving_counts`.
        score_at: the scores of a scale's first so many samples. All scales share noise and
            labels, and a rung's samples are the first of the next one's.

    Returns:
        The rungs as ``sweep.json`` has them, and the best scale.
    """
    alive = sorted(scales)
    rungs: list[dict[str, Any]] = []
    for number, count in enumerate(counts):
        scores = {scale: score_at(scale, count) for scale in alive}
        best = best_scale(scores)
        if count == counts[-1]:
            kept = alive
        else:
            kept = keep(scores, at_most=len(scales) * SHARES[number] // 9)
        points = [point_of(scale, scores, best, scale in kept) for scale in alive]
        rungs.append({"count": count, "points": points})
        alive = kept
    return rungs, best


def best_scale(scores: Mapping[float, Scores]) -> float:
    """The scale of the lowest distance to expect at the last rung's count."""
    return min(scores, key=lambda scale: scores[scale].expected)


def keep(scores: Mapping[float, Scores], *, at_most: int) -> list[float]:
    """The scales that go on to the next rung.

    Those that are not surely worse than the best, by the paired error, and of these the
    ``at_most`` (at least one) best, in ascending order.
    """
    ranked = sorted(scores, key=lambda scale: scores[scale].expected)
    best = scores[ranked[0]]
    near = []
    for scale in ranked:
        _, error = paired_difference(scores[scale].frechet, best.frechet)
        if error is None or scores[scale].expected - best.expected <= SURELY * error:
            near.append(scale)
    return sorted(near[: max(1, at_most)])


def point_of(
    scale: float, scores: Mapping[float, Scores], best: float, kept: bool
) -> dict[str, Any]:
    """One scale in a rung, as ``sweep.json`` has it."""
    found = scores[scale]
    difference, error = paired_difference(found.frechet, scores[best].frechet)
    return {
        "scale": scale,
        "metrics": {name: dataclasses.asdict(value) for name, value in found.metrics.items()},
        "difference to best": {"value": difference, "error": error},
        "expected": found.expected,
        "kept": kept,
        "notes": found.notes,
    }


def samples_drawn(rungs: Sequence[Mapping[str, Any]]) -> int:
    """Samples of the whole search; each rung goes on with the samples of the one before."""
    drawn, before = 0, 0
    for rung in rungs:
        drawn += len(rung["points"]) * (rung["count"] - before)
        before = rung["count"]
    return drawn


def edge_warning(scales: Sequence[float], best: float) -> list[str]:
    """A sentence where the best scale is the first or the last of the grid."""
    low, high = min(scales), max(scales)
    if best not in (low, high):
        return []
    return [
        f"the best scale, {best:g}, is at the edge of the grid {low:g} ... {high:g}: a "
        f"{'lower' if best == low else 'higher'} one may be better; sweep again with --scales"
    ]
