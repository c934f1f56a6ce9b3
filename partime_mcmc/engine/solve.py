"""The one loop: guess a path, linearise it, scan, measure, repeat.

    x̂ ← guess;  repeat:  r_t = f(x̂_{t-1}, u_t) − x̂_t;  stop if exact;  x̂ ← the solver's proposal

Every solver, schedule and time axis goes through this loop, and only this loop says CONVERGED, by the exact residual of
the very path it returns.

Verdicts other than CONVERGED: NONFINITE as soon as the step after the exact prefix is not finite (its past is right, so no
iteration can help), STALLED when an iterate repeats (compared at powers of two, Brent 1980), OUT_OF_ITERATIONS at the
stated bound. Under `vmap` each path has its own verdict, and finished paths keep their values.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.adjoint import Adjoint, Implicit
from partime_mcmc.engine.dynamics import Dynamics, check_state, ravel, without_captures
from partime_mcmc.engine.recipes import DEFAULT_MAX_ITERATIONS, deer
from partime_mcmc.engine.solution import Solution, Stats, Status, Tolerance, nanaware_max
from partime_mcmc.engine.time_axis import LocalTime, TimeAxis, recent_sizes
from partime_mcmc.engine.windows import AllAtOnce, Schedule
from partime_mcmc.executions import run_jitted
from partime_mcmc.solvers import Sequential, Solver
from partime_mcmc.types import Array, Key, PyTree, nan_is_a_value, pytree
from partime_mcmc.validation import check_count, check_has, check_like, describe

RUNNING = -1
_MAX_HISTORY = 512


@nan_is_a_value()
def solve(
    dynamics: Dynamics,
    initial: PyTree,
    drives: PyTree,
    *,
    solver: Solver = deer(),
    schedule: Schedule = AllAtOnce(),
    tolerance: Tolerance = Tolerance(),
    max_iterations: int | None = None,
    guess: PyTree | None = None,
    adjoint: Adjoint = Implicit(),
    axis: TimeAxis = LocalTime(),
    key: Key | None = None,
) -> Solution:
    """Solve a recurrence for its whole path.

    Args:
        dynamics: `x_t = dynamics(x_{t-1}, u_t)`; arrays that its step captures become parameters.
        initial: `x_0`, a pytree of floating-point arrays of one type.
        drives: `u_1..u_T`, a pytree with leading axis `T`, at least one leaf.
        solver: One of the recipes, or your own; `deer()` unless given. For chains take `shooting()`.
        schedule: All of time at once (`AllAtOnce`), or a window that moves (`Windows`, `SlidingWindow`).
        tolerance: How small the residual must be.
        max_iterations: Passes allowed per window's length of time; None is 200. It is a bound, not a plan:
            the loop stops as soon as the path is exact.
        guess: A first path, shaped like the result; None is `x_0` at every step. Values that are not finite are
            replaced by `x_0`.
        adjoint: How derivatives reach the path.
        axis: Where the steps of time are stored. If they are spread over devices, `initial` is the same on all of them,
            and `drives` and `guess` hold the steps of this device (`distributed.sharded_solve` cuts them).
        key: For solvers that estimate; None is a fixed key. It never changes the path, only how it is found.

    Returns:
        The solution, with the verdict in `.status` and work in `.stats`; `.or_raise()` insists on CONVERGED.

    Raises:
        TypeError: If the state is not floating point of one type, or the step changes its structure.
        ValueError: If shapes do not fit, or `max_iterations` is not a positive integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, solve
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> found = solve(decay, jnp.zeros(1), jnp.ones((4, 1))).or_raise()
        >>> print(found.states.ravel())
        [1.    1.5   1.75  1.875]
    """
    check_strategies(dynamics, solver, schedule, tolerance, adjoint)
    initial = jax.tree.map(jnp.asarray, initial)
    drives = jax.tree.map(jnp.asarray, drives)
    check_state(initial)
    num_steps = count_steps(drives)
    flat, start, unravel = ravel(check_step(dynamics, initial, drives), initial)
    tolerance.check(start.size)
    window = schedule.window(num_steps)
    if window != num_steps and axis.length(num_steps) != num_steps:
        raise ValueError(
            f"schedule: got {schedule!r} with an axis spread over devices, wanted AllAtOnce(): a window that moves "
            "would be on one device at a time"
        )
    max_iterations = check_iterations(max_iterations)
    path = flat_guess(guess, initial, start, num_steps)
    key = jax.random.key(0) if key is None else key
    found = run_jitted(
        _solve,
        flat,
        start,
        drives,
        path,
        solver,
        schedule,
        tolerance,
        key,
        axis=axis,
        window=window,
        max_iterations=max_iterations * max(1, math.ceil(num_steps / max(window, 1))),
    )
    states = adjoint(flat, start, drives, found.states, axis)
    return dataclasses.replace(found, states=jax.vmap(unravel)(states))


@pytree()
class _Loop:
    """What the loop carries: the path, how much of it is exact, the solver's memory, and counts of the work."""

    states: Array
    start: Array
    memory: PyTree
    status: Array
    iterations: Array
    residual: Array
    num_exact: Array
    fingerprint: Array
    evaluations: Array
    jvps: Array
    depth: Array
    history: Array
    num_jacobians: Array
    num_updates: Array
    notes: Array | None
    defects: Array | None


