"""What `unroll` refuses, by name, before anything is compiled."""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.contracts import check_has, kind
from partime_mcmc.dynamics import check_state
from partime_mcmc.solution import Tolerance
from partime_mcmc.solve import check_iterations
from partime_mcmc.types import Array, PyTree


def check_inputs(
    carry: PyTree, inputs: PyTree, batch_axes: int
) -> tuple[tuple[int, ...], int, PyTree, PyTree]:
    """The batch's shape, T, and the shapes and types of one sequence's carry and of one step's inputs.

    Raises:
        TypeError: If the carry is not floating point of one type.
        ValueError: If there are no inputs, or axes do not fit.
    """
    if isinstance(batch_axes, bool) or not isinstance(batch_axes, int) or batch_axes < 0:
        raise ValueError(f"batch_axes must be an integer of at least 0, got {batch_axes!r}")
    leaves = jax.tree.leaves(inputs)
    if not leaves:
        raise ValueError(
            "inputs: no arrays, wanted at least one leaf with leading axis T (use jnp.arange(T) if the cell "
            "ignores its input)"
        )
    check_state(carry)
    heads = {leaf.shape[: batch_axes + 1] for leaf in leaves}
    short = min(map(len, heads)) <= batch_axes
    if len(heads) > 1 or short:
        raise ValueError(
            f"inputs: leading axes {sorted(heads)}, wanted one common "
            f"{'(batch..., T)' if batch_axes else '(T,)'} with batch_axes={batch_axes}"
        )
    *batch, num_steps = heads.pop()
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if leaf.shape[:batch_axes] != tuple(batch):
            raise ValueError(
                f"carry: {jax.tree_util.keystr(path) or 'the array'} has shape {leaf.shape}, wanted the batch "
                f"axes {tuple(batch)} of `inputs` in front"
            )
    one, x = (
        jax.tree.map(
            lambda leaf, drop=drop: jax.ShapeDtypeStruct(leaf.shape[drop:], leaf.dtype), tree
        )
        for tree, drop in ((carry, batch_axes), (inputs, batch_axes + 1))
    )
    return tuple(batch), num_steps, one, x


def check_mask(mask: Array | None, shape: tuple[int, ...]) -> Array | None:
    """The mask as an array.

    Raises:
        TypeError: If it is not Boolean.
        ValueError: If its shape is not `shape`.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask: got type {mask.dtype}, wanted bool (True where the step counts)")
    if mask.shape != shape:
        raise ValueError(
            f"mask: got shape {mask.shape}, wanted {shape}, the leading axes of `inputs`"
        )
    return mask


def check_solver(solver: Any, tolerance: Any, max_iterations: Any, carry: PyTree) -> None:
    """Refuse a solver, a tolerance or a bound on passes that cannot be meant.

    Raises:
        TypeError: If `solver` is no solver or `tolerance` no `Tolerance`.
        ValueError: If a tolerance has a bad value or shape, or `max_iterations` is given without a solver or is not a
            positive integer.
    """
    if solver is not None:
        check_has(
            solver,
            "solver",
            ("init", "step", "map_size"),
            "a recipe such as shooting() or quasi_deer(), or None",
        )
    elif max_iterations is not None:
        raise ValueError(
            f"max_iterations: got {max_iterations!r} with solver=None, which makes no passes; give a solver, "
            "or leave it out"
        )
    check_iterations(max_iterations)
    if tolerance is not None:
        if not isinstance(tolerance, Tolerance):
            raise TypeError(
                f"tolerance: got {kind(tolerance)}, wanted Tolerance(relative, absolute) or None"
            )
        tolerance.check(sum(leaf.size for leaf in jax.tree.leaves(carry)))


def check_carry(cell: Callable, params: PyTree, carry: PyTree, x: PyTree) -> None:
    """Refuse a cell that does not return `(carry, y)` with a carry like the one it was given.

    Raises:
        TypeError: Naming the first difference.
    """
    result = jax.eval_shape(cell, params, carry, x)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"cell: returns {jax.tree.structure(result)}, wanted a pair (carry, y)")
    got, wanted = jax.tree.structure(result[0]), jax.tree.structure(carry)
    if got != wanted:
        raise TypeError(
            f"cell: returns a carry of structure {got}, wanted that of `carry`, {wanted}"
        )
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(result[0]), jax.tree.leaves(carry)
    ):
        if new.shape != old.shape or new.dtype != old.dtype:
            raise TypeError(
                f"cell: returns {jax.tree_util.keystr(path) or 'a carry'} with shape {new.shape} and type "
                f"{new.dtype}, wanted {old.shape} and {old.dtype} as in `carry`"
            )
