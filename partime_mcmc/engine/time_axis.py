"""The time axis: the only place that knows where the steps of a path are stored.

Solvers use a few operations along time, and never slice, concatenate or communicate themselves:

    previous(x_0, x_1..x_T) = x_0..x_{T-1}       prefix(M, x) = M_t(… M_1(x)) for all t
    maximum(v) = max over all steps              suffix(M, x) = M_t(… M_T(x)) for all t

`LocalTime` keeps the whole path on one device. An axis spread over devices does the same with collectives, and no solver
changes: arrays then hold the T / P steps of one device, `length` is the number of all steps and `index` the places of
these. Devices that exchange something in a loop must leave it together, so such loops go through `repeat`, or end by
`anyone`.
"""

from typing import Callable, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.solution import nanaware_max
from partime_mcmc.scan.prefix import Scan, default_scan
from partime_mcmc.types import Array, PyTree, pytree


class ScanAxis(Protocol):
    """Neighbours and scans along time, all that derivatives need; leaves have leading axis `T`."""

    def previous(self, initial: PyTree, states: PyTree) -> PyTree:
        """The states before each step."""
        ...

    def following(self, states: PyTree, final: PyTree) -> PyTree:
        """The states after each step, `final` standing after the last."""
        ...

    def prefix(self, elements: PyTree, start: PyTree) -> PyTree:
        """All prefixes of the maps applied to `start`."""
        ...

    def suffix(self, elements: PyTree, end: PyTree) -> PyTree:
        """All suffixes of the maps applied to `end`, the last map acting first."""
        ...


class TimeAxis(ScanAxis, Protocol):
    """All operations along time that solvers need."""

    def maximum(self, values: Array) -> Array:
        """The largest of `values ≥ 0`, shape `(T, ...)`, over the first axis; NaN if any is NaN."""
        ...

    def total(self, values: Array) -> Array:
        """The sum of `values`, shape `(T, ...)`, over the first axis."""
        ...

    def length_of_true(self, flags: Array) -> Array:
        """How many steps from the start on are true, `flags` of shape `(T,)`."""
        ...

    def length(self, num_steps: int) -> int:
        """Steps of all of time, where `num_steps` of them are here."""
        ...

    def index(self, num_steps: int) -> Array:
        """The places in time, counted from 0, of the `num_steps` steps that are here."""
        ...

    def in_turn(self, roll: Callable[[PyTree], PyTree], initial: PyTree) -> PyTree:
        """A path computed one device after another: `roll(x)` gives the steps of this device from the state before them."""
        ...

    def last(self, states: PyTree) -> PyTree:
        """The state at the end of time."""
        ...

    def by_part(self, value: Array) -> Array:
        """`value` of each part of time, one part per device, shape `(P, ...)`."""
        ...

    def anyone(self, flag: Array) -> Array:
        """Whether a scalar flag is set on any device of the run, those with other chains included."""
        ...

    def repeat(
        self,
        unfinished: Callable[[PyTree], Array],
        advance: Callable[[PyTree], PyTree],
        begin: PyTree,
    ) -> PyTree:
        """`lax.while_loop` for bodies that use this axis."""
        ...


# Over how many steps, itself included, the size of a coordinate is taken; a power of two. In fewer steps a coordinate may be
# near zero by chance while `f` still rounds by units of its usual size; after many more a large start would be remembered.
REMEMBERED = 16


def recent_sizes(axis: TimeAxis, states: Array) -> Array:
    """The mean |x_j| of each step and the 15 before it, shape `(T, D)` like `states`; where there are fewer, zeros stand for them.

    The state before the first step does not count: it was given, and the recurrence may map it to anything.
    """
    sizes = jnp.abs(states) / REMEMBERED
    tail = sizes[max(sizes.shape[0] - REMEMBERED + 1, 0) :]
    before = jnp.zeros((REMEMBERED - 1, *states.shape[1:]), states.dtype)
    before = before.at[REMEMBERED - 1 - tail.shape[0] :].set(tail)
    before = axis.previous(jnp.zeros_like(before), before[None])[0]
    sizes, shift = jnp.concatenate([before, sizes]), 1
    while shift < REMEMBERED:
        sizes = sizes[shift:] + sizes[:-shift]
        shift *= 2
    return sizes


@pytree(static=("scan",))
class LocalTime:
    """The whole path on one device.

    Attributes:
        scan: How prefixes are computed; None takes `default_scan` of the maps when tracing.
    """

    scan: Scan | None = None

    def previous(self, initial: PyTree, states: PyTree) -> PyTree:
        return jax.tree.map(
            lambda first, rest: jnp.concatenate([first[None], rest[:-1]])[: rest.shape[0]],
            initial,
            states,
        )

    def following(self, states: PyTree, final: PyTree) -> PyTree:
        return jax.tree.map(
            lambda rest, last: jnp.concatenate([rest[1:], last[None]])[: rest.shape[0]],
            states,
            final,
        )

    def prefix(self, elements: PyTree, start: PyTree) -> PyTree:
        return (self.scan or default_scan(elements))(elements, start)

    def suffix(self, elements: PyTree, end: PyTree) -> PyTree:
        return (self.scan or default_scan(elements)).suffix(elements, end)

    def maximum(self, values: Array) -> Array:
        return nanaware_max(values, axis=0)

    def total(self, values: Array) -> Array:
        return jnp.sum(values, axis=0)

    def length_of_true(self, flags: Array) -> Array:
        return jnp.sum(jnp.cumprod(flags.astype(jnp.int32)))

    def length(self, num_steps: int) -> int:
        return num_steps

    def index(self, num_steps: int) -> Array:
        return jnp.arange(num_steps)

    def in_turn(self, roll: Callable[[PyTree], PyTree], initial: PyTree) -> PyTree:
        return roll(initial)

    def last(self, states: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[-1], states)

    def by_part(self, value: Array) -> Array:
        return value[None]

    def anyone(self, flag: Array) -> Array:
        return flag

    def repeat(
        self,
        unfinished: Callable[[PyTree], Array],
        advance: Callable[[PyTree], PyTree],
        begin: PyTree,
    ) -> PyTree:
        return lax.while_loop(unfinished, advance, begin)
