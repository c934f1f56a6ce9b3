"""Dynamics: the recurrence x_t = f(θ, x_{t-1}, u_t), its sequential solution, and its residual.

`θ` are the parameters, `u_1..u_T` the drives (dice of a chain, inputs of a network), `x_0` the initial state. States are
any pytree of floating-point arrays of one type; inside the engine they are flat vectors of shape `(D,)`, and `ravel`
is the border between the two. Keys, counters and other discrete things belong to the drives.

A function that captures arrays hides part of `θ`: XLA folds captured constants for minutes and no derivative reaches
them. `Dynamics.closing_over` finds what a function captures, concrete or traced, and makes it parameters.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from partime_mcmc.closures import explicit
from partime_mcmc.reduction import largest
from partime_mcmc.types import Array, PyTree, pytree


@pytree(static=("step",))
class Dynamics:
    """A recurrence `state = step(params, state, drive)`.

    Attributes:
        step: A pure function `(params, state, drive) -> state` whose result has the structure, shapes and types of
            `state`. Compared by identity: use one function object for one recurrence, or it is compiled again.
        params: Whatever `step` needs besides; a pytree, differentiable.
    """

    step: Callable[[PyTree, PyTree, PyTree], PyTree]
    params: PyTree = None

    def __call__(self, state: PyTree, drive: PyTree) -> PyTree:
        return self.step(self.params, state, drive)

    @classmethod
    def closing_over(cls, function: Callable[[PyTree, PyTree], PyTree], state: PyTree, drive: PyTree) -> Dynamics:
        """Dynamics of a function that captures arrays, with the captured arrays as parameters.

        Args:
            function: `(state, drive) -> state`.
            state: An example state; only shapes and types matter.
            drive: An example drive of one step.

        Returns:
            Dynamics whose `params` are the arrays that `function` captures. Equal functions and shapes give the same
            `step`, so nothing is compiled twice.
        """
        step, captured = explicit(_WithoutParams(function), None, state, drive)
        return cls(step, captured)


def rollout(dynamics: Dynamics, initial: PyTree, drives: PyTree) -> PyTree:
    """The path, one step after another: the oracle for everything else.

    Args:
        dynamics: The recurrence.
        initial: `x_0`.
        drives: `u_1..u_T`, leaves with leading axis `T`.

    Returns:
        `x_1..x_T`, leaves with leading axis `T`.
    """

    def advance(state, drive):
        state = dynamics(state, drive)
        return state, state

    return lax.scan(advance, initial, drives)[1]


def residual(dynamics: Dynamics, initial: PyTree, states: PyTree, drives: PyTree) -> Array:
    """How badly each step of a path breaks the recurrence, all steps at once.

    Args:
        dynamics: The recurrence.
        initial: `x_0`.
        states: The path, leaves with leading axis `T`.
        drives: `u_1..u_T`.

    Returns:
        `max_j |f(x_{t-1}, u_t) − x_t|_j`, shape `(T,)`; NaN where a step is not finite.
    """
    previous = jax.tree.map(lambda first, rest: jnp.concatenate([jnp.asarray(first, rest.dtype)[None], rest[:-1]])[
        : rest.shape[0]], initial, states)
    values = jax.vmap(dynamics)(previous, drives)
    gaps = [jnp.abs(value - state).reshape(state.shape[0], -1)
            for value, state in zip(jax.tree.leaves(values), jax.tree.leaves(states))]
    return largest(jnp.concatenate(gaps, axis=1), axis=1)


def ravel(dynamics: Dynamics, initial: PyTree) -> tuple[Dynamics, Array, Callable[[Array], PyTree]]:
    """The same dynamics on flat states.

    Args:
        dynamics: The recurrence on pytrees.
        initial: `x_0`, floating-point leaves of one type.

    Returns:
        The recurrence on vectors, `x_0` as a vector of shape `(D,)`, and the function from one vector to one pytree.

    Raises:
        TypeError: If a leaf is not floating point, or types are mixed.
        ValueError: If the state has no elements.
    """
    leaves = jax.tree_util.tree_leaves_with_path(initial)
    types = {jax.tree_util.keystr(path) or "the state": jnp.asarray(leaf).dtype for path, leaf in leaves}
    for name, dtype in types.items():
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"initial: {name} has type {dtype}, wanted floating point; discrete things and keys belong "
                            "to the drives")
    if len(set(types.values())) > 1:
        raise TypeError(f"initial: mixed floating-point types {({k: str(v) for k, v in types.items()})}, wanted one")
    flat, unravel = ravel_pytree(initial)
    if flat.size == 0:
        raise ValueError("initial: the state has no elements, wanted at least one number")
    if len(leaves) == 1 and flat.shape == jnp.shape(leaves[0][1]) and jax.tree.structure(initial) == _LEAF:
        return dynamics, flat, _identity
    return Dynamics(_Flat(dynamics.step, _Unravel(initial)), dynamics.params), flat, unravel


_LEAF = jax.tree.structure(0)


def _identity(flat: Array) -> Array:
    return flat


class _Unravel:
    """Vector to pytree; equal for equal structures, so that compiled code is found again."""

    def __init__(self, example: PyTree):
        self.structure = jax.tree.structure(example)
        self.shapes = tuple((jnp.shape(leaf), str(jnp.asarray(leaf).dtype)) for leaf in jax.tree.leaves(example))

    def __call__(self, flat: Array) -> PyTree:
        leaves, start = [], 0
        for shape, _ in self.shapes:
            size = int(np.prod(shape, dtype=int))
            leaves.append(flat[start:start + size].reshape(shape))
            start += size
        return jax.tree.unflatten(self.structure, leaves)

    def __eq__(self, other):
        return isinstance(other, _Unravel) and (self.structure, self.shapes) == (other.structure, other.shapes)

    def __hash__(self):
        return hash((self.structure, self.shapes))


class _Flat:
    """A step on flat states."""

    def __init__(self, step: Callable, unravel: _Unravel):
        self.step, self.unravel = step, unravel

    def __call__(self, params, flat, drive):
        return ravel_pytree(self.step(params, self.unravel(flat), drive))[0]

    def __eq__(self, other):
        return isinstance(other, _Flat) and (self.step, self.unravel) == (other.step, other.unravel)

    def __hash__(self):
        return hash((self.step, self.unravel))


class _WithoutParams:
    """A function `(state, drive)` as a step `(params, state, drive)`."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, params, state, drive):
        del params
        return self.function(state, drive)

    def __eq__(self, other):
        return isinstance(other, _WithoutParams) and self.function == other.function

    def __hash__(self):
        return hash(self.function)
