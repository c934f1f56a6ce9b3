"""A segmented scan: segments rolled side by side and corrected once, for recurrences that cost little and forget quickly.

`Shooting` copes with any recurrence, but its bookkeeping (the residual of every step, guesses, verdicts, drives moved to
the front of time) costs more than a step of a recurrent network does. Where a state is forgotten within a segment, less is
enough:

    probe      a few lanes, two plausible starts each, the same drives: do they meet within `patience` steps?
    roll       C segments of n steps from a guessed start                          n steps deep, T evaluations
    correct    every segment again from its predecessor's end, until all agree with the stored path
    otherwise  one step after another, from the beginning

The path is the recurrence's own to the tolerance, whatever the guess was worth: after the correction the residual is 0
except at one step per segment, where it is the difference at the meeting. A phase that is not needed is a loop of no
iterations, so no path is copied, and a recurrence that never forgets pays for the probe only. Time and segments keep their
order in memory (`(C, n, ...)` is a view of `(T, ...)`), because on a CPU moving a path costs as much as computing it: this
is why `Shooting`, which moves time to the front, is not the solver of networks.

The scan also runs backwards in time, as the transpose of a recurrence needs.
"""

import functools
from typing import Callable

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.solvers.segments import (
    RecentSizes,
    agree,
    bound_of_lanes,
    share_lanes,
    to_segments,
)
from partime_mcmc.types import Array, ArrayLike, PyTree, pytree

# Segments shorter than this meet too late to be worth their start.
SHORTEST = 128
# The probe: so many pairs, after so many steps that make the second of each pair typical, for at most so large a share of
# the run; a run that would leave it less than `_PATIENCE` steps is too short for segments.
PROBES, PROBE_RUN, PROBE_SHARE, _PATIENCE = 4, 32, 32, 64
_LEAST = PROBE_SHARE * (PROBE_RUN + _PATIENCE)
# Whether `lax.scan` on a CPU keeps the products of a narrow step inside its loop, which makes it up to four times as fast.
LEAN_LOOPS = jax.__version_info__ >= (0, 12)
# Then probe and correction cost more than a short run gains (32 units, 4,096 steps: 0.65 times the speed of `lax.scan`).
_LEAST_ON_CPU = 8192 if LEAN_LOOPS else _LEAST


