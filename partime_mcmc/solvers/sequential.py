"""The sequential solver: one step after another, whatever the guess.

A sequential run has the same loop, schedules, verdicts and records as a parallel one. Its path obeys the recurrence as
evaluated by the scan that made it, with residual 0 up to the first step that is not finite, so one pass is enough.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.dynamics import CachedStep, Dynamics, rollout, rollout_with_aux
from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.engine.time_axis import TimeAxis
from partime_mcmc.solvers.base import Proposal, Solver
from partime_mcmc.types import Array, Key, PyTree, pytree


@pytree()
class Sequential(Solver):
    """`x_t = f(x_{t-1}, u_t)` by `lax.scan`."""

    keeps_aux: ClassVar[bool] = True

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
        if dynamics.cached and dynamics.cached.aux:
            path, notes = rollout_with_aux(dynamics, initial, drives)
        else:
            path, notes = (
                axis.in_turn(lambda first: rollout(dynamics, first, drives), initial),
                None,
            )
        finite = jnp.isfinite(path)
        residual = jnp.where(finite, 0, jnp.nan).astype(path.dtype)
        path = jnp.where(finite, path, states)
        none = jnp.zeros((), jnp.int32)
        num_steps = states.shape[0]
        return Proposal(
            path,
            path,
            residual,
            none,
            none,
            jnp.asarray(axis.length(num_steps), jnp.int32),
            jnp.asarray(num_steps, jnp.float32),
            jnp.zeros((), jnp.float32),
            notes=notes,
        ), state

    def map_size(self, dimension: int) -> int:
        return 0


def finish_sequentially(
    dynamics: Dynamics,
    initial: PyTree,
    states: PyTree,
    drives: PyTree,
    num_exact: Array,
    notes: Array | None = None,
) -> tuple[PyTree, Array | None]:
    """Finish paths one step after another from where they stop being exact.

    Args:
        dynamics: The recurrence.
        initial: `x_0` of every path, leaves `(B, ...)`.
        states: Paths, leaves `(B, T, ...)`; only their exact steps are used. T is at least 1.
        drives: Leaves `(B, T, ...)`.
        num_exact: How many leading steps of each path are right, shape `(B,)`; T leaves a path as it is, to the last bit.
        notes: `CachedStep.aux` of every step of the paths, `(B, T, R)`, where the dynamics have one and it is wanted.

    Returns:
        The paths, leaves `(B, T, ...)`, and their notes. The loop begins at the smallest `num_exact`.
    """
    cached = cached_step_of(dynamics)
    num_paths, num_steps = jax.tree.leaves(states)[0].shape[:2]
    every = jnp.arange(num_paths)

    def select(flags, new, old):
        return jax.tree.map(
            lambda a, b: jnp.where(flags.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old
        )

    last = jax.tree.map(lambda leaf: leaf[every, jnp.maximum(num_exact - 1, 0)], states)
    following = jax.tree.map(
        lambda leaf: leaf[every, jnp.minimum(num_exact, num_steps - 1)], drives
    )
    memory = jax.vmap(cached.init, in_axes=(None, 0, 0))(
        cached.params[0], select(num_exact == 0, initial, last), following
    )

    def one_step(step, carry):
        memory, rolled = carry
        at_step = lambda leaf: lax.dynamic_index_in_dim(leaf, step, axis=1, keepdims=False)
        new = jax.vmap(cached.step, in_axes=(None, 0, 0))(
            cached.params[1], memory, jax.tree.map(at_step, drives)
        )
        memory = select(step >= num_exact, new, memory)
        state = jax.vmap(cached.state, in_axes=(None, 0))(cached.params[2], memory)
        noted = None if notes is None or cached.aux is None else jax.vmap(cached.aux)(memory)
        row = select(step >= num_exact, (state, noted), jax.tree.map(at_step, known))
        return memory, jax.tree.map(
            lambda leaf, one: lax.dynamic_update_index_in_dim(leaf, one, step, 1), rolled, row
        )

    begin, known = num_exact.min(), (states, notes)
    _, rolled = lax.fori_loop(
        begin, num_steps, one_step, (memory, jax.tree.map(jnp.zeros_like, known))
    )
    seen = jnp.arange(num_steps) < begin
    return jax.tree.map(
        lambda old, new: jnp.where(seen.reshape(-1, *(1,) * (old.ndim - 2)), old, new),
        known,
        rolled,
    )


def cached_step_of(dynamics: Dynamics) -> CachedStep:
    """The dynamics' `CachedStep`; where steps share nothing, the state itself in the shape of one."""
    return dynamics.cached or CachedStep(
        init_as_is, dynamics.step, _state_as_is, (None, dynamics.params, None)
    )


def init_as_is(params: PyTree, state: PyTree, drive: PyTree) -> PyTree:
    """`CachedStep.init` of dynamics whose steps share nothing."""
    return state


def _state_as_is(params, memory):
    return memory
