"""Outputs of a cell, read off the path of its carry.

Most cells return part of their new carry as their output: a GRU its state, an LSTM its `h`. A look at the traced cell tells,
and then the outputs are the path itself. Any other cell is evaluated once more, at all steps side by side.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp

from partime_mcmc.types import PyTree


def read_outputs(
    cell: Callable, params: PyTree, carry: PyTree, states: PyTree, inputs: PyTree
) -> PyTree:
    """`y_1..y_T`.

    Args:
        cell: A cell as `closures.explicit` returns it: with its `jaxpr` and `structure`.
        params: Its parameters.
        carry: The initial carry.
        states: The path of the carry, leaves `(T, ...)`.
        inputs: Leaves `(T, ...)`.
    """
    shape = jax.tree.unflatten(cell.structure, cell.jaxpr.outvars)
    path = jax.tree.leaves(states)
    places = {id(variable): index for index, variable in enumerate(jax.tree.leaves(shape[0]))}
    sources = [places.get(id(variable)) for variable in jax.tree.leaves(shape[1])]
    outputs = jax.tree.structure(shape[1])
    if None not in sources:
        return jax.tree.unflatten(outputs, [path[index] for index in sources])
    previous = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), carry, states
    )
    return jax.vmap(lambda state, x: cell(params, state, x)[1])(previous, inputs)
