"""Shooting: segments of the path rolled side by side until their ends and starts coincide.

Cut time into C segments of n steps and roll all of them at once, sequentially inside, from guessed starts. Then give every
segment its predecessor's end as its new start and roll it again, but only until it meets its own stored path: both have the
same random numbers, so on a system that forgets they coalesce after m ≪ n steps, and everything after the meeting is already
right.

    pass 1       x_{c,0} guessed         n steps deep, T evaluations
    pass k > 1   x_{c,0} ← x_{c-1,n}     until |x_{c,i} − stored_{c,i}| ≤ tolerance in all segments, or i = n
    done when every segment starts at its predecessor's end, to the tolerance: depth n + m, 1 + m/n evaluations per step

The loop is narrowed to the segments that have not met yet (`narrowing`). What a step computes from its drive alone, random
draws above all, is computed once, for all steps in one batch (`hoist`).

One segment is the sequential chain. After k passes the first k segments are exact whatever the system; a system that does
not forget needs C passes, so the solver gives up at a bound on its work (`gave_up`), and the caller goes on sequentially.
No derivative is needed and nothing can overflow that does not overflow in the sequential chain. This is multiple shooting
(Bellen & Zennaro 1989), i.e. parareal without a coarse model, with coalescence in place of contraction estimates.

Where forgetting is slow the starts can be corrected: with F_c the map of a whole segment and A_c its linearisation,

    x_{c+1,0} ← F_c(x_{c,0}) + A_c δ_c,     δ_c the change of x_{c,0} by this very rule,

which is a Newton or quasi-Newton step for the starts of segments. `steps=1` with the Jacobian is DEER; A = 0, the default, is the rule
above. A correction costs one more roll of every segment and its JVPs, and may overflow unless it is clipped.
"""

import dataclasses
import functools
import math
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.dynamics import CachedStep, Dynamics
from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.engine.time_axis import REMEMBERED, TimeAxis
from partime_mcmc.linearize import Linearizer, ZeroJacobian
from partime_mcmc.solvers.base import Proposal, Solver, defect
from partime_mcmc.solvers.hoist import hoist_drive_only
from partime_mcmc.solvers.interfaces import SegmentInterfaces, corrector
from partime_mcmc.solvers.narrowing import Segments, no_lanes, roll_until_met, widths
from partime_mcmc.solvers.segments import (
    agree,
    bound_of_lanes,
    segment_length,
    share_lanes,
    to_segments,
)
from partime_mcmc.solvers.sequential import cached_step_of, init_as_is
from partime_mcmc.types import Array, Key, PyTree, pytree
from partime_mcmc.validation import check_count

# If fewer than one segment in twenty has met after so many steps, the chain is taken to be one that does not forget.
_TRIAL = 256


