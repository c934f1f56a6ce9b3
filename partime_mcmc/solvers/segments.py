"""What the solvers with segments share: how long they are, one set of lanes for all chains, and when two states agree.

    n = max(64, m, C T / lanes)    steps per segment, a multiple of four

for C chains of T steps, m steps being how long the last of all segments takes to meet its stored path. With n ≥ m a rerun
takes no longer than the first pass, so that nearly the best depth costs at most twice the work. A lane is one segment of one
chain; all lanes take a step together, as one batch.
"""

import math
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.solution import Bound
from partime_mcmc.engine.time_axis import REMEMBERED
from partime_mcmc.solvers.base import defect
from partime_mcmc.types import Array

# Lanes that fill a device (`python -m benchmarks.advised`): two CPU cores are full with some hundred, a GPU with thousands.
_LANES = {"cpu": 128}
_LANES_ELSEWHERE = 4096
# Shorter segments meet too late to be worth their start.
_SHORTEST = 64


def device_lanes() -> int:
    """How many chains × segments fill the default device."""
    return _LANES.get(jax.default_backend(), _LANES_ELSEWHERE)


def segment_length(
    num_steps: int, num_chains: int = 1, meeting_time: float = 0.0, lanes: int | None = None
) -> int:
    """Steps per segment; where two of them do not fit the sequential loop is as good.

    A multiple of four, so that kernels with a counter are at the same point of it in all lanes.

    Args:
        num_steps: T, steps that are solved at once.
        num_chains: C, chains that are solved side by side.
        meeting_time: m, steps until the last segment has met its stored path; 0 if unknown.
        lanes: Chains × segments wanted side by side; None is `device_lanes()`.
    """
    wanted = num_steps * num_chains / (device_lanes() if lanes is None else lanes)
    return 4 * math.ceil(max(_SHORTEST, meeting_time, wanted) / 4)


def share_lanes(function: Callable, one_lane: Callable | None = None) -> Callable:
    """A function of chains whose `vmap` gives it more chains, so that all of them share one loop.

    Left to itself, `vmap` turns the condition of a loop into a selection over the whole path in every step.

    Args:
        function: `(shared, *chains) -> results`: `shared` has no batch axis; leaves of chains and of results have the
            leading axis `B` of chains.
        one_lane: The same function in loops whose length is known when tracing, so that `vmap` may batch it; taken
            on a CPU for chains with shared values of their own, where more lanes gain nothing. None: such chains are
            solved one after another.
    """
    # Batching rules are asked for the same shapes more than once; inside `jit` they trace the function once.
    run = jax.custom_batching.custom_vmap(jax.jit(function))

    @run.def_vmap
    def _(axis_size, in_batched, *args):
        flags = tuple(in_batched)

        def with_axis(leaf, flag):
            return leaf if flag else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))

        def merge(leaf, flag):
            leaf = with_axis(leaf, flag)
            return leaf.reshape(axis_size * leaf.shape[1], *leaf.shape[2:])

        def unmerge(leaf):
            return leaf.reshape(axis_size, leaf.shape[0] // axis_size, *leaf.shape[1:])

        if not any(jax.tree.leaves(flags[0])):
            found = jax.tree.map(unmerge, run(args[0], *jax.tree.map(merge, args[1:], flags[1:])))
        elif one_lane is not None and jax.default_backend() == "cpu":
            axes = jax.tree.map(lambda flag: 0 if flag else None, flags)
            found = jax.vmap(one_lane, in_axes=axes, axis_size=axis_size)(*args)
        else:
            found = lax.map(lambda one: run(*one), jax.tree.map(with_axis, args, flags))
        return found, jax.tree.map(lambda _: True, found)

    return run


def to_segments(leaf: Array, num_segments: int) -> Array:
    """`(B, C n, ...)` as `(B C, n, ...)`: a view, the segments of one chain in a row."""
    return leaf.reshape(leaf.shape[0] * num_segments, -1, *leaf.shape[2:])


def bound_of_lanes(absolute: Array | None, relative: Array, num_segments: int) -> Bound:
    """The tolerances of chains, shapes `(B, D)` or None and `(B,)`, as those of their segments, chain after chain."""
    if absolute is not None:
        absolute = jnp.repeat(absolute, num_segments, axis=0)
    return Bound(absolute, jnp.repeat(relative, num_segments)[:, None])


class RecentSizes(NamedTuple):
    """The sizes |x_j| by which lanes are judged while they are rolled: of up to 16 of the last states, so of no more than the
    judge of the whole path looks at (`time_axis.recent_sizes`).

    Attributes:
        mean: A sixteenth of their sum since the last step that is a multiple of 16, shape `(L, D)`.
    """

    mean: Array

    @classmethod
    def none(cls, bound: Bound, like: Array) -> "RecentSizes | None":
        """Before the first step, for states like `like`; None where an absolute tolerance makes them unnecessary."""
        return cls(jnp.zeros_like(like)) if bound.absolute is None else None

    def at(self, step: Array) -> "RecentSizes":
        """Before the state of `step`, an index that goes up by one."""
        return RecentSizes(jnp.where(step % REMEMBERED == 0, 0, self.mean))

    def seen(self, states: Array) -> "RecentSizes":
        """With the states `(L, D)` of one more step."""
        return RecentSizes(self.mean + jnp.abs(states) / REMEMBERED)


def agree(
    new: Array, stored: Array, bound: Bound, recent: Array | None, older: Array | float = 0.0
) -> Array:
    """Whether the states `(L, D)` of each lane agree within the tolerance, shape `(L,)`.

    An infinite stored state has an infinite bound, and infinity minus itself is NaN. So equal numbers agree and NaN
    agrees with NaN, because otherwise a segment that has left the finite numbers would never close; a finite number
    never agrees with an infinite one.

    Args:
        new: Shape `(L, D)`.
        stored: Shape `(L, D)`.
        bound: The tolerance, its parts of shapes `(L, D)` and `(L, 1)`.
        recent: Mean sizes of the stored state and those before it, shape `(L, D)`; None if `bound` needs none.
        older: Differences, shape `(L, D)`, that are to be within the tolerance here, too.
    """
    allowed = bound.at(stored, recent)
    near = jnp.isfinite(stored) & (jnp.abs(defect(new, stored)) <= allowed)
    same = near | (new == stored) | (jnp.isnan(new) & jnp.isnan(stored))
    return (same & ~(older > allowed)).all(axis=1)
