"""The joints between segments: how the ends of one pass become the starts of the next.

With F_c the map of segment c, from its start s_c to its end e_c = F_c(s_c), the joints obey a recurrence of their own,
s_{c+1} = F_c(s_c), with C steps instead of T. Handing ends over is Jacobi's iteration for it; a linearisation A_c of F_c
gives Newton's,

    δ_{c+1} = A_c δ_c + (e_c − s_{c+1}),   δ_0 = 0,      s_{c+1} ← e_c + A_c δ_c,

a prefix scan over segments. As for a single step, a joint whose past is right becomes right to the last bit.

Segments are an axis of time of their own, a coarser one: where time is spread over devices, neighbours exchange one state
per chain and pass, and nothing else.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.time_axis import TimeAxis
from partime_mcmc.linearize import ZeroJacobian
from partime_mcmc.solvers.base import replace_nonfinite_jacobians
from partime_mcmc.types import Array


class SegmentInterfaces(NamedTuple):
    """Who follows whom among lanes `(B C, ...)`: a chain's segments in a row, so many of them as are here.

    Attributes:
        axis: The time axis.
        initial: The starts of the chains, shape `(B, D)`.
    """

    axis: TimeAxis
    initial: Array

    def hand_over(self, ends: Array) -> Array:
        """Every segment starts where its predecessor ended; `ends` and starts have shape `(B C, D)`."""
        return self.by_lane(self.axis.previous(self.initial, self.by_segment(ends)))

    def from_before(self, values: Array) -> Array:
        """The values `(B C,)` of each segment's predecessor, 0 where there is none; of numbers that are no states."""
        nothing = jnp.zeros(self.initial.shape[0], values.dtype)
        return self.by_lane(self.axis.previous(nothing, self.by_segment(values)))

    def next(self, values: Array) -> Array:
        """The values `(B C, D)` of each segment's successor, 0 where there is none."""
        return self.by_lane(
            self.axis.following(self.by_segment(values), jnp.zeros_like(self.initial))
        )

    def is_last(self, num_lanes: int) -> Array:
        """Which lanes are the last segment of their chain."""
        count = num_lanes // self.initial.shape[0]
        return jnp.tile(
            self.axis.index(count) == self.axis.length(count) - 1, self.initial.shape[0]
        )

    def by_segment(self, values: Array) -> Array:
        """`(B C, ...)` as `(C, B, ...)`."""
        return jnp.moveaxis(values.reshape(self.initial.shape[0], -1, *values.shape[1:]), 1, 0)

    def by_lane(self, values: Array) -> Array:
        """`(C, B, ...)` as `(B C, ...)`."""
        return jnp.moveaxis(values, 0, 1).reshape(-1, *values.shape[2:])


def corrector(
    enter, advance, leave, params, correction, key, drives, joints: SegmentInterfaces
) -> Callable[[Array, Array], Array]:
    """The rule for new starts.

    Args:
        enter, advance, leave: The dynamics' memo.
        params: Their parameters.
        correction: What stands for the Jacobian of a segment.
        key: For corrections that estimate.
        drives: Drives by segment, leading axes `(L, n)`, lanes being chains × segments.
        joints: How lanes hang together.

    Returns:
        A function `(starts (L, D), handed over (L, D)) -> new starts (L, D)`, of where segments started and of their
        predecessors' ends.
    """

    if isinstance(correction, ZeroJacobian):
        return lambda starts, ends: ends

    def segment(params, start, drives):
        def roll(memory, drive):
            return advance(params[1], memory, drive), None

        first = jax.tree.map(lambda leaf: leaf[0], drives)
        return leave(params[2], lax.scan(roll, enter(params[0], start, first), drives)[0])

    def newton(starts, ends):
        _, maps = correction(Dynamics(segment, params), starts, drives, key)
        maps, _ = replace_nonfinite_jacobians(maps)
        # The defect at joint c belongs to the step from start c to start c + 1; the end of a chain has no joint.
        defects = joints.next(ends - starts)
        defects = jnp.where(jnp.isfinite(defects), defects, 0)
        maps = jax.tree.map(joints.by_segment, maps.with_shift(defects))
        nothing = jnp.zeros_like(joints.initial)
        # The chains' axis is the second one.
        changes = jax.vmap(joints.axis.prefix, in_axes=(1, 0), out_axes=1)(maps, nothing)
        moved = jax.vmap(jax.vmap(lambda step, delta: step.linear(delta)))(
            maps, joints.axis.previous(nothing, changes)
        )
        corrected = ends + joints.by_lane(joints.axis.previous(nothing, moved))
        first = jnp.tile(joints.axis.index(moved.shape[0]) == 0, joints.initial.shape[0])[:, None]
        return jnp.where(first | ~jnp.isfinite(corrected), ends, corrected)

    return newton
