"""A solve watched pass by pass: the residual of every time step after every pass.

Pass k leaves a path x̂ with residuals |f(x̂_{t-1}, u_t) − x̂_t|. After k passes of a Newton-like solver at least the
first k steps are exact; where the recurrence forgets, all of time converges at once instead of from the front. The
solver's steps are taken from the host one by one, as `solve` takes them inside a compiled loop: for pictures.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.engine import Dynamics, LocalTime, Tolerance, ravel, without_captures
from partime_mcmc.engine.time_axis import recent_sizes
from partime_mcmc.solvers import Solver
from partime_mcmc.types import PyTree
from partime_mcmc.validation import check_count


def residuals_by_pass(
    dynamics: Dynamics,
    initial: PyTree,
    drives: PyTree,
    *,
    solver: Solver,
    tolerance: Tolerance = Tolerance(),
    max_passes: int = 100,
) -> np.ndarray:
    """Solve a recurrence and keep the residuals of all passes.

    Args:
        dynamics: The recurrence.
        initial: `x_0`.
        drives: `u_1..u_T`, leaves with leading axis `T`.
        solver: A recipe.
        tolerance: How small residuals must be; it ends there.
        max_passes: It ends there at the latest.

    Returns:
        Largest residual over coordinates after each pass, shape `(P, T)` with P ≤ `max_passes`; NaN where not finite.

    Raises:
        ValueError: If `max_passes` is less than one.
    """
    check_count(max_passes, "max_passes", 1)
    drive = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), drives)
    flat, start, _ = ravel(without_captures(dynamics, initial, drive), initial)
    states = jnp.broadcast_to(start, (jax.tree.leaves(drives)[0].shape[0], *start.shape))
    memory, key, found = solver.init(start, states), jax.random.key(0), []
    step = jax.jit(functools.partial(_step, solver))
    while len(found) < max_passes:
        states, residual, exact, gave_up, memory = step(
            flat, start, states, drives, memory, key, tolerance
        )
        found.append(np.asarray(residual))
        if exact or gave_up:
            break
    return np.stack(found)


def _step(solver, dynamics, initial, states, drives, memory, key, tolerance):
    proposal, memory = solver.step(
        dynamics, initial, states, drives, memory, axis=LocalTime(), key=key, tolerance=tolerance
    )
    size = jnp.abs(proposal.residual)
    # A maximum may drop a NaN: ask for it apart.
    residual = jnp.where(jnp.isfinite(size).all(axis=1), jnp.max(size, axis=1), jnp.nan)
    exact = (
        jnp.all(
            tolerance.ratio(
                proposal.residual, proposal.judged, recent_sizes(LocalTime(), proposal.judged)
            )
            <= 1
        )
        & jnp.isfinite(residual).all()
    )
    return proposal.states, residual, exact, jnp.asarray(proposal.gave_up), memory