@pytree(static=("lanes", "most_chains"))
class SegmentedScanConfig:
    """How many segments a path is cut into; static, so that it is known when a program is traced.

    Attributes:
        lanes: Chains × segments wanted side by side.
        most_chains: The largest batch that gains from lanes; None where every batch does.
    """

    lanes: int
    most_chains: int | None = None

    def segments(self, num_chains: int, num_steps: int, backend: str) -> int:
        """C, segments per chain; 1 means one step after another.

        Args:
            num_chains: B, chains that are solved together.
            num_steps: T.
            backend: The platform, as `jax.default_backend()` names it.
        """
        if (
            num_steps < (_LEAST_ON_CPU if backend == "cpu" else _LEAST)
            or self.most_chains is not None
            and num_chains > self.most_chains
        ):
            return 1
        most = min(max(self.lanes // num_chains, 1), num_steps // SHORTEST)
        if most < 2:
            return 1
        # The largest number that divides the steps, if one is near.
        return next((n for n in range(most, most // 2, -1) if num_steps % n == 0), most)


@pytree()
class SegmentedScanReport:
    """How a path was found; scalars, the same for all chains that were solved together.

    Attributes:
        parallel: Whether the path came from the segments; False if from one step after another.
        probe_steps: Steps until the probe's pairs met, or the patience they had.
        corrected: Steps that every segment was rolled again.
        gap: The largest difference at a meeting, which is the largest residual of the path.
        evaluations: Evaluations of the step per step of the path.
    """

    parallel: Array
    probe_steps: Array
    corrected: Array
    gap: Array
    evaluations: Array


def segmented_scan(
    step: Callable,
    params: PyTree,
    initial: Array,
    drives: PyTree,
    bound: tuple[ArrayLike | None, ArrayLike],
    plan: SegmentedScanConfig,
    *,
    direction: int = 1,
) -> tuple[Array, SegmentedScanReport]:
    """The path of a recurrence, not differentiable; under `vmap` chains with the same parameters share one set of lanes.

    Args:
        step: `(params, state, drive) -> state` on flat states; equal functions are compiled once.
        params: Shared by all steps.
        initial: The state before the first step, shape `(D,)`.
        drives: Leaves with leading axis `T`.
        bound: Absolute, shape `()` or `(D,)`, and relative tolerance at a meeting. None for the former judges by the largest
            mean |x_k| of the last states, over all k: numbers of one state are taken to be of one kind, and each a sum of others.
        plan: How many lanes.
        direction: 1 runs from the first step to the last, -1 from the last to the first.

    Returns:
        The states after each step, shape `(T, D)`, each at its step's place in time; and how they were found.
    """
    absolute, relative = jax.tree.map(lambda part: jnp.asarray(part, initial.dtype), tuple(bound))
    absolute = None if absolute is None else jnp.broadcast_to(absolute, initial.shape)
    chains = (initial, drives, absolute, relative)
    chains = jax.tree.map(lambda leaf: leaf[None], chains)
    return jax.tree.map(lambda leaf: leaf[0], _runner(step, plan, direction)(params, *chains))


def one_after_another(
    step: Callable, params: PyTree, initial: Array, drives: PyTree, states: Array, right: Array
) -> tuple[Array, Array]:
    """`states` where they are `right`, else the path by one step after another; not differentiable.

    Args:
        step: `(params, state, drive) -> state` on flat states.
        params: Shared by all steps.
        initial: Shape `(D,)`.
        drives: Leaves with leading axis `T`.
        states: Shape `(T, D)`.
        right: A Boolean.

    Returns:
        The path, and `right`; under `vmap` one wrong path has all of them computed again, and none is right.
    """
    chains = jax.tree.map(lambda leaf: leaf[None], (initial, drives, states, right))
    return jax.tree.map(lambda leaf: leaf[0], _fallback(step)(params, *chains))


@functools.lru_cache(maxsize=256)
def _fallback(step):
    def run(params, initial, drives, states, right):
        advance = functools.partial(jax.vmap(step, in_axes=(None, 0, 0)), params)
        num_steps, all_right = states.shape[1], right.all()
        begin = jnp.where(all_right, num_steps, 0)
        path = _roll(advance, initial, drives, states, 1, begin, num_steps)[1]
        return path, jnp.full_like(right, all_right)

    return share_lanes(run)


@functools.lru_cache(maxsize=256)
def _runner(step, plan: SegmentedScanConfig, direction: int):
    """`(params, initial (B, D), drives (B, T, ...), absolute (B, D), relative (B,))`."""
    return share_lanes(
        functools.partial(_run, step, plan, direction),
        functools.partial(_run, step, SegmentedScanConfig(1), direction),
    )


def _run(step, plan, direction, params, initial, drives, absolute, relative):
    """All phases over B chains."""
    num_chains, num_steps = jax.tree.leaves(drives)[0].shape[:2]
    segments = plan.segments(num_chains, num_steps, jax.default_backend())
    advance = functools.partial(jax.vmap(step, in_axes=(None, 0, 0)), params)
    path = jnp.zeros((num_chains, num_steps, initial.shape[1]), initial.dtype)
    zero, forward = jnp.zeros((), jnp.int32), direction > 0
    if segments == 1:
        path = _roll(advance, initial, drives, path, direction, 0, num_steps)[1]
        nothing = jnp.asarray(False), zero, zero, jnp.zeros((), path.dtype), jnp.float32(1)
        return path, _for_all(SegmentedScanReport(*nothing), num_chains)
    length = num_steps // segments
    body = segments * length

    def cut(leaf):
        # The last steps, in the direction of the scan, are left over.
        leaf = leaf[:, :body] if forward else leaf[:, num_steps - body :]
        return to_segments(leaf, segments)

    bound = bound_of_lanes(absolute, relative, segments)
    tape = jax.tree.map(cut, drives)
    patience = min(length, num_steps // PROBE_SHARE - PROBE_RUN)
    forgets, looked = _probe(advance, initial, tape, bound, patience, direction, segments)
    lanes, to_roll = jnp.repeat(initial, segments, axis=0), jnp.where(forgets, length, 0)
    ends, rolled = _roll(advance, lanes, tape, cut(path), direction, 0, to_roll)
    starts = _hand_over(initial, ends, direction)
    patience = min(length, max(SHORTEST, length // 2))
    rolled, met, corrected, gap = _correct(
        advance, starts, tape, rolled, bound, patience, direction, forgets
    )
    rolled = rolled.reshape(num_chains, body, -1)
    if body < num_steps:
        rest = path[:, body:]
        rolled = jnp.concatenate([rolled, rest] if forward else [rest, rolled], axis=1)
    last = ends.reshape(num_chains, segments, -1)[:, -1 if forward else 0]
    first = jnp.where(met, body, 0)
    begin = jnp.where(met, last, initial)
    path = _roll(advance, begin, drives, rolled, direction, first, num_steps)[1]
    work = (
        2.0 * min(PROBES, segments) * (PROBE_RUN + looked)
        + num_chains * segments * (to_roll + corrected)
        + num_chains * (num_steps - first)
    ) / (num_chains * num_steps)
    report = SegmentedScanReport(
        met, looked, corrected, jnp.where(met, gap, 0), work.astype(jnp.float32)
    )
    return path, _for_all(report, num_chains)


def _for_all(report, num_chains):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_chains,)), report)


def _hand_over(initial, ends, direction):
    """Every segment starts where its predecessor ended, the first at `initial`."""
    by_chain = ends.reshape(initial.shape[0], -1, initial.shape[1])
    first = initial[:, None]
    parts = [first, by_chain[:, :-1]] if direction > 0 else [by_chain[:, 1:], first]
    return jnp.concatenate(parts, axis=1).reshape(ends.shape)


def _row(tree, index):
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, 1, keepdims=False), tree)


def _place(step, length, direction):
    return step if direction > 0 else length - 1 - step


def _roll(advance, states, tape, path, direction, begin, end):
    """Roll lanes from step `begin` to step `end`: the last states, and `path` with the states of these steps."""
    length = path.shape[1]

    def one(step, carry):
        states, path = carry
        at = _place(step, length, direction)
        states = advance(states, _row(tape, at))
        return states, lax.dynamic_update_index_in_dim(path, states, at, 1)

    return lax.fori_loop(begin, end, one, (states, path))


def _probe(advance, initial, tape, bound, patience, direction, segments):
    """Whether pairs of lanes meet within `patience` steps, and after how many.

    One of a pair starts where the segments will, the other at a state that the recurrence itself has reached.
    """
    lanes, length = jax.tree.leaves(tape)[0].shape[:2]
    count = min(PROBES, lanes)
    chosen = jnp.arange(count) * lanes // count
    few, limit = jax.tree.map(lambda leaf: leaf[chosen], (tape, bound))
    starts = initial[chosen // segments]

    def roll(step, states):
        return advance(states, _row(few, _place(step, length, direction)))

    typical = lax.fori_loop(0, min(PROBE_RUN, length), roll, starts)
    pairs = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), few)

    def have_met(states, recent):
        return agree(states[:count], states[count:], limit, _largest(recent)).all()

    def apart(carry):
        step, _, _, met = carry
        return (step < patience) & ~met

    def onwards(carry):
        step, states, recent, _ = carry
        states = advance(states, _row(pairs, _place(step, length, direction)))
        recent = None if recent is None else recent.at(step).seen(states[count:])
        return step + 1, states, recent, have_met(states, recent)

    states = jnp.concatenate([starts, jnp.roll(typical, 1, axis=0)])
    recent = RecentSizes.none(limit, starts)
    recent = None if recent is None else recent.seen(states[count:])
    begin = jnp.zeros((), jnp.int32), states, recent, have_met(states, recent)
    step, _, _, met = lax.while_loop(apart, onwards, begin)
    return met, step


def _largest(recent):
    return None if recent is None else recent.mean.max(axis=1, keepdims=True)


def _correct(advance, starts, tape, path, bound, patience, direction, wanted):
    """Roll from `starts` until every lane agrees with `path` at one step; what was rolled until then replaces it.

    Returns:
        The path, whether all lanes agreed, how many steps were rolled, and the largest difference where they agreed.
    """
    length = path.shape[1]

    def unfinished(carry):
        step, _, met, _, _, _ = carry
        return wanted & (step < patience) & ~met

    def onwards(carry):
        step, states, _, _, head, recent = carry
        at = _place(step, length, direction)
        states = advance(states, _row(tape, at))
        stored = _row(path, at)
        recent = None if recent is None else recent.at(step)
        sizes = None if recent is None else recent.seen(stored)
        met = agree(states, stored, bound, _largest(sizes)).all()
        recent = None if recent is None else recent.seen(states)
        gap = jnp.max(jnp.where(jnp.isfinite(stored), jnp.abs(states - stored), 0))
        # Read from one buffer and write to another: a loop that does both on one would copy all of it in every step.
        place = _place(step, patience, direction)
        head = lax.dynamic_update_index_in_dim(head, states, place, 1)
        return step + 1, states, met, gap, head, recent

    head = jnp.zeros((path.shape[0], patience, path.shape[2]), path.dtype)
    nothing = jnp.zeros((), jnp.int32), starts, jnp.asarray(False), jnp.zeros((), path.dtype), head
    nothing = *nothing, RecentSizes.none(bound, starts)
    step, _, met, gap, head, _ = lax.while_loop(unfinished, onwards, nothing)
    # At the meeting the stored state stays, because what follows was computed from it.
    begin = 0 if direction > 0 else length - patience
    order = _place(jnp.arange(patience), patience, direction)
    old = lax.slice_in_dim(path, begin, begin + patience, axis=1)
    new = jnp.where((order < step - 1)[None, :, None], head, old)
    return lax.dynamic_update_slice_in_dim(path, new, begin, 1), met & wanted, step, gap
