"""Affine maps of a state, as a monoid: the elements that a parallel scan composes.

A step linearised around a guess is `x ↦ A x + shift`. Such maps compose to maps of the same kind,

    (A₂, s₂) ∘ (A₁, s₁) = (A₂ A₁, A₂ s₁ + s₂),

and composition is associative, so all T partial compositions come from one prefix scan of depth log T
(Blelloch 1990, "Prefix sums and their applications"). The shape of `A` (dense, diagonal, pairs, identity, zero) sets the
price: D³, D, 4 D, 0 and 0 multiplications per composition. Every class here holds one map, `shift` of shape `(D,)`;
batches of maps are made by `vmap`, as everywhere in JAX.

Left out: low-rank maps and larger blocks (a new class with these four methods is enough to add one).
"""

from __future__ import annotations

from typing import Protocol, Self

import jax.numpy as jnp

from partime_mcmc.types import Array, PyTree, pytree


class AffineMap(Protocol):
    """A map `x ↦ A x + shift` on states of shape `(D,)`.

    Attributes:
        shift: The image of 0, shape `(D,)`.
    """

    @property
    def shift(self) -> Array: ...

    def __call__(self, x: Array) -> Array:
        """The image of `x`, shape `(D,)`."""
        ...

    def linear(self, x: Array) -> Array:
        """`A x`, without the shift."""
        ...

    def after(self, earlier: Self) -> Self:
        """`self ∘ earlier`, a map of the same class."""
        ...

    def with_shift(self, shift: PyTree) -> Self:
        """The same `A` with another shift of shape `(D,)`; with None, whose leaves are those of `A` alone."""
        ...


@pytree()
class Dense:
    """`x ↦ matrix @ x + shift`, `matrix` of shape `(D, D)`."""

    matrix: Array
    shift: Array

    def __call__(self, x: Array) -> Array:
        return self.linear(x) + self.shift

    def linear(self, x: Array) -> Array:
        return self.matrix @ x

    def after(self, earlier: Dense) -> Dense:
        return Dense(self.matrix @ earlier.matrix, self(earlier.shift))

    def with_shift(self, shift: PyTree) -> Dense:
        return Dense(self.matrix, shift)


@pytree()
class Diagonal:
    """`x ↦ diagonal * x + shift`, `diagonal` of shape `(D,)`."""

    diagonal: Array
    shift: Array

    def __call__(self, x: Array) -> Array:
        return self.linear(x) + self.shift

    def linear(self, x: Array) -> Array:
        return self.diagonal * x

    def after(self, earlier: Diagonal) -> Diagonal:
        return Diagonal(self.diagonal * earlier.diagonal, self(earlier.shift))

    def with_shift(self, shift: PyTree) -> Diagonal:
        return Diagonal(self.diagonal, shift)


@pytree()
class Pairs:
    """`(x, y) ↦ blocks (x, y) + shift`: x_j and y_j make a pair, `blocks` of shape `(2, 2, D/2)`; the state is flat, x then y."""

    blocks: Array
    shift: Array

    def __call__(self, x: Array) -> Array:
        return self.linear(x) + self.shift

    def linear(self, x: Array) -> Array:
        first, second = jnp.split(x, 2)
        (a, b), (c, d) = self.blocks
        return jnp.concatenate([a * first + b * second, c * first + d * second])

    def after(self, earlier: Pairs) -> Pairs:
        return Pairs(jnp.einsum("ijd,jkd->ikd", self.blocks, earlier.blocks), self(earlier.shift))

    def with_shift(self, shift: PyTree) -> Pairs:
        return Pairs(self.blocks, shift)


@pytree()
class Identity:
    """`x ↦ x + shift`: a scan of these is a cumulative sum (Picard's iteration)."""

    shift: Array

    def __call__(self, x: Array) -> Array:
        return x + self.shift

    def linear(self, x: Array) -> Array:
        return x

    def after(self, earlier: Identity) -> Identity:
        return Identity(earlier.shift + self.shift)

    def with_shift(self, shift: PyTree) -> Identity:
        return Identity(shift)


@pytree()
class Zero:
    """`x ↦ shift`: forgets its argument, so a scan of these does nothing (Jacobi's iteration)."""

    shift: Array

    def __call__(self, x: Array) -> Array:
        return self.shift

    def linear(self, x: Array) -> Array:
        return jnp.zeros_like(x)

    def after(self, earlier: Zero) -> Zero:
        return self

    def with_shift(self, shift: PyTree) -> Zero:
        return Zero(shift)
