"""Prefix scans: all partial compositions of T maps, applied to a start.

Given maps M_1..M_T and a start x_0, a scan returns x_t = M_t(… M_1(x_0)) for every t. Three ways, one answer:

    SequentialScan    apply one map after another: T applications, depth T, no composition at all
    AssociativeScan   compose in a balanced tree, then apply: about 2T compositions, depth 2 log₂ T
    ChunkedScan(n)    T/n chunks composed side by side (sequential inside), then chunk starts passed along:
                      T compositions and T applications, depth n + T/n

Applying costs D² for dense maps where composing costs D³, and a CPU has few lanes, so there the sequential scan wins by
an order of magnitude although it is "not parallel" (the expensive part, evaluating the dynamics, still is). On
accelerators depth is what counts. `default_scan` chooses.

Elements are any monoid with `after(earlier)` and `__call__(start)`: affine maps and Kalman messages. Numbers of two
bytes (bfloat16, float16) are added up in float32 and rounded once, or a sum of some hundred would have no digits left.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.types import PyTree, pytree
from partime_mcmc.validation import check_count


class Scan(Protocol):
    """A way to apply all prefixes, or all suffixes, of a sequence of maps."""

    def __call__(self, elements: PyTree, start: PyTree) -> PyTree:
        """Apply all prefixes.

        Args:
            elements: Batched maps, leaves with leading axis `T`.
            start: What the first map is applied to.

        Returns:
            The T images, leaves with leading axis `T`, in the type of `start`.
        """
        ...

    def suffix(self, elements: PyTree, end: PyTree) -> PyTree:
        """As a prefix scan, the last map acting first on `end`: x_t = M_t(… M_T(end)); of a copy turned round."""
        backwards = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), elements)
        return jax.tree.map(lambda leaf: jnp.flip(leaf, 0), self(backwards, end))


@pytree()
class SequentialScan:
    """One map after another (`lax.scan`): least work, depth T."""

    def __call__(self, elements: PyTree, start: PyTree) -> PyTree:
        return _roll(elements, start, start)

    def suffix(self, elements: PyTree, end: PyTree) -> PyTree:
        """The last map first: the same loop from the end, nothing is copied."""
        return _roll(elements, end, end, reverse=True)


@pytree()
class AssociativeScan(Scan):
    """A balanced tree of compositions (`lax.associative_scan`): depth 2 log₂ T."""

    def __call__(self, elements: PyTree, start: PyTree) -> PyTree:
        if length(elements) == 0:
            return SequentialScan()(elements, start)
        composed = lax.associative_scan(
            jax.vmap(lambda earlier, later: later.after(earlier)), widened(elements)
        )
        return as_type_of(start, jax.vmap(lambda element: element(widened(start)))(composed))


@pytree(static=("size",))
class ChunkedScan(Scan):
    """Chunks of `size` steps: sequential inside, side by side across; work-efficient, depth `size + T/size`.

    Steps that do not fill a whole chunk are applied at the end, one after another.
    """

    size: int

    def __post_init__(self):
        check_count(self.size, "size", 1)

    def __call__(self, elements: PyTree, start: PyTree) -> PyTree:
        num_steps = length(elements)
        num_chunks = num_steps // self.size
        if num_chunks < 2:
            return SequentialScan()(elements, start)
        whole = num_chunks * self.size
        chunks = jax.tree.map(
            lambda leaf: leaf[:whole].reshape(num_chunks, self.size, *leaf.shape[1:]), elements
        )
        # Starts of chunks stay in the wide type; only the path itself is rounded.
        wide = widened(start)
        ends = SequentialScan()(jax.vmap(_compose)(chunks), wide)
        starts = jax.tree.map(
            lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), wide, ends
        )
        inner = jax.vmap(lambda chunk, first: _roll(chunk, first, start))(chunks, starts)
        values = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), inner)
        if whole == num_steps:
            return values
        rest = jax.tree.map(lambda leaf: leaf[whole:], elements)
        tail = _roll(rest, jax.tree.map(lambda leaf: leaf[-1], ends), start)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), values, tail)


def default_scan(elements: PyTree) -> Scan:
    """The scan for these maps on the platform in use, from what is known when tracing.

    Args:
        elements: Batched maps, leaves with leading axis `T`; arrays, tracers or shapes.
    """
    # Measured on two CPU cores in float32 (`benchmarks/results/scans-cpu.md`): at each of fifteen sizes, T from 10³ to 10⁶,
    # D in 1, 8, 64 for diagonal maps and 2, 8 for dense ones, the plain loop was the fastest, 1.1 times (T = 10⁶, D = 1)
    # to 24 times (T = 10⁶, D = 8, dense) ahead of the associative scan and 2 times or more ahead of the chunked one. So
    # there no shape asks for another. Elsewhere nothing was measured so far, and the tree is taken for its depth, but for
    # one map there is nothing to compose.
    if jax.default_backend() == "cpu" or length(elements) < 2:
        return SequentialScan()
    return AssociativeScan()


def widened(tree: PyTree) -> PyTree:
    """Leaves of two-byte floats as float32, others as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(wide_type(leaf.dtype)), tree)


def wide_type(dtype: jnp.dtype) -> jnp.dtype:
    """The type in which numbers of `dtype` are added up."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else dtype


def as_type_of(like: PyTree, tree: PyTree) -> PyTree:
    """Leaves of `tree` rounded to the types of those of `like`, where `widened` would have made these wide."""
    return jax.tree.map(
        lambda leaf, one: leaf.astype(one.dtype) if wide_type(one.dtype) != one.dtype else leaf,
        tree,
        like,
    )


def _roll(elements: PyTree, start: PyTree, like: PyTree, reverse: bool = False) -> PyTree:
    """One map after another; images in the types of `like`. `reverse` is that of `lax.scan`."""

    def advance(value, element):
        value = element(value)
        return value, value

    # Widened before and rounded after the loop, at the price of wide copies: inside it, XLA for CPUs rewrites a whole path
    # of two-byte floats at every step (seen: 100 times as slow at T = 1,000, D = 64).
    return as_type_of(
        like, lax.scan(advance, widened(start), widened(elements), reverse=reverse)[1]
    )


def _compose(elements: PyTree) -> PyTree:
    """The composition of all maps, leaves with leading axis n → leaves without it, wide."""

    def advance(composed, element):
        return element.after(composed), None

    elements = widened(elements)
    first = jax.tree.map(lambda leaf: leaf[0], elements)
    return lax.scan(advance, first, jax.tree.map(lambda leaf: leaf[1:], elements))[0]


def composition(elements: PyTree) -> PyTree:
    """The composition M_T ∘ … ∘ M_1, leaves without the leading axis T ≥ 1: in pairs, T compositions, depth log₂ T."""
    elements = widened(elements)
    while length(elements) > 1:
        paired = length(elements) // 2 * 2
        earlier, later = (jax.tree.map(lambda leaf: leaf[k:paired:2], elements) for k in (0, 1))
        pairs = jax.vmap(lambda one, other: other.after(one))(earlier, later)
        elements = jax.tree.map(
            lambda leaf, rest: jnp.concatenate([leaf, rest[paired:]]), pairs, elements
        )
    return jax.tree.map(lambda leaf: leaf[0], elements)


def length(elements: PyTree) -> int:
    """T, the leading axis of all leaves."""
    return jax.tree.leaves(elements)[0].shape[0]
