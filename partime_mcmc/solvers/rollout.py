"""The sequential solver: one step after another, whatever the guess.

The oracle in the shape of a solver, so that a sequential run goes through the same loop, schedules, verdicts and
records as every parallel one. Its path obeys the recurrence as evaluated by the scan that made it, with residual 0 up to
the first step that is not finite, so one pass is enough.
"""

from __future__ import annotations

import jax.numpy as jnp

from partime_mcmc.dynamics import Dynamics, rollout
from partime_mcmc.scan.time_axis import TimeAxis
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers.base import Proposal
from partime_mcmc.types import Array, Key, PyTree, pytree


@pytree()
class Rollout:
    """`x_t = f(x_{t-1}, u_t)` by `lax.scan`."""

    def init(self, initial: Array, states: Array) -> PyTree:
        del initial, states
        return ()

    def step(self, dynamics: Dynamics, initial: Array, states: Array, drives: PyTree, state: PyTree, *,
             axis: TimeAxis, key: Key, tolerance: Tolerance) -> tuple[Proposal, PyTree]:
        del axis, key
        path = rollout(dynamics, initial, drives)
        finite = jnp.isfinite(path)
        residual = jnp.where(finite, 0, jnp.nan).astype(path.dtype)
        path = jnp.where(finite, path, states)
        none = jnp.zeros((), jnp.int32)
        num_steps = states.shape[0]
        return Proposal(path, path, residual, none, none, jnp.asarray(num_steps, jnp.int32),
                        jnp.asarray(num_steps, jnp.float32), jnp.zeros((), jnp.float32)), state

    def map_size(self, dimension: int) -> int:
        del dimension
        return 0
