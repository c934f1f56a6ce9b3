"""Prefix scans of affine maps as GPU kernels (Pallas, Triton), for diagonal maps of any width and dense ones up to D
= 8.

x_t = A_t x_{t-1} + s_t, one kernel instance per tile of independent numbers, each running through time one step after
another:

    D wide (from `wide` on, diagonal maps)   the tiles are columns; every input is read once: a single pass over memory
    D narrow                                 time is cut into chunks of n steps, the tiles are chunks × columns:
        (a) a kernel composes each chunk:    (A, s)_c = M_{cn} ∘ … ∘ M_{(c-1)n+1}
        (b) `AssociativeScan` of the T/n chunk maps gives every chunk its start
        (c) a kernel applies each chunk to its start
      (a) and (c) both read the inputs: twice, where one pass with look-back (Merrill & Garland 2016, "Single-pass parallel
      prefix scan with decoupled look-back") would read them once.

Two-byte floats are added up in float32, others in their own type, as in `scan.prefix`. Arrays are padded with zero
maps where T is no multiple of n or D no power of two: a copy that fitting sizes avoid. Maps of other kinds go to
`AssociativeScan`.

Run so far in Pallas' interpret mode only, where it agrees with the loop, and lowered to Triton; never run on a GPU, never
timed. So it is no platform's default: name it, `LocalTime(PallasScan())`. From JAX 0.12 on the Triton backend of Pallas is
deprecated in favour of Mosaic's: the kernels must move there before it goes.

Left out: derivatives (solvers take theirs from `adjoint`, not through a scan), look-back, TPUs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partime_mcmc.scan.affine import Dense, Diagonal
from partime_mcmc.scan.prefix import AssociativeScan, SequentialScan, length, wide_type, widened
from partime_mcmc.types import Array, PyTree, pytree

_WIDEST_DENSE = 8
# Numbers of a state that one kernel instance holds: four warps, one number per thread.
_TILE = 128
_FORWARD, _BACKWARD = 1, -1


@pytree(static=("size", "wide", "interpret"))
class PallasScan:
    """Prefix scans by Pallas kernels; see the module for what it does and how little was tried.

    Attributes:
        size: Steps per chunk, n.
        wide: D from which diagonal maps are scanned in a single pass, all of time as one chunk.
        interpret: As in `jax.experimental.pallas.pallas_call`: on any platform, slowly, for tests.
    """

    size: int = 64
    wide: int = 512
    interpret: bool = False

    def __post_init__(self):
        for name in ("size", "wide"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def __call__(self, elements: PyTree, start: PyTree) -> PyTree:
        return self._scanned(elements, start, _FORWARD)

    def suffix(self, elements: PyTree, end: PyTree) -> PyTree:
        """The last map first: the same kernels, running from the end."""
        return self._scanned(elements, end, _BACKWARD)

    def _scanned(self, elements, start, direction: int):
        other = SequentialScan() if length(elements) == 0 else AssociativeScan()
        if not takes(elements) or length(elements) == 0:
            return (
                other(elements, start) if direction == _FORWARD else other.suffix(elements, start)
            )
        if jax.default_backend() == "cpu" and not self.interpret:
            raise ValueError(
                "PallasScan is for GPUs and the platform is cpu: take SequentialScan(), or interpret=True "
                "for a test"
            )
        kind, (num_steps, width) = type(elements), elements.shift.shape
        size = num_steps if kind is Diagonal and width >= self.wide else min(self.size, num_steps)
        # Columns and chunks of a tile.
        lanes = min(_power_of_two(width), _TILE)
        rows = (
            1 if size == num_steps else max(1, _TILE // (lanes if kind is Diagonal else lanes**2))
        )
        num_chunks = -(-num_steps // size)
        num_chunks = -(-num_chunks // rows) * rows
        # The padding comes last in the order of the scan, so that nothing real passes through it.
        missing = num_chunks * size - num_steps
        before, after = (0, missing) if direction == _FORWARD else (missing, 0)
        columns = -(-width // lanes) * lanes
        linear, shift = (
            _padded(leaf, (before, after), columns).reshape(
                num_chunks, size, *(leaf.ndim - 1) * (columns,)
            )
            for leaf in (_linear(elements), elements.shift)
        )
        first = _padded(widened(start)[None], (0, 0), columns)
        run = functools.partial(
            _call, kind=kind, tile=(rows, lanes), direction=direction, interpret=self.interpret
        )
        if num_chunks > 1:
            first = _starts(kind(*run(_compose_kernel, (linear, shift), None)), first[0], direction)
        path = run(_apply_kernel, (linear, shift), first).reshape(num_chunks * size, columns)
        return path[before : before + num_steps, :width]


def takes(elements: PyTree) -> bool:
    """Whether there are kernels for these maps."""
    return (
        isinstance(elements, Diagonal)
        or isinstance(elements, Dense)
        and elements.shift.shape[-1] <= _WIDEST_DENSE
    )


def _starts(totals: PyTree, first: Array, direction: int) -> Array:
    """What every chunk starts from, `(N, D)`, in the order of time."""
    if direction == _FORWARD:
        return jnp.concatenate([first[None], AssociativeScan()(totals, first)[:-1]])
    return jnp.concatenate([AssociativeScan().suffix(totals, first)[1:], first[None]])


def _call(
    kernel,
    maps: tuple[Array, Array],
    starts: Array | None,
    *,
    kind,
    tile: tuple[int, int],
    direction: int,
    interpret: bool,
):
    """A kernel over all tiles of maps `(N, n, D[, D])`, `(N, n, D)`.

    Without starts the maps of chunks, `(N, D[, D])` and `(N, D)`; with starts `(N, D)` the path, `(N, n, D)`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (rows, lanes), (num_chunks, size, columns), dtype = tile, maps[1].shape, maps[1].dtype
    state = pl.BlockSpec((rows, lanes), lambda i, j: (i, j))
    path = pl.BlockSpec((rows, size, lanes), lambda i, j: (i, 0, j))
    linear, matrix, deep = path, state, ()
    if kind is Dense:
        # All columns of a narrow map are in one tile.
        linear = pl.BlockSpec((rows, size, lanes, lanes), lambda i, j: (i, 0, j, j))
        matrix, deep = pl.BlockSpec((rows, lanes, lanes), lambda i, j: (i, j, j)), (columns,)
    if starts is None:
        wide = wide_type(dtype)
        arrays, ins, outs = maps, [linear, path], [matrix, state]
        shapes = [jax.ShapeDtypeStruct((num_chunks, *rest, columns), wide) for rest in (deep, ())]
    else:
        arrays, ins, outs = (*maps, starts), [linear, path, state], path
        shapes = jax.ShapeDtypeStruct((num_chunks, size, columns), dtype)
    body = functools.partial(
        kernel, kind=kind, place=functools.partial(_place, size, direction), size=size
    )
    return pl.pallas_call(
        body,
        grid=(num_chunks // rows, columns // lanes),
        in_specs=ins,
        out_specs=outs,
        out_shape=shapes,
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4),
    )(*arrays)


