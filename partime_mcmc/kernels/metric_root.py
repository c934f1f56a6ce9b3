"""The root R of a metric Σ = R Rᵀ, in three forms.

    diagonal     σ, shape `(D,)`:              R = diag(σ)
    dense        lower triangular `(D, D)`
    low rank     `LowRank`, O(D K) numbers:    R = diag(σ) (I + U (diag(s) − I) Uᵀ)

A low-rank root has the factors s for the widths along K orthonormal directions U, in units of σ, and 1 for all others; it is what fits
where a matrix of D² numbers cannot be learned from the draws there are (Seyboldt, Carlson & Carpenter 2025 learn such metrics).

Functions take NumPy's or JAX's arrays, whichever the root is of, and vectors with any axes in front.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from partime_mcmc.types import pytree


@pytree()
class LowRank:
    """The root `diag(σ) (I + U (diag(s) − I) Uᵀ)`.

    Attributes:
        sigma: σ, shape `(D,)`, positive.
        directions: U, shape `(D, K)`: columns are orthonormal, or zero where fewer directions are used.
        factors: s, shape `(K,)`, positive; 1 where the column is zero.
    """

    sigma: Any
    directions: Any
    factors: Any

    @property
    def num_used(self) -> int:
        """How many directions have another width than σ says."""
        return int(np.sum(np.asarray(self.factors) != 1))


# Of whichever library the caller works with.
Root: TypeAlias = Any


def is_diagonal(root: Root) -> bool:
    """Whether a root is standard deviations alone."""
    return not isinstance(root, LowRank) and root.ndim == 1


def times(root: Root, z: Any) -> Any:
    """R z, shape `(..., D)`."""
    if isinstance(root, LowRank):
        return root.sigma * _scaled(root, z)
    return root * z if root.ndim == 1 else z @ root.T


def transposed_times(root: Root, x: Any) -> Any:
    """Rᵀ x, shape `(..., D)`."""
    if isinstance(root, LowRank):
        return _scaled(root, root.sigma * x)
    return root * x if root.ndim == 1 else x @ root


def dual(root: Root) -> Any:
    """R⁻ᵀ, a root of the inverse metric: R⁻¹ x is `transposed_times(dual(root), x)`. Dense ones become upper triangular."""
    if isinstance(root, LowRank):
        return LowRank(1 / root.sigma, root.directions, 1 / root.factors)
    if root.ndim == 1:
        return 1 / root
    return root.__array_namespace__().linalg.inv(root).T


def solve(root: Root, x: Any) -> Any:
    """R⁻¹ x for one vector `(D,)`; for many `dual` is worked out once."""
    if isinstance(root, LowRank) or is_diagonal(root):
        return transposed_times(dual(root), x)
    return root.__array_namespace__().linalg.solve(root, x)


def metric_of(root: Root) -> Any:
    """R Rᵀ: variances `(D,)`, or a matrix `(D, D)`."""
    if isinstance(root, LowRank):
        # Row i of the first is R eᵢ.
        columns = times(root, root.sigma.__array_namespace__().eye(len(root.sigma)))
        return columns.T @ columns
    return root**2 if root.ndim == 1 else root @ root.T


def largest_ratio(old: Root, new: Root) -> float:
    """The largest singular value of new⁻¹ old: how much longer a step of the old metric is in units of the new one."""
    if not isinstance(old, LowRank) and not isinstance(new, LowRank):
        if old.ndim == 1 and new.ndim == 1:
            return float((old / new).max())
        old, new = (np.diag(root) if root.ndim == 1 else root for root in (old, new))
        return float(np.linalg.norm(np.linalg.solve(new, old), 2))
    # By the power method: matrices would be too large.
    inverse = dual(new)
    vector = np.random.default_rng(0).normal(size=_dimension(old))
    length = 0.0
    for _ in range(_POWER_STEPS):
        moved = transposed_times(inverse, times(old, vector / np.linalg.norm(vector)))
        length = float(np.linalg.norm(moved))
        vector = transposed_times(old, times(inverse, moved))
    return length


_POWER_STEPS = 30


def _dimension(root: Root) -> int:
    return len(root.sigma if isinstance(root, LowRank) else root)


def _scaled(root: LowRank, z: Any) -> Any:
    return z + ((z @ root.directions) * (root.factors - 1)) @ root.directions.T
