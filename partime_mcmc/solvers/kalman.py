"""Newton's method inside a trust region, evaluated with a Kalman smoother: ELK and quasi-ELK.

The Levenberg–Marquardt step of the path problem minimises

    ½ Σ_t ‖r_t + A_t δ_{t-1} − δ_t‖² + ½ λ Σ_t ‖δ_t‖²,

which is the mean of δ under the linear Gaussian model `δ_t = A_t δ_{t-1} + r_t + N(0, I)`, `0 = δ_t + N(0, I/λ)`: a Kalman
filter forwards and a Rauch–Tung–Striebel smoother backwards (Gonzalez et al. 2024, arXiv:2407.19115). The filter is a
prefix scan of Kalman messages; given its beliefs the smoothed means obey an affine recurrence backwards in time, so the
smoother is a suffix scan of affine maps. λ = 0 is Newton's step; a large λ stays near the guess, which keeps an
unstable part of the path from overflowing. λ follows a policy that relaxes as the residual falls.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.engine.time_axis import TimeAxis
from partime_mcmc.linearize.base import Linearizer
from partime_mcmc.scan.affine import Dense, Diagonal, Identity, Zero
from partime_mcmc.scan.gaussian import DenseMessage, DiagonalMessage
from partime_mcmc.solvers.base import (
    Proposal,
    Solver,
    defect,
    replace_nonfinite_jacobians,
    replace_nonfinite_updates,
)
from partime_mcmc.types import Array, Key, PyTree, pytree


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


@pytree()
class Kalman(Solver):
    """Levenberg–Marquardt over the path, dense or diagonal by the linearizer."""

    linearizer: Linearizer
    damping: DampingPolicy = RelaxingDamping()

    def init(self, initial: Array, states: Array) -> PyTree:
        return self.damping.init(initial)

    def step(
        self,
        dynamics: Dynamics,
        initial: Array,
        states: Array,
        drives: PyTree,
        state: PyTree,
        *,
        axis: TimeAxis,
        key: Key,
        tolerance: Tolerance,
    ) -> tuple[Proposal, PyTree]:
        values, maps = self.linearizer(dynamics, axis.previous(initial, states), drives, key)
        residual = defect(values, states)
        maps, num_jacobians = replace_nonfinite_jacobians(maps)
        right = jnp.where(jnp.isfinite(residual), residual, 0)
        # In units of the largest one, whose square need not be a number of this type.
        largest = axis.maximum(jnp.max(jnp.abs(right), axis=1))
        shares = right / jnp.where(largest > 0, largest, 1)
        merit = largest * jnp.sqrt(
            axis.total(jnp.mean(shares**2, axis=1)) / axis.length(states.shape[0])
        )
        damping, state = self.damping(merit, state)
        correction = trust_region_step(maps.with_shift(right), damping, initial, axis)
        updated, num_updates = replace_nonfinite_updates(states + correction, values, states)
        num_steps = jnp.asarray(states.shape[0], jnp.float32)
        return Proposal(
            updated,
            states,
            residual,
            num_jacobians,
            num_updates,
            jnp.ones((), jnp.int32),
            num_steps,
            num_steps * self.linearizer.jvps(initial.shape[0]),
        ), state

    def map_size(self, dimension: int) -> int:
        # A message holds three matrices where an affine map holds one.
        return 3 * max(self.linearizer.map_size(dimension), dimension)


def trust_region_step(maps: PyTree, damping: Array, like: Array, axis: TimeAxis) -> Array:
    """The minimiser δ of the damped least squares problem above.

    Args:
        maps: T affine maps, shift `r_t`.
        damping: λ ≥ 0, a scalar.
        like: Any state, for shape `(D,)` and type.
        axis: The time axis.

    Returns:
        δ, shape `(T, D)`.
    """
    maps, message = _as_gaussian(maps)
    nothing = jnp.zeros_like(like)
    messages = jax.vmap(lambda step: message.trust_region(step, damping))(maps)
    beliefs = axis.prefix(messages, message.certain(nothing))
    # The last step has nothing after it: its smoothed mean is its filtered mean, a map that ignores its argument.
    after_last = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), maps)
    backwards = jax.vmap(message.smoother)(beliefs, axis.following(maps, after_last))
    return axis.suffix(backwards, nothing)


@functools.singledispatch
def _as_gaussian(maps: PyTree) -> tuple[PyTree, Any]:
    """The maps as dense or diagonal ones, and the Kalman message that fits them."""
    raise TypeError(
        f"linearizer: no Kalman message fits {type(maps).__name__} maps; wanted Dense or Diagonal"
    )


@_as_gaussian.register
def _(maps: Dense) -> tuple[PyTree, Any]:
    return maps, DenseMessage


@_as_gaussian.register
def _(maps: Diagonal) -> tuple[PyTree, Any]:
    return maps, DiagonalMessage


@_as_gaussian.register
def _(maps: Identity | Zero) -> tuple[PyTree, Any]:
    return Diagonal(maps.linear(jnp.ones_like(maps.shift)), maps.shift), DiagonalMessage
