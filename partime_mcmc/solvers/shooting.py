"""Shooting: segments of the path rolled side by side, joined until they coalesce.

Cut time into C segments of n steps and roll all of them at once, sequentially inside, from guessed starts. Then hand every
segment its predecessor's end as its new start and roll it again, but only until it meets its own stored path: both see the
same dice, so on a system that forgets they coalesce after m ≪ n steps, and everything after the meeting is already right.

    pass 1       x_{c,0} guessed         n steps deep, T evaluations
    pass k > 1   x_{c,0} ← x_{c-1,n}     until |x_{c,i} − stored_{c,i}| ≤ tolerance in all segments, or i = n
    done when every segment starts at its predecessor's end, to the tolerance: depth n + m, 1 + m/n evaluations per step

Lanes that have met are let go: the loop is narrowed to those that are open (`lanes`). What a step computes from its dice
alone, the draws first of all, is computed once, for all steps in one batch (`ahead`).

One segment is the sequential chain. After k passes the first k segments are exact whatever the system; a system that does
not forget needs C passes, so the solver gives up once the work says so (`gave_up`), and the caller goes on sequentially.
No derivative is needed and nothing can overflow that does not overflow in the sequential chain. This is multiple shooting
(Bellen & Zennaro 1989), i.e. parareal without a coarse model, with coalescence in place of contraction estimates.

Where forgetting is slow the starts can be corrected: with F_c the map of a whole segment and A_c its linearisation,

    x_{c+1,0} ← F_c(x_{c,0}) + A_c δ_c,     δ_c the change of x_{c,0} by this very rule,

which is a Newton or quasi-Newton step for the joints. `steps=1` with the Jacobian is DEER; A = 0, the default, is the rule
above. A correction costs one more roll of every segment and its JVPs, and may overflow unless it is clipped.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.engine.time_axis import TimeAxis
from partime_mcmc.linearize import Linearizer, ZeroJacobian
from partime_mcmc.solvers.base import Proposal
from partime_mcmc.solvers.hoist import hoist_drive_only
from partime_mcmc.solvers.interfaces import SegmentInterfaces, corrector
from partime_mcmc.solvers.narrowing import Lanes, Segments, roll_until_met, same, widths
from partime_mcmc.solvers.segment_rule import segment_length
from partime_mcmc.solvers.sequential import cached_step_of, enter_as_is
from partime_mcmc.types import Array, Key, PyTree, pytree

# Steps after which segments of which fewer than one in twenty has met are taken for chains that do not forget.
_TRIAL = 256


@pytree(static=("num_segments", "steps", "max_evaluations"))
class Shooting:
    """Segments side by side until they coalesce.

    Attributes:
        num_segments: C; None leaves it to `segment_rule`, or to `steps`.
        steps: n, instead of `num_segments`; at most one of the two is given.
        correction: What stands for the Jacobian of a whole segment when starts are corrected; zero hands over ends.
        max_evaluations: How many segments' lengths deep to go before giving up if more than half of the segments are still
            open, and four times as many in any case: evaluations per step if no lane could be let go. None is 4 + 256 / n, and
            an end once segments have been rolled twice, 256 steps deep at least, and hardly one has met: these do not forget.
    """

    num_segments: int | None = None
    steps: int | None = None
    correction: Linearizer = ZeroJacobian()
    max_evaluations: float | None = None
    keeps_notes: ClassVar[bool] = True

    def __post_init__(self):
        if self.num_segments is not None and self.steps is not None:
            raise ValueError(
                f"num_segments and steps: got both ({self.num_segments} and {self.steps}), wanted one"
            )
        if self.max_evaluations is not None and not self.max_evaluations >= 1:
            raise ValueError(
                f"max_evaluations must be at least 1 or None, got {self.max_evaluations!r}"
            )
        for name in ("num_segments", "steps"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def init(self, initial: Array, states: Array) -> PyTree:
        del initial, states
        return ()

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
        absolute = jnp.broadcast_to(absolute, initial.shape)
        cached = cached_step_of(dynamics)
        budget = 4 + 256 / steps if self.max_evaluations is None else self.max_evaluations
        budget = (
            math.ceil(budget * steps),
            math.inf if self.max_evaluations is not None else max(2 * steps, _TRIAL),
        )
        shoot = _shoot_for(cached.init, cached.step, cached.state, cached.aux, steps, budget, axis)
        shared = jax.tree.map(jnp.asarray, (cached.params, self.correction)), key
        batched = jax.tree.map(
            lambda leaf: leaf[None], (initial, states, drives, absolute, relative)
        )
        found = shoot(shared, *batched)
        path, notes, residual, evaluations, jvps, depth, gave_up, num_passes = jax.tree.map(
            lambda leaf: leaf[0], found
        )
        none, notes = jnp.zeros((), jnp.int32), notes if cached.aux else None
        return Proposal(
            path, path, residual, none, none, depth, evaluations, jvps, gave_up, num_passes, notes
        ), state

    def map_size(self, dimension: int) -> int:
        return self.correction.map_size(dimension)

    def segment_steps(self, num_steps: int, num_devices: int = 1) -> int:
        """The length n of a segment for a path of `num_steps` on so many devices, each of which holds whole segments."""
        here = math.ceil(num_steps / num_devices)
        if self.steps is not None:
            return min(self.steps, here)
        if self.num_segments is not None:
            return math.ceil(here / math.ceil(min(self.num_segments, num_steps) / num_devices))
        return min(here, segment_length(here))


@functools.lru_cache(maxsize=256)
def _shoot_for(enter, advance, leave, note, steps: int, budget: tuple[int, float], axis: TimeAxis):
    """The shooting of B chains at once, `(shared, initial (B, D), guess (B, T, D), drives (B, T, ...), ...)`.

    Under `vmap` the new axis joins the chains: all lanes share one loop. Left to itself, `vmap` would turn the loop's
    condition into a selection over the whole path in every step.
    """

    @jax.custom_batching.custom_vmap
    def shoot(shared, initial, guess, drives, absolute, relative):
        return _shoot(
            enter,
            advance,
            leave,
            note,
            steps,
            budget,
            axis,
            shared,
            initial,
            guess,
            drives,
            absolute,
            relative,
        )

    @shoot.def_vmap
    def _(axis_size, in_batched, shared, *chains):
        if any(jax.tree.leaves(in_batched[0])):
            # Every chain has parameters of its own: one after another.
            spread = [
                jax.tree.map(
                    lambda leaf, is_in: (
                        leaf if is_in else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
                    ),
                    value,
                    flags,
                )
                for value, flags in zip((shared, *chains), in_batched)
            ]
            return lax.map(lambda one: shoot(*one), tuple(spread)), (True,) * 8
        merged = jax.tree.map(
            lambda leaf, is_in: _merge(leaf, is_in, axis_size), chains, tuple(in_batched[1:])
        )
        found = shoot(shared, *merged)
        hoist_drive_only = jax.tree.map(
            lambda leaf: leaf.reshape(axis_size, leaf.shape[0] // axis_size, *leaf.shape[1:]), found
        )
        return hoist_drive_only, (True,) * 8

    return shoot


def _merge(leaf, is_batched, axis_size):
    leaf = leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
    return leaf.reshape(axis_size * leaf.shape[1], *leaf.shape[2:])


def _shoot(
    enter,
    advance,
    leave,
    note,
    steps,
    budget,
    axis,
    shared,
    initial,
    guess,
    drives,
    absolute,
    relative,
):
    """All passes over B chains; lanes are chains × segments that are here.

    Returns:
        Path `(B, T, D)`, notes `(B, T, R)`, residual `(B, T, D)`, and evaluations, JVPs, depth, whether it gave up, and
        passes, `(B,)` each.
    """
    num_chains, num_steps, dimension = guess.shape
    num_segments = math.ceil(num_steps / steps)
    num_lanes = num_chains * num_segments
    drives = jax.tree.map(lambda leaf: _to_segments(leaf, num_segments, steps), drives)
    bound = jnp.repeat(absolute, num_segments, axis=0), jnp.repeat(relative, num_segments)[:, None]
    joints = SegmentInterfaces(axis, initial)
    ends = guess[:, jnp.minimum(jnp.arange(1, num_segments + 1) * steps, num_steps) - 1]
    guessed = joints.hand_over(ends.reshape(num_lanes, dimension))
    (params, correction), key = shared
    correct = corrector(enter, advance, leave, params, correction, key, drives, joints)
    plain = isinstance(correction, ZeroJacobian)
    # A corrected start differs from its predecessor's end by what the meeting leaves over: that must still close the joint.
    meeting = bound if plain else tuple(0.25 * part for part in bound)
    segments, num_notes = _segments(
        enter, advance, leave, note, params, initial[0], drives, meeting
    )
    levels = widths(num_lanes, num_chains)
    is_closed = functools.partial(_closed, joints, bound, num_notes)
    goes_on = functools.partial(_goes_on, axis, budget, num_segments, num_lanes)

    def one_pass(carry):
        passes, old, new, lanes, _, _ = carry
        # Not the same question as whether a joint is open: a correction may move a start whose joint was closed.
        unchanged = ((new == old) | (jnp.isnan(new) & jnp.isnan(old))).all(axis=1) & (passes > 0)
        lanes = roll_until_met(segments, lanes._replace(open=~unchanged), new, passes == 0, levels)
        # A pass is as deep as the slowest device has made it.
        depth = axis.maximum(lanes.depth[None].astype(jnp.float32)).astype(jnp.int32)
        ends = joints.hand_over(lanes.path[-1, :, :dimension])
        unmet = ~is_closed(lanes, new, ends)
        going = goes_on(passes + 1, unmet, depth)
        return passes + 1, new, correct(new, ends), lanes._replace(depth=depth), ends, going

    zero = jnp.zeros((), jnp.int32)
    nothing = Lanes(
        jnp.zeros((steps, num_lanes, dimension + num_notes), guess.dtype),
        zero,
        jnp.ones(num_lanes, bool),
        jnp.zeros(num_lanes, jnp.int32),
        jnp.zeros((num_lanes, dimension), guess.dtype),
        jnp.zeros((), jnp.float32),
        zero,
    )
    passes, starts, _, lanes, ends, _ = lax.while_loop(
        lambda carry: carry[-1],
        one_pass,
        (zero, guessed, guessed, nothing, guessed, jnp.ones((), bool)),
    )
    judged = (
        *_judged(lanes._replace(path=lanes.path[..., :dimension]), starts, ends, joints),
        lanes.path[..., dimension:],
    )
    everything, residual, notes = (
        values.transpose(1, 0, 2).reshape(num_chains, num_segments * steps, values.shape[2])[
            :, :num_steps
        ]
        for values in judged
    )
    unmet = (~is_closed(lanes, starts, ends)).reshape(num_chains, num_segments)
    each = functools.partial(jnp.broadcast_to, shape=(num_chains,))
    corrections = passes * (not plain) * steps
    evaluations = lanes.evaluations / num_chains + (corrections * num_segments).astype(jnp.float32)
    jvps = (corrections * num_segments * correction.jvps(dimension)).astype(jnp.float32)
    return (
        jnp.where(jnp.isfinite(everything), everything, initial[:, None]),
        notes,
        residual,
        each(evaluations),
        each(jvps),
        each(lanes.depth + corrections),
        axis.total(unmet.T) > 0,
        each(passes),
    )


def _closed(joints, bound, num_notes, lanes, starts, ends):
    """Joints whose segment starts at its predecessor's end, to the tolerance; known to stand still, a step has none."""
    closed, dimension = same(ends, starts, bound).all(axis=1), starts.shape[1]
    if not num_notes:
        return closed
    last = lanes.path[-1, :, :dimension]
    before = lanes.path[-2, :, :dimension] if lanes.path.shape[0] > 1 else starts
    return closed & (
        joints.from_before((last != before).any(axis=1)) | (ends == starts).all(axis=1)
    )


