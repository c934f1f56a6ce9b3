"""Time spread over devices: each holds a row of successive steps, and neighbours exchange what the joints need.

Inside `jax.shard_map` every array is the part of one device, T / P successive steps, and the questions that solvers
ask of time are answered with collectives over one mesh axis:

    previous, following     one `ppermute` of one state
    prefix, suffix          the composition M_{p,n} ∘ … ∘ M_{p,1} of the maps that are here, one all-gather of P such
                            maps, P applications to find where this part starts, then the maps that are here
    maximum, total          one all-reduce of one number (of two, where NaN has to be seen)
    length_of_true          one all-reduce of one integer
    in_turn                 P hand-overs, everybody else waiting: the recurrence itself
    anyone, repeat          one all-reduce of one flag over all devices of the mesh: one that has finished goes round
                            with the others and changes nothing, because a `ppermute` waits for all of the program

No collective carries a path: what travels in one pass is O(D) per device for states and diagonal maps and O(D²) for
dense ones, whatever T is (prefix sums over processors: Blelloch 1990; Ladner & Fischer 1980). `TimeOnMesh` asks the same
questions from outside, of whole arrays: for derivatives, whose transposes must know what all devices share.
"""

import functools
from typing import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from partime_mcmc.engine.solution import nanaware_max
from partime_mcmc.scan.prefix import Scan, composition, default_scan
from partime_mcmc.types import Array, PyTree, pytree


@pytree(static=("num_parts", "name", "everybody", "scan"))
class ShardedTime:
    """One part of time per device, for use inside `jax.shard_map`.

    Attributes:
        num_parts: P, the size of the mesh axis.
        name: The mesh axis.
        everybody: All axes of the mesh.
        scan: How prefixes are computed on one device; None takes `default_scan` of the maps when tracing.
    """

    num_parts: int
    name: str = "time"
    everybody: tuple[str, ...] = ("time",)
    scan: Scan | None = None

    def previous(self, initial: PyTree, states: PyTree) -> PyTree:
        before = self._shift(jax.tree.map(lambda leaf: leaf[-1], states), 1)
        return _begins(_where(self._part() == 0, initial, before), states)

    def following(self, states: PyTree, final: PyTree) -> PyTree:
        after = self._shift(jax.tree.map(lambda leaf: leaf[0], states), -1)
        last = _where(self._part() == self.num_parts - 1, final, after)
        return jax.tree.map(lambda rest, one: jnp.concatenate([rest[1:], one[None]]), states, last)

    def prefix(self, elements: PyTree, start: PyTree) -> PyTree:
        return self._scanned(elements, start, lambda parts: parts, self._part())

    def suffix(self, elements: PyTree, end: PyTree) -> PyTree:
        return _flipped(
            self._scanned(_flipped(elements), end, _flipped, self.num_parts - 1 - self._part())
        )

    def maximum(self, values: Array) -> Array:
        # NaN has a number of its own: what an all-reduce makes of it differs between backends.
        here = nanaware_max(values, axis=0)
        missing = jnp.isnan(here)
        missing, top = lax.pmax(
            jnp.stack([missing.astype(here.dtype), jnp.where(missing, 0, here)]), self.name
        )
        return jnp.where(missing > 0, jnp.nan, top)

    def total(self, values: Array) -> Array:
        return lax.psum(jnp.sum(values, axis=0), self.name)

    def length_of_true(self, flags: Array) -> Array:
        num_steps, here = flags.shape[0], jnp.sum(jnp.cumprod(flags.astype(jnp.int32)))
        first_false = jnp.where(
            here == num_steps, self.length(num_steps), self._part() * num_steps + here
        )
        return lax.pmin(first_false, self.name)

    def length(self, num_steps: int) -> int:
        return num_steps * self.num_parts

    def index(self, num_steps: int) -> Array:
        return self._part() * num_steps + jnp.arange(num_steps)

    def in_turn(self, roll: Callable[[PyTree], PyTree], initial: PyTree) -> PyTree:
        path = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(roll, initial)
        )

        def turn(part, carry):
            first, path = carry
            path = lax.cond(self._part() == part, roll, lambda _: path, first)
            handed = self._shift(jax.tree.map(lambda leaf: leaf[-1], path), 1)
            return _where(self._part() == part + 1, handed, first), path

        return lax.fori_loop(0, self.num_parts, turn, (initial, path))[1]

    def by_part(self, value: Array) -> Array:
        return lax.all_gather(value, self.name)

    def anyone(self, flag: Array) -> Array:
        return lax.pmax(flag.astype(jnp.int32), self.everybody) > 0

    def repeat(
        self,
        unfinished: Callable[[PyTree], Array],
        advance: Callable[[PyTree], PyTree],
        begin: PyTree,
    ) -> PyTree:
        def onwards(carry):
            state, _ = carry
            state = _where(unfinished(state), advance(state), state)
            return state, self.anyone(unfinished(state))

        return lax.while_loop(
            lambda carry: carry[1], onwards, (begin, self.anyone(unfinished(begin)))
        )[0]

    def last(self, states: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: lax.all_gather(leaf[-1], self.name)[-1], states)

    def _scanned(self, elements, start, arranged, place):
        """All prefixes of the maps that are here, after those of the `place` parts before it in the arranged order."""
        scan = self.scan or default_scan(elements)
        parts = jax.tree.map(lambda leaf: lax.all_gather(leaf, self.name), composition(elements))
        starts = _begins(start, scan(arranged(parts), start))
        return scan(elements, jax.tree.map(lambda leaf: leaf[place], starts))

    def _part(self) -> Array:
        return lax.axis_index(self.name)

    def _shift(self, tree: PyTree, by: int) -> PyTree:
        """What the neighbour holds; zeros where there is no neighbour."""
        pairs = [
            (source, source + by)
            for source in range(self.num_parts)
            if 0 <= source + by < self.num_parts
        ]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.name, pairs), tree)


@pytree(static=("mesh", "axis"))
class TimeOnMesh:
    """The same axis from outside `jax.shard_map`: whole arrays, whose leading axis lies along a mesh axis.

    Attributes:
        mesh: The devices.
        axis: How its parts answer.
    """

    mesh: Mesh
    axis: ShardedTime

    def previous(self, initial: PyTree, states: PyTree) -> PyTree:
        return self._on_parts(self.axis.previous, (_WHOLE, self._spread))(initial, states)

    def following(self, states: PyTree, final: PyTree) -> PyTree:
        return self._on_parts(self.axis.following, (self._spread, _WHOLE))(states, final)

    def prefix(self, elements: PyTree, start: PyTree) -> PyTree:
        return self._on_parts(self.axis.prefix, (self._spread, _WHOLE))(elements, start)

    def suffix(self, elements: PyTree, end: PyTree) -> PyTree:
        return self._on_parts(self.axis.suffix, (self._spread, _WHOLE))(elements, end)

    @property
    def _spread(self) -> PartitionSpec:
        return PartitionSpec(self.axis.name)

    def _on_parts(self, function, given):
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=given, out_specs=self._spread, check_vma=False
        )


_WHOLE = PartitionSpec()


def _begins(first: PyTree, states: PyTree) -> PyTree:
    """The state before each of these."""
    return jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest[:-1]]), first, states)


def _where(flag: Array, one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(functools.partial(jnp.where, flag), one, other)


def _flipped(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.flip(leaf, 0), tree)
