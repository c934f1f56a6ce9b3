"""The metric from pooled draws: a Fisher metric where draws are few, a covariance where they are many.

With draws x and gradients g = ∇log p(x) the Fisher metric is the positive definite solution of

    Σ cov(g) Σ = cov(x),       Σ = A^½ (A^-½ B⁻¹ A^-½)^½ A^½,   A = cov(x), B = cov(g),

the geometric mean of A and B⁻¹, which minimises a Fisher divergence between the whitened target and a standard normal
(Seyboldt, Carlson & Carpenter 2025, "Preconditioning Hamiltonian Monte Carlo by minimizing Fisher divergence").
On a normal target g = −Σ⁻¹(x − μ) exactly, so it is right with hardly more draws than dimensions, where a covariance
still errs by 2√(D/n) in spectral norm. Far from normal a covariance is what a sampler wants, and it is used once there
are enough draws. Everything is computed in units of each coordinate. A diagonal metric is the same rule coordinate by
coordinate; a low-rank one adds those directions in which draws or gradients differ clearly from the diagonal.
"""

from typing import Protocol, Sequence, TypeAlias

import numpy as np

from partime_mcmc.kernels.metric_root import LowRank, Root, metric_of

# A covariance `(D, D)`, variances `(D,)`, or the low-rank root of a covariance, which stands for it.
Metric: TypeAlias = np.ndarray | LowRank

# Correlated draws: about a fifth of them counts; so many more stand for what was believed before.
_DRAWS_PER_EFFECTIVE = 5
_PRIOR_DRAWS = 5
# With so many effective draws per dimension a covariance errs by less than a half in spectral norm.
_ENOUGH_PER_DIMENSION = 10
# A direction joins a low-rank metric if its variance is off by this factor.
_WORTH_A_DIRECTION = 1.5
_SUBSPACE_STEPS = 3


class MetricRule(Protocol):
    """How a metric is estimated."""

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: Metric) -> Metric:
        """From few draws and their gradients, `(n, C, D)` each."""
        ...

    def covariance(self, x: np.ndarray, g: np.ndarray, previous: Metric) -> Metric:
        """From a long window, `(n, C, D)`."""
        ...


class DenseMetric:
    """All correlations."""

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: Metric) -> np.ndarray:
        x, g = _deviations(x), _deviations(g)
        unit = _units(x, g, previous)
        old, weight = _as_matrix(previous) / np.outer(unit, unit), _weight(len(x))
        spread = weight * _second_moment(x / unit) + (1 - weight) * old
        slope = weight * _second_moment(g * unit) + (1 - weight) * np.linalg.inv(old)
        return geometric_mean(spread, np.linalg.inv(slope)) * np.outer(unit, unit)

    def covariance(self, x: np.ndarray, g: np.ndarray, previous: Metric) -> np.ndarray:
        if x.shape[0] * x.shape[1] / _DRAWS_PER_EFFECTIVE < _ENOUGH_PER_DIMENSION * x.shape[-1]:
            return self.fisher(x, g, previous)
        flat = x.reshape(-1, x.shape[-1])
        unit, weight = np.sqrt(np.diag(_as_matrix(previous))), _weight(len(flat))
        found = weight * np.atleast_2d(np.cov(flat / unit, rowvar=False)) * np.outer(unit, unit)
        return found + (1 - weight) * _as_matrix(previous)


class BlockMetric(DenseMetric):
    """Correlations within blocks of coordinates, variances elsewhere.

    Args:
        blocks: The coordinates of each block.
    """

    def __init__(self, blocks: Sequence[np.ndarray]):
        self.blocks = blocks

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: Metric) -> np.ndarray:
        return self._by_block(DenseMetric().fisher, DiagonalMetric().fisher, x, g, previous)

    def covariance(self, x: np.ndarray, g: np.ndarray, previous: Metric) -> np.ndarray:
        return self._by_block(DenseMetric().covariance, DiagonalMetric().covariance, x, g, previous)

    def _by_block(self, dense, diagonal, x, g, previous) -> np.ndarray:
        previous = _as_matrix(previous)
        found = np.diag(diagonal(x, g, previous))
        for block in self.blocks:
            within = np.ix_(block, block)
            found[within] = dense(x[..., block], g[..., block], previous[within])
        return found


class DiagonalMetric:
    """Variances only."""

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: Metric) -> np.ndarray:
        x, g = _deviations(x), _deviations(g)
        old, weight = _as_variances(previous), _weight(len(x))
        spread = weight * np.mean(x**2, axis=0) + (1 - weight) * old
        return np.sqrt(spread / (weight * np.mean(g**2, axis=0) + (1 - weight) / old))

    def covariance(self, x: np.ndarray, g: np.ndarray, previous: Metric) -> np.ndarray:
        weight = _weight(x.shape[0] * x.shape[1])
        return weight * x.reshape(-1, x.shape[-1]).var(axis=0) + (1 - weight) * _as_variances(
            previous
        )


