"""Fréchet distance between Gaussians fitted to features, with its standard error.

Heusel et al. 2017: FID = |mu - mu_r|^2 + tr(S + S_r - 2 (S_r^1/2 S S_r^1/2)^1/2).

The reference's square root is computed once, and the trace of the cross term is the sum of
square roots of the eigenvalues of a symmetric matrix, so a distance costs one ``eigvalsh``.

The standard error comes from the delta method. The distance's derivative along one sample x is
its influence

    phi(x) = 2 d.(x - mu) + (x - mu)^T (I - T) (x - mu)  less its mean,
    d = mu - mu_r,   T = S_r^1/2 (S_r^1/2 S S_r^1/2)^-1/2 S_r^1/2,

and SE = sd(phi) / sqrt(N). (A percentile bootstrap is wrong here: resampling repeats rows, which
moves the distance itself.) The error is that of sampling at this N; the distance's upward bias,
about the same for two models at the same N, is not in it. Differences of two models that share
noise and labels use phi_1 - phi_2 and are several times sharper.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import scipy.linalg

from detok_pipe.latents.errors import InputError, MismatchError, NonFiniteError

_ROWS = 4096


@dataclass(frozen=True)
class FeatureStats:
    """Mean and covariance of features.

    Attributes:
        mu: (D,) fp64. sigma: (D, D) fp64, unbiased (divided by N - 1).
        count: N, or None where a file does not say.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None

    @property
    def dimensions(self) -> int:
        return len(self.mu)