@pytree(static=("num_segments", "steps", "max_evaluations", "max_passes"))
class Shooting(Solver):
    """Segments side by side until they coalesce.

    Attributes:
        num_segments: C; None leaves it to `segments.segment_length`, or to `steps`.
        steps: n, instead of `num_segments`; at most one of the two is given.
        correction: What stands for the Jacobian of a whole segment when starts are corrected; zero hands over ends.
        max_evaluations: The bound on the work, in evaluations per step of the path, if every pass rolled all segments to
            their ends. At this bound the solver gives up if more than half of the segments are still open, and at four
            times the bound in any case. None is 4 + 256 / n. With None it also gives up after two rolls of all segments,
            and at least 256 steps, if fewer than one segment in twenty has met, those that are exact whatever the system
            not counted: such a chain does not forget its past.
        max_passes: Passes after which `step` hands the path back, to be called again with it; None makes all of them. The
            passes are the same to rounding, but segments are not rolled onto their old paths across calls, so that each
            call rolls them to their ends.
    """

    num_segments: int | None = None
    steps: int | None = None
    correction: Linearizer = ZeroJacobian()
    max_evaluations: float | None = None
    max_passes: int | None = None
    keeps_aux: ClassVar[bool] = True

    def __post_init__(self):
        if self.num_segments is not None and self.steps is not None:
            raise ValueError(
                f"num_segments and steps: got both ({self.num_segments} and {self.steps}), wanted one"
            )
        if self.max_evaluations is not None and not self.max_evaluations >= 1:
            raise ValueError(
                f"max_evaluations must be at least 1 or None, got {self.max_evaluations!r}"
            )
        for name in ("num_segments", "steps", "max_passes"):
            value = getattr(self, name)
            if value is not None:
                check_count(value, name, 1)

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
        num_devices = axis.length(1)
        steps = self.segment_steps(axis.length(states.shape[0]), num_devices)
        if num_devices > 1 and states.shape[0] % steps:
            raise ValueError(
                f"steps: segments of {steps} steps do not fill the {states.shape[0]} steps of each device; take "
                "a divisor, or distributed.sharded_solve, which fills up time"
            )
        absolute, relative = tolerance.parts(states.dtype)
        absolute = None if absolute is None else jnp.broadcast_to(absolute, initial.shape)
        cached = cached_step_of(dynamics)
        budget = 4 + 256 / steps if self.max_evaluations is None else self.max_evaluations
        budget = (
            math.ceil(budget * steps),
            math.inf if self.max_evaluations is not None else max(2 * steps, _TRIAL),
        )
        functions = dataclasses.replace(cached, params=(None, None, None))
        shoot = _shoot_for(functions, steps, budget, self.max_passes, axis)
        shared = jax.tree.map(jnp.asarray, (cached.params, self.correction)), key
        batched = jax.tree.map(
            lambda leaf: leaf[None], (initial, states, drives, absolute, relative)
        )
        found = shoot(shared, *batched)
        following, path, notes, residual, evaluations, jvps, depth, gave_up, num_passes = (
            jax.tree.map(lambda leaf: leaf[0], found)
        )
        none, notes = jnp.zeros((), jnp.int32), notes if cached.aux else None
        return Proposal(
            path if following is None else following,
            path,
            residual,
            none,
            none,
            depth,
            evaluations,
            jvps,
            gave_up,
            num_passes,
            notes,
        ), state

    def map_size(self, dimension: int) -> int:
        return self.correction.map_size(dimension)

    def single_pass(self) -> Self:
        return dataclasses.replace(self, max_passes=1)

    def segment_steps(self, num_steps: int, num_devices: int = 1) -> int:
        """The length n of a segment for a path of `num_steps` on so many devices, each of which holds whole segments."""
        here = math.ceil(num_steps / num_devices)
        if self.steps is not None:
            return min(self.steps, here)
        if self.num_segments is not None:
            return math.ceil(here / math.ceil(min(self.num_segments, num_steps) / num_devices))
        return min(here, segment_length(here))


@functools.lru_cache(maxsize=256)
def _shoot_for(
    cached: CachedStep,
    steps: int,
    budget: tuple[int, float],
    max_passes: int | None,
    axis: TimeAxis,
):
    """The shooting of B chains, `(shared, initial (B, D), guess (B, T, D), drives (B, T, ...), ...)`."""
    return share_lanes(functools.partial(_shoot, cached, steps, budget, max_passes, axis))


