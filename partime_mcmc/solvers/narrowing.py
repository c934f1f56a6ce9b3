"""Lanes: segments rolled side by side, each until it meets its stored path, in fewer and fewer lanes.

    level 0    L lanes, all of them               until at most W₁ are open
    level k    W_k lanes, the open ones gathered  until at most W_{k+1} are open, or the segments end

The loops of all levels are compiled once, with fixed widths W_k = ⌈L / 4^k⌉; how long each of them runs is decided while
running. A lane that has met costs nothing once it is left behind: the work is at most four times that of the open lanes
instead of L times the slowest. Where a level ends, its states are written back, and the next level begins from them.

Kernels that record `aux` numbers show which steps stand still. There, a path meets its stored one on a step that moves, or
on equal bits: the difference at a meeting is then a change of the proposal's noise, and never a rejected step that moves by
a rounding error.

A program of another width may round differently. So lanes are not narrowed where the tolerance is 0, and not where several
chains share the lanes, because then the last bits of one chain would depend on when the others meet.
"""

import functools
import math
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.solution import Bound
from partime_mcmc.solvers.base import defect
from partime_mcmc.solvers.segments import RecentSizes, agree
from partime_mcmc.types import Array, PyTree

_NARROWER = 4
# With fewer lanes a step costs no less: starting its kernels is all that it costs.
_NARROWEST = 8
_MAX_LEVELS = 4


class Segments(NamedTuple):
    """The recurrence in lanes.

    Attributes:
        init: `(states (W, D), drives of one step) -> memory`.
        roll: `(memory, values of one step) -> (memory, rows (W, D + R))`: states, and behind them the step's `aux` numbers.
        drives: Drives by segment, leading axes `(L, n)`.
        values: What `roll` needs of each step, leading axes `(n, L)`.
        bound: The tolerance, its parts of shapes `(L, D)` and `(L, 1)`.
        init_cost: Evaluations that `init` costs: 1 or 0.
    """

    init: Callable
    roll: Callable
    drives: PyTree
    values: PyTree
    bound: Bound
    init_cost: int


class Lanes(NamedTuple):
    """The state of all lanes.

    Attributes:
        path: Stored states, and the `aux` numbers of their steps, shape `(n, L, D + R)`.
        step: The next step to roll, the same for all lanes.
        open: Lanes that have not met their stored path, shape `(L,)`.
        where: At which step each lane last met its path, shape `(L,)`.
        gap: By how much they differed there, shape `(L, D)`.
        evaluations: Steps computed so far, those of lanes that have met included; a floating-point scalar.
        depth: How many of them one after another.
    """

    path: Array
    step: Array
    open: Array
    where: Array
    gap: Array
    evaluations: Array
    depth: Array


def no_lanes(steps: int, num_lanes: int, dimension: int, num_aux: int, dtype: jnp.dtype) -> Lanes:
    """The lanes before the first pass: all open, nothing stored."""
    zero = jnp.zeros((), jnp.int32)
    return Lanes(
        jnp.zeros((steps, num_lanes, dimension + num_aux), dtype),
        zero,
        jnp.ones(num_lanes, bool),
        jnp.zeros(num_lanes, jnp.int32),
        jnp.zeros((num_lanes, dimension), dtype),
        jnp.zeros((), jnp.float32),
        zero,
    )


def widths(num_lanes: int, num_chains: int) -> tuple[int, ...]:
    """The widths of the levels."""
    found = [num_lanes]
    while num_chains == 1 and len(found) < _MAX_LEVELS and found[-1] // _NARROWER >= _NARROWEST:
        found.append(math.ceil(found[-1] / _NARROWER))
    return tuple(found)


def roll_until_met(
    segments: Segments, lanes: Lanes, starts: Array, is_first: Array, levels: tuple[int, ...]
) -> Lanes:
    """Roll the open lanes until each has met its stored path or a segment has ended.

    Args:
        segments: The recurrence.
        lanes: Which are open, and what is stored.
        starts: Where segments start, shape `(L, D)`.
        is_first: Whether nothing is stored yet, so that nothing can be met.
        levels: From `widths`.

    Returns:
        The lanes; those still open have a new path to their very end, and no gap in it.
    """
    steps = lanes.path.shape[0]
    absolute, relative = segments.bound
    only_equal = ((relative == 0) & (True if absolute is None else absolute == 0)).any()
    lanes = lanes._replace(step=jnp.zeros((), jnp.int32))
    for width, narrower in zip(levels, (*levels[1:], 0)):
        enough = jnp.where(only_equal | is_first, 0, narrower)

        def wanted(lanes, enough=enough):
            return (lanes.step < steps) & (lanes.open.sum() > enough)

        level = functools.partial(_level, segments, starts, is_first, width, enough)
        # At most one iteration: a level ends where its condition does.
        lanes = lax.while_loop(wanted, level, lanes)
    return lanes._replace(gap=jnp.where(lanes.open[:, None], 0, lanes.gap))


