"""Simulation-based calibration (Talts, Betancourt, Simpson, Vehtari & Gelman 2018) of MALA, HMC, NUTS and the
coalescing cycle.

Draw θ from the prior N(0, I) and data y ~ N(θ, 1) three times, sample the posterior from a far start, thin, and rank
each θ_j among the draws: over many simulations ranks are uniform if the sampler is right. Ranks are counted in eight bins
and held to χ² at 1e-4 over all coordinates; a density whose likelihood is a quarter too wide must fail, or the test has no power.
Chains are solved in parallel time. The long form has ten times as many simulations, and finds a tenth.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from partime_mcmc.engine.recipes import shooting
from partime_mcmc.engine.solution import Status
from partime_mcmc.engine.solve import solve
from partime_mcmc.kernels import MultishiftCoupling, Whitening, coalescing_hmc, hmc, mala, nuts

D, COUNT, BINS = 2, 3, 8
BURN_IN, STRIDE, KEPT = 20, 4, 31  # 32 possible ranks, four to a bin


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


KERNELS = {
    "mala": lambda density, metric: mala(density, 0.6, metric, coupling=MultishiftCoupling()),
    "hmc": lambda density, metric: hmc(density, 0.9, metric, 2),
    "nuts": lambda density, metric: nuts(density, 0.8, metric, 4),
    "coalescing hmc": lambda density, metric: coalescing_hmc(density, 0.7, metric, 2),
}


@functools.cache
def _one(build):
    def one(key, width):
        keys = jax.random.split(key, 3)
        theta = jax.random.normal(keys[0], (D,))
        y = theta + jax.random.normal(keys[1], (COUNT, D))

        def density(x):
            return -0.5 * jnp.sum(x**2) - 0.5 * jnp.sum((y - x) ** 2) / width**2

        metric = Whitening(jnp.zeros(D), jnp.zeros(D), jnp.full(D, 0.5))
        kernel = build(density, metric)
        state = kernel.init(jnp.full(D, 3.0))
        tape = kernel.tape(keys[2], BURN_IN + STRIDE * KEPT, state)
        found = solve(kernel.dynamics(), kernel.carry(state), tape, solver=shooting(steps=36))
        draws = jax.vmap(kernel.position)(found.states)[BURN_IN + STRIDE - 1 :: STRIDE]
        return jnp.sum(draws < theta, axis=0), found.status

    return jax.jit(jax.vmap(one, in_axes=(0, None)))


def smallest_p(name, num_simulations, width=1.0):
    """The smallest p of χ² over coordinates."""
    ranks, status = _one(KERNELS[name])(
        jax.random.split(jax.random.key(11), num_simulations), width
    )
    solved = np.asarray(status) == Status.CONVERGED
    assert solved.mean() > 0.99
    counts = [
        np.bincount(column * BINS // (KEPT + 1), minlength=BINS)
        for column in np.asarray(ranks)[solved].T
    ]
    return min(stats.chisquare(one).pvalue for one in counts)


# NUTS takes some 25 s of one core, three times as long as any other, for trees that all lanes build to the deepest; its
# conservation test is ordinary (`test_statistics`).
@pytest.mark.parametrize(
    "name", ["hmc", "coalescing hmc", "mala", pytest.param("nuts", marks=pytest.mark.slow)]
)
def test_ranks_are_uniform(name):
    assert smallest_p(name, 1000) > 1e-4 / D


def test_a_likelihood_of_the_wrong_width_is_found():
    assert smallest_p("hmc", 1000, width=1.25) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_ranks_are_uniform_in_many_simulations(name):
    assert smallest_p(name, 10_000) > 1e-4 / D
    assert smallest_p(name, 10_000, width=1.1) < 1e-4