def _goes_on(axis, budget, num_segments, num_lanes, passes, unmet, depth):
    """Whether another pass is worth it; the same answer on all devices."""
    still, (max_depth, trial) = axis.total(unmet.sum()[None]), budget
    patient = (depth < max_depth) | (
        (2 * still <= axis.length(num_lanes)) & (depth < 4 * max_depth)
    )
    patient &= (depth < trial) | (20 * still <= 19 * axis.length(num_lanes))
    # After as many passes as segments all are exact whatever happened, so this also bounds passes that do nothing.
    return axis.anyone(
        (still > 0) & patient & (passes <= max(axis.length(num_segments), max_depth))
    )


def _segments(enter, advance, leave, note, params, state, drives, bound) -> tuple[Segments, int]:
    """The recurrence in lanes, with whatever steps compute from their drives alone computed for all steps at once, and R."""
    drive = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), drives)
    memory = jax.eval_shape(enter, params[0], state, drive)
    ahead, rest = hoist_drive_only(advance, params[1], memory, drive)
    # Time in front, then one flat batch: moving drives costs less than moving what is made of them.
    shape = jax.tree.leaves(drives)[0].shape[1::-1]
    tape = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0).reshape(-1, *leaf.shape[2:]), drives)
    values = jax.vmap(ahead, in_axes=(None, 0))(params[1], tape)
    values = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), values)

    def roll(memory, value):
        memory = jax.vmap(rest, in_axes=(None, 0, 0))(params[1], memory, value)
        states = jax.vmap(leave, in_axes=(None, 0))(params[2], memory)
        return memory, jnp.concatenate([states, jax.vmap(note)(memory)], axis=1) if note else states

    enter_all = functools.partial(jax.vmap(enter, in_axes=(None, 0, 0)), params[0])
    num_notes = jax.eval_shape(note, memory).size if note else 0
    return Segments(
        enter_all, roll, drives, values, bound, int(enter is not enter_as_is)
    ), num_notes


