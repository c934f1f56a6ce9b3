"""A density with a gradient that is traced once: every derivative is that of the plain function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import coalescing_hmc
from partime_mcmc.kernels import Whitening
from partime_mcmc.kernels.traced_gradient import WithTracedGradient

pytestmark = pytest.mark.fast

DATA = {"y": jnp.arange(1.0, 4.0), "counts": jnp.arange(3)}
AT = {"a": jnp.array([0.3, -0.2, 0.5]), "b": jnp.array(0.7)}
CALLS = []


def density(data, position):
    CALLS.append(None)
    shift = data["counts"] * position["b"]
    return -jnp.sum((data["y"] - jnp.exp(position["a"]) - shift) ** 2) - position["b"] ** 4


TRACED = WithTracedGradient(density)


def test_every_derivative_is_that_of_the_function():
    wanted = {name: derivative(density) for name, derivative in DERIVATIVES.items()}
    found = {name: derivative(TRACED) for name, derivative in DERIVATIVES.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), found, wanted)


DERIVATIVES = {
    "value": lambda f: f(DATA, AT),
    "gradient": lambda f: jax.grad(f, 1)(DATA, AT),
    "forward": lambda f: jax.jacfwd(f, 1)(DATA, AT),
    "of one part": lambda f: jax.grad(lambda b: f(DATA, {**AT, "b": b}))(AT["b"]),
    "second": lambda f: jax.hessian(f, 1)(DATA, AT),
    "by the data": lambda f: jax.grad(lambda y, x: f({**DATA, "y": y}, x), (0, 1))(DATA["y"], AT),
    "batched": lambda f: jax.vmap(jax.value_and_grad(f, 1), (None, 0))(
        DATA, jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), AT)
    ),
    "in a loop": lambda f: jax.lax.fori_loop(
        0, 3, lambda _, x: jax.tree.map(lambda a, g: a + 1e-3 * g, x, jax.grad(f, 1)(DATA, x)), AT
    ),
}


def test_more_gradients_are_no_more_traces():
    def steps(count):
        x = AT
        for _ in range(count):
            x = jax.tree.map(lambda a, g: a + 1e-3 * g, x, jax.grad(TRACED, 1)(DATA, x))
        return x

    jax.eval_shape(lambda: steps(1))
    before = len(CALLS)
    jaxpr = jax.make_jaxpr(lambda: steps(5))()
    assert len(CALLS) == before
    assert str(jaxpr).count("name=_value_and_gradient") == 5


def test_a_kernel_in_whitened_coordinates_traces_its_gradient_once():
    """With the coordinates: the change of variables is no operation of the steps either."""
    whitening = Whitening.of_covariance(AT, jnp.zeros(4), 2 * jnp.eye(4))
    whitened = whitening.density(functools.partial(TRACED, DATA))
    plain = whitening.density(functools.partial(density, DATA))
    z = jnp.array([0.1, -0.3, 0.2, 0.4])
    for derivative in (lambda f: f, jax.grad, jax.hessian):
        np.testing.assert_allclose(derivative(whitened)(z), derivative(plain)(z), rtol=1e-5)
    kernel = coalescing_hmc(functools.partial(TRACED, DATA), 0.3, whitening, 2)
    state = kernel.init(AT)
    before = len(CALLS)
    jaxpr = jax.make_jaxpr(kernel.step)(jax.random.key(0), state)
    assert len(CALLS) == before
    # Two leapfrogs, a Langevin step, and once, inside of all three, the gradient by the position.
    assert str(jaxpr).count("name=_value_and_gradient") == 3 + 1
