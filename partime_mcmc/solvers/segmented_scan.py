"""A relay: segments rolled side by side with one hand-over, for recurrences that cost little and forget quickly.

`Shooting` is ready for anything; its books (residual of every step, guesses, verdicts, transposed tapes) cost more than a
step of a recurrent network does. Where the state is expected to be forgotten within a segment, this is enough:

    pilot    a few lanes, two plausible starts each, same drives: do they meet within `patience` steps? If not, stop here
    roll     C segments of n steps from a guessed start                                  n steps deep, T evaluations
    mend     every segment again from its predecessor's end, until all meet what is stored           some steps deep
    else     one step after another, from the beginning

so the path is the recurrence's own to the tolerance, whatever the guess was worth: after the mend the residual is 0 but
for one step per segment, where it is the gap at the meeting. Phases that are not needed are loops of no trips: no branch,
no copy of a path, and a lane that never forgets costs the pilot only. Time and segments stay where they are in memory
(`(C, n, ...)` is a view of `(T, ...)`), because on a CPU moving a path costs as much as computing it.

Runs backwards in time as well, which is what the transpose of a recurrence asks for.
"""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.types import Array, PyTree, pytree


@pytree(static=("lanes", "most_chains"))
class SegmentedScanConfig:
    """How a relay is run; static, so that it is known when a program is traced.

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
            backend: The platform, as `jax.default_backend()` says it.
        """
        if (
            num_steps < (_LEAST_ON_CPU if backend == "cpu" else _LEAST)
            or self.most_chains is not None
            and num_chains > self.most_chains
        ):
            return 1
        most = min(max(self.lanes // num_chains, 1), num_steps // SHORTEST)
        return _divisor(num_steps, most) if most >= 2 else 1


# Segments shorter than this meet too late to be worth their start.
SHORTEST = 128
# The pilot: so many pairs, after so many steps that make the second of each pair typical, for at most so large a share of
# the run; a run that would leave it less than `_PATIENCE` steps is too short for a relay.
PROBES, PROBE_RUN, PROBE_SHARE, _PATIENCE = 4, 32, 32, 64
_LEAST = PROBE_SHARE * (PROBE_RUN + _PATIENCE)
# Whether `lax.scan` on a CPU keeps the products of a narrow step inside its loop, which makes it up to four times as fast.
LEAN_LOOPS = jax.__version_info__ >= (0, 12)
# Then the pilot and the mend cost more than a short run gains (32 units, 4,096 steps: 0.65 times the speed of `lax.scan`).
_LEAST_ON_CPU = 8192 if LEAN_LOOPS else _LEAST


def _divisor(num_steps: int, most: int) -> int:
    """The largest number of segments of at most `most` that leaves no rest, if one is near, else `most`."""
    for count in range(most, most // 2, -1):
        if num_steps % count == 0:
            return count
    return most


@pytree()
class SegmentedScanReport:
    """What happened; scalars, the same for all chains that were solved together.

    Attributes:
        parallel: Whether the path came from the segments; False if from one step after another.
        pilot_steps: Steps until the pilot's pairs met, or the patience they had.
        mended: Steps that every segment was rolled again.
        gap: The largest difference at a meeting: the largest residual of the path.
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
    bound: tuple[Array, Array],
    plan: SegmentedScanConfig,
    *,
    direction: int = 1,
) -> tuple[Array, SegmentedScanReport]:
    """The path of a recurrence, not differentiable; under `vmap` all chains with the same parameters share one set of lanes.

    Args:
        step: `(params, state, drive) -> state` on flat states; equal functions are compiled once.
        params: Shared by all steps.
        initial: The state before the first step, shape `(D,)`.
        drives: Leaves with leading axis `T`.
        bound: Absolute, shape `()` or `(D,)`, and relative tolerance at a meeting.
        plan: How many lanes.
        direction: 1 runs from the first step to the last, -1 from the last to the first.

    Returns:
        The states after each step, shape `(T, D)`, at the steps' places in time; and what happened.
    """
    absolute, relative = (jnp.asarray(part, initial.dtype) for part in bound)
    chains = jax.tree.map(
        lambda leaf: leaf[None],
        (initial, drives, jnp.broadcast_to(absolute, initial.shape), relative),
    )
    path, report = _runner(step, plan, direction)(params, *chains)
    return path[0], jax.tree.map(lambda leaf: leaf[0], report)


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
        num_steps = states.shape[1]
        begin = jnp.where(right.all(), num_steps, 0)
        return _roll(advance, initial, drives, states, 1, begin, num_steps)[1], jnp.full_like(
            right, right.all()
        )

    return _with_lanes(run)


@functools.lru_cache(maxsize=256)
def _runner(step, plan: SegmentedScanConfig, direction: int):
    """`(params, initial (B, D), drives (B, T, ...), absolute (B, D), relative (B,))`."""
    return _with_lanes(
        functools.partial(_run, step, plan, direction),
        functools.partial(_run, step, _ONE_LANE, direction),
    )


# One step after another, whatever the device.
_ONE_LANE = SegmentedScanConfig(1)


def _with_lanes(function, plain=None):
    """A function of shared parameters and of chains with a leading axis, to which `vmap` adds its own axis.

    `plain`, if given, does the same in loops whose length is known beforehand, so that it can be mapped: loops with a
    condition would copy the path in every step. On a CPU it takes chains with parameters of their own, where lanes have
    nothing to gain (`relay_plan`).
    """
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def _(axis_size, in_batched, params, *chains):
        if any(jax.tree.leaves(in_batched[0])):
            if plain is not None and jax.default_backend() == "cpu":
                axes = jax.tree.map(lambda flag: 0 if flag else None, tuple(in_batched))
                found = jax.vmap(plain, in_axes=axes, axis_size=axis_size)(params, *chains)
                return found, jax.tree.map(lambda _: True, found)
            # Every chain has parameters of its own: one after another, each in its own lanes.
            spread = jax.tree.map(
                lambda leaf, flag: (
                    leaf if flag else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
                ),
                (params, *chains),
                tuple(in_batched),
            )
            found = lax.map(lambda one: run(*one), spread)
        else:
            merged = jax.tree.map(
                lambda leaf, flag: _merge(leaf, flag, axis_size), chains, tuple(in_batched[1:])
            )
            found = jax.tree.map(
                lambda leaf: leaf.reshape(axis_size, -1, *leaf.shape[1:]), run(params, *merged)
            )
        return found, jax.tree.map(lambda _: True, found)

    return run


def _merge(leaf, is_batched, axis_size):
    leaf = leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
    return leaf.reshape(axis_size * leaf.shape[1], *leaf.shape[2:])


def _run(step, plan, direction, params, initial, drives, absolute, relative):
    """All phases over B chains."""
    num_chains, num_steps = jax.tree.leaves(drives)[0].shape[:2]
    segments = plan.segments(num_chains, num_steps, jax.default_backend())
    advance = functools.partial(jax.vmap(step, in_axes=(None, 0, 0)), params)
    path = jnp.zeros((num_chains, num_steps, initial.shape[1]), initial.dtype)
    zero = jnp.zeros((), jnp.int32)
    if segments == 1:
        path = _roll(advance, initial, drives, path, direction, 0, num_steps)[1]
        each = functools.partial(jnp.broadcast_to, shape=(num_chains,))
        return path, SegmentedScanReport(
            each(False),
            each(zero),
            each(zero),
            each(jnp.zeros((), path.dtype)),
            each(jnp.float32(1)),
        )
    length = num_steps // segments
    body = segments * length
    cut = functools.partial(_to_segments, segments=segments, length=length, direction=direction)
    bound = jnp.repeat(absolute, segments, axis=0), jnp.repeat(relative, segments)[:, None]
    patience = min(length, max(SHORTEST, length // 2))
    tape = jax.tree.map(cut, drives)
    forgets, looked = _probe(
        advance,
        initial,
        tape,
        bound,
        min(length, num_steps // PROBE_SHARE - PROBE_RUN),
        direction,
        segments,
    )
    lanes = jnp.repeat(initial, segments, axis=0)
    ends, rolled = _roll(
        advance, lanes, tape, cut(path), direction, 0, jnp.where(forgets, length, 0)
    )
    starts = _hand_over(initial, ends, direction)
    rolled, met, corrected, gap = _correct(
        advance, starts, tape, rolled, bound, patience, direction, forgets
    )
    rolled = rolled.reshape(num_chains, body, -1)
    if body < num_steps:
        rest = path[:, body:]
        rolled = jnp.concatenate([rolled, rest] if direction > 0 else [rest, rolled], axis=1)
    last = ends.reshape(num_chains, segments, -1)[:, -1 if direction > 0 else 0]
    first = jnp.where(met, body, 0)
    _, path = _roll(
        advance, jnp.where(met, last, initial), drives, rolled, direction, first, num_steps
    )
    work = (
        2.0 * min(PROBES, segments) * (PROBE_RUN + looked)
        + num_chains * segments * (jnp.where(forgets, length, 0) + corrected)
        + num_chains * (num_steps - first)
    ) / (num_chains * num_steps)
    report = SegmentedScanReport(
        met, looked, corrected, jnp.where(met, gap, 0), work.astype(jnp.float32)
    )
    return path, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_chains,)), report)


def _to_segments(leaf, segments, length, direction):
    """`(B, T, ...)` as `(B C, n, ...)`, without the rest that the last steps in `direction` are."""
    body = segments * length
    if body < leaf.shape[1]:
        leaf = leaf[:, :body] if direction > 0 else leaf[:, leaf.shape[1] - body :]
    return leaf.reshape(leaf.shape[0] * segments, length, *leaf.shape[2:])


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
    """Lanes from step `begin` to step `end`, written into `path`."""
    length = path.shape[1]

    def one(step, carry):
        states, path = carry
        at = _place(step, length, direction)
        states = advance(states, _row(tape, at))
        return states, lax.dynamic_update_index_in_dim(path, states, at, 1)

    return lax.fori_loop(begin, end, one, (states, path))


def _same(new, stored, bound):
    """Whether lanes agree, shape `(L,)`; infinite and NaN states agree with their like only."""
    near = jnp.isfinite(stored) & (jnp.abs(new - stored) <= bound[0] + bound[1] * jnp.abs(stored))
    return (near | (new == stored) | (jnp.isnan(new) & jnp.isnan(stored))).all(axis=1)


def _probe(advance, initial, tape, bound, patience, direction, segments):
    """Whether pairs of lanes meet within `patience` steps, and after how many.

    One of a pair starts where the relay's segments will, the other at a state that the recurrence itself has reached.
    """
    lanes, length = jax.tree.leaves(tape)[0].shape[:2]
    count = min(PROBES, lanes)
    chosen = jnp.arange(count) * lanes // count
    few, limit = (
        jax.tree.map(lambda leaf: leaf[chosen], tape),
        tuple(part[chosen] for part in bound),
    )
    starts = initial[chosen // segments]

    def roll(step, states):
        return advance(states, _row(few, _place(step, length, direction)))

    typical = lax.fori_loop(0, min(PROBE_RUN, length), roll, starts)
    pairs = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), few)

    def apart(carry):
        step, states = carry
        return (step < patience) & ~_same(states[:count], states[count:], limit).all()

    def onwards(carry):
        step, states = carry
        return step + 1, advance(states, _row(pairs, _place(step, length, direction)))

    step, states = lax.while_loop(
        apart,
        onwards,
        (jnp.zeros((), jnp.int32), jnp.concatenate([starts, jnp.roll(typical, 1, axis=0)])),
    )
    return _same(states[:count], states[count:], limit).all(), step


def _correct(advance, starts, tape, path, bound, patience, direction, wanted):
    """Roll from `starts` until every lane agrees with `path` at one step; what was rolled until then replaces it.

    Returns:
        The path, whether all agreed, how many steps were rolled, and the largest difference where they agreed.
    """
    length = path.shape[1]

    def unfinished(carry):
        step, _, met, _, _ = carry
        return wanted & (step < patience) & ~met

    def onwards(carry):
        step, states, _, _, head = carry
        at = _place(step, length, direction)
        states = advance(states, _row(tape, at))
        stored = _row(path, at)
        met = _same(states, stored, bound).all()
        gap = jnp.max(jnp.where(jnp.isfinite(stored), jnp.abs(states - stored), 0))
        # Read from one buffer and write to another: a loop that does both on one would copy all of it in every step.
        return (
            step + 1,
            states,
            met,
            gap,
            lax.dynamic_update_index_in_dim(head, states, _place(step, patience, direction), 1),
        )

    head = jnp.zeros((path.shape[0], patience, path.shape[2]), path.dtype)
    step, _, met, gap, head = lax.while_loop(
        unfinished,
        onwards,
        (jnp.zeros((), jnp.int32), starts, jnp.asarray(False), jnp.zeros((), path.dtype), head),
    )
    # At the meeting the stored state stays, because what follows was computed from it.
    begin = 0 if direction > 0 else length - patience
    order = _place(jnp.arange(patience), patience, direction)
    old = lax.slice_in_dim(path, begin, begin + patience, axis=1)
    new = jnp.where((order < step - 1)[None, :, None], head, old)
    return lax.dynamic_update_slice_in_dim(path, new, begin, 1), met & wanted, step, gap
