"""Dynamics: the recurrence x_t = f(θ, x_{t-1}, u_t), its sequential solution, and its residual.

`θ` are the parameters, `u_1..u_T` the drives (the random numbers of a chain, the inputs of a network), `x_0` the initial
state. States are
any pytree of floating-point arrays of one type; inside the engine they are flat vectors of shape `(D,)`, and `ravel`
is the border between the two. Keys, counters and other discrete things belong to the drives.

A function that captures arrays hides part of `θ`: XLA folds captured constants for minutes and no derivative reaches
them. `Dynamics.closing_over` finds what a function captures, concrete or traced, and makes it parameters.
"""

from typing import Callable, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from partime_mcmc.engine.solution import nanaware_max
from partime_mcmc.tracing import HashableFunction, WithoutParams, explicit
from partime_mcmc.types import Array, PyTree, pytree


@pytree(static=("init", "step", "state", "aux"))
class CachedStep:
    """The same recurrence for sequential evaluation: what one step computes for the next is kept in a memory.

    A gradient-based kernel evaluates the gradient at the end of a step; the next step begins with that very gradient.
    All functions take parameters first; `state(step(init(x, u), u))` is `Dynamics.step(x, u)` up to rounding.

    Attributes:
        init: `(params, state, first_drive) -> memory`.
        step: `(params, memory, drive) -> memory`.
        state: `(params, memory) -> state`.
        params: Parameters of `init`, `step` and `state`, in this order.
        aux: `memory -> (R,)`, further results of the step just made, of the state's type (what a kernel reports of its
            proposal); solvers that go step by step keep them for every step of the path. None: nothing.
    """

    init: Callable
    step: Callable
    state: Callable
    params: tuple = (None, None, None)
    aux: Callable | None = None


@pytree(static=("step",))
class Dynamics:
    """A recurrence `state = step(params, state, drive)`.

    Attributes:
        step: A pure function `(params, state, drive) -> state` whose result has the structure, shapes and types of
            `state`. Compared by identity: use one function object for one recurrence, or it is compiled again.
        params: Whatever `step` needs besides; a pytree, differentiable.
        cached: The same recurrence with a memory, for sequential use; None where steps share nothing.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> print(decay(jnp.ones(1), jnp.ones(1)))
        [1.5]
    """

    step: Callable[[PyTree, PyTree, PyTree], PyTree]
    params: PyTree = None
    cached: CachedStep | None = None

    def __call__(self, state: PyTree, drive: PyTree) -> PyTree:
        return self.step(self.params, state, drive)

    @classmethod
    def closing_over(
        cls, function: Callable[[PyTree, PyTree], PyTree], state: PyTree, drive: PyTree
    ) -> Self:
        """Dynamics of a function that captures arrays, with the captured arrays as parameters.

        Args:
            function: `(state, drive) -> state`.
            state: An example state; only shapes and types matter.
            drive: An example drive of one step.

        Returns:
            Dynamics whose `params` are the arrays that `function` captures. Equal functions and shapes give the same
            `step`, so nothing is compiled twice.
        """
        step, captured = explicit(WithoutParams(function), None, state, drive)
        return cls(step, captured)


def without_captures(dynamics: Dynamics, state: PyTree, drive: PyTree) -> Dynamics:
    """The same dynamics with every captured array among its parameters.

    Args:
        dynamics: The recurrence.
        state: An example state; only shapes and types matter.
        drive: An example drive of one step.
    """
    step, params = explicit(dynamics.step, dynamics.params, state, drive)
    cached = dynamics.cached
    if cached is not None:
        init, p0 = explicit(cached.init, cached.params[0], state, drive)
        advance, p1 = explicit(cached.step, cached.params[1], init.result, drive)
        state_of, p2 = explicit(cached.state, cached.params[2], init.result)
        cached = CachedStep(init, advance, state_of, (p0, p1, p2), cached.aux)
    return Dynamics(step, params, cached)


def rollout(dynamics: Dynamics, initial: PyTree, drives: PyTree) -> PyTree:
    """The path, one step after another: the reference for every solver.

    Args:
        dynamics: The recurrence.
        initial: `x_0`.
        drives: `u_1..u_T`, leaves with leading axis `T`.

    Returns:
        `x_1..x_T`, leaves with leading axis `T`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, rollout
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> print(rollout(decay, jnp.zeros(1), jnp.ones((4, 1))).ravel())
        [1.    1.5   1.75  1.875]
    """
    return rollout_with_aux(dynamics, initial, drives)[0]


