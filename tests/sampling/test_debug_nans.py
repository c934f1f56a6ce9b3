"""JAX's search for NaN, switched on by somebody who debugs another part of a program, does not end runs that are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import Dynamics, Target, certify, deer, mala, sample, shooting, solve


@pytest.fixture(autouse=True)
def searching():
    # For all threads, as users set it.
    settings = ("jax_debug_nans", "jax_debug_infs")
    for name in settings:
        jax.config.update(name, True)
    yield
    for name in settings:
        jax.config.update(name, False)


def system(weight):
    return Dynamics(lambda w, x, u: jnp.tanh(w * x + u), weight)


@pytest.mark.parametrize("solver", [deer(), shooting(num_segments=4)])
def test_solves_and_their_derivatives(solver):
    drives = jnp.linspace(-1, 1, 60)
    found = solve(system(jnp.float32(0.5)), jnp.float32(0), drives, solver=solver)
    assert found.or_raise().status == 0

    @jax.jit
    def total(weight):
        return solve(system(weight), jnp.float32(0), drives, solver=solver).states.sum()

    assert np.isfinite(jax.grad(total)(jnp.float32(0.5)))


def test_proposals_outside_the_support():
    """Side by side in threads, which begin with the settings of the process."""
    logdensity = lambda x: jnp.sum(jnp.log(1 - x**2))
    kernel = mala(logdensity, 0.4)
    draws = sample(
        jax.random.key(0),
        Target(logdensity, jnp.zeros(2)),
        kernel,
        num_samples=100,
        num_chains=2,
        progress=False,
    )
    certificate = draws.certificate
    assert certificate.certified.all() and certificate.num_nonfinite_proposals.min() > 0
    state = kernel.init(jnp.zeros(2))
    tape = kernel.tape(jax.random.key(0), 100, state)
    path = solve(kernel.dynamics(), kernel.carry(state), tape).states
    assert certify(kernel, kernel.carry(state), path, tape).certified


def test_the_search_goes_on_outside():
    solve(system(jnp.float32(0.5)), jnp.float32(0), jnp.ones(10))
    # JAX looks at what it compiles now; of a shape that no test has had.
    with pytest.raises(FloatingPointError):
        jnp.log(-jnp.ones(7))