@functools.partial(jax.jit, static_argnames=("axis", "window", "max_iterations"))
def _solve(
    dynamics: Dynamics,
    initial: Array,
    drives: PyTree,
    guess: Array,
    solver: Solver,
    schedule: Schedule,
    tolerance: Tolerance,
    key: Key,
    *,
    axis: TimeAxis,
    window: int,
    max_iterations: int,
) -> Solution:
    # Derivatives come from the adjoint; nothing here may be differentiated.
    dynamics, initial, drives, guess = lax.stop_gradient((dynamics, initial, drives, guess))
    num_steps = guess.shape[0]
    begin = at_start(dynamics, initial, drives, guess, solver, window, max_iterations)
    pass_on = functools.partial(
        one_pass,
        dynamics,
        initial,
        drives,
        solver,
        schedule,
        tolerance,
        key,
        axis,
        window,
        max_iterations,
    )
    if isinstance(solver, Sequential) and window == num_steps > 0:
        # One pass is enough; under `vmap` a loop would copy the path to select between the old and the new one.
        end, _ = pass_on(begin)
    elif num_steps:
        end = axis.repeat(lambda loop: loop.status == RUNNING, lambda loop: pass_on(loop)[0], begin)
    else:
        end = begin
    work = axis.by_part(jnp.stack([end.evaluations, end.jvps]))
    evaluations, jvps = work.T / max(axis.length(num_steps), 1)
    replaced = axis.total(jnp.stack([end.num_jacobians, end.num_updates])[None])
    stats = Stats(
        evaluations.sum(), jvps.sum(), end.depth, end.history, replaced[0], replaced[1], evaluations
    )
    return Solution(
        end.states,
        end.status,
        end.iterations,
        end.residual,
        end.num_exact,
        stats,
        end.notes,
        end.defects,
    )


def at_start(dynamics, initial, drives, guess, solver, window, max_iterations) -> _Loop:
    """What the loop carries before the first pass."""
    num_steps, dtype = guess.shape[0], guess.dtype
    zero = jnp.zeros((), jnp.int32)
    return _Loop(
        guess,
        zero,
        solver.init(initial, guess[:window]),
        jnp.asarray(RUNNING if num_steps else 0, jnp.int32),
        zero,
        jnp.zeros((), dtype),
        zero,
        jnp.full(4, jnp.nan, dtype),
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.float32),
        zero,
        jnp.full(min(max_iterations + 1, _MAX_HISTORY), jnp.nan, dtype),
        zero,
        zero,
        *_no_notes(dynamics, solver, initial, drives, guess, window),
    )


def _no_notes(dynamics, solver, initial, drives, guess, window):
    """Arrays of zeros for `notes` and `defects`; None where none are kept: by most solvers, and where a window moves."""
    cached = dynamics.cached
    if not (
        cached
        and cached.aux
        and getattr(solver, "keeps_aux", False)
        and window == guess.shape[0] > 0
    ):
        return None, None
    memory = jax.eval_shape(
        cached.init, cached.params[0], initial, jax.tree.map(lambda leaf: leaf[0], drives)
    )
    return jnp.zeros(
        (window, *jax.eval_shape(cached.aux, memory).shape), guess.dtype
    ), jnp.zeros_like(guess)


