"""What the solvers with segments share: one set of lanes for all chains, time cut into segments, and when two states agree.

A lane is one segment of one chain. All lanes take a step together, as one batch.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.types import Array


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
