"""The metric from pooled draws: a covariance where draws are many, a Fisher metric where they are few.

With draws x and gradients g = ∇log p(x) the Fisher metric is the positive definite solution of

    Σ cov(g) Σ = cov(x),       Σ = A^½ (A^-½ B⁻¹ A^-½)^½ A^½,   A = cov(x), B = cov(g),

the geometric mean of A and B⁻¹, which minimises a Fisher divergence between the whitened target and a standard normal.
On a normal target g = −Σ⁻¹(x − μ) exactly, so it is right with hardly more draws than dimensions, where a covariance
still errs by 2√(D/n) in spectral norm. Far from normal a covariance is what a sampler wants, and it is used once there are enough draws.
Everything is computed in units of the draws' own standard deviations.
"""

from __future__ import annotations

from typing import Callable

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.types import PyTree

# Correlated draws: about a fifth of them counts.
_DRAWS_PER_EFFECTIVE = 5
# With so many effective draws per dimension a covariance errs by less than a half in spectral norm.
_ENOUGH_PER_DIMENSION = 20
_MAX_GRADIENTS = 2048


def pooled_metric(density: Callable, params: PyTree, draws: PyTree, previous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The centre and the metric of pooled draws.

    Args:
        density: `(params, position) -> log density`.
        params: Its first argument.
        draws: Leaves `(C, n, ...)`.
        previous: The metric before, `(D, D)`, towards which little evidence is shrunk.

    Returns:
        Mean `(D,)` and metric `(D, D)`, symmetric and positive definite.
    """
    flat = np.asarray(jax.vmap(jax.vmap(lambda position: ravel_pytree(position)[0]))(draws), float)
    flat = flat.reshape(-1, flat.shape[-1])
    count, dimension = flat.shape
    center = flat.mean(axis=0)
    unit = np.maximum(flat.std(axis=0), 1e-6 * (1e-12 + np.abs(center)))
    effective = count / _DRAWS_PER_EFFECTIVE
    weight = effective / (effective + 5)
    old = previous / np.outer(unit, unit)
    covariance = weight * np.atleast_2d(np.cov(flat / unit, rowvar=False)) + (1 - weight) * old
    if effective < _ENOUGH_PER_DIMENSION * dimension:
        gradients = _gradients(density, params, draws, dimension)
        if gradients is not None:
            spread = np.atleast_2d(np.cov(gradients * unit, rowvar=False))
            precision = weight * spread + (1 - weight) * np.linalg.inv(old)
            covariance = geometric_mean(covariance, np.linalg.inv(precision))
    return center, covariance * np.outer(unit, unit)


def geometric_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`A # B = A^½ (A^-½ B A^-½)^½ A^½` of two symmetric positive definite matrices of shape `(D, D)`."""
    root = _power(a, 0.5)
    inverse_root = _power(a, -0.5)
    mean = root @ _power(inverse_root @ b @ inverse_root, 0.5) @ root
    return 0.5 * (mean + mean.T)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    return (vectors * np.maximum(values, 1e-12 * values.max()) ** exponent) @ vectors.T


def _gradients(density: Callable, params: PyTree, draws: PyTree, dimension: int) -> np.ndarray | None:
    """Gradients at up to 2,048 draws, shape `(n, D)`; None unless clearly more than D of them are finite."""
    pooled = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), draws)
    size = jax.tree.leaves(pooled)[0].shape[0]
    pick = np.linspace(0, size - 1, min(_MAX_GRADIENTS, size)).astype(int)
    states = jax.tree.map(lambda leaf: leaf[pick], pooled)
    found = jax.jit(jax.vmap(jax.grad(density, argnums=1), in_axes=(None, 0)))(params, states)
    flat = np.asarray(jax.vmap(lambda position: ravel_pytree(position)[0])(found), float)
    flat = flat[np.isfinite(flat).all(axis=1)]
    return flat if len(flat) > 2 * dimension + 10 else None
