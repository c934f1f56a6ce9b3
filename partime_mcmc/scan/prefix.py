"""Prefix scans: all partial compositions of T maps, applied to a start.

Given maps M_1..M_T and a start x_0, a scan returns x_t = M_t(… M_1(x_0)) for every t. Three ways, one answer:

    SequentialScan    apply one map after another: T applications, depth T, no composition at all
    AssociativeScan   compose in a balanced tree, then apply: about 2T compositions, depth 2 log₂ T
    ChunkedScan(n)    T/n chunks composed side by side (sequential inside), then chunk starts passed along:
                      T compositions and T applications, depth n + T/n

Applying costs D² for dense maps where composing costs D³, and a CPU has few lanes, so there the sequential scan wins
by an order of magnitude although it is "not parallel" (the expensive part, evaluating the dynamics, still is). On
accelerators depth is what counts. `default_scan` chooses by the platform, which is known when tracing.

Elements are any monoid with `after(earlier)` and `__call__(start)`: affine maps and Kalman messages.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.types import PyTree, pytree


class Scan(Protocol):
    """A way to apply all prefixes of a sequence of maps."""

    def __call__(self, elements: PyTree, start: PyTree) -> PyTree:
        """Apply all prefixes.

        Args:
            elements: Batched maps, leaves with leading axis `T`.
            start: What the first map is applied to.

        Returns:
            The T images, leaves with leading axis `T`.
        """
        ...


@pytree()
class SequentialScan:
    """One map after another (`lax.scan`): least work, depth T."""

    def __call__(self, elements: PyTree, start: PyTree) -> PyTree:
        def advance(value, element):
            value = element(value)
            return value, value

        return lax.scan(advance, start, elements)[1]


@pytree()
class AssociativeScan:
    """A balanced tree of compositions (`lax.associative_scan`): depth 2 log₂ T."""

    def __call__(self, elements: PyTree, start: PyTree) -> PyTree:
        if _length(elements) == 0:
            return SequentialScan()(elements, start)
        composed = lax.associative_scan(jax.vmap(lambda earlier, later: later.after(earlier)), elements)
        return jax.vmap(lambda element: element(start))(composed)


@pytree(static=("size",))
class ChunkedScan:
    """Chunks of `size` steps: sequential inside, side by side across; work-efficient, depth `size + T/size`.

    Steps that do not fill a whole chunk are applied at the end, one after another.
    """

    size: int

    def __post_init__(self):
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size must be an integer of at least 1, got {self.size!r}")

    def __call__(self, elements: PyTree, start: PyTree) -> PyTree:
        num_steps = _length(elements)
        num_chunks = num_steps // self.size
        if num_chunks < 2:
            return SequentialScan()(elements, start)
        whole = num_chunks * self.size
        chunks = jax.tree.map(lambda leaf: leaf[:whole].reshape(num_chunks, self.size, *leaf.shape[1:]), elements)
        totals = jax.vmap(_compose)(chunks)
        ends = SequentialScan()(totals, start)
        starts = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), start, ends)
        inner = jax.vmap(SequentialScan())(chunks, starts)
        values = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), inner)
        if whole == num_steps:
            return values
        rest = jax.tree.map(lambda leaf: leaf[whole:], elements)
        tail = SequentialScan()(rest, jax.tree.map(lambda leaf: leaf[-1], ends))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), values, tail)


def default_scan() -> Scan:
    """The scan for the platform in use: sequential on a CPU, associative elsewhere (measured by `benchmarks/scans.py`)."""
    return SequentialScan() if jax.default_backend() == "cpu" else AssociativeScan()


def _compose(elements: PyTree) -> PyTree:
    """The composition of all maps, leaves with leading axis n → leaves without it."""

    def advance(composed, element):
        return element.after(composed), None

    first = jax.tree.map(lambda leaf: leaf[0], elements)
    return lax.scan(advance, first, jax.tree.map(lambda leaf: leaf[1:], elements))[0]


def composition(elements: PyTree) -> PyTree:
    """The composition M_T ∘ … ∘ M_1, leaves without the leading axis T ≥ 1: in pairs, T compositions, depth log₂ T."""
    while _length(elements) > 1:
        paired = _length(elements) // 2 * 2
        earlier, later = (jax.tree.map(lambda leaf: leaf[k:paired:2], elements) for k in (0, 1))
        pairs = jax.vmap(lambda one, other: other.after(one))(earlier, later)
        elements = jax.tree.map(lambda leaf, rest: jnp.concatenate([leaf, rest[paired:]]), pairs, elements)
    return jax.tree.map(lambda leaf: leaf[0], elements)


def _length(elements: PyTree) -> int:
    return jax.tree.leaves(elements)[0].shape[0]
