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

from typing import Protocol, Sequence

import numpy as np

# Correlated draws: about a fifth of them counts; so many more stand for what was believed before.
_DRAWS_PER_EFFECTIVE = 5
_PRIOR_DRAWS = 5
# With so many effective draws per dimension a covariance errs by less than a half in spectral norm.
_ENOUGH_PER_DIMENSION = 10
# A direction joins a low-rank metric if its variance is off by this factor.
_WORTH_A_DIRECTION = 1.5


class MetricRule(Protocol):
    """How a metric is estimated. A metric is a covariance `(D, D)`, or variances `(D,)`."""

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """From few draws and their gradients, `(n, C, D)` each."""
        ...

    def covariance(self, x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """From a long window, `(n, C, D)`."""
        ...


class DenseMetric:
    """All correlations."""

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
        x, g = _deviations(x), _deviations(g)
        unit = _units(x, g, previous)
        old, weight = _as_matrix(previous) / np.outer(unit, unit), _weight(len(x))
        spread = weight * _second_moment(x / unit) + (1 - weight) * old
        slope = weight * _second_moment(g * unit) + (1 - weight) * np.linalg.inv(old)
        return geometric_mean(spread, np.linalg.inv(slope)) * np.outer(unit, unit)

    def covariance(self, x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
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

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
        return self._by_block(DenseMetric().fisher, DiagonalMetric().fisher, x, g, previous)

    def covariance(self, x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
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

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
        x, g = _deviations(x), _deviations(g)
        old, weight = _as_variances(previous), _weight(len(x))
        spread = weight * np.mean(x**2, axis=0) + (1 - weight) * old
        return np.sqrt(spread / (weight * np.mean(g**2, axis=0) + (1 - weight) / old))

    def covariance(self, x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
        weight = _weight(x.shape[0] * x.shape[1])
        return weight * x.reshape(-1, x.shape[-1]).var(axis=0) + (1 - weight) * _as_variances(
            previous
        )


class LowRankMetric:
    """Variances, and the directions in which draws or gradients show that variances do not suffice.

    With n draws only the space that draws and gradients span can be known; the Fisher metric is computed there, in
    units of the diagonal one, and every other direction keeps variance 1.

    Args:
        max_rank: Directions at most.
    """

    def __init__(self, max_rank: int = 64):
        self.max_rank = max_rank

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
        variances = DiagonalMetric().fisher(
            x, g, np.diag(previous) if previous.ndim == 2 else previous
        )
        unit = np.sqrt(variances)
        x, g = _deviations(x) / unit, _deviations(g) * unit
        basis = np.concatenate(
            [np.linalg.svd(part, full_matrices=False)[2][: self.max_rank] for part in (x, g)]
        )
        basis = np.linalg.qr(basis.T)[0]
        eye, weight = np.eye(basis.shape[1]), _weight(len(x))
        spread = weight * _second_moment(x @ basis) + (1 - weight) * eye
        slope = weight * _second_moment(g @ basis) + (1 - weight) * eye
        values, vectors = np.linalg.eigh(geometric_mean(spread, np.linalg.inv(slope)))
        kept = np.abs(np.log(values)) > np.log(_WORTH_A_DIRECTION)
        if not kept.any():
            return variances
        directions = basis @ vectors[:, kept]
        metric = np.eye(len(unit)) + (directions * (values[kept] - 1)) @ directions.T
        return metric * np.outer(unit, unit)

    covariance = fisher


class FrozenMetric:
    """The metric that was given."""

    def fisher(self, x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
        return previous

    covariance = fisher


def metric_for(dimension: int) -> MetricRule:
    """Dense up to some hundred dimensions, low-rank beyond, variances where a matrix would be too large to carry."""
    if dimension <= 300:
        return DenseMetric()
    return LowRankMetric() if dimension <= 3000 else DiagonalMetric()


def unit_metric(rule: MetricRule, dimension: int) -> np.ndarray:
    """The identity, in the form in which a rule returns a metric: `(D, D)` if it is dense, else variances `(D,)`."""
    return np.eye(dimension) if isinstance(rule, DenseMetric) else np.ones(dimension)


def root_of(metric: np.ndarray) -> np.ndarray:
    """R with R Rᵀ the metric: lower triangular `(D, D)`, or standard deviations `(D,)`."""
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


def _units(x: np.ndarray, g: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Units in which draws and gradients are equally wide, the diagonal Fisher metric; the old ones where nothing moved."""
    wide, steep = x.std(axis=0), g.std(axis=0)
    moved = (wide > 0) & (steep > 0) & np.isfinite(wide) & np.isfinite(steep)
    return np.where(
        moved, np.sqrt(wide / np.where(moved, steep, 1)), np.sqrt(np.diag(_as_matrix(previous)))
    )


def _weight(num_draws: int) -> float:
    effective = num_draws / _DRAWS_PER_EFFECTIVE
    return effective / (effective + _PRIOR_DRAWS)


def _as_matrix(metric: np.ndarray) -> np.ndarray:
    return np.diag(metric) if metric.ndim == 1 else metric


def _as_variances(metric: np.ndarray) -> np.ndarray:
    return metric if metric.ndim == 1 else np.diag(metric)