class FeatureMoments:
    """Running mean and scatter of features, in fp64, by Chan's pairwise update."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    def update(self, features: np.ndarray) -> None:
        """Add features (B, D).

        Raises:
            NonFiniteError: a feature is NaN or infinite.
        """
        for start in range(0, len(features), _ROWS):
            rows = np.asarray(features[start : start + _ROWS], dtype=np.float64)
            check_finite(rows, first=self.count)
            mean = rows.mean(0)
            centred = rows - mean
            self._add(len(rows), mean, centred.T @ centred)

    def merge(self, other: "FeatureMoments") -> None:
        """Add what another process counted."""
        if other.count:
            self._add(other.count, other._mean, other._scatter)

    def arrays(self) -> dict[str, np.ndarray]:
        """What has been counted so far, to be saved."""
        return {"count": np.array(self.count), "mean": self._mean, "scatter": self._scatter}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "FeatureMoments":
        """What :meth:`arrays` gave."""
        moments = cls()
        moments.count = int(arrays["count"])
        moments._mean, moments._scatter = arrays["mean"], arrays["scatter"]
        return moments

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not self.count:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        total = self.count + count
        delta = mean - self._mean
        self._scatter = (
            self._scatter + scatter + np.outer(delta, delta) * (self.count * count / total)
        )
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def finish(self) -> FeatureStats:
        """Mean and unbiased covariance.

        Raises:
            InputError: fewer than two rows.
        """
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, got {self.count}")
        return FeatureStats(self._mean, self._scatter / (self.count - 1), self.count)


def feature_stats(features: np.ndarray) -> FeatureStats:
    """Mean and covariance of features (N, D)."""
    moments = FeatureMoments()
    moments.update(features)
    return moments.finish()


def check_finite(features: np.ndarray, *, first: int = 0) -> None:
    """Raise NonFiniteError, naming the first image, if a feature is NaN or infinite."""
    finite = np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise NonFiniteError(
            f"{len(bad)} image(s) have NaN or infinite features, the first is number "
            f"{first + int(bad[0])}; the latents or the decoder's output are broken there"
        )


@dataclass(frozen=True)
class FrechetScore:
    """A distance and what is known of its accuracy.

    Attributes:
        value: the distance, fp64.
        standard_error: of sampling, or None where N is at most D (the covariance is singular).
        count: N.
        influence: (N,) fp64, phi of each sample, or None like `standard_error`.
        note: what a reader must know ("").
    """

    value: float
    standard_error: float | None
    count: int
    influence: np.ndarray | None = field(default=None, repr=False)
    note: str = ""


class FrechetReference:
    """Reference statistics with their square root, to which many sets of features are compared."""

    def __init__(self, stats: FeatureStats) -> None:
        check_stats(stats, "the reference")
        self.stats = stats
        values, vectors = scipy.linalg.eigh(stats.sigma)
        # A covariance has no negative eigenvalues; rounding makes some of about -1e-16.
        self._root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    def distance(self, stats: FeatureStats) -> float:
        """Fréchet distance to other statistics.

        Raises:
            MismatchError: another number of dimensions.
        """
        return self._distance(stats, np.linalg.eigvalsh(self._cross(stats)))

    def score(self, features: np.ndarray, *, influence: bool = True) -> FrechetScore:
        """Distance of features (N, D), with standard error and influences where N > D.

        Raises:
            MismatchError: another number of dimensions.
            NonFiniteError: a feature is not finite.
            InputError: fewer than two rows.
        """
        stats = feature_stats(features)
        count, dimensions = features.shape
        if count <= dimensions or not influence:
            note = (
                f"{count} samples are not more than the {dimensions} feature dimensions: the value "
                "is strongly biased upwards, has no interval, and compares only at equal counts"
                if count <= dimensions
                else ""
            )
            return FrechetScore(self.distance(stats), None, count, None, note)
        values, vectors = scipy.linalg.eigh(self._cross(stats))
        phi = self._influence(features, stats, values, vectors)
        error = float(phi.std(ddof=1) / math.sqrt(count))
        return FrechetScore(self._distance(stats, values), error, count, phi)

    def predicted(self, features: np.ndarray, score: FrechetScore, count: int) -> float:
        """The distance to expect at ``count`` samples of the model that ``features`` come from.

        The distance is biased upwards by an amount that falls with N and depends on the model:
        at 2,500 samples of 2,048 dimensions a wrong guidance scale can lead. How steeply it falls
        shows in the mean distance of the two halves; how the fall goes on follows from N / D
        alone to a good approximation (see `bias_share`).

        Args:
            features: (N, D). score: theirs.
        """
        rows, dimensions = features.shape
        halves = [feature_stats(features[: rows // 2]), feature_stats(features[rows // 2 :])]
        slope = score.value - sum(self.distance(half) for half in halves) / 2
        here = bias_share(dimensions / rows)
        further = (here - bias_share(dimensions / count)) / (
            bias_share(2 * dimensions / rows) - here
        )
        return score.value + slope * further

    def _cross(self, stats: FeatureStats) -> np.ndarray:
        """S_r^1/2 S S_r^1/2, exactly symmetric."""
        if stats.dimensions != self.stats.dimensions:
            raise MismatchError(
                f"features have {stats.dimensions} dimensions, the reference has "
                f"{self.stats.dimensions}: it was computed with another feature network"
            )
        cross = self._root @ stats.sigma @ self._root
        return (cross + cross.T) / 2

    def _distance(self, stats: FeatureStats, eigenvalues: np.ndarray) -> float:
        difference = stats.mu - self.stats.mu
        trace = np.trace(stats.sigma) + np.trace(self.stats.sigma)
        return float(
            difference @ difference + trace - 2 * np.sqrt(np.clip(eigenvalues, 0, None)).sum()
        )

    def _influence(
        self, features: np.ndarray, stats: FeatureStats, values: np.ndarray, vectors: np.ndarray
    ) -> np.ndarray:
        # Where the reference itself is singular so is the cross term, in the same fixed
        # directions: the derivative has no part there, which is the pseudo-inverse.
        threshold = values[-1] * len(values) * np.finfo(np.float64).eps
        inverse_root = np.where(values > threshold, 1 / np.sqrt(np.maximum(values, threshold)), 0)
        half = self._root @ vectors  # (D, D)
        curvature = np.eye(len(values)) - (half * inverse_root) @ half.T  # I - T
        slope = 2 * (stats.mu - self.stats.mu)
        phi = np.empty(len(features))
        for start in range(0, len(features), _ROWS):
            rows = np.asarray(features[start : start + _ROWS], dtype=np.float64) - stats.mu
            phi[start : start + len(rows)] = rows @ slope + ((rows @ curvature) * rows).sum(1)
        return phi - phi.mean()


def bias_share(ratio: float) -> float:
    """Bias of the distance of N samples of D dimensions, over that of infinitely few.

    For white features it is 1 - E sqrt(x), x distributed by the law of Marchenko and Pastur with
    ``ratio`` = D / N: about ratio / 4 for many samples. Spectra that fall like those of image
    features give nearly the same share.
    """
    angle = (np.arange(4096) + 0.5) * (np.pi / 4096)
    eigenvalues = 1 + ratio + 2 * math.sqrt(ratio) * np.cos(angle)
    return float(1 - 2 * (np.sin(angle) ** 2 / np.sqrt(eigenvalues)).mean())


def paired_difference(first: FrechetScore, second: FrechetScore) -> tuple[float, float | None]:
    """``first`` - ``second`` of two models sampled with the same noise and labels, and its error.

    Returns:
        The difference of the values, and its standard error (None where either has none).

    Raises:
        MismatchError: different counts, so the samples are no pairs.
    """
    difference = first.value - second.value
    if first.count != second.count:
        raise MismatchError(
            f"a paired difference needs equal sample counts, got {first.count} and {second.count}"
        )
    if first.influence is None or second.influence is None:
        return difference, None
    spread = (first.influence - second.influence).std(ddof=1)
    return difference, float(spread / math.sqrt(first.count))


def check_stats(stats: FeatureStats, where: str) -> None:
    """Check shapes and values of statistics that came from elsewhere.

    Raises:
        MismatchError: mu and sigma do not fit each other.
        NonFiniteError: a value is not finite.
    """
    dimensions = stats.mu.shape[0] if stats.mu.ndim == 1 else -1
    if stats.sigma.shape != (dimensions, dimensions):
        raise MismatchError(
            f"{where}: mu has the shape {stats.mu.shape} and sigma {stats.sigma.shape}; they must "
            "be (D,) and (D, D)"
        )
    if not (np.isfinite(stats.mu).all() and np.isfinite(stats.sigma).all()):
        raise NonFiniteError(f"{where} has NaN or infinite values; compute it again")
