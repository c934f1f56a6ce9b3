"""Damping policies: how strongly a trust region holds on to the present guess.

A policy turns the history of the residual into the Levenberg–Marquardt damping λ of the next pass. λ must fall with the
residual, or the last digits are bought one factor λ/(1+λ) at a time; taking it proportional to the residual keeps
Newton's fast end (Yamashita & Fukushima 2001; Fan & Yuan 2005). And it must rise when a pass made things worse.
"""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp

from partime_mcmc.types import Array, PyTree, pytree


class DampingPolicy(Protocol):
    """Residual in, damping out."""

    def init(self, like: Array) -> PyTree:
        """What the policy remembers at the start; scalars of the type of `like`."""
        ...

    def __call__(self, merit: Array, memory: PyTree) -> tuple[Array, PyTree]:
        """The damping for this pass.

        Args:
            merit: Root mean square residual of the present guess, a scalar.
            memory: What the policy remembers.

        Returns:
            λ ≥ 0, a scalar, and what to remember.
        """
        ...


@pytree()
class ConstantDamping:
    """The same λ in every pass, as in the first ELK paper."""

    damping: float = 1e-2

    def init(self, like: Array) -> PyTree:
        return jnp.asarray(self.damping, like.dtype)

    def __call__(self, merit: Array, memory: PyTree) -> tuple[Array, PyTree]:
        del merit
        return memory, memory


@pytree()
class RelaxingDamping:
    """λ = `initial` · g · (residual / first residual), with a factor g that halves after progress and grows after none.

    The residual of a chain has local minima (a wrong decision, and everything after it), where a λ proportional to it would
    stay for ever. So λ has a ceiling that falls with every pass, and ELK turns into Newton's method in the end, which is
    exact on one more step per pass whatever happens.

    Attributes:
        initial: λ of the first pass. Small: a large one costs passes where Newton's method works, and λ rises where
            it does not, by up to 10⁴ within some passes.
        grow: What g is multiplied by when the residual did not fall.
        shrink: What g is multiplied by when it did.
        cooling: What the ceiling, at first 10⁴ · `initial`, is multiplied by in every pass.
    """

    initial: float = 1e-4
    grow: float = 4.0
    shrink: float = 0.5
    cooling: float = 0.5

    def init(self, like: Array) -> PyTree:
        one = jnp.ones((), like.dtype)
        return -one, -one, one, 1e4 * self.initial * one

    def __call__(self, merit: Array, memory: PyTree) -> tuple[Array, PyTree]:
        first, before, factor, ceiling = memory
        fresh = first < 0
        first = jnp.where(fresh, jnp.where(merit > 0, merit, 1), first)
        progress = merit < before
        factor = jnp.where(
            fresh, factor, factor * jnp.where(progress, self.shrink, self.grow).astype(factor.dtype)
        )
        # Bounded, because near the rounding floor the residual stops falling for a reason that no damping can change.
        factor = jnp.clip(factor, 1e-4, 1e4)
        damping = jnp.minimum(self.initial * factor * jnp.minimum(merit / first, 1e6), ceiling)
        return damping.astype(factor.dtype), (
            first,
            merit,
            factor,
            (self.cooling * ceiling).astype(factor.dtype),
        )
