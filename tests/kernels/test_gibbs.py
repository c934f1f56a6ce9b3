"""Gibbs sampling by inversion: its law, its quantiles, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.scipy.stats.norm import ppf

from partime_mcmc import deer, gibbs, rollout, shooting, solve
from partime_mcmc.kernels import blackjax_loop, gamma_quantile

CORRELATION, NUM_STEPS = 0.8, 20_000


def given_the_other(name):
    """x | y ~ N(ρ y, 1 − ρ²)."""
    return lambda state, uniform: (
        CORRELATION * state[name] + ppf(uniform) * jnp.sqrt(1 - CORRELATION**2)
    )


@pytest.fixture(scope="module")
def pair():
    """A pair of normals drawn in turn: the kernel, its start and its tape, and a path of each solver."""
    with jax.enable_x64(True):
        kernel = gibbs({"x": given_the_other("y"), "y": given_the_other("x")})
        state = kernel.init({"x": jnp.zeros(2), "y": jnp.zeros(2)})
        tape = kernel.tape(jax.random.key(0), NUM_STEPS, state)
        given = kernel.dynamics(), kernel.carry(state), tape
        paths = {"loop": rollout(*given)} | {
            str(solver): solve(*given, solver=solver).or_raise().states
            for solver in (deer(), shooting(16))
        }
        return kernel, state, tape, paths


def test_every_solver_gives_the_kernels_own_loop(pair, double):
    kernel, state, tape, paths = pair
    keys = jax.random.split(jax.random.key(0), NUM_STEPS)
    carries, _ = blackjax_loop(kernel, state, keys)
    for path in paths.values():
        for name in ("x", "y"):
            np.testing.assert_allclose(path[name], carries[name], rtol=0, atol=1e-11)


def test_the_law_is_that_of_the_conditionals(pair):
    x, y = (np.asarray(pair[3]["loop"][name][100:]) for name in ("x", "y"))
    # Sweeps of this pair are an AR(1) chain with coefficient ρ²: n draws are worth n (1 − ρ⁴) / (1 + ρ⁴) for the variances.
    memory = CORRELATION**2
    error = np.sqrt(2 * (1 + memory**2) / (1 - memory**2) / x.size)
    assert abs(np.mean(x**2) - 1) < 4 * error and abs(np.mean(y**2) - 1) < 4 * error
    assert abs(np.mean(x * y) - CORRELATION) < 4 * error
    lag = np.mean(y[1:] * y[:-1])
    assert abs(lag - memory) < 4 * error
    # Within one sweep y is drawn given this sweep's x, and x given the last sweep's y.
    assert abs(np.mean(x[1:] * y[:-1]) - CORRELATION) < 4 * error
    assert abs(np.mean(x[:-1] * y[1:]) - CORRELATION**3) < 4 * error


def test_gamma_quantiles(double):
    shapes = jnp.asarray([0.05, 0.5, 1.0, 6.0, 80.0, 1e4])[:, None]
    uniform = jnp.asarray([1e-12, 1e-3, 0.3, 0.5, 0.97, 1 - 1e-9])
    got = jax.jit(gamma_quantile)(shapes, uniform)
    wanted = scipy.stats.gamma.ppf(np.asarray(uniform), np.asarray(shapes))
    # P is right to about 1e-14 absolutely, and 1 − u has as many digits.
    slope = scipy.stats.gamma.pdf(wanted, np.asarray(shapes)) * wanted
    shown = wanted > 1e-300
    room = 1e-10 + 1e-13 / np.where(shown, slope, 1)
    assert (np.abs(np.log(got[shown] / wanted[shown])) < room[shown]).all()
    in_u, in_shape = (
        jax.grad(gamma_quantile, argnums=(1, 0))(2.5, jnp.asarray(0.4)),
        jax.grad(gamma_quantile, argnums=0)(2.5, jnp.asarray(0.4)),
    )
    x = scipy.stats.gamma.ppf(0.4, 2.5)
    np.testing.assert_allclose(in_u[0], 1 / scipy.stats.gamma.pdf(x, 2.5), rtol=1e-9)
    by_differences = (
        scipy.stats.gamma.ppf(0.4, 2.5 + 1e-5) - scipy.stats.gamma.ppf(0.4, 2.5 - 1e-5)
    ) / 2e-5
    np.testing.assert_allclose(in_shape, by_differences, rtol=1e-6)
    assert np.isnan(
        gamma_quantile(jnp.asarray([-1.0, 2.0, 2.0]), jnp.asarray([0.5, 0.0, 1.0]))
    ).all()


def test_gamma_quantiles_in_float32():
    uniform = jnp.asarray([1e-4, 0.2, 0.9, 0.999], jnp.float32)
    got = gamma_quantile(6.0, uniform)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, scipy.stats.gamma.ppf(np.asarray(uniform), 6.0), rtol=2e-3)


@pytest.mark.parametrize(
    "blocks, error, words",
    [
        ({}, ValueError, "blocks: none"),
        ([lambda state, uniform: uniform], TypeError, "blocks: got"),
        ({"x": 3}, TypeError, "blocks: got"),
    ],
)
def test_unusable_blocks(blocks, error, words):
    with pytest.raises(error, match=words):
        gibbs(blocks)


def test_unusable_positions():
    with pytest.raises(TypeError, match="position: got"):
        gibbs({"x": given_the_other("y")}).init(jnp.zeros(2))
    with pytest.raises(TypeError, match="no field 'x'"):
        gibbs({"x": given_the_other("y")}).init({"y": jnp.zeros(2)})
    wide = gibbs({"x": lambda state, uniform: jnp.zeros(3)})
    with pytest.raises(TypeError, match="'x' returns"):
        wide.step(jax.random.key(0), wide.init({"x": jnp.zeros(2)}))
