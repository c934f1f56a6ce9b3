"""A function of parameters and a position whose gradient is traced once.

A program of this package holds the gradient of the log density in several places: the first state, each leapfrog step, the
Langevin step, the certificate. Each `jax.value_and_grad` would trace the density and transpose it anew, operation by
operation. Here f(a, x) has a rule for its derivative,

    ∂f(a, x) · v = ⟨∇ₓf(a, x), v⟩,

in which the value and the gradient are one nested function that JAX traces, batches and lowers once and calls wherever it is
wanted. Derivatives with respect to the parameters, and of the gradient itself, are as ever.
"""

import functools
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from partime_mcmc.tracing import HashableFunction, num_computed
from partime_mcmc.types import Array, PyTree


class WithTracedGradient(HashableFunction):
    """`(params, position) -> scalar` with the rule above; the part is the function itself, hashable, capturing no array."""

    def __call__(self, params: PyTree, position: PyTree) -> Array:
        return _value(self.parts[0], params, position)


# What one number costs, out of one operation on an array, in a program that was not optimised, and in a product of matrices.
_PER_NUMBER, _PER_PRODUCT = 4e-10, 1.2e-9
# A metric's columns at most.
_MOST_COLUMNS = 300


def unoptimised_seconds(density: Callable, dimension: int, num_gradients: float) -> float:
    """How long so many gradients, and their products with a metric, take in a program that was not optimised.

    Args:
        density: From `kernel_program.density_of`; of another function it is not known, which counts as infinite.
        dimension: D.
        num_gradients: How many.
    """
    if not isinstance(density, WithTracedGradient):
        return math.inf
    # Reverse mode computes about three times what the function does.
    gradient = 3 * num_computed(density.parts[0].jaxpr) * _PER_NUMBER
    return num_gradients * (gradient + dimension * min(dimension, _MOST_COLUMNS) * _PER_PRODUCT)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _value(function: Callable, params: PyTree, position: PyTree) -> Array:
    return function(params, position)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(function: Callable, params: PyTree, position: PyTree):
    return jax.value_and_grad(function, argnums=1)(params, position)


@functools.partial(_value.defjvp, symbolic_zeros=True)
def _slope(function: Callable, primals: tuple, tangents: tuple) -> tuple[Array, Any]:
    leaves = list(zip(jax.tree.leaves(primals), jax.tree.leaves(tangents)))
    moving = [place for place, (_, one) in enumerate(leaves) if not isinstance(one, SymbolicZero)]
    if all(isinstance(one, SymbolicZero) for one in jax.tree.leaves(tangents[0])):
        value, gradient = _value_and_gradient(function, *primals)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(tangents[1]))
        parts = [
            jnp.vdot(one, slope) for one, slope in pairs if not isinstance(slope, SymbolicZero)
        ]
        return value, sum(parts, jnp.zeros_like(value)).astype(value.dtype)
    structure = jax.tree.structure(primals)

    def of_moving(*given):
        values = [value for value, _ in leaves]
        for place, value in zip(moving, given):
            values[place] = value
        return function(*jax.tree.unflatten(structure, values))

    values, slopes = zip(*(leaves[place] for place in moving))
    return jax.jvp(of_moving, values, slopes)
