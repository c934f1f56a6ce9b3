"""Wrappers that make any linearizer tamer: smaller and bounded linear parts.

    Damped(inner, d)    A_t ← (1 − d) A_t
    Clipped(inner, b)   A_t ← A_t with size at most b: entries of a diagonal clipped to ±b, a matrix scaled so that
                        its spectral norm is at most b (bounded by √(‖A‖₁ ‖A‖_∞), which costs no decomposition)

A product of T linear parts overflows when some exceed 1 for long enough, and then the update is worthless however good
each linearisation is. Bounding by 1 makes overflow impossible. The fixed point is the same: a linear part decides how
fast a solver converges, never to what.
"""

import functools

import jax
import jax.numpy as jnp

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.linearize.base import Linearizer
from partime_mcmc.scan.affine import AffineMap, Dense, Diagonal, Identity, Pairs, Zero
from partime_mcmc.types import Array, Key, PyTree, pytree


@pytree()
class Damped:
    """Linear parts of `inner` times `1 − damping`, `0 ≤ damping ≤ 1`."""

    inner: Linearizer
    damping: float = 0.1

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, AffineMap]:
        values, maps = self.inner(dynamics, previous, drives, key)
        keep = jnp.asarray(1.0 - self.damping, values.dtype)
        return values, jax.vmap(lambda step: scaled(step, keep))(maps)

    def jvps(self, dimension: int) -> int:
        return self.inner.jvps(dimension)

    def map_size(self, dimension: int) -> int:
        return self.inner.map_size(dimension)


@pytree()
class Clipped:
    """Linear parts of `inner` with size at most `bound`."""

    inner: Linearizer
    bound: float = 1.0

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, AffineMap]:
        values, maps = self.inner(dynamics, previous, drives, key)
        bound = jnp.asarray(self.bound, values.dtype)
        return values, jax.vmap(lambda step: bounded(step, bound))(maps)

    def jvps(self, dimension: int) -> int:
        return self.inner.jvps(dimension)

    def map_size(self, dimension: int) -> int:
        return self.inner.map_size(dimension)


@functools.singledispatch
def scaled(step: AffineMap, factor: Array) -> AffineMap:
    """One map with its linear part times `factor`; register a new class of maps here.

    Raises:
        TypeError: If this class of maps is not known.
    """
    raise TypeError(f"scaled: no rule for {type(step).__name__}; register one with scaled.register")


@scaled.register
def _(step: Dense, factor: Array) -> Dense:
    return Dense(factor * step.matrix, step.shift)


@scaled.register
def _(step: Diagonal, factor: Array) -> Diagonal:
    return Diagonal(factor * step.diagonal, step.shift)


@scaled.register
def _(step: Pairs, factor: Array) -> Pairs:
    return Pairs(factor * step.blocks, step.shift)


@scaled.register
def _(step: Identity, factor: Array) -> Diagonal:
    return Diagonal(jnp.broadcast_to(factor, step.shift.shape), step.shift)


@functools.singledispatch
def bounded(step: AffineMap, bound: Array) -> AffineMap:
    """One map with a linear part of size at most `bound`; register a new class of maps here.

    Raises:
        TypeError: If this class of maps is not known.
    """
    raise TypeError(
        f"bounded: no rule for {type(step).__name__}; register one with bounded.register"
    )


@bounded.register
def _(step: Dense, bound: Array) -> Dense:
    size = jnp.abs(step.matrix)
    norm = jnp.sqrt(size.sum(axis=0).max() * size.sum(axis=1).max())
    return Dense(step.matrix * jnp.minimum(1.0, bound / jnp.where(norm > 0, norm, 1.0)), step.shift)


@bounded.register
def _(step: Diagonal, bound: Array) -> Diagonal:
    return Diagonal(jnp.clip(step.diagonal, -bound, bound), step.shift)


@bounded.register
def _(step: Pairs, bound: Array) -> Pairs:
    # Per pair, by the same bound on the spectral norm as for dense maps.
    size = jnp.abs(step.blocks)
    norm = jnp.sqrt(size.sum(axis=0).max(axis=0) * size.sum(axis=1).max(axis=0))
    return Pairs(step.blocks * jnp.minimum(1.0, bound / jnp.where(norm > 0, norm, 1.0)), step.shift)


@bounded.register
def _(step: Identity, bound: Array) -> Diagonal:
    return Diagonal(
        jnp.broadcast_to(jnp.minimum(1.0, bound), step.shift.shape).astype(step.shift.dtype),
        step.shift,
    )


@scaled.register
@bounded.register
def _(step: Zero, size: Array) -> Zero:
    return step
