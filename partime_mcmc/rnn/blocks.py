"""Linear parts of cells in closed form: a map with a 2×2 block per unit, and the linearizer that asks the cell.

A carry of two vectors (c, h) is the flat state (c_1..c_D, h_1..h_D); `Pairs` couples c_j with h_j and nothing else. Maps of
this kind compose to maps of this kind, for 8 D multiplications instead of 8 D³.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp

from partime_mcmc.engine.dynamics import Dynamics, ravel
from partime_mcmc.linearize.base import no_shift
from partime_mcmc.linearize.modify import bounded, scaled
from partime_mcmc.rnn.unroll import Packed
from partime_mcmc.scan.affine import AffineMap
from partime_mcmc.types import Array, Key, PyTree, pytree


@pytree()
class Pairs:
    """`(c, h) ↦ blocks (c, h) + shift`, `blocks` of shape `(2, 2, D)`, states flat, `(2 D,)`."""

    blocks: Array
    shift: Array

    def __call__(self, x: Array) -> Array:
        return self.linear(x) + self.shift

    def linear(self, x: Array) -> Array:
        c, h = jnp.split(x, 2)
        (cc, ch), (hc, hh) = self.blocks
        return jnp.concatenate([cc * c + ch * h, hc * c + hh * h])

    def after(self, earlier: Pairs) -> Pairs:
        return Pairs(jnp.einsum("ijd,jkd->ikd", self.blocks, earlier.blocks), self(earlier.shift))

    def with_shift(self, shift: Array) -> Pairs:
        return Pairs(self.blocks, shift)

    def transpose(self) -> Pairs:
        return Pairs(jnp.swapaxes(self.blocks, 0, 1), self.shift)


@scaled.register
def _(step: Pairs, factor: Array) -> Pairs:
    return Pairs(factor * step.blocks, step.shift)


@bounded.register
def _(step: Pairs, bound: Array) -> Pairs:
    # Per unit, by the bound √(‖A‖₁ ‖A‖_∞) on the spectral norm, as for dense maps.
    size = jnp.abs(step.blocks)
    norm = jnp.sqrt(size.sum(axis=0).max(axis=0) * size.sum(axis=1).max(axis=0))
    return Pairs(step.blocks * jnp.minimum(1.0, bound / jnp.where(norm > 0, norm, 1.0)), step.shift)


@pytree(static=("linear_part", "numbers_per_state"))
class ClosedForm:
    """The linear part that a cell states itself, for `unroll` only: no Jacobian product is taken.

    Attributes:
        linear_part: `(params, carry, x) -> AffineMap` with shift 0, such as `gru_diagonal` or `lstm_pairs`.
        carry: An example carry, for its structure.
        numbers_per_state: KernelParams that the linear part keeps per number of the state: 1 for a diagonal, 2 for `Pairs`.
    """

    linear_part: Callable
    carry: PyTree
    numbers_per_state: int = 1

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, AffineMap]:
        values = jax.vmap(dynamics)(previous, drives)
        _, (_, params) = (
            dynamics.params
        )  # what the step captures, what the cell captures, the cell's own
        _, _, unravel = ravel(Dynamics(None), self.carry)
        x, counts = drives if isinstance(drives, Packed) else (drives, None)
        maps = jax.vmap(lambda state, x: self.linear_part(params, unravel(state), x))(previous, x)
        if counts is not None:
            maps = jax.vmap(lambda step, counted: scaled(step, counted.astype(values.dtype)))(
                maps, counts
            )
        return values, maps.with_shift(no_shift(values))

    def jvps(self, dimension: int) -> int:
        del dimension
        return 0

    def map_size(self, dimension: int) -> int:
        return self.numbers_per_state * dimension