def rollout_with_aux(
    dynamics: Dynamics, initial: PyTree, drives: PyTree
) -> tuple[PyTree, Array | None]:
    """As `rollout`, and `CachedStep.aux` of each step, shape `(T, R)`; None without `aux`, or without steps."""
    cached = dynamics.cached
    if cached is None or jax.tree.leaves(drives)[0].shape[0] == 0:

        def advance(state, drive):
            state = dynamics(state, drive)
            return state, state

        return lax.scan(advance, initial, drives)[1], None

    def advance_memory(memory, drive):
        memory = cached.step(cached.params[1], memory, drive)
        return memory, (cached.state(cached.params[2], memory), cached.aux and cached.aux(memory))

    first = jax.tree.map(lambda leaf: leaf[0], drives)
    return lax.scan(advance_memory, cached.init(cached.params[0], initial, first), drives)[1]


def residual(dynamics: Dynamics, initial: PyTree, states: PyTree, drives: PyTree) -> Array:
    """How badly each step of a path breaks the recurrence, all steps at once.

    Args:
        dynamics: The recurrence.
        initial: `x_0`.
        states: The path, leaves with leading axis `T`.
        drives: `u_1..u_T`.

    Returns:
        `max_j |f(x_{t-1}, u_t) − x_t|_j`, shape `(T,)`; NaN where a step is not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, residual
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> path = jnp.array([[1.0], [1.5], [2.0]])  # 1.75 would be right
        >>> print(residual(decay, jnp.zeros(1), path, jnp.ones((3, 1))))
        [0.   0.   0.25]
    """
    previous = jax.tree.map(
        lambda first, rest: jnp.concatenate([jnp.asarray(first, rest.dtype)[None], rest[:-1]])[
            : rest.shape[0]
        ],
        initial,
        states,
    )
    values = jax.vmap(dynamics)(previous, drives)
    gaps = [
        jnp.abs(value - state).reshape(state.shape[0], -1)
        for value, state in zip(jax.tree.leaves(values), jax.tree.leaves(states))
    ]
    return nanaware_max(jnp.concatenate(gaps, axis=1), axis=1)


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
    check_state(initial)
    flat, unravel = ravel_pytree(initial)
    if jax.tree.structure(initial) == jax.tree.structure(0) and flat.shape == jnp.shape(initial):
        return dynamics, flat, _identity
    border, cached = _Unravel(initial), dynamics.cached
    if cached is not None:
        cached = CachedStep(
            _FlatInit(cached.init, border),
            cached.step,
            _FlatState(cached.state),
            cached.params,
            cached.aux,
        )
    return Dynamics(_FlatStep(dynamics.step, border), dynamics.params, cached), flat, unravel


def check_state(initial: PyTree) -> None:
    """Refuse a state that cannot be solved for.

    Raises:
        TypeError: If a leaf is not floating point, or types are mixed.
        ValueError: If the state has no elements.
    """
    leaves = jax.tree_util.tree_leaves_with_path(initial)
    types = {
        jax.tree_util.keystr(path) or "the state": jnp.asarray(leaf).dtype for path, leaf in leaves
    }
    for name, dtype in types.items():
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"initial: {name} has type {dtype}, wanted floating point; discrete things and keys belong "
                "to the drives"
            )
    if len(set(types.values())) > 1:
        raise TypeError(
            f"initial: mixed floating-point types { ({k: str(v) for k, v in types.items()}) }, wanted one"
        )
    if not sum(jnp.size(leaf) for _, leaf in leaves):
        raise ValueError("initial: the state has no elements, wanted at least one number")


def _identity(flat: Array) -> Array:
    return flat


class _Unravel(HashableFunction):
    """Vector to pytree; equal for equal structures, so that compiled code is found again."""

    def __init__(self, example: PyTree):
        leaves, structure = jax.tree.flatten(example)
        super().__init__(
            structure, tuple((jnp.shape(leaf), str(jnp.asarray(leaf).dtype)) for leaf in leaves)
        )

    def __call__(self, flat: Array) -> PyTree:
        (structure, shapes), leaves, start = self.parts, [], 0
        for shape, _ in shapes:
            size = int(np.prod(shape, dtype=int))
            leaves.append(flat[start : start + size].reshape(shape))
            start += size
        return jax.tree.unflatten(structure, leaves)


class _FlatStep(HashableFunction):
    """A step on flat states."""

    def __call__(self, params, flat, drive):
        step, unravel = self.parts
        return ravel_pytree(step(params, unravel(flat), drive))[0]


class _FlatInit(HashableFunction):
    """`CachedStep.init` from a flat state."""

    def __call__(self, params, flat, drive):
        init, unravel = self.parts
        return init(params, unravel(flat), drive)


class _FlatState(HashableFunction):
    """`CachedStep.state` to a flat state."""

    def __call__(self, params, memory):
        return ravel_pytree(self.parts[0](params, memory))[0]