def one_pass(
    dynamics, initial, drives, solver, schedule, tolerance, key, axis, window, max_iterations, loop
):
    """One pass over the window: propose, judge, move on. What the loop carries next, and the proposal that was judged."""
    num_steps, length = loop.states.shape[0], axis.length(window)
    first, states, in_window = _cut(initial, loop.states, drives, loop.start, window)
    proposal, memory = solver.step(
        dynamics, first, states, in_window, loop.memory, axis=axis, key=key, tolerance=tolerance
    )
    sizes = recent_sizes(axis, proposal.judged)
    num_exact = axis.length_of_true(
        tolerance.ratio(proposal.residual, proposal.judged, sizes) <= 1
    ).astype(jnp.int32)
    per_step = nanaware_max(jnp.abs(proposal.residual), axis=1)
    per_step = jnp.where(jnp.isfinite(per_step), per_step, jnp.nan)
    size = axis.maximum(per_step)
    repeats, fingerprint = _repeats(loop, per_step, num_exact, memory, axis)
    # The step after the exact prefix: if it is not finite, its past is right and the recurrence itself has left.
    at_front = axis.index(window) == num_exact
    nonfinite = axis.total(at_front & ~jnp.isfinite(per_step)) > 0
    done = (num_exact == length) & (loop.start + window == num_steps)
    status = jnp.select(
        [done, nonfinite, repeats, (loop.iterations >= max_iterations) | proposal.gave_up],
        [
            jnp.int32(Status.CONVERGED),
            jnp.int32(Status.NONFINITE),
            jnp.int32(Status.STALLED),
            jnp.int32(Status.OUT_OF_ITERATIONS),
        ],
        jnp.int32(RUNNING),
    )
    over = status != RUNNING
    ahead = jnp.where(over, 0, schedule.advance(num_exact, length))
    start = jnp.minimum(loop.start + ahead, num_steps - window)
    # What the window leaves behind, or returns at the end, is the path whose residual was computed, not the new guess.
    counted = (jnp.arange(window) < start - loop.start) | over
    kept = jnp.where(counted[:, None], proposal.judged, proposal.states)
    path = lax.dynamic_update_slice_in_dim(loop.states, kept, loop.start, 0)
    # What the solver remembers of the old window's residual is wrong in a new window.
    fresh = solver.init(initial, states)
    memory = jax.tree.map(lambda new, old: jnp.where(ahead == window, new, old), fresh, memory)
    left = axis.maximum(jnp.where(counted, per_step, 0))
    loop = _Loop(
        _extend_guess(path, loop.start + window, start, window),
        start,
        memory,
        status,
        loop.iterations + proposal.num_passes - over.astype(jnp.int32),
        nanaware_max(jnp.stack([loop.residual, left])),
        loop.start + num_exact,
        fingerprint,
        loop.evaluations + proposal.evaluations,
        loop.jvps + proposal.jvps,
        loop.depth + proposal.depth,
        loop.history.at[loop.iterations].set(size, mode="drop"),
        loop.num_jacobians + proposal.num_replaced_jacobians,
        loop.num_updates + proposal.num_replaced_updates,
        *((None, None) if loop.notes is None else (proposal.notes, proposal.residual)),
    )
    return loop, proposal


def _cut(initial, states, drives, start, window):
    """The window's first state, its states and its drives."""
    if window == states.shape[0]:
        return initial, states, drives
    before = lax.dynamic_index_in_dim(states, jnp.maximum(start - 1, 0), keepdims=False)
    cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=window)
    return jnp.where(start == 0, initial, before), cut(states), jax.tree.map(cut, drives)


def _extend_guess(states, old_end, start, window):
    """Where the window moves onto new steps, guess the last state before them."""
    if window == states.shape[0]:
        return states
    last = lax.dynamic_index_in_dim(states, old_end - 1, keepdims=False)
    index = jnp.arange(states.shape[0])
    unseen = (index >= old_end) & (index < start + window)
    return jnp.where(unseen[:, None], last, states)