def _shoot(
    cached, steps, budget, max_passes, axis, shared, initial, guess, drives, absolute, relative
):
    """All passes over B chains; lanes are chains × the segments on this device.

    Returns:
        What to guess next (None: the path) and the path `(B, T, D)`, `aux` numbers `(B, T, R)`, residual `(B, T, D)`, and
        evaluations, JVPs, depth, whether it gave up, and passes, `(B,)` each.
    """
    num_chains, num_steps, dimension = guess.shape
    num_segments = math.ceil(num_steps / steps)
    num_lanes = num_chains * num_segments
    drives = jax.tree.map(lambda leaf: _filled_up(leaf, num_segments, steps), drives)
    bound = bound_of_lanes(absolute, relative, num_segments)
    interfaces = SegmentInterfaces(axis, initial)
    ends = guess[:, jnp.minimum(jnp.arange(1, num_segments + 1) * steps, num_steps) - 1]
    guessed = interfaces.hand_over(ends.reshape(num_lanes, dimension))
    (params, correction), key = shared
    cached = dataclasses.replace(cached, params=params)
    correct = corrector(cached, correction, key, drives, interfaces)
    plain = isinstance(correction, ZeroJacobian)
    # A corrected start differs from its predecessor's end by what the meeting leaves over; that must still be within `bound`.
    meeting = bound if plain else bound.scaled(0.25)
    segments, num_aux = _segments(cached, initial[0], drives, meeting)
    levels = widths(num_lanes, num_chains)
    is_closed = functools.partial(_closed, interfaces, bound, num_aux)
    goes_on = functools.partial(_goes_on, axis, budget, num_segments, num_lanes)

    def one_pass(carry):
        passes, old, new, lanes, _, _ = carry
        # Not the same question as whether an interface is open: a correction may move a start whose interface was closed.
        unchanged = ((new == old) | (jnp.isnan(new) & jnp.isnan(old))).all(axis=1) & (passes > 0)
        lanes = roll_until_met(segments, lanes._replace(open=~unchanged), new, passes == 0, levels)
        # A pass is as deep as the slowest device has made it.
        depth = axis.maximum(lanes.depth[None].astype(jnp.float32)).astype(jnp.int32)
        ends = interfaces.hand_over(lanes.path[-1, :, :dimension])
        unmet = ~is_closed(lanes, new, ends)
        going = goes_on(passes + 1, unmet, depth)
        if max_passes is not None:
            going &= passes + 1 < max_passes
        return passes + 1, new, correct(new, ends), lanes._replace(depth=depth), ends, going

    zero = jnp.zeros((), jnp.int32)
    nothing = no_lanes(steps, num_lanes, dimension, num_aux, guess.dtype)
    begin = zero, guessed, guessed, nothing, guessed, jnp.ones((), bool)
    passes, starts, following, lanes, ends, _ = lax.while_loop(
        lambda carry: carry[-1], one_pass, begin
    )
    states = lanes._replace(path=lanes.path[..., :dimension])
    judged = *_judged(states, starts, ends, interfaces), lanes.path[..., dimension:]

    def over_time(values):
        values = values.transpose(1, 0, 2)
        return values.reshape(num_chains, num_segments * steps, values.shape[2])[:, :num_steps]

    everything, residual, notes = map(over_time, judged)
    everything = jnp.where(jnp.isfinite(everything), everything, initial[:, None])
    guess = None
    if max_passes is not None:
        # The next call reads the starts of its segments from the ends of this path.
        guess = over_time(states.path.at[-1].set(_started(states, following, interfaces)))
        guess = jnp.where(jnp.isfinite(guess), guess, everything)
    unmet = (~is_closed(lanes, starts, ends)).reshape(num_chains, num_segments)
    each = functools.partial(jnp.broadcast_to, shape=(num_chains,))
    corrections = passes * (not plain) * steps
    evaluations = lanes.evaluations / num_chains + (corrections * num_segments).astype(jnp.float32)
    jvps = (corrections * num_segments * correction.jvps(dimension)).astype(jnp.float32)
    return (
        guess,
        everything,
        notes,
        residual,
        each(evaluations),
        each(jvps),
        each(lanes.depth + corrections),
        (axis.total(unmet.T) > 0) if max_passes is None else each(jnp.zeros((), bool)),
        each(passes),
    )


def _closed(interfaces, bound, num_aux, lanes, starts, ends):
    """Which lanes start at their predecessor's end: to the tolerance, and exactly where that end is a step that stands still."""
    dimension = starts.shape[1]
    # The start will stand in the place of the last of these states.
    before = jnp.abs(lanes.path[-REMEMBERED:-1, :, :dimension]).sum(axis=0)
    sizes = (interfaces.hand_over(before) + jnp.abs(starts)) / REMEMBERED
    closed = agree(ends, starts, bound, sizes)
    if not num_aux:
        return closed
    last = lanes.path[-1, :, :dimension]
    before = lanes.path[-2, :, :dimension] if lanes.path.shape[0] > 1 else starts
    moved = interfaces.from_before((last != before).any(axis=1))
    return closed & (moved | (ends == starts).all(axis=1))


