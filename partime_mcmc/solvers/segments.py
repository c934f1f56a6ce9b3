"""What the solvers with segments share: how many there are, one set of lanes for all chains, and when two states agree.

    S    the largest power of two with    C S ≤ lanes    and    T / S ≥ max(64, m)

for C chains of T steps, m steps being how long the last of all segments takes to meet its stored path. With T / S ≥ m a
rerun takes no longer than the first pass, so that nearly the best depth costs at most twice the work. A lane is one segment
of one chain; all lanes take a step together, as one batch.
"""

from __future__ import annotations

import math
from typing import Callable

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.types import Array

# Measured by `python -m benchmarks.advised` on two CPU cores; a GPU takes thousands.
_LANES = {"cpu": 256}
_LANES_ELSEWHERE = 4096
# Shorter segments meet too late to be worth their start.
_SHORTEST = 64


def device_lanes() -> int:
    """How many chains × segments fill the default device."""
    return _LANES.get(jax.default_backend(), _LANES_ELSEWHERE)


def choose_segments(num_steps: int, num_chains: int = 1, meeting_time: float = 0.0) -> int:
    """The number of segments per chain; 1 where the sequential loop is as good.

    Args:
        num_steps: T, steps that are solved at once.
        num_chains: C, chains that are solved side by side.
        meeting_time: m, steps until the last segment has met its stored path; 0 if unknown.
    """
    shortest = max(_SHORTEST, meeting_time)
    most = min(device_lanes() / num_chains, num_steps / shortest)
    return 2 ** max(0, math.floor(math.log2(max(most, 1))))


def segment_length(num_steps: int, num_chains: int = 1, meeting_time: float = 0.0) -> int:
    """Steps per segment with that many segments, a multiple of four; arguments as for `choose_segments`.

    Kernels with a counter are then at the same point of it in all lanes.
    """
    num_segments = choose_segments(num_steps, num_chains, meeting_time)
    return 4 * max(1, math.ceil(num_steps / num_segments / 4))


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
    run = jax.custom_batching.custom_vmap(function)

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


def agree(new: Array, stored: Array, bound: tuple[Array, Array]) -> Array:
    """Whether the states `(L, D)` of each lane agree within the tolerance, shape `(L,)`.

    An infinite stored state has an infinite bound, and infinity minus itself is NaN. So equal numbers agree and NaN
    agrees with NaN, because otherwise a segment that has left the finite numbers would never close; a finite number
    never agrees with an infinite one.

    Args:
        new: Shape `(L, D)`.
        stored: Shape `(L, D)`.
        bound: Absolute and relative tolerance, shapes `(L, D)` and `(L, 1)`.
    """
    near = jnp.isfinite(stored) & (jnp.abs(new - stored) <= bound[0] + bound[1] * jnp.abs(stored))
    return (near | (new == stored) | (jnp.isnan(new) & jnp.isnan(stored))).all(axis=1)
