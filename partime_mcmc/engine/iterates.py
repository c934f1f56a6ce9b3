"""A solve watched: the path after every iteration, and how far each of its steps is from obeying the recurrence.

    x̂⁽⁰⁾ → x̂⁽¹⁾ → … → x̂⁽ᴷ⁾,     r_t = f(x̂_{t-1}, u_t) − x̂_t,     merit L = ½ Σ_t ‖r_t‖²

What every paper on these methods shows first. The merit function is the one that ELK (arXiv:2407.19115) and the theory of
predictability (arXiv:2508.16817) are about; where the recurrence forgets, it falls all over time at once, and where it does
not, only the front of exact steps moves. After k iterations of a Newton-like solver at least the first k steps are exact.

The iterations are those of `solve`: the same `one_pass`, the same verdicts, the same tolerance. Left out: schedules whose
window moves, and devices.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.adjoint import NoDerivatives
from partime_mcmc.engine.dynamics import Dynamics, check_state, ravel
from partime_mcmc.engine.recipes import deer
from partime_mcmc.engine.solution import Tolerance, nanaware_max
from partime_mcmc.engine.solve import (
    RUNNING,
    at_start,
    check_step,
    check_strategies,
    count_steps,
    flat_guess,
    one_pass,
)
from partime_mcmc.engine.time_axis import LocalTime
from partime_mcmc.engine.windows import AllAtOnce
from partime_mcmc.executions import run_jitted
from partime_mcmc.solvers import Solver
from partime_mcmc.types import Array, Key, PyTree, nan_is_a_value, pytree
from partime_mcmc.validation import check_count


@pytree()
class Iterates:
    """The paths of a solve, one row per iteration; rows after the last iteration repeat it.

    Row k is the path after k iterations, row 0 the guess. Solvers that roll (`sequential`, `shooting`) judge the path that
    they have made and not the guess, so that their row 0 is their first path. In either case row `iterations` is the path
    that `solve` returns.

    Attributes:
        states: `x̂_1..x̂_T` of every row, leaves `(K + 1, T, ...)`.
        residuals: `max_j |r_tj|` in the units of the state, shape `(K + 1, T)`; NaN where `f` is not finite.
        merit: ½ Σ_t ‖r_t‖², shape `(K + 1,)`; NaN where `f` is not finite, infinite where a square overflows.
        num_exact: Steps from the start on that are within the tolerance, shape `(K + 1,)`; the next one is the first open
            step, T if there is none.
        status: The verdict, a `Status` as an integer.
        iterations: How many iterations were made, an integer of at most K.
    """

    states: PyTree
    residuals: Array
    merit: Array
    num_exact: Array
    status: Array
    iterations: Array

    @property
    def residual(self) -> Array:
        """The largest residual of every row, shape `(K + 1,)`; NaN where one is not finite."""
        return nanaware_max(self.residuals, axis=-1)


@nan_is_a_value()
def iterates(
    dynamics: Dynamics,
    initial: PyTree,
    drives: PyTree,
    *,
    solver: Solver = deer(),
    num_iterations: int = 50,
    tolerance: Tolerance = Tolerance(),
    guess: PyTree | None = None,
    axis: LocalTime = LocalTime(),
    key: Key | None = None,
) -> Iterates:
    """Solve a recurrence and keep every iterate.

    Under `jit` what is not used of the result takes no memory: `jax.jit(lambda *args: iterates(*args).merit)` keeps K + 1
    numbers, where all states would be (K + 1) T D. Nothing of the result can be differentiated.

    Args:
        dynamics: As for `solve`.
        initial: `x_0`.
        drives: `u_1..u_T`, leaves with leading axis `T`, at least one step.
        solver: A recipe. `shooting()` is watched after every pass over its segments.
        num_iterations: K, at least 1; it ends there at the latest.
        tolerance: As for `solve`.
        guess: As for `solve`.
        axis: How prefixes are computed.
        key: As for `solve`.

    Returns:
        K + 1 rows.

    Raises:
        TypeError: As `solve` does.
        ValueError: As `solve` does; or if there are no steps, or `num_iterations` is not a positive integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, iterates, jacobi
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> rows = iterates(decay, jnp.zeros(1), jnp.ones((3, 1)), solver=jacobi(), num_iterations=3)
        >>> print(rows.num_exact)
        [0 1 2 3]
    """
    schedule = AllAtOnce()
    check_strategies(dynamics, solver, schedule, tolerance, NoDerivatives())
    check_count(num_iterations, "num_iterations", 1)
    initial, drives = jax.tree.map(jnp.asarray, (initial, drives))
    check_state(initial)
    num_steps = count_steps(drives)
    if num_steps == 0:
        raise ValueError("drives: no steps, wanted at least one")
    flat, start, unravel = ravel(check_step(dynamics, initial, drives), initial)
    tolerance.check(start.size)
    watched = getattr(solver, "single_pass", lambda: solver)()
    found = run_jitted(
        _iterates,
        flat,
        start,
        drives,
        flat_guess(guess, initial, start, num_steps),
        watched,
        tolerance,
        jax.random.key(0) if key is None else key,
        axis=axis,
        num_iterations=num_iterations,
    )
    states = jax.vmap(jax.vmap(unravel))(found.states)
    return Iterates(
        states, found.residuals, found.merit, found.num_exact, found.status, found.iterations
    )


@functools.partial(jax.jit, static_argnames=("axis", "num_iterations"))
def _iterates(
    dynamics, initial, drives, guess, solver, tolerance, key, *, axis, num_iterations
) -> Iterates:
    dynamics, initial, drives, guess = lax.stop_gradient((dynamics, initial, drives, guess))
    num_steps = guess.shape[0]

    def advance(carry):
        loop, proposal = one_pass(
            dynamics,
            initial,
            drives,
            solver,
            AllAtOnce(),
            tolerance,
            key,
            axis,
            num_steps,
            num_iterations,
            carry[0],
        )
        size = jnp.abs(proposal.residual)
        size = jnp.where(jnp.isfinite(size), size, jnp.nan)
        return loop, (
            proposal.judged,
            nanaware_max(size, axis=1),
            0.5 * jnp.sum(size**2),
            loop.num_exact,
        )

    def row(carry, _):
        carry = lax.cond(carry[0].status == RUNNING, advance, lambda same: same, carry)
        return carry, carry[1]

    begin = at_start(dynamics, initial, drives, guess, solver, num_steps, num_iterations)
    empty = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(advance, (begin, None))[1],
    )
    (end, _), rows = lax.scan(row, (begin, empty), length=num_iterations + 1)
    states, residuals, merit, num_exact = rows
    return Iterates(states, residuals, merit, num_exact, end.status, end.iterations)
