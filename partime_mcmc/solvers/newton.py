"""Newton's method over the whole path: DEER and its relatives.

Let F(x)_t = f(x_{t-1}, u_t) − x_t be the residual of a path. Newton's step δ solves the recurrence

    δ_t = A_t δ_{t-1} + r_t,     δ_0 = 0,     r_t = f(x̂_{t-1}, u_t) − x̂_t,

which is affine, so one prefix scan gives all of δ. With the Jacobian as `A_t` this is DEER (Lim et al. 2024,
arXiv:2309.12252); with anything else it is quasi-Newton. The new path is taken as

    x_t = f(x̂_{t-1}, u_t) + A_t δ_{t-1}      (= x̂_t + δ_t, without its cancellation),

so a step whose past is right becomes right to the last bit: after k passes at least the first k states are exact,
whatever `A_t` is.
"""

import jax
import jax.numpy as jnp

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.engine.time_axis import TimeAxis
from partime_mcmc.linearize.base import Linearizer
from partime_mcmc.solvers.base import (
    Proposal,
    Solver,
    defect,
    replace_nonfinite_jacobians,
    replace_nonfinite_updates,
)
from partime_mcmc.types import Array, Key, PyTree, pytree


@pytree()
class Newton(Solver):
    """Newton or quasi-Newton, by the linearizer."""

    linearizer: Linearizer

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
        previous = axis.previous(initial, states)
        values, maps = self.linearizer(dynamics, previous, drives, key)
        residual = defect(values, states)
        maps, num_jacobians = replace_nonfinite_jacobians(maps)
        # A step whose f is not finite contributes nothing: the verdict comes from the residual, not from the scan.
        right = jnp.where(jnp.isfinite(residual), residual, 0)
        nothing = jnp.zeros_like(initial)
        corrections = axis.prefix(maps.with_shift(right), nothing)
        updated = values + jax.vmap(lambda step, delta: step.linear(delta))(
            maps, axis.previous(nothing, corrections)
        )
        updated, num_updates = replace_nonfinite_updates(updated, values, states)
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
        return self.linearizer.map_size(dimension)
