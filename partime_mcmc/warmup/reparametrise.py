"""Coordinates learned from pooled draws: how far to recentre each site.

With draws y of all chains and gradients ∇log p_y of their density, a change of coordinates is judged by

    J = ½ (log det cov(y) + log det cov(∇log p_y(y))),

which no affine map changes, and which is 0 for a normal law and positive for every other: the Fisher divergence between the
best-whitened law and a standard normal, in the limit of small divergences (Seyboldt, Carlson & Carpenter 2025 minimise it
over affine maps). A diagonal version misleads where effects trade off. Draws and gradients are carried through a map by the
chain rule, so that learning evaluates the model's laws and never its likelihood:

    y = m⁻¹(x),     ∇log p_y(y) = m'(y)ᵀ ∇log p(x) + ∇ log |det m'(y)|.

The derivative of J with respect to draws and gradients is a few lines of linear algebra on the host; the compiler's part is to
carry draws through the map and derivatives back. Half of the draws fit the weights by L-BFGS-B (Byrd, Lu, Nocedal & Zhu 1995)
within [0, 1]; they are kept only if J falls on the other half as well.

J has several minima where effects trade off. The first fit descends from two starts, and later ones from the better of the two
minima that the fit before has found, as the new draws see them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import get_lapack_funcs
from scipy.optimize import minimize

from partime_mcmc.compile_cache import Timings, compiler_options, run_program
from partime_mcmc.kernels.coordinates import CoordinateMap
from partime_mcmc.kernels.metric_root import Root, dual, times, transposed_times
from partime_mcmc.types import PyTree
from partime_mcmc.warmup.hmc_batch import HMCBatchResult

# Draws that weights are fitted to, of so many chains at most, and as many that judge them.
_NUM_DRAWS, _MOST_CHAINS = 512, 32
# Where the second of the first fit's descents begins.
_OTHER_START = 0.5
_MAX_ITERATIONS = 15
# A descent ends where a step changes J by so little of it. (With 1e-5 an item response model of 144 coordinates lost a third of its
# effective draws: its valleys are flat. Below 1e-6 the rounding of J in float32 makes line searches fail, at twice the cost.)
_RELATIVE_CHANGE = 1e-6
# What J must fall by on draws that did not take part.
_LEAST_GAIN = 0.1
_TINY = 1e-30
_cholesky, _inverse = get_lapack_funcs(("potrf", "potri"), dtype=np.float64)
# With so many draws per dimension a covariance needs no shrinking.
_PLENTY = 4


class Learned(NamedTuple):
    """What a fit returns.

    Attributes:
        map: With the weights to go on with.
        before: J on the held-out draws with the weights there were.
        after: J there with the new ones.
        minima: The best two that are known, flat weights `(K,)` each, the better one first.
    """

    map: CoordinateMap
    before: float
    after: float
    minima: tuple[np.ndarray, ...]


def learn_map(
    found: CoordinateMap,
    draws: HMCBatchResult,
    root: Root,
    minima: tuple[np.ndarray, ...] = (),
) -> Learned:
    """Weights of a map that make the draws' law more normal.

    Args:
        found: The map in which the draws were made.
        draws: A window, with gradients.
        root: Of a metric for these draws: in its units correlations are small, and so is what shrinking them does.
        minima: Of the fit before; none at first.
    """
    # In float64, as is J then: where it is rounded to float32 line searches fail.
    inverse = dual(root)
    num_steps, num_chains, dimension = draws.positions.shape
    chains = min(num_chains, _MOST_CHAINS)
    steps = np.linspace(0, num_steps - 1, 2 * (_NUM_DRAWS // chains)).astype(int)
    shape = (-1, chains, dimension)
    fitted, held_out = (
        [
            leaf[steps[part::2], :chains].reshape(-1, dimension)
            for leaf in (draws.positions, draws.gradients)
        ]
        for part in (0, 1)
    )
    nothing = np.zeros_like(fitted[0])
    # On the host: every small operation on arrays of a device is a program of its own.
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, found.weights))
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def ravelled(weights: list) -> np.ndarray:
        return np.concatenate([np.ravel(leaf) for leaf in weights]).astype(float)

    def unravel(weights: np.ndarray) -> PyTree:
        parts = zip(np.split(weights, cuts), leaves)
        return jax.tree.unflatten(
            structure, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in parts]
        )

    def divergence(weights: np.ndarray, data: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
        y, g = _moved(found, unravel(weights), data[0], data[1], nothing, nothing)[:2]
        one, dy = half_log_det(transposed_times(inverse, y).reshape(shape))
        two, dg = half_log_det(transposed_times(root, g).reshape(shape))
        slopes = (
            times(inverse, dy.reshape(-1, dimension)),
            times(root, dg.reshape(-1, dimension)),
        )
        return one + two, [slope.astype(nothing.dtype) for slope in slopes]

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, slopes = divergence(weights, fitted)
        if not np.isfinite(value):
            return _FAR, np.zeros_like(weights)
        slope = _moved(found, unravel(weights), fitted[0], fitted[1], slopes[0], slopes[1])[-1]
        return value, ravelled(jax.tree.leaves(slope))

    def descend(begin: np.ndarray) -> Any:
        return minimize(
            objective,
            begin,
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, 1)] * len(begin),
            options={"maxiter": _MAX_ITERATIONS, "ftol": _RELATIVE_CHANGE},
        )

    start = ravelled(leaves)
    if minima:
        best = descend(min((start, *minima), key=lambda one: divergence(one, fitted)[0])).x
        # The other one is that of another valley.
        other = max(minima, key=lambda one: np.abs(one - best).max())
    else:
        ends = map(descend, (start, np.full_like(start, _OTHER_START)))
        best, other = (end.x for end in sorted(ends, key=lambda end: end.fun))
    before, after = (divergence(one, held_out)[0] for one in (start, best))
    better = after < before - _LEAST_GAIN
    learned = found.reweighted(jax.device_put(unravel(best))) if better else found
    return Learned(learned, before, after, (best, other))


def carry_over(old: CoordinateMap, new: CoordinateMap, draws: HMCBatchResult) -> HMCBatchResult:
    """Draws in the coordinates of one map as they are in those of the same map with other weights."""
    shape = draws.positions.shape
    y, g = (leaf.reshape(-1, shape[-1]) for leaf in (draws.positions, draws.gradients))
    chains = min(shape[1], _MOST_CHAINS)
    # As many at a time as a fit takes, so that one program does both; the last batch is filled up with the last draw.
    parts, size = [], _NUM_DRAWS // chains * chains
    for begin in range(0, len(y), size):
        rows = np.minimum(np.arange(begin, begin + size), len(y) - 1)
        nothing = np.zeros_like(y[rows])
        parts.append(_moved(old, new.weights, y[rows], g[rows], nothing, nothing)[:3])
    moved, slopes, change = (np.concatenate(part)[: len(y)] for part in zip(*parts))
    return draws._replace(
        positions=moved.reshape(shape),
        gradients=slopes.reshape(shape),
        logdensity=draws.logdensity + change.reshape(shape[:2]),
    )


def half_log_det(draws: np.ndarray, root: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """Half the log determinant of the covariance of draws within chains, and its derivative.

    With few draws n for D coordinates correlations are shrunk by s = D / (D + n) towards none: with C the covariance of deviations d
    and σ the standard deviations,

        R = s I + (1 − s) C / σσᵀ,     d(½ log det) / d(draws) = d M / n,
        M = (1 − s) R⁻¹ / σσᵀ + diag((1 − (1 − s) Σ_i (R⁻¹)_ij C_ij / σ_i σ_j) / σ_j²).

    Args:
        draws: Shape `(S, C, D)`; computed in their type, matrices of D × D in float64.
        root: A, `(D, D)`: draws times Aᵀ are judged, but the derivative is by the draws; None is the identity.

    Returns:
        The value, infinite where the covariance is singular, and the derivative with respect to the draws, `(S, C, D)`.
    """
    dimension = draws.shape[-1]
    deviations = (draws - draws.mean(axis=0)).reshape(-1, dimension)
    if root is not None:
        deviations = deviations @ root.T
    num_draws = len(deviations)
    shrink = 1e-10 if num_draws >= _PLENTY * dimension else dimension / (dimension + num_draws)
    solved = (_solved_tall if num_draws >= dimension else _solved_wide)(deviations, shrink)
    if solved is None:
        return np.inf, np.zeros_like(draws)
    value, *factors = solved
    if root is not None:
        factors.append(root.astype(draws.dtype))
    # From the right: products of D × D matrices come first.
    slopes = functools.reduce(lambda right, left: left @ right, reversed(factors))
    return value, slopes.reshape(draws.shape)


def _solved_tall(deviations: np.ndarray, shrink: float):
    """The value, and two matrices whose product is the derivative; None where the covariance is singular."""
    count = len(deviations)
    covariance = (deviations.T @ deviations).astype(float) / count
    variances = np.diag(covariance) + _TINY
    scale = np.sqrt(variances)
    correlation = covariance / np.outer(scale, scale)
    found = _inverse_and_log_det(shrink * np.eye(len(scale)) + (1 - shrink) * correlation)
    if found is None:
        return None
    inverse, log_det = found
    matrix = (1 - shrink) * inverse / np.outer(scale, scale)
    own = (1 - (1 - shrink) * (inverse * correlation).sum(axis=0)) / variances
    matrix[np.diag_indices(len(own))] += own
    value = 0.5 * (np.log(variances).sum() + log_det)
    return value, deviations, (matrix / count).astype(deviations.dtype)


def _solved_wide(deviations: np.ndarray, shrink: float):
    """The value and the derivative, of fewer draws than coordinates: u R⁻¹ = (s I + a u uᵀ)⁻¹ u, whose matrix is the smaller one."""
    count, dimension = deviations.shape
    variances = np.mean(deviations**2, axis=0) + _TINY
    u = deviations / np.sqrt(variances)
    a = (1 - shrink) / count
    found = _inverse_and_log_det(shrink * np.eye(count) + a * (u @ u.T).astype(float))
    if found is None:
        return None
    inverse, log_det = found
    slope = a * (inverse.astype(u.dtype) @ u)
    slope = slope / np.sqrt(variances) + deviations / (count * variances) * (
        1 - (slope * u).sum(axis=0)
    )
    value = 0.5 * (np.log(variances).sum() + log_det + (dimension - count) * np.log(shrink))
    return value, slope


def _inverse_and_log_det(matrix: np.ndarray) -> tuple[np.ndarray, float] | None:
    """None where the matrix is not positive definite."""
    factor, failed = _cholesky(matrix, lower=1)
    if failed:
        return None
    # From the factor in a fourth of the time of `numpy.linalg.inv`; the upper triangle is that of the factor's array.
    inverse = np.tril(_inverse(factor, lower=1)[0])
    inverse += np.tril(inverse, -1).T
    return inverse, 2 * np.log(np.diag(factor)).sum()


# What stands for J where it is not finite.
_FAR = 1e10


# What moving one of the draws' numbers takes in all of a warm-up, some 240 times, in programs that were not optimised.
_SECONDS_PER_NUMBER = 1.6e-5


def _moved(found, weights, y, g, slope_y, slope_g) -> tuple:
    """y, g and log densities' changes with other weights, and the derivative of ⟨slopes, (y, g)⟩ by the weights."""
    moved = run_program(
        *(_move, found, weights, y, g, slope_y, slope_g),
        timings=Timings(),
        options=compiler_options(_SECONDS_PER_NUMBER * np.size(y)),
    )
    return jax.tree.map(np.asarray, moved)


def _move(found, weights: PyTree, y, g, slope_y, slope_g):
    def moved(weights):
        new = found.reweighted(weights)

        def one(y, g):
            x, g, there = _to_positions(found, y, g)
            y, g, back = _from_positions(new, x, g)
            return y, g, back - there

        return jax.vmap(one)(y, g)

    (y, g, change), pull = jax.vjp(moved, weights)
    return y, g, change, pull((slope_y, slope_g, jnp.zeros_like(change)))[0]


def _to_positions(found, y, g):
    """x, the gradient there, and log |det dx/dy|."""
    x, change = found.leave(y)

    def density(x):
        y = found.enter(x)
        return jnp.sum(g * y) - found.leave(y)[1]

    return x, jax.grad(density)(x), change


def _from_positions(found, x, g):
    """y, the gradient there, and log |det dx/dy|."""
    y = found.enter(x)

    def density(y):
        x, change = found.leave(y)
        return jnp.sum(g * x) + change, change

    gradient, change = jax.grad(density, has_aux=True)(y)
    return y, gradient, change
