"""Derivatives of a solved path, whatever solved it.

A path is defined by x_t = f(θ, x_{t-1}, u_t), so its derivative along (θ̇, ẋ_0, u̇) is the solution of

    δ_t = J_t δ_{t-1} + b_t,     b_t = ∂f/∂θ θ̇ + ∂f/∂u u̇ (+ J_1 ẋ_0 for t = 1),     δ_0 = 0,     J_t = ∂f/∂x at x_{t-1}

(implicit function theorem): an affine recurrence. Its transpose, which reverse mode needs, is the same recurrence backwards,
y_t = J_{t+1}ᵀ y_{t+1} + b_t. No derivative goes through the solver's iterations, and the rule is itself differentiable, so
second derivatives follow. Two ways to solve the recurrence and its transpose:

    Implicit           Jacobians in full and a prefix or suffix scan                         memory O(T D²)
    ImplicitSegmented  products J_t δ and J_tᵀ y as they are needed, in a segmented scan     memory O(T D)

The recurrence of δ forgets exactly as the path itself does, hence the segmented scan; its products are recomputed from the
path, so nothing but states is kept.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.solution import DEFAULT_ULPS
from partime_mcmc.engine.time_axis import ScanAxis
from partime_mcmc.linearize.dense import jacobian
from partime_mcmc.scan.affine import Dense
from partime_mcmc.solvers.segmented_scan import (
    SegmentedScanConfig,
    SegmentedScanReport,
    segmented_scan,
)
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Array, PyTree, pytree


class Adjoint(Protocol):
    """How derivatives reach a solved path."""

    def __call__(
        self, dynamics: Dynamics, initial: Array, drives: PyTree, states: Array, axis: ScanAxis
    ) -> Array:
        """`states` itself, with derivatives with respect to `dynamics.params`, `initial` and `drives`."""
        ...


@pytree()
class Implicit:
    """Derivatives by the implicit function theorem, with the Jacobians of all steps at once: for narrow states."""

    def __call__(
        self, dynamics: Dynamics, initial: Array, drives: PyTree, states: Array, axis: ScanAxis
    ) -> Array:
        return _with_derivatives(dynamics, initial, drives, states, axis, None)


@pytree(static=("plan",))
class ImplicitSegmented:
    """Derivatives by the implicit function theorem, with Jacobian products in a segmented scan: for wide states that forget.

    Where the recurrence does not forget it is solved one step after another; the result is the same. Along an axis that
    is spread over devices take `Implicit`.

    Attributes:
        plan: How many lanes.
    """

    plan: SegmentedScanConfig = SegmentedScanConfig(64)

    def __call__(
        self, dynamics: Dynamics, initial: Array, drives: PyTree, states: Array, axis: ScanAxis
    ) -> Array:
        return _with_derivatives(dynamics, initial, drives, states, axis, self.plan)


def _with_derivatives(dynamics, initial, drives, states, axis, plan):
    if states.shape[0] == 0:
        return states
    return _attach(
        dynamics.step, axis, plan, dynamics.params, initial, drives, lax.stop_gradient(states)
    )


@pytree()
class NoDerivatives:
    """The path as it was found, for callers that attach derivatives later or need none."""

    def __call__(
        self, dynamics: Dynamics, initial: Array, drives: PyTree, states: Array, axis: ScanAxis
    ) -> Array:
        return states


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _attach(
    step: Callable,
    axis: ScanAxis,
    plan: SegmentedScanConfig | None,
    params: PyTree,
    initial: Array,
    drives: PyTree,
    states: Array,
) -> Array:
    return states


@_attach.defjvp
def _attach_jvp(step, axis, plan, primals, tangents):
    params, initial, drives, states = primals
    params_dot, initial_dot, drives_dot, _ = tangents
    # The path as a function of the primals, so that this rule can be differentiated again.
    path = _attach(step, axis, plan, params, initial, drives, states)
    previous = axis.previous(initial, path)
    at_once = _all_steps if plan is None else _in_blocks

    def push(params, first, drives):
        # Only x_0 moves here; how the other states move is what the recurrence below finds.
        return at_once(step, params, axis.previous(first, path), drives)

    _, force = jax.jvp(push, (params, initial, drives), (params_dot, initial_dot, drives_dot))
    if plan is None:
        matrices = jax.vmap(lambda state, drive: jacobian(Dynamics(step, params), state, drive)[1])(
            previous, drives
        )
        return path, _solve_recurrence(matrices, force, axis)
    return path, _segmented_recurrence(step, plan, params, previous, drives, force, axis)


def _all_steps(step, params, previous, drives):
    """`step` at all times at once, `(T, D)`."""
    return jax.vmap(step, in_axes=(None, 0, 0))(params, previous, drives)


# Numbers of state in the steps evaluated side by side, where all T at once would keep T times what a step computes on its
# way: as many as a cache holds with what is computed from them (64 units: blocks of 2,048 steps take 6.4 ms, of 512 steps
# 10 ms, all 16,384 at once 17 ms).
_BLOCK_NUMBERS = 131_072


def _in_blocks(step, params, previous, drives):
    """The same in blocks of time that keep nothing for their derivative but states and drives."""
    num_steps = previous.shape[0]
    most = min(num_steps, max(1, _BLOCK_NUMBERS // max(previous.shape[1], 1)))
    size = next((size for size in range(most, most // 4, -1) if num_steps % size == 0), num_steps)
    blocks = jax.tree.map(
        lambda leaf: leaf.reshape(num_steps // size, size, *leaf.shape[1:]), (previous, drives)
    )

    @jax.checkpoint
    def block(params, previous, drives):
        return _all_steps(step, params, previous, drives)

    values = lax.scan(lambda params, cut: (params, block(params, *cut)), params, blocks)[1]
    return values.reshape(previous.shape)


def _solve_recurrence(matrices: Array, force: Array, axis: ScanAxis) -> Array:
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


def _segmented_recurrence(step, plan, params, previous, drives, force, axis):
    """The same with products in place of matrices: J_t is that of `step` at `previous[t]`, `drives[t]`."""
    nothing = jnp.zeros_like(force[0])

    def apply(delta):
        _, moved = jax.jvp(
            lambda states: _in_blocks(step, params, states, drives),
            (previous,),
            (axis.previous(nothing, delta),),
        )
        return delta - moved

    def solve(_, right):
        return segmented_scan(
            _Push(step), params, nothing, (previous, drives, right), _bound(right), plan
        )[0]

    def transpose_solve(_, right):
        # y_t = b_t + z_{t+1}.
        return right + axis.following(
            pulled_back(step, plan, params, previous, drives, right)[0], nothing
        )

    return lax.custom_linear_solve(apply, force, solve, transpose_solve)


def pulled_back(
    step: Callable,
    plan: SegmentedScanConfig,
    params: PyTree,
    previous: Array,
    drives: PyTree,
    right: Array,
) -> tuple[Array, SegmentedScanReport]:
    """What reaches x_{t-1} through step t, from the last step to the first: z_t = J_tᵀ (b_t + z_{t+1}).

    Args:
        step: `(params, state, drive) -> state` on flat states.
        plan: How many lanes.
        params: Shared by all steps.
        previous: The states before each step, shape `(T, D)`.
        drives: Leaves with leading axis `T`.
        right: b, the derivative of a loss in each state, shape `(T, D)`.

    Returns:
        z, shape `(T, D)`, and the report of the scan, with products with J_tᵀ per step in `evaluations`.
    """
    return segmented_scan(
        _Pull(step),
        params,
        jnp.zeros_like(right[0]),
        (previous, drives, right),
        _bound(right),
        plan,
        direction=-1,
    )


def _bound(right):
    """Tolerances at a meeting, against the size of what drives the recurrence: it is linear, so it has no other scale."""
    unit = DEFAULT_ULPS / 4 * jnp.finfo(right.dtype).eps
    return unit * jnp.max(jnp.where(jnp.isfinite(right), jnp.abs(right), 0)), unit


class _Push(HashableFunction):
    """δ_{t-1} to J_t δ_{t-1} + b_t."""

    def __call__(self, params, delta, drive):
        state, drive, force = drive
        return (
            jax.jvp(lambda state: self.parts[0](params, state, drive), (state,), (delta,))[1]
            + force
        )


class _Pull(HashableFunction):
    """z_{t+1} to J_tᵀ (b_t + z_{t+1})."""

    def __call__(self, params, pulled, drive):
        state, drive, right = drive
        return jax.vjp(lambda state: self.parts[0](params, state, drive), state)[1](right + pulled)[
            0
        ]
