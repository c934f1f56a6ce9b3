"""Shooting: segments of the path rolled side by side, joined until they coalesce.

Cut time into C segments of n steps and roll all of them at once, sequentially inside, from guessed starts. Then hand every
segment its predecessor's end as its new start and roll it again, but only until it meets its own stored path: both see the
same dice, so on a system that forgets they coalesce after m ≪ n steps, and everything after the meeting is already right.

    pass 1       x_{c,0} guessed         n steps deep, T evaluations
    pass k > 1   x_{c,0} ← x_{c-1,n}     until |x_{c,i} − stored_{c,i}| ≤ tolerance in all segments, or i = n
    done when every segment starts at its predecessor's end, to the tolerance: depth n + m, 1 + m/n evaluations per step

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

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.dynamics import Dynamics, Memo
from partime_mcmc.linearize import Linearizer, ZeroJacobian
from partime_mcmc.scan.time_axis import TimeAxis
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers.ahead import split
from partime_mcmc.solvers.base import Proposal
from partime_mcmc.solvers.junctions import corrector, hand_over
from partime_mcmc.solvers.lanes import Lanes, Segments, roll_until_met, same, widths
from partime_mcmc.types import Array, Key, PyTree, pytree

# Lanes that fill a device: chains × segments. Two CPU cores are full with some hundred, a GPU with thousands.
_LANES = {"cpu": 128}
_LANES_ELSEWHERE = 4096
# Segments shorter than this meet too late to be worth their start.
_SHORTEST = 64


def device_lanes() -> int:
    """How many chains × segments fill the default device."""
    return _LANES.get(jax.default_backend(), _LANES_ELSEWHERE)


@pytree(static=("num_segments", "steps", "max_evaluations"))
class Shooting:
    """Segments side by side until they coalesce.

    Attributes:
        num_segments: C; None chooses by the device and the length of the path.
        steps: n, instead of `num_segments`; at most one of the two is given.
        correction: What stands for the Jacobian of a whole segment when starts are corrected; zero hands over ends.
        max_evaluations: Evaluations per step after which to give up if more than half of the segments are still open,
            and four times as many in any case; None is 4 + 256 / n.
    """

    num_segments: int | None = None
    steps: int | None = None
    correction: Linearizer = ZeroJacobian()
    max_evaluations: float | None = None

    def __post_init__(self):
        if self.num_segments is not None and self.steps is not None:
            raise ValueError(f"num_segments and steps: got both ({self.num_segments} and {self.steps}), wanted one")
        if self.max_evaluations is not None and not self.max_evaluations >= 1:
            raise ValueError(f"max_evaluations must be at least 1 or None, got {self.max_evaluations!r}")
        for name in ("num_segments", "steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def init(self, initial: Array, states: Array) -> PyTree:
        del initial, states
        return ()

    def step(self, dynamics: Dynamics, initial: Array, states: Array, drives: PyTree, state: PyTree, *,
             axis: TimeAxis, key: Key, tolerance: Tolerance) -> tuple[Proposal, PyTree]:
        steps = self.segment_steps(states.shape[0])
        absolute, relative = tolerance.parts(states.dtype)
        absolute = jnp.broadcast_to(absolute, initial.shape)
        memo = dynamics.memo or _stateless(dynamics)
        budget = 4 + 256 / steps if self.max_evaluations is None else self.max_evaluations
        shoot = _shoot_for(memo.enter, memo.advance, memo.leave, steps, math.ceil(budget * steps))
        shared = jax.tree.map(jnp.asarray, (memo.params, self.correction)), key
        batched = jax.tree.map(lambda leaf: leaf[None], (initial, states, drives, absolute, relative))
        found = shoot(shared, *batched)
        path, residual, evaluations, jvps, depth, gave_up, num_passes = jax.tree.map(lambda leaf: leaf[0], found)
        none = jnp.zeros((), jnp.int32)
        return Proposal(path, path, residual, none, none, depth, evaluations, jvps, gave_up, num_passes), state

    def map_size(self, dimension: int) -> int:
        return self.correction.map_size(dimension)

    def segment_steps(self, num_steps: int) -> int:
        """The length n of a segment for a path of `num_steps`."""
        if self.steps is not None:
            return min(self.steps, num_steps)
        if self.num_segments is not None:
            return math.ceil(num_steps / min(self.num_segments, num_steps))
        return min(num_steps, max(_SHORTEST, math.ceil(num_steps / device_lanes())))


def _stateless(dynamics: Dynamics) -> Memo:
    """Dynamics whose steps share nothing, in the shape of those that do."""
    return Memo(_enter_as_is, dynamics.step, _leave_as_is, (None, dynamics.params, None))


def _enter_as_is(params, state, drive):
    return state


def _leave_as_is(params, memory):
    return memory


@functools.lru_cache(maxsize=256)
def _shoot_for(enter, advance, leave, steps: int, max_depth: int):
    """The shooting of B chains at once, `(shared, initial (B, D), guess (B, T, D), drives (B, T, ...), ...)`.

    Under `vmap` the new axis joins the chains: all lanes share one loop. Left to itself, `vmap` would turn the loop's
    condition into a selection over the whole path in every step.
    """

    @jax.custom_batching.custom_vmap
    def shoot(shared, initial, guess, drives, absolute, relative):
        return _shoot(enter, advance, leave, steps, max_depth, shared, initial, guess, drives, absolute, relative)

    @shoot.def_vmap
    def _(axis_size, in_batched, shared, *chains):
        if any(jax.tree.leaves(in_batched[0])):
            # Every chain has parameters of its own: one after another.
            spread = [jax.tree.map(lambda leaf, is_in: leaf if is_in else jnp.broadcast_to(
                leaf, (axis_size, *leaf.shape)), value, flags) for value, flags in zip((shared, *chains), in_batched)]
            return lax.map(lambda one: shoot(*one), tuple(spread)), (True,) * 7
        merged = jax.tree.map(lambda leaf, is_in: _merge(leaf, is_in, axis_size), chains, tuple(in_batched[1:]))
        found = shoot(shared, *merged)
        split = jax.tree.map(lambda leaf: leaf.reshape(axis_size, -1, *leaf.shape[1:]), found)
        return split, (True,) * 7

    return shoot


def _merge(leaf, is_batched, axis_size):
    leaf = leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
    return leaf.reshape(axis_size * leaf.shape[1], *leaf.shape[2:])


def _shoot(enter, advance, leave, steps, max_depth, shared, initial, guess, drives, absolute, relative):
    """All passes over B chains; lanes are chains × segments.

    Returns:
        Path `(B, T, D)`, residual `(B, T, D)`, and evaluations, JVPs, depth, whether it gave up, and passes, `(B,)` each.
    """
    num_chains, num_steps, dimension = guess.shape
    num_segments = math.ceil(num_steps / steps)
    num_lanes = num_chains * num_segments
    drives = jax.tree.map(lambda leaf: _to_segments(leaf, num_segments, steps), drives)
    bound = jnp.repeat(absolute, num_segments, axis=0), jnp.repeat(relative, num_segments)[:, None]
    ends = guess[:, jnp.minimum(jnp.arange(1, num_segments + 1) * steps, num_steps) - 1]
    guessed = hand_over(initial, ends.reshape(num_lanes, dimension))
    (params, correction), key = shared
    correct = corrector(enter, advance, leave, params, correction, key, drives, num_chains, initial)
    plain = isinstance(correction, ZeroJacobian)
    # A corrected start differs from its predecessor's end by what the meeting leaves over: that must still close the joint.
    meeting = bound if plain else tuple(0.25 * part for part in bound)
    segments = _segments(enter, advance, leave, params, initial[0], drives, meeting)
    levels = widths(num_lanes, num_chains)

    def open_joints(passes, starts, path):
        return ~same(hand_over(initial, path[-1]), starts, bound).all(axis=1) | (passes == 0)

    def unfinished(carry):
        passes, starts, _, lanes = carry
        still, depth = open_joints(passes, starts, lanes.path), lanes.depth
        patient = (depth < max_depth) | ((2 * still.sum() <= num_lanes) & (depth < 4 * max_depth))
        # After as many passes as segments all are exact whatever happened, so this also bounds passes that do nothing.
        return still.any() & patient & (passes <= max(num_segments, max_depth))

    def one_pass(carry):
        passes, old, new, lanes = carry
        # Not the same question as whether a joint is open: a correction may move a start whose joint was closed.
        unchanged = ((new == old) | (jnp.isnan(new) & jnp.isnan(old))).all(axis=1) & (passes > 0)
        lanes = roll_until_met(segments, lanes._replace(open=~unchanged), new, passes == 0, levels)
        return passes + 1, new, correct(new, lanes.path[-1]), lanes

    zero = jnp.zeros((), jnp.int32)
    nothing = Lanes(jnp.zeros((steps, num_lanes, dimension), guess.dtype), zero, jnp.ones(num_lanes, bool),
                    jnp.zeros(num_lanes, jnp.int32), jnp.zeros((num_lanes, dimension), guess.dtype),
                    jnp.zeros((), jnp.float32), zero)
    passes, starts, _, lanes = lax.while_loop(unfinished, one_pass, (zero, guessed, guessed, nothing))
    everything, residual = (values.transpose(1, 0, 2).reshape(num_chains, num_segments * steps, dimension)[:, :num_steps]
                            for values in _judged(lanes, starts, initial, num_segments))
    unmet = open_joints(passes, starts, lanes.path).reshape(num_chains, num_segments)
    each = functools.partial(jnp.broadcast_to, shape=(num_chains,))
    corrections = passes * (not plain) * steps
    evaluations = lanes.evaluations / num_chains + (corrections * num_segments).astype(jnp.float32)
    jvps = (corrections * num_segments * correction.jvps(dimension)).astype(jnp.float32)
    return (jnp.where(jnp.isfinite(everything), everything, initial[:, None]), residual, each(evaluations), each(jvps),
            each(lanes.depth + corrections), unmet.any(axis=1), each(passes))


def _segments(enter, advance, leave, params, state, drives, bound) -> Segments:
    """The recurrence in lanes, with whatever steps compute from their drives alone computed for all steps at once."""
    drive = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), drives)
    memory = jax.eval_shape(enter, params[0], state, drive)
    ahead, rest = split(advance, params[1], memory, drive)
    # Time in front, then one flat batch: moving drives costs less than moving what is made of them.
    shape = jax.tree.leaves(drives)[0].shape[1::-1]
    tape = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0).reshape(-1, *leaf.shape[2:]), drives)
    values = jax.vmap(ahead, in_axes=(None, 0))(params[1], tape)
    values = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), values)

    def roll(memory, value):
        memory = jax.vmap(rest, in_axes=(None, 0, 0))(params[1], memory, value)
        return memory, jax.vmap(leave, in_axes=(None, 0))(params[2], memory)

    enter_all = functools.partial(jax.vmap(enter, in_axes=(None, 0, 0)), params[0])
    return Segments(enter_all, roll, drives, values, bound, int(enter is not _enter_as_is))


def _judged(lanes, starts, initial, num_segments):
    """The path and its residual, shapes `(n, L, D)`.

    Rolled steps have residual 0 by construction, and meetings the gap that was seen there. A segment still open was rolled
    from a start that is not its predecessor's end: with that start put in the end's place, the defect is the residual of
    the predecessor's last step and every other step is exact, so that nothing has to be evaluated again.
    """
    path, index = lanes.path, jnp.arange(lanes.path.shape[1])
    wanted = hand_over(initial, path[-1])
    residual = jnp.where(jnp.isfinite(path), 0, jnp.nan).astype(path.dtype)
    residual = residual.at[lanes.where, index].add(lanes.gap)
    has_successor = (index % num_segments != num_segments - 1)[:, None]
    used, wanted = (jnp.roll(values, -1, axis=0) for values in (starts, wanted))
    defect = jnp.where(has_successor & jnp.isfinite(wanted), wanted - used, 0)
    last = jnp.where(has_successor & jnp.isfinite(wanted), used, path[-1])
    return path.at[-1].set(last), residual.at[-1].add(defect)


def _to_segments(leaf: Array, num_segments: int, steps: int) -> Array:
    """Drives `(B, T, ...)` as `(B C, n, ...)`; the last segment is filled up with the last drive."""
    missing = num_segments * steps - leaf.shape[1]
    if missing:
        leaf = jnp.concatenate([leaf, jnp.repeat(leaf[:, -1:], missing, axis=1)], axis=1)
    return leaf.reshape(leaf.shape[0] * num_segments, steps, *leaf.shape[2:])