def _repeats(loop, per_step, num_exact, memory, axis):
    """Whether the iterate of the last power of two came back.

    Iterates are compared by some numbers of their residual and of the solver's memory: a damping that still changes is no
    cycle.
    """
    finite = jnp.where(jnp.isfinite(per_step), per_step, 0)
    remembered = sum(
        (jnp.sum(leaf).astype(finite.dtype) for leaf in jax.tree.leaves(memory)),
        jnp.zeros((), finite.dtype),
    )
    now = jnp.stack(
        [
            axis.total(finite),
            axis.maximum(finite),
            (loop.start + num_exact).astype(finite.dtype),
            remembered,
        ]
    )
    power_of_two = (loop.iterations & (loop.iterations - 1)) == 0
    return jnp.all(now == loop.fingerprint), jnp.where(power_of_two, now, loop.fingerprint)


def check_strategies(
    dynamics: Dynamics,
    solver: Solver,
    schedule: Schedule,
    tolerance: Tolerance,
    adjoint: Adjoint,
) -> None:
    """Refuse what is no recurrence, solver, schedule, tolerance or adjoint.

    Raises:
        TypeError: Naming the argument.
    """
    if not isinstance(dynamics, Dynamics):
        raise TypeError(f"dynamics: got {describe(dynamics)}, wanted Dynamics(step, params)")
    check_has(solver, "solver", ("init", "step"), "a recipe such as shooting() or deer()")
    check_has(
        getattr(solver, "linearizer", getattr(solver, "correction", jax.jit)),
        "linearizer",
        ("__call__",),
        "an instance such as DenseJacobian()",
    )
    check_has(
        schedule,
        "schedule",
        ("window", "advance"),
        "AllAtOnce(), Windows(size) or SlidingWindow(size)",
    )
    check_has(adjoint, "adjoint", ("__call__",), "Implicit()")
    if not isinstance(tolerance, Tolerance):
        raise TypeError(
            f"tolerance: got {describe(tolerance)}, wanted Tolerance(relative, absolute)"
        )


def count_steps(drives: PyTree) -> int:
    """T, the common leading axis of all drives.

    Raises:
        ValueError: If there is none.
    """
    leaves = jax.tree.leaves(drives)
    if not leaves:
        raise ValueError(
            "drives: no arrays, wanted at least one leaf with leading axis T (use jnp.arange(T) if the "
            "dynamics ignores its drive)"
        )
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(lengths) > 1 or None in lengths:
        raise ValueError(
            f"drives: leading axes {sorted(map(str, lengths))}, wanted one common length T"
        )
    return leaves[0].shape[0]


def check_step(dynamics: Dynamics, initial: PyTree, drives: PyTree) -> Dynamics:
    """The dynamics with captured arrays as parameters, once its step is known to return a state like `initial`."""
    drive = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), drives)
    dynamics = without_captures(dynamics, initial, drive)
    result = jax.eval_shape(dynamics.step, dynamics.params, initial, drive)
    check_like("dynamics: step returns", result, initial, "initial")
    return dynamics


def check_iterations(max_iterations: int | None) -> int:
    """The bound on passes, None filled in.

    Raises:
        ValueError: If it is not a positive integer.
    """
    if max_iterations is None:
        return DEFAULT_MAX_ITERATIONS
    check_count(max_iterations, "max_iterations", 1)
    return max_iterations


def flat_guess(guess: PyTree | None, initial: PyTree, start: Array, num_steps: int) -> Array:
    """A guess as an array `(T, D)`, `start` standing in for what is missing or not finite.

    Raises:
        ValueError: If the guess is not shaped like a path of states such as `initial`.
    """
    constant = jnp.broadcast_to(start, (num_steps, *start.shape))
    if guess is None:
        return constant
    if jax.tree.structure(guess) != jax.tree.structure(initial):
        raise ValueError(
            f"guess: structure {jax.tree.structure(guess)}, wanted the state's "
            f"{jax.tree.structure(initial)}"
        )
    for (path, got), state in zip(
        jax.tree_util.tree_leaves_with_path(guess), jax.tree.leaves(initial)
    ):
        if jnp.shape(got) != (num_steps, *state.shape):
            raise ValueError(
                f"guess: {jax.tree_util.keystr(path) or 'the array'} has shape {jnp.shape(got)}, wanted "
                f"{(num_steps, *state.shape)}"
            )
    flat = jnp.concatenate(
        [jnp.asarray(leaf, start.dtype).reshape(num_steps, -1) for leaf in jax.tree.leaves(guess)],
        axis=1,
    )
    return jnp.where(jnp.isfinite(flat), flat, constant)
