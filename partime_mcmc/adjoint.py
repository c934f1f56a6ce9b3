"""Derivatives of a solved path, whatever solved it.

A path is defined by x_t = f(θ, x_{t-1}, u_t), so its derivative along (θ̇, ẋ_0, u̇) is the solution of

    δ_t = J_t δ_{t-1} + ∂f/∂θ θ̇ + ∂f/∂u u̇,     δ_0 = ẋ_0,     J_t = ∂f/∂x at x_{t-1}

(implicit function theorem): an affine recurrence, one prefix scan. Its transpose, which reverse mode needs, is the same
recurrence backwards, one suffix scan. No derivative goes through the solver's iterations, and the rule is itself
differentiable, so second derivatives follow. Memory is `O(T D²)` for the Jacobians.
"""

from __future__ import annotations

import functools
from typing import Callable, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.dynamics import Dynamics
from partime_mcmc.linearize.dense import jacobian
from partime_mcmc.scan.affine import Dense
from partime_mcmc.scan.time_axis import TimeAxis
from partime_mcmc.types import Array, PyTree, pytree


class Adjoint(Protocol):
    """How derivatives reach a solved path."""

    def __call__(self, dynamics: Dynamics, initial: Array, drives: PyTree, states: Array, axis: TimeAxis) -> Array:
        """`states` itself, with derivatives with respect to `dynamics.params`, `initial` and `drives`."""
        ...


@pytree()
class Implicit:
    """Derivatives by the implicit function theorem."""

    def __call__(self, dynamics: Dynamics, initial: Array, drives: PyTree, states: Array, axis: TimeAxis) -> Array:
        if states.shape[0] == 0:
            return states
        return _attach(dynamics.step, axis, dynamics.params, initial, drives, lax.stop_gradient(states))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attach(step: Callable, axis: TimeAxis, params: PyTree, initial: Array, drives: PyTree, states: Array) -> Array:
    return states


@_attach.defjvp
def _attach_jvp(step, axis, primals, tangents):
    params, initial, drives, states = primals
    params_dot, initial_dot, drives_dot, _ = tangents
    # The path as a function of the primals, so that this rule can be differentiated again.
    path = _attach(step, axis, params, initial, drives, states)
    previous = axis.previous(initial, path)

    def push(params, first, drives):
        # Only x_0 moves here; how the other states move is what the recurrence below finds.
        before = axis.previous(first, path)
        return jax.vmap(lambda state, drive: step(params, state, drive))(before, drives)

    _, force = jax.jvp(push, (params, initial, drives), (params_dot, initial_dot, drives_dot))
    matrices = jax.vmap(lambda state, drive: jacobian(Dynamics(step, params), state, drive)[1])(previous, drives)
    return path, _solve_recurrence(matrices, force, axis)


def _solve_recurrence(matrices: Array, force: Array, axis: TimeAxis) -> Array:
    """δ with δ_t = matrices_t δ_{t-1} + force_t and δ_0 = 0, differentiable and transposable."""
    nothing = jnp.zeros_like(force[0])

    def apply(delta):
        return delta - jnp.einsum("tij,tj->ti", matrices, axis.previous(nothing, delta))

    def solve(_, right):
        return axis.prefix(Dense(matrices, right), nothing)

    def transpose_solve(_, right):
        # (I − L)ᵀ y = b reads y_t = J_{t+1}ᵀ y_{t+1} + b_t.
        later = axis.following(matrices, jnp.zeros_like(matrices[0]))
        return axis.suffix(Dense(jnp.swapaxes(later, 1, 2), right), nothing)

    return lax.custom_linear_solve(apply, force, solve, transpose_solve)