def _level(segments: Segments, starts, is_first, width, enough, lanes: Lanes) -> Lanes:
    """Roll the open lanes, gathered in `width` lanes, until few enough are open."""
    (steps, num_lanes, width_of_row), dimension = lanes.path.shape, starts.shape[1]
    is_state = jnp.arange(width_of_row) < dimension
    full, begin = width == num_lanes, lanes.step
    if full:
        chosen, take = jnp.arange(num_lanes), lambda leaf: leaf
    else:
        chosen = jnp.nonzero(lanes.open, size=width, fill_value=num_lanes)[0]
        take = lambda leaf: leaf.at[chosen].get(mode="clip")  # noqa: E731
    row = functools.partial(lax.dynamic_index_in_dim, index=begin, axis=1, keepdims=False)
    before = lax.dynamic_index_in_dim(lanes.path, jnp.maximum(begin - 1, 0), keepdims=False)[
        :, :dimension
    ]
    state = take(jnp.where(begin == 0, starts, before))
    memory = segments.init(state, jax.tree.map(lambda leaf: take(row(leaf)), segments.drives))
    bound = jax.tree.map(take, segments.bound)
    met = ~lanes.open if full else chosen == num_lanes

    def going(carry):
        return (carry[0] < steps) & ((~carry[4]).sum() > enough)

    def advance(carry):
        step, memory, last, rolled, met, where, gap, recent = carry
        at_step = functools.partial(lax.dynamic_index_in_dim, index=step, keepdims=False)
        memory, row = segments.roll(
            memory, jax.tree.map(lambda leaf: take(at_step(leaf)), segments.values)
        )
        stored_row = take(at_step(lanes.path))
        new, stored = row[:, :dimension], stored_row[:, :dimension]
        # An older gap further on is still there; the larger of the two stands for both, at the place of the newer.
        older = jnp.where((where > step)[:, None], jnp.abs(gap), 0)
        recent = None if recent is None else recent.at(step)
        sizes = None if recent is None else recent.seen(stored).mean
        meets = ~met & agree(new, stored, bound, sizes, older) & ~is_first
        if last is not None:
            meets &= (new != last).any(axis=1) | (new == stored).all(axis=1)
        apart = jnp.maximum(jnp.abs(defect(new, stored)), older)
        gap = jnp.where(meets[:, None], apart, gap)
        where = jnp.where(meets, step, where)
        # At the meeting the stored state stays, because what follows was computed from it; `aux` is of the new step.
        row = jnp.where(met[:, None] | meets[:, None] & is_state, stored_row, row)
        rolled = lax.dynamic_update_index_in_dim(rolled, row, step, 0)
        recent = None if recent is None else recent.seen(new)
        last = None if last is None else new
        return step + 1, memory, last, rolled, met | meets, where, gap, recent

    # Read from one buffer and write to another: a loop that does both on one is made to copy all of it in every step.
    rolled = jnp.zeros((steps, width, width_of_row), lanes.path.dtype)
    last = state if width_of_row > dimension else None
    recent = RecentSizes.none(bound, state)
    begins = begin, memory, last, rolled, met, take(lanes.where), take(lanes.gap), recent
    end, _, _, rolled, met, where, gap, _ = lax.while_loop(going, advance, begins)
    if full:
        path = lax.fori_loop(begin, end, functools.partial(_copy_step, rolled), lanes.path)
        still = ~met
    else:
        stop = jnp.where(chosen == num_lanes, 0, jnp.where(met, where + 1, end))
        path = _written_back(lanes.path, rolled, chosen, begin, stop)
        still = jnp.zeros_like(lanes.open).at[chosen].set(~met, mode="drop")
        where, gap = (
            old.at[chosen].set(new, mode="drop")
            for old, new in ((lanes.where, where), (lanes.gap, gap))
        )
    done = end - begin + segments.init_cost
    return Lanes(path, end, still, where, gap, lanes.evaluations + width * done, lanes.depth + done)


def _copy_step(rolled, step, path):
    row = lax.dynamic_index_in_dim(rolled, step, keepdims=False)
    return lax.dynamic_update_index_in_dim(path, row, step, 0)


def _written_back(path, rolled, chosen, begin, stop):
    """The path with steps `begin` to `stop` (one per lane) of the chosen lanes replaced, lane after lane in place."""
    index = jnp.arange(path.shape[0])[:, None, None]

    def write(lane, path):
        new = lax.dynamic_slice_in_dim(rolled, lane, 1, axis=1)
        old = lax.dynamic_slice_in_dim(path, chosen[lane], 1, axis=1)
        fresh = (index >= begin) & (index < stop[lane])
        return lax.dynamic_update_slice_in_dim(
            path, jnp.where(fresh, new, old), chosen[lane], axis=1
        )

    return lax.fori_loop(0, rolled.shape[1], write, path)