def _goes_on(axis, budget, num_segments, num_lanes, passes, unmet, depth):
    """Whether another pass is worth it; the same answer on all devices."""
    still, (max_depth, trial) = axis.total(unmet.sum()[None]), budget
    all_lanes, all_segments = axis.length(num_lanes), axis.length(num_segments)
    patient = (depth < max_depth) | ((2 * still <= all_lanes) & (depth < 4 * max_depth))
    # The first segments, one per pass, are exact whatever the system: only the others tell whether it forgets.
    rest = all_lanes - jnp.minimum(passes, all_segments) * (num_lanes // num_segments)
    patient &= (depth < trial) | (20 * still <= 19 * rest)
    # After as many passes as segments all are exact whatever happened, so this also bounds passes that do nothing.
    return axis.anyone((still > 0) & patient & (passes <= max(all_segments, max_depth)))


def _segments(cached, state, drives, bound) -> tuple[Segments, int]:
    """The recurrence in lanes, with whatever depends on drives alone computed for all steps at once, and R."""
    init, step, state_of, params = cached.init, cached.step, cached.state, cached.params
    drive = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), drives)
    memory = jax.eval_shape(init, params[0], state, drive)
    ahead, rest = hoist_drive_only(step, params[1], memory, drive)
    # Time in front, then one flat batch: moving drives costs less than moving what is made of them.
    shape = jax.tree.leaves(drives)[0].shape[1::-1]
    tape = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0).reshape(-1, *leaf.shape[2:]), drives)
    values = jax.vmap(ahead, in_axes=(None, 0))(params[1], tape)
    values = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), values)

    def roll(memory, value):
        memory = jax.vmap(rest, in_axes=(None, 0, 0))(params[1], memory, value)
        states = jax.vmap(state_of, in_axes=(None, 0))(params[2], memory)
        if not cached.aux:
            return memory, states
        return memory, jnp.concatenate([states, jax.vmap(cached.aux)(memory)], axis=1)

    init_all = functools.partial(jax.vmap(init, in_axes=(None, 0, 0)), params[0])
    num_aux = jax.eval_shape(cached.aux, memory).size if cached.aux else 0
    return Segments(init_all, roll, drives, values, bound, int(init is not init_as_is)), num_aux


def _judged(lanes, starts, wanted, interfaces):
    """The path and its residual, shapes `(n, L, D)`, given where segments started and where they ought to have.

    Rolled steps have residual 0 by construction, and meetings the gap that was seen there. A segment still open was rolled
    from a start that is not its predecessor's end: with that start put in the end's place, the defect is the residual of
    the predecessor's last step and every other step is exact, so that nothing has to be evaluated again.
    """
    path, index = lanes.path, jnp.arange(lanes.path.shape[1])
    residual = jnp.where(jnp.isfinite(path), 0, jnp.nan).astype(path.dtype)
    residual = residual.at[lanes.where, index].add(lanes.gap)
    used, wanted = (interfaces.next(values) for values in (starts, wanted))
    joined = ~interfaces.is_last(path.shape[1])[:, None] & jnp.isfinite(wanted)
    left = jnp.where(joined, defect(wanted, used), 0)
    last = jnp.where(joined, used, path[-1])
    return path.at[-1].set(last), residual.at[-1].add(left)


def _started(lanes, starts, interfaces):
    """The last state of every segment with the start of the next one in its place, where there is one."""
    following = interfaces.next(starts)
    joined = ~interfaces.is_last(following.shape[0])[:, None]
    return jnp.where(joined, following, lanes.path[-1])


def _filled_up(leaf: Array, num_segments: int, steps: int) -> Array:
    """Drives `(B, T, ...)` as `(B C, n, ...)`; the last segment is filled up with the last drive."""
    missing = num_segments * steps - leaf.shape[1]
    if missing:
        leaf = jnp.concatenate([leaf, jnp.repeat(leaf[:, -1:], missing, axis=1)], axis=1)
    return to_segments(leaf, num_segments)
