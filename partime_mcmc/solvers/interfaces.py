"""The interfaces between segments: how the ends of one pass become the starts of the next.

With F_c the map of segment c, from its start s_c to its end e_c = F_c(s_c), the starts obey a recurrence of their own,
s_{c+1} = F_c(s_c), with C steps instead of T (in multiple shooting, the matching conditions). Taking each end as the next
start is Jacobi's iteration for it; a linearisation A_c of F_c gives Newton's,

    δ_{c+1} = A_c δ_c + (e_c − s_{c+1}),   δ_0 = 0,      s_{c+1} ← e_c + A_c δ_c,

a prefix scan over segments. As for a single step, a start whose past is right becomes right to the last bit.

Segments are an axis of time of their own, a coarser one: where time is spread over devices, neighbours exchange one state
per chain and pass, and nothing else.
"""

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.dynamics import CachedStep, Dynamics
from partime_mcmc.engine.time_axis import TimeAxis
from partime_mcmc.linearize import Linearizer, ZeroJacobian
from partime_mcmc.solvers.base import replace_nonfinite_jacobians
from partime_mcmc.types import Array, Key, PyTree


class SegmentInterfaces(NamedTuple):
    """The order of lanes `(B C, ...)` in time: the segments of a chain that this device has, in a row, chain after chain.

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
        """The values `(B C,)` of each segment's predecessor, 0 where there is none, for numbers other than states."""
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
    cached: CachedStep,
    correction: Linearizer,
    key: Key,
    drives: PyTree,
    interfaces: SegmentInterfaces,
) -> Callable[[Array, Array], Array]:
    """The rule for new starts.

    Args:
        cached: The recurrence, step by step.
        correction: What stands for the Jacobian of a segment.
        key: For corrections that estimate.
        drives: Drives by segment, leading axes `(L, n)`, lanes being chains × segments.
        interfaces: The order of lanes.

    Returns:
        A function `(starts (L, D), handed over (L, D)) -> new starts (L, D)`, of where segments started and of their
        predecessors' ends.
    """
    if isinstance(correction, ZeroJacobian):
        return lambda starts, ends: ends

    def segment(params, start, drives):
        def roll(memory, drive):
            return cached.step(params[1], memory, drive), None

        first = jax.tree.map(lambda leaf: leaf[0], drives)
        end = lax.scan(roll, cached.init(params[0], start, first), drives)[0]
        return cached.state(params[2], end)

    def newton(starts, ends):
        _, maps = correction(Dynamics(segment, cached.params), starts, drives, key)
        maps, _ = replace_nonfinite_jacobians(maps)
        # The defect at interface c belongs to the step from start c to start c + 1; the end of a chain has none.
        defects = interfaces.next(ends - starts)
        defects = jnp.where(jnp.isfinite(defects), defects, 0)
        maps = jax.tree.map(interfaces.by_segment, maps.with_shift(defects))
        nothing = jnp.zeros_like(interfaces.initial)
        # The chains' axis is the second one.
        changes = jax.vmap(interfaces.axis.prefix, in_axes=(1, 0), out_axes=1)(maps, nothing)
        moved = jax.vmap(jax.vmap(lambda step, delta: step.linear(delta)))(
            maps, interfaces.axis.previous(nothing, changes)
        )
        corrected = ends + interfaces.by_lane(interfaces.axis.previous(nothing, moved))
        first = jnp.tile(interfaces.axis.index(moved.shape[0]) == 0, interfaces.initial.shape[0])[
            :, None
        ]
        return jnp.where(first | ~jnp.isfinite(corrected), ends, corrected)

    return newton