def _place(size: int, direction: int, k: Array) -> Array:
    """Where in its chunk the k-th step of a scan is."""
    return k if direction == _FORWARD else size - 1 - k


def _apply_kernel(linear_ref, shift_ref, start_ref, path_ref, *, kind, place, size: int) -> None:
    """The path of a tile from its start."""
    act = _ACTIONS[kind]

    def advance(k, value):
        t = place(k)
        value = act(widened(linear_ref[:, t]), value) + widened(shift_ref[:, t])
        path_ref[:, t] = value.astype(path_ref.dtype)
        return value

    _loop(size, advance, start_ref[...])


def _compose_kernel(
    linear_ref, shift_ref, total_linear_ref, total_shift_ref, *, kind, place, size: int
) -> None:
    """The composition of the maps of a tile."""
    act, multiply = _ACTIONS[kind], _PRODUCTS[kind]

    def advance(k, composed):
        linear, shift = widened(linear_ref[:, place(k)]), widened(shift_ref[:, place(k)])
        return multiply(linear, composed[0]), act(linear, composed[1]) + shift

    first = widened(linear_ref[:, place(np.int32(0))]), widened(shift_ref[:, place(np.int32(0))])
    total_linear_ref[...], total_shift_ref[...] = _loop(size, advance, first, begin=1)


def _loop(size: int, advance, value: PyTree, begin: int = 0) -> PyTree:
    # Counted in 32 bits, whatever Python's integers become: places in memory are.
    return lax.fori_loop(np.int32(begin), np.int32(size), advance, value)


def _multiply_diagonal(linear: Array, value: Array) -> Array:
    return linear * value


def _act_dense(linear: Array, value: Array) -> Array:
    # Sums of products and no dot: the smallest that Triton multiplies are 16 × 16.
    return jnp.sum(linear * value[:, None, :], axis=-1)


def _multiply_dense(later: Array, earlier: Array) -> Array:
    return jnp.sum(later[:, :, :, None] * earlier[:, None, :, :], axis=2)


_ACTIONS = {Diagonal: _multiply_diagonal, Dense: _act_dense}
_PRODUCTS = {Diagonal: _multiply_diagonal, Dense: _multiply_dense}


def _linear(elements: Diagonal | Dense) -> Array:
    return elements.diagonal if isinstance(elements, Diagonal) else elements.matrix


def _padded(leaf: Array, steps: tuple[int, int], columns: int) -> Array:
    """More steps, and zeros up to so many columns."""
    return jnp.pad(leaf, (steps, *((0, columns - width) for width in leaf.shape[1:])))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
