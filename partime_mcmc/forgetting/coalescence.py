"""Pilot pairs: two paths from different starts under the same drives, and the step at which they become one.

    x_t = f(x_{t-1}, u_t),  y_t = f(y_{t-1}, u_t),    m = min {t : |x_tj − y_tj| ≤ absolute_j + relative |y_tj|, all j}

(`engine.solution` says what stands for an absolute tolerance that is not given).

The same map takes equal states to equal states, so a pair that has met bit for bit is one path for ever; a pair within
a tolerance of rounding is treated as one, as shooting treats it. m is what a re-rolled segment of shooting costs, and
from far-apart starts the time after which the system has forgotten its start. Unlike a Lyapunov exponent it speaks for
accept/reject decisions and piecewise-constant maps too (coupling by common random numbers: Johnson 1996; Wilson 2000).

All pairs are rolled side by side, with the dynamics' memory where it has one, and the loop ends when all have met.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from partime_mcmc.engine import Dynamics, Tolerance, ravel, without_captures
from partime_mcmc.engine.solution import nanaware_max
from partime_mcmc.executions import run_jitted
from partime_mcmc.solvers.segments import RecentSizes, agree
from partime_mcmc.solvers.sequential import cached_step_of
from partime_mcmc.types import Array, PyTree, pytree
from partime_mcmc.validation import check_count

_EULER_GAMMA = 0.5772156649


@pytree()
class MeetingTimes:
    """When pairs of paths became one.

    Attributes:
        steps: Steps until the pair was within tolerance, 0 for equal starts, shape `(K,)`; where a pair did not meet,
            the steps that were looked at.
        met: Whether it met, shape `(K,)`. A pair with a NaN in it has not.
        distance: `max_j |x_j − y_j| / scale_j` at that step, shape `(K,)`; NaN where a state is not finite.
    """

    steps: Array
    met: Array
    distance: Array


def meeting_times(
    dynamics: Dynamics,
    starts: PyTree,
    others: PyTree,
    drives: PyTree,
    *,
    tolerance: Tolerance = Tolerance(),
    max_steps: int | None = None,
    scale: Array | float = 1.0,
) -> MeetingTimes:
    """When pairs of paths with the same drives meet.

    Args:
        dynamics: The recurrence.
        starts: One start per pair, leaves `(K, ...)`.
        others: The other start of each pair, likewise.
        drives: Leaves `(K, T, ...)`, drives of its own for each pair, or `(T, ...)`, shared by all. Where both readings
            are possible (T = K) it is the first.
        tolerance: How near two states must be to count as one; 0 asks for equal bits.
        max_steps: Steps to look at, at most T; None is T.
        scale: Unit of the distance, a scalar or shape `(D,)`.

    Returns:
        Steps, verdict and distance of every pair. Looking ends when all pairs that hold no NaN have met.

    Raises:
        ValueError: If shapes do not fit, there are no pairs, or `max_steps` is not a positive integer.
    """
    flat, pairs, tape, shared = _prepared(dynamics, starts, others, drives)
    num_steps = jax.tree.leaves(tape)[0].shape[0]
    if max_steps is not None:
        num_steps = min(num_steps, check_count(max_steps, "max_steps", 1))
    return run_jitted(
        _meet,
        flat,
        pairs,
        tape,
        tolerance,
        jnp.asarray(num_steps),
        jnp.asarray(scale, pairs.dtype),
        shared=shared,
    )


def distances(
    dynamics: Dynamics,
    starts: PyTree,
    others: PyTree,
    drives: PyTree,
    *,
    scale: Array | float = 1.0,
) -> Array:
    """How far apart pairs of paths with the same drives are, step by step.

    Args:
        dynamics: The recurrence.
        starts: One start per pair, leaves `(K, ...)`.
        others: The other start of each pair, likewise.
        drives: Leaves `(K, T, ...)` or `(T, ...)`, as for `meeting_times`.
        scale: Unit of the distance, a scalar or shape `(D,)`.

    Returns:
        `max_j |x_tj − y_tj| / scale_j` for t = 1..T, shape `(K, T)`; NaN where a state is not finite.

    Raises:
        ValueError: If shapes do not fit or there are no pairs.
    """
    flat, pairs, tape, shared = _prepared(dynamics, starts, others, drives)
    return run_jitted(_distances, flat, pairs, tape, jnp.asarray(scale, pairs.dtype), shared=shared)


def expected_max_meeting_time(steps: np.ndarray, met: np.ndarray, lanes: int) -> float:
    """The expected largest of `lanes` meeting times, from those of the pilots.

    Args:
        steps: Meeting times, shape `(K,)`; where `met` is False the pair had not met by then.
        met: Shape `(K,)`.
        lanes: How many segments wait for one another.
    """
    expected = survival_time(steps, met, 1 / max(lanes, 2)) + _tail(steps, met)[1] * _EULER_GAMMA
    return max(expected, float(np.max(steps))) if lanes >= np.size(steps) else expected


def survival_time(steps: np.ndarray, met: np.ndarray, fraction: float) -> float:
    """After how many steps only this fraction of pairs, at most a half, has not met.

    Args:
        steps: Meeting times, shape `(K,)`, as for `expected_max_meeting_time`.
        met: Shape `(K,)`.
        fraction: Between 0 and ½.
    """
    median, scale = _tail(steps, met)
    return median + scale * math.log(0.5 / fraction)


def _tail(steps, met) -> tuple[float, float]:
    """The median, and the scale of an exponential beyond it; pairs that have not met add waiting time and no meeting."""
    steps = np.asarray(steps, float)
    median = float(np.median(steps))
    above = steps > median
    return median, float((steps[above] - median).sum()) / max(
        int((above & np.asarray(met)).sum()), 1
    )


@functools.partial(jax.jit, static_argnames=("shared",))
def _meet(dynamics, pairs, tape, tolerance, num_steps, scale, *, shared) -> MeetingTimes:
    bound = tolerance.parts(pairs.dtype)
    enter, advance = _batched(dynamics, shared)

    def look(step, states, carried):
        steps, met, gap, recent = carried
        recent = None if recent is None else recent.at(step)
        recent = None if recent is None else recent.seen(states[:, 1])
        sizes = None if recent is None else recent.mean
        near = agree(states[:, 0], states[:, 1], bound, sizes)
        near &= jnp.isfinite(states).all(axis=(1, 2))
        # A pair keeps the step and the distance of its meeting.
        gap = jnp.where(met, gap, _apart(states, scale))
        return jnp.where(met, steps, step), met | near, gap, recent

    def waiting(carry):
        step, _, states, (_, met, _, _) = carry
        return (step < num_steps) & (~met & ~jnp.isnan(states).any(axis=(1, 2))).any()

    def one_step(carry):
        step, memory, _, carried = carry
        memory, states = advance(memory, jax.tree.map(lambda leaf: leaf[step], tape))
        return step + 1, memory, states, look(step + 1, states, carried)

    count, zero = pairs.shape[0], jnp.zeros((), jnp.int32)
    begin = jnp.zeros(count, jnp.int32), jnp.zeros(count, bool), jnp.zeros(count, pairs.dtype)
    begin = *begin, RecentSizes.none(bound, pairs[:, 1])
    first = jax.tree.map(lambda leaf: leaf[0], tape)
    start = zero, enter(pairs, first), pairs, look(zero, pairs, begin)
    return MeetingTimes(*lax.while_loop(waiting, one_step, start)[3][:3])


@functools.partial(jax.jit, static_argnames=("shared",))
def _distances(dynamics, pairs, tape, scale, *, shared) -> Array:
    enter, advance = _batched(dynamics, shared)

    def one_step(memory, drive):
        memory, states = advance(memory, drive)
        return memory, _apart(states, scale)

    first = jax.tree.map(lambda leaf: leaf[0], tape)
    return lax.scan(one_step, enter(pairs, first), tape)[1].T


def _apart(pairs: Array, scale: Array) -> Array:
    """The distance of each pair, `(K, 2, D)` → `(K,)`."""
    gap = jnp.abs(pairs[:, 0] - pairs[:, 1]) / scale
    return jnp.where(jnp.isfinite(pairs).all(axis=(1, 2)), nanaware_max(gap, axis=1), jnp.nan)


def _batched(dynamics: Dynamics, shared: bool):
    """`enter` and one step of pairs: both paths of a pair see the same drive, which is drawn once."""
    cached = cached_step_of(dynamics)
    of_drives = None if shared else 0

    def over_pairs(function, params):
        both = jax.vmap(lambda value, drive: function(params, value, drive), in_axes=(0, None))
        return jax.vmap(both, in_axes=(0, of_drives))

    def advance(memory, drive):
        memory = over_pairs(cached.step, cached.params[1])(memory, drive)
        return memory, jax.vmap(jax.vmap(lambda value: cached.state(cached.params[2], value)))(
            memory
        )

    return over_pairs(cached.init, cached.params[0]), advance


def _prepared(dynamics, starts, others, drives):
    """Flat dynamics, starts as `(K, 2, D)`, drives with time in front, and whether all pairs share them."""
    starts, others, drives = (jax.tree.map(jnp.asarray, tree) for tree in (starts, others, drives))
    if jax.tree.structure(starts) != jax.tree.structure(others) or any(
        a.shape != b.shape for a, b in zip(jax.tree.leaves(starts), jax.tree.leaves(others))
    ):
        raise ValueError(
            f"others: {jax.tree.map(jnp.shape, others)}, wanted the shapes of starts, "
            f"{jax.tree.map(jnp.shape, starts)}"
        )
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(starts)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"starts: leading axes {sorted(counts)}, wanted one common number of pairs K of at least 1"
        )
    first = jax.tree.map(lambda leaf: leaf[0], starts)
    shared = _are_shared(dynamics, first, drives, counts.pop())
    drive = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1 if shared else 2 :], leaf.dtype), drives
    )
    flat, _, _ = ravel(without_captures(dynamics, first, drive), first)
    flatten = jax.vmap(lambda state: ravel_pytree(state)[0])
    tape = drives if shared else jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), drives)
    return flat, jnp.stack([flatten(starts), flatten(others)], axis=1), tape, shared


def _are_shared(dynamics, state, drives, num_pairs: int) -> bool:
    """Whether drives are `(T, ...)`; the step itself says which reading fits.

    Raises:
        ValueError: If none does.
    """
    leaves = jax.tree.leaves(drives)
    for axes, shared in ((2, False), (1, True)):
        head: tuple[int, ...] = leaves[0].shape[:axes] if leaves else ()
        if len(head) < axes or 0 in head or any(leaf.shape[:axes] != head for leaf in leaves):
            continue
        if not shared and head[:1] != (num_pairs,):
            continue
        drive = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype), drives
        )
        try:
            result = jax.eval_shape(dynamics.step, dynamics.params, state, drive)
        except (TypeError, ValueError):
            continue
        if jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, state):
            return shared
    raise ValueError(
        f"drives: shapes {[leaf.shape for leaf in leaves]}, wanted leaves (K, T, ...) with K = "
        f"{num_pairs} and T ≥ 1, or (T, ...), that the step accepts"
    )