def _judged(lanes, starts, wanted, joints):
    """The path and its residual, shapes `(n, L, D)`, given where segments started and where they ought to have.

    Rolled steps have residual 0 by construction, and meetings the gap that was seen there. A segment still open was rolled
    from a start that is not its predecessor's end: with that start put in the end's place, the defect is the residual of
    the predecessor's last step and every other step is exact, so that nothing has to be evaluated again.
    """
    path, index = lanes.path, jnp.arange(lanes.path.shape[1])
    residual = jnp.where(jnp.isfinite(path), 0, jnp.nan).astype(path.dtype)
    residual = residual.at[lanes.where, index].add(lanes.gap)
    used, wanted = (joints.next(values) for values in (starts, wanted))
    joined = ~joints.is_last(path.shape[1])[:, None] & jnp.isfinite(wanted)
    defect = jnp.where(joined, wanted - used, 0)
    last = jnp.where(joined, used, path[-1])
    return path.at[-1].set(last), residual.at[-1].add(defect)


def _to_segments(leaf: Array, num_segments: int, steps: int) -> Array:
    """Drives `(B, T, ...)` as `(B C, n, ...)`; the last segment is filled up with the last drive."""
    missing = num_segments * steps - leaf.shape[1]
    if missing:
        leaf = jnp.concatenate([leaf, jnp.repeat(leaf[:, -1:], missing, axis=1)], axis=1)
    return leaf.reshape(leaf.shape[0] * num_segments, steps, *leaf.shape[2:])