class LowRankMetric:
    """Variances, and the directions in which draws or gradients show that variances do not suffice.

    With n draws only the space that draws and gradients span can be known; the Fisher metric is computed in the leading
    directions of both, in units of the diagonal one, and every other direction keeps variance 1.

    Args:
        rank: Directions at most: K, what every leapfrog step pays for with O(D K).
        num_searched: Leading directions of the draws, and of the gradients, among which they are looked for.
    """

    def __init__(self, rank: int = 32, num_searched: int = 64):
        self.rank, self.num_searched = rank, num_searched

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: Metric) -> LowRank:
        unit = np.sqrt(DiagonalMetric().fisher(x, g, previous))
        x, g = _deviations(x) / unit, _deviations(g) * unit
        leading = [_leading_directions(part, self.num_searched) for part in (x, g)]
        basis = np.linalg.qr(np.concatenate(leading, axis=1))[0]
        eye, weight = np.eye(basis.shape[1]), _weight(len(x))
        spread = weight * _second_moment(x @ basis) + (1 - weight) * eye
        slope = weight * _second_moment(g @ basis) + (1 - weight) * eye
        values, vectors = np.linalg.eigh(geometric_mean(spread, np.linalg.inv(slope)))
        size = np.abs(np.log(values))
        kept = [i for i in np.argsort(-size)[: self.rank] if size[i] > np.log(_WORTH_A_DIRECTION)]
        found = no_directions(unit, self.rank)
        found.directions[:, : len(kept)] = basis @ vectors[:, kept]
        found.factors[: len(kept)] = np.sqrt(values[kept])
        return found

    covariance = fisher


class FrozenMetric:
    """The metric that was given."""

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: Metric) -> Metric:
        return previous

    covariance = fisher


def metric_for(dimension: int) -> MetricRule:
    """Dense up to some hundred dimensions, low-rank beyond, variances where even some directions would be too much to carry."""
    if dimension <= 300:
        return DenseMetric()
    return LowRankMetric() if dimension <= 100_000 else DiagonalMetric()


def unit_metric(rule: MetricRule, dimension: int) -> Metric:
    """The identity, in the form in which a rule returns a metric."""
    if isinstance(rule, LowRankMetric):
        return no_directions(np.ones(dimension), rule.rank)
    return np.eye(dimension) if isinstance(rule, DenseMetric) else np.ones(dimension)


def no_directions(sigma: np.ndarray, rank: int) -> LowRank:
    """Standard deviations `(D,)` alone, with room for so many directions."""
    rank = min(rank, len(sigma))
    return LowRank(sigma, np.zeros((len(sigma), rank)), np.ones(rank))


def diagonal_like(metric: Metric, variances: np.ndarray) -> Metric:
    """A metric of variances alone, in the form of another one."""
    if isinstance(metric, LowRank):
        return no_directions(np.sqrt(variances), len(metric.factors))
    return variances if metric.ndim == 1 else np.diag(variances)


def root_of(metric: Metric) -> Root:
    """R with R Rᵀ the metric."""
    if isinstance(metric, LowRank):
        return metric
    return np.sqrt(metric) if metric.ndim == 1 else np.linalg.cholesky(metric)


def geometric_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`A # B = A^½ (A^-½ B A^-½)^½ A^½` of two symmetric positive definite matrices of shape `(D, D)`."""
    root, inverse_root = _power(a, 0.5), _power(a, -0.5)
    mean = root @ _power(inverse_root @ b @ inverse_root, 0.5) @ root
    return 0.5 * (mean + mean.T)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    return (vectors * np.maximum(values, 1e-12 * values.max()) ** exponent) @ vectors.T


def _deviations(draws: np.ndarray) -> np.ndarray:
    """From each chain's own mean, `(n, C, D)` → `(n C, D)` in float64: chains that have not met say nothing of a width."""
    draws = np.asarray(draws, float)
    return (draws - draws.mean(axis=0)).reshape(-1, draws.shape[-1])


def _second_moment(deviations: np.ndarray) -> np.ndarray:
    return deviations.T @ deviations / len(deviations)


def _leading_directions(rows: np.ndarray, count: int) -> np.ndarray:
    """The leading right singular vectors of a matrix `(n, D)`, as columns, by subspace iteration.

    Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1; they need be right only so far as a metric is.
    """
    count = min(count, *rows.shape)
    guess = np.random.default_rng(0).normal(size=(rows.shape[1], min(count + 8, *rows.shape)))
    for _ in range(_SUBSPACE_STEPS):
        guess = np.linalg.qr(rows.T @ (rows @ guess))[0]
    return guess @ np.linalg.svd(rows @ guess, full_matrices=False)[2][:count].T


def _units(x: np.ndarray, g: np.ndarray, previous: Metric) -> np.ndarray:
    """Units in which draws and gradients are equally wide, the diagonal Fisher metric; the old ones where nothing moved."""
    wide, steep = x.std(axis=0), g.std(axis=0)
    moved = (wide > 0) & (steep > 0) & np.isfinite(wide) & np.isfinite(steep)
    return np.where(
        moved, np.sqrt(wide / np.where(moved, steep, 1)), np.sqrt(np.diag(_as_matrix(previous)))
    )


def _weight(num_draws: int) -> float:
    effective = num_draws / _DRAWS_PER_EFFECTIVE
    return effective / (effective + _PRIOR_DRAWS)


def _as_matrix(metric: Metric) -> np.ndarray:
    if isinstance(metric, LowRank):
        return np.asarray(metric_of(metric))
    return np.diag(metric) if metric.ndim == 1 else metric


def _as_variances(metric: Metric) -> np.ndarray:
    if isinstance(metric, LowRank):
        return metric.sigma**2 * (1 + metric.directions**2 @ (np.asarray(metric.factors) ** 2 - 1))
    return metric if metric.ndim == 1 else np.diag(metric)
