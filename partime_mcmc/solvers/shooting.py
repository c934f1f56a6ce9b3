"""Shooting: segments of the path rolled side by side, joined until they coalesce.

Cut time into C segments of n steps and roll all of them at once, sequentially inside, from guessed starts. Then hand every
segment its predecessor's end as its new start and roll it again, but only until it meets its own stored path: both see the
same dice, so on a system that forgets they coalesce after m ≪ n steps, and everything after the meeting is already right.

    pass 1       x_{c,0} guessed         n steps deep, T evaluations
    pass k > 1   x_{c,0} ← x_{c-1,n}     until |x_{c,i} − stored_{c,i}| ≤ tolerance in all segments, or i = n
    done when no start has changed       depth about n + m, evaluations about 1 + m/n per step

One segment is the sequential chain. After k passes the first k segments are exact whatever the system; a system that does
not forget needs C passes, so the solver gives up once the work says so (`gave_up`), and the caller goes on sequentially.
No derivative is needed and nothing can overflow that does not overflow in the sequential chain. This is multiple shooting
(Bellen & Zennaro 1989), i.e. parareal without a coarse model, with coalescence in place of contraction estimates.

Left out: correcting the starts by Newton steps over the segment maps.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.dynamics import Dynamics, Memo
from partime_mcmc.reduction import largest
from partime_mcmc.scan.time_axis import TimeAxis
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers.base import Proposal
from partime_mcmc.types import Array, Key, PyTree, pytree

# Lanes that fill a device: chains × segments. Two CPU cores are full with some hundred, a GPU with thousands.
_LANES = {"cpu": 128}
_LANES_ELSEWHERE = 4096
# Segments shorter than this meet too late to be worth their start.
_SHORTEST = 64


@pytree(static=("num_segments", "steps", "max_evaluations"))
class Shooting:
    """Segments side by side until they coalesce.

    Attributes:
        num_segments: C; None chooses by the device and the length of the path.
        steps: n, instead of `num_segments`; at most one of the two is given.
        max_evaluations: Evaluations per step after which to give up if more than half of the segments are still open,
            and four times as many in any case; None is 4 + 256 / n.
    """

    num_segments: int | None = None
    steps: int | None = None
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
        del axis, key
        steps = self.segment_steps(states.shape[0])
        absolute, relative = tolerance.parts(states.dtype)
        absolute = jnp.broadcast_to(absolute, initial.shape)
        memo = dynamics.memo or _stateless(dynamics)
        budget = 4 + 256 / steps if self.max_evaluations is None else self.max_evaluations
        shoot = _shoot_for(memo.enter, memo.advance, memo.leave, steps, math.ceil(budget * steps))
        batched = jax.tree.map(lambda leaf: leaf[None], (initial, states, drives, absolute, relative))
        found = shoot(memo.params, *batched)
        path, residual, evaluations, depth, gave_up, num_passes = jax.tree.map(lambda leaf: leaf[0], found)
        none = jnp.zeros((), jnp.int32)
        return Proposal(path, path, residual, none, none, depth, evaluations, gave_up, num_passes), state

    def jvps(self, dimension: int) -> int:
        del dimension
        return 0

    def map_size(self, dimension: int) -> int:
        del dimension
        return 0

    def segment_steps(self, num_steps: int) -> int:
        """The length n of a segment for a path of `num_steps`."""
        if self.steps is not None:
            return min(self.steps, num_steps)
        if self.num_segments is not None:
            return math.ceil(num_steps / min(self.num_segments, num_steps))
        lanes = _LANES.get(jax.default_backend(), _LANES_ELSEWHERE)
        return min(num_steps, max(_SHORTEST, math.ceil(num_steps / lanes)))


def _stateless(dynamics: Dynamics) -> Memo:
    """Dynamics whose steps share nothing, in the shape of those that do."""
    return Memo(_enter_as_is, dynamics.step, _leave_as_is, (None, dynamics.params, None))


def _enter_as_is(params, state, drive):
    return state


def _leave_as_is(params, memory):
    return memory


@functools.lru_cache(maxsize=256)
def _shoot_for(enter, advance, leave, steps: int, max_depth: int):
    """The shooting of B chains at once, `(params, initial (B, D), guess (B, T, D), drives (B, T, ...), ...)`.

    Under `vmap` the new axis joins the chains: all lanes share one loop. Left to itself, `vmap` would turn the loop's
    condition into a selection over the whole path in every step.
    """

    @jax.custom_batching.custom_vmap
    def shoot(params, initial, guess, drives, absolute, relative):
        return _shoot(enter, advance, leave, steps, max_depth, params, initial, guess, drives, absolute, relative)

    @shoot.def_vmap
    def _(axis_size, in_batched, params, *chains):
        if any(jax.tree.leaves(in_batched[0])):
            # Every chain has parameters of its own: one after another.
            spread = [jax.tree.map(lambda leaf, is_in: leaf if is_in else jnp.broadcast_to(
                leaf, (axis_size, *leaf.shape)), value, flags) for value, flags in zip((params, *chains), in_batched)]
            return lax.map(lambda one: shoot(*one), tuple(spread)), _all_true_like(6)
        merged = jax.tree.map(lambda leaf, is_in: _merge(leaf, is_in, axis_size), chains, tuple(in_batched[1:]))
        found = shoot(params, *merged)
        split = jax.tree.map(lambda leaf: leaf.reshape(axis_size, -1, *leaf.shape[1:]), found)
        return split, _all_true_like(6)

    return shoot


def _merge(leaf, is_batched, axis_size):
    leaf = leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
    return leaf.reshape(axis_size * leaf.shape[1], *leaf.shape[2:])


def _all_true_like(count: int) -> tuple:
    return (True,) * count


def _shoot(enter, advance, leave, steps, max_depth, params, initial, guess, drives, absolute, relative):
    """All passes over B chains; lanes are chains × segments.

    Returns:
        Path `(B, T, D)`, residual `(B, T, D)`, and evaluations, depth, whether it gave up, and passes, `(B,)` each.
    """
    num_chains, num_steps, dimension = guess.shape
    num_segments = math.ceil(num_steps / steps)
    lanes = num_chains * num_segments
    tape = jax.tree.map(lambda leaf: _to_lanes(leaf, num_segments, steps), drives)
    first_drives = jax.tree.map(lambda leaf: leaf[0], tape)
    bound = jnp.repeat(absolute, num_segments, axis=0), jnp.repeat(relative, num_segments)[:, None]
    guessed = _hand_over(initial, guess[:, steps - 1::steps][:, :num_segments - 1])

    def roll(memory, drive):
        memory = jax.vmap(advance, in_axes=(None, 0, 0))(params[1], memory, drive)
        return memory, jax.vmap(leave, in_axes=(None, 0))(params[2], memory)

    def next_starts(carry):
        passes, _, path, _, _ = carry
        ends = path[-1].reshape(num_chains, num_segments, dimension)
        return jnp.where(passes == 0, guessed, _hand_over(initial, ends[:, :-1]))

    def open_lanes(carry):
        # NaN differs from itself: a segment that starts from NaN twice has not changed.
        new, old = next_starts(carry), carry[1]
        return ((new != old) & ~(jnp.isnan(new) & jnp.isnan(old))).any(axis=1) | (carry[0] == 0)

    def unfinished(carry):
        still, depth = open_lanes(carry), carry[3]
        patient = (depth < max_depth) | ((2 * still.sum() <= lanes) & (depth < 4 * max_depth))
        return still.any() & patient

    def one_pass(carry):
        passes, _, path, depth, gaps = carry
        new = next_starts(carry)
        memory = jax.vmap(enter, in_axes=(None, 0, 0))(params[0], new, first_drives)
        path, done, gaps = _roll_until_met(roll, memory, tape, path, ~open_lanes(carry), passes == 0, bound, gaps)
        return passes + 1, new, path, depth + done, gaps

    zero = jnp.zeros((), jnp.int32)
    no_gaps = jnp.zeros(lanes, jnp.int32), jnp.zeros((lanes, dimension), guess.dtype)
    end = lax.while_loop(unfinished, one_pass, (
        zero, guessed, jnp.zeros((steps, lanes, dimension), guess.dtype), zero, no_gaps))
    path, residual = _judged(end, next_starts(end), num_segments)
    everything, residual = (values.transpose(1, 0, 2).reshape(num_chains, num_segments * steps, dimension)[:, :num_steps]
                            for values in (path, residual))
    depth, unmet = end[3], open_lanes(end).reshape(num_chains, num_segments)
    each = functools.partial(jnp.broadcast_to, shape=(num_chains,))
    return (jnp.where(jnp.isfinite(everything), everything, initial[:, None]), residual,
            jnp.full(num_chains, depth * num_segments, jnp.float32), each(depth), unmet.any(axis=1), each(end[0]))


def _judged(end, new, num_segments):
    """The path and its residual, shapes `(n, L, D)`.

    Rolled steps have residual 0 by construction, and meetings the gap that was seen there. A segment still open was rolled
    from a start that is not its predecessor's end: with that start put in the end's place, the defect is the residual of
    the predecessor's last step and every other step is exact, so that nothing has to be evaluated again.
    """
    _, starts, path, _, (where, gap) = end
    lanes = path.shape[1]
    residual = jnp.where(jnp.isfinite(path), 0, jnp.nan).astype(path.dtype)
    residual = residual.at[where, jnp.arange(lanes)].add(gap)
    has_successor = (jnp.arange(lanes) % num_segments != num_segments - 1)[:, None]
    used, wanted = (jnp.roll(values, -1, axis=0) for values in (starts, new))
    defect = jnp.where(has_successor & jnp.isfinite(wanted), wanted - used, 0)
    last = jnp.where(has_successor & jnp.isfinite(wanted), used, path[-1])
    return path.at[-1].set(last), residual.at[-1].add(defect)


def _roll_until_met(roll, memory, tape, path, met, is_first, bound, gaps):
    """Roll all lanes until each has met its stored path or a segment has ended.

    Args:
        roll: `(memory, drives of one step) -> (memory, states (L, D))`.
        memory: Where the lanes start.
        tape: Drives, leading axes `(n, L)`.
        path: Stored states, shape `(n, L, D)`.
        met: Lanes that need nothing, shape `(L,)`.
        is_first: Whether nothing is stored yet, so that nothing can be met.
        bound: Absolute and relative tolerance, shapes `(L, D)` and `(L, 1)`.
        gaps: Where each lane last met its stored path and by how much they differed there, shapes `(L,)`, `(L, D)`.

    Returns:
        The path, the number of steps done, and the new gaps.
    """
    steps = path.shape[0]

    def open_lanes(carry):
        step, _, _, met, _ = carry
        return (step < steps) & ~met.all()

    def advance(carry):
        step, memory, rolled, met, (where, gap) = carry
        drive = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, step, keepdims=False), tape)
        memory, new = roll(memory, drive)
        stored = lax.dynamic_index_in_dim(path, step, keepdims=False)
        same = (jnp.abs(new - stored) <= bound[0] + bound[1] * jnp.abs(stored)) | (jnp.isnan(new) & jnp.isnan(stored))
        meets = ~met & same.all(axis=1) & ~is_first
        # An older gap further on is still there; the larger of the two stands for both, at the place of the newer.
        older = jnp.where((where > step)[:, None], jnp.abs(gap), 0)
        gap = jnp.where(meets[:, None], jnp.maximum(jnp.abs(new - stored), older), gap)
        where = jnp.where(meets, step, where)
        # At the meeting the stored state stays, because what follows was computed from it.
        met = met | meets
        rolled = lax.dynamic_update_index_in_dim(rolled, jnp.where(met[:, None], stored, new), step, 0)
        return step + 1, memory, rolled, met, (where, gap)

    # Read from one buffer and write to another: a loop that does both on one is made to copy all of it in every step.
    start = (jnp.zeros((), jnp.int32), memory, jnp.zeros_like(path), met, gaps)
    step, _, rolled, now_met, (where, gap) = lax.while_loop(open_lanes, advance, start)
    path = jnp.where((jnp.arange(steps) < step)[:, None, None], rolled, path)
    # A lane that never meets has replaced its whole path, and any gap in it.
    return path, step, (where, jnp.where(now_met[:, None], gap, 0))


def _hand_over(initial: Array, ends: Array) -> Array:
    """The start of every lane: `(B, D)` and `(B, C − 1, D)` → `(B C, D)`."""
    starts = jnp.concatenate([initial[:, None], ends], axis=1)
    return starts.reshape(-1, initial.shape[-1])


def _to_lanes(leaf: Array, num_segments: int, steps: int) -> Array:
    """Drives `(B, T, ...)` as `(n, B C, ...)`; the last segment is filled up with the last drive."""
    missing = num_segments * steps - leaf.shape[1]
    if missing:
        leaf = jnp.concatenate([leaf, jnp.repeat(leaf[:, -1:], missing, axis=1)], axis=1)
    leaf = leaf.reshape(leaf.shape[0] * num_segments, steps, *leaf.shape[2:])
    return jnp.moveaxis(leaf, 1, 0)
