"""Solvers: one pass over a path, from a guess to a better guess.

A solver evaluates the recurrence along a path and proposes the next one. It hands back the path it evaluated together
with that path's exact residual, so that the one loop in `engine/solve.py` judges every solver by the same number and no
solver judges itself. Newton-like solvers evaluate the guess they were given; solvers that roll evaluate the path they make.
"""

from typing import Protocol, Self

import jax
import jax.numpy as jnp

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.engine.time_axis import TimeAxis
from partime_mcmc.scan.affine import AffineMap
from partime_mcmc.types import Array, Key, PyTree, pytree


@pytree()
class Proposal:
    """What one pass yields.

    Attributes:
        states: The next guess, shape `(T, D)`, finite.
        judged: The path whose residual is known, shape `(T, D)`: the guess that was given, or the new path.
        residual: `f(x_{t-1}, u_t) − x_t` of `judged`, shape `(T, D)`; NaN where `f` is not finite.
        num_replaced_jacobians: How many step Jacobians were not finite and were replaced by 0; a scalar.
        num_replaced_updates: How many new states were not finite and were replaced by `f(x̂_{t-1})`; a scalar.
        depth: Dependent evaluations of `f` one after another in this pass; a scalar.
        evaluations: Evaluations of `f` in this pass, over all steps of the window; a scalar.
        jvps: Jacobian-vector products of `f` in this pass, over all steps of the window; a scalar.
        gave_up: Whether the solver stops because further passes would cost more than they gain; a scalar.
        num_passes: Passes that this step stands for, for solvers that make several at once; a scalar.
        notes: `CachedStep.aux` of the steps of `judged`, shape `(T, R)`; None from solvers that keep none.
    """

    states: Array
    judged: Array
    residual: Array
    num_replaced_jacobians: Array
    num_replaced_updates: Array
    depth: Array
    evaluations: Array
    jvps: Array
    gave_up: Array | bool = False
    num_passes: Array | int = 1
    notes: Array | None = None


class Solver(Protocol):
    """One pass from a guess to a better guess."""

    # With a class attribute `keeps_aux = True`, proposals hold `CachedStep.aux` of every step, if the dynamics have it.

    def init(self, initial: Array, states: Array) -> PyTree:
        """What the solver remembers between passes, at the start; nothing, unless a solver has its own."""
        return ()

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
        """One pass.

        Args:
            dynamics: The recurrence on flat states.
            initial: The state before the first step, shape `(D,)`.
            states: The guess, shape `(T, D)`, finite.
            drives: Leaves with leading axis `T`.
            state: What the solver remembers.
            axis: The time axis.
            key: For estimates; the same in every pass.
            tolerance: How near two states must be to count as one.

        Returns:
            The proposal and what to remember.
        """
        ...

    def map_size(self, dimension: int) -> int:
        """Numbers kept per step besides the states, for estimates of memory."""
        ...

    def single_pass(self) -> Self:
        """The same iteration handed back after every pass, by solvers whose `step` makes several passes at once."""
        return self


def defect(values: Array, states: Array) -> Array:
    """`values − states`, and exactly 0 where they are equal and finite.

    A compiler may fuse the last product of `f` with this subtraction and skip the rounding of the product; a state that
    is `f` of its past would then show a residual below one ulp, and tolerance 0 could not be met. The other way about, the
    difference of two small numbers may be flushed to 0: numbers that differ do so by the smallest normal number at least.
    """
    difference = values - states
    least = jnp.asarray(jnp.finfo(values.dtype).tiny, values.dtype)
    difference = jnp.where(difference == 0, least, difference)
    return jnp.where((values == states) & jnp.isfinite(values), 0, difference)


def replace_nonfinite_jacobians(maps: AffineMap) -> tuple[AffineMap, Array]:
    """Set to 0 the linear part of every step where it is not finite, and count those steps.

    One NaN in a scan reaches every later state, so a step without a derivative is treated as one that forgets (A = 0,
    Jacobi). The values of `f` are never touched.
    """
    linear = [leaf for leaf in jax.tree.leaves(maps.with_shift(None))]
    if not linear:
        return maps, jnp.zeros((), jnp.int32)
    good = jnp.stack(
        [jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1) for leaf in linear]
    ).all(axis=0)

    def keep(leaf):
        return jnp.where(good.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)

    cleaned = jax.tree.map(keep, maps.with_shift(None)).with_shift(maps.shift)
    return cleaned, jnp.sum(~good).astype(jnp.int32)


def replace_nonfinite_updates(updated: Array, values: Array, states: Array) -> tuple[Array, Array]:
    """Where an update overflowed take `f` of the old guess, where that is not finite keep the old guess; count both.

    Args:
        updated: Shape `(T, D)`.
        values: `f(x̂_{t-1})`, shape `(T, D)`.
        states: The old guess, shape `(T, D)`.

    Returns:
        Finite states, shape `(T, D)`, and the number of steps replaced.
    """
    good = jnp.isfinite(updated).all(axis=1, keepdims=True)
    usable = jnp.isfinite(values).all(axis=1, keepdims=True)
    replaced = jnp.where(good, updated, jnp.where(usable, values, states))
    return replaced, jnp.sum(~good).astype(jnp.int32)
