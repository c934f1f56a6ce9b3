"""Masked steps, which leave the carry as it is.

Steps that count are moved to the front, in their order, and solved there as one shorter sequence; then every step is given
the state that stood after the last step that counted,

    k_t = number of counting steps among 1..t,       h_t = path[k_t],     path[0] = h_0,

so a frozen state is the very same floats. Left in place, frozen steps would carry a guessed state through whole segments
without forgetting it, and every pass of a solver would mend one segment only. Behind the last counting step the packed
sequence goes on with a state of 0 that nothing depends on.

Inputs of masked steps are set to 0 beforehand: what stands there in practice is often NaN, and 0 times NaN would reach the
derivatives.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from partime_mcmc.closures import Named
from partime_mcmc.types import Array, PyTree, pytree


def without_masked(inputs: PyTree, mask: Array | None) -> PyTree:
    """Inputs `(T, ...)` with 0 where `mask` `(T,)` is False; floating-point leaves only."""

    def clean(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(mask.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)

    return inputs if mask is None else jax.tree.map(clean, inputs)


def silence(outputs: PyTree, mask: Array | None) -> PyTree:
    """Outputs `(T, ...)` with 0 where `mask` `(T,)` is False."""
    if mask is None:
        return outputs
    return jax.tree.map(
        lambda leaf: jnp.where(
            mask.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype)
        ),
        outputs,
    )


class Packed(NamedTuple):
    """Drives of a packed sequence: inputs `(T, ...)`, and whether each step counts, `(T,)`."""

    x: PyTree
    counts: Array


@pytree()
class Packing:
    """Where steps go.

    Attributes:
        order: The steps that count, in their order, then the others; shape `(T,)`.
        count: k_t, shape `(T,)`.
    """

    order: Array
    count: Array

    @classmethod
    def of(cls, mask: Array) -> Packing:
        """The packing for a mask `(T,)`."""
        return cls(jnp.argsort(~mask, stable=True), jnp.cumsum(mask))

    def pack(self, inputs: PyTree) -> Packed:
        """Inputs in packed order."""
        counts = jnp.arange(self.order.shape[0]) < self.count[-1]
        return Packed(jax.tree.map(lambda leaf: leaf[self.order], inputs), counts)

    def unpack(self, initial: Array, path: Array) -> Array:
        """States `(T, D)` at their own steps, from the packed path `(T, D)` and the initial state `(D,)`."""
        return jnp.concatenate([initial[None], path])[self.count]


class PackedStep(Named):
    """The carry's part of a cell as the step of a recurrence; parts: the cell, and whether the drive says if a step counts."""

    def __call__(self, params: PyTree, carry: PyTree, drive: PyTree) -> PyTree:
        cell, counted = self.parts
        if not counted:
            return cell(params, carry, drive)[0]
        x, counts = drive
        new = cell(params, carry, x)[0]
        return jax.tree.map(lambda leaf: jnp.where(counts, leaf, jnp.zeros((), leaf.dtype)), new)
