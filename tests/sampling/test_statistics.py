"""Exactness of the law: chains solved in parallel time have the moments, and kernels the invariant law, that they must.

Seeds are fixed, so a test here either always passes or always fails on one machine; thresholds are set so that with fresh
seeds a right library would fail once in about 1,000 (moments) or 100,000 (conservation) runs. Every gate states what it
can see, and the conservation test has to catch kernels that are wrong on purpose.
"""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from partime_mcmc.engine.dynamics import rollout
from partime_mcmc.engine.recipes import quasi_deer
from partime_mcmc.engine.windows import Windows
from partime_mcmc.kernels import (
    Kernel,
    MultishiftCoupling,
    Whitening,
    coalescing_hmc,
    hmc,
    mala,
    nuts,
    random_walk,
)
from partime_mcmc.models import banana
from partime_mcmc.sampling.sample import sample
from partime_mcmc.sampling.target import Target


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


# --- moments of parallel draws


def z_scores(values, truth):
    """How many standard errors the mean of each quantity is off, and its effective sample size, by batch means.

    Args:
        values: Shape (C, T, m).
        truth: Shape (m,).
    """
    num_batches = 20
    batches = values.reshape(values.shape[0] * num_batches, -1, values.shape[-1]).mean(axis=1)
    error = batches.std(axis=0, ddof=1) / np.sqrt(len(batches))
    return (batches.mean(axis=0) - truth) / error, values.var(axis=(0, 1)) / error**2


def assert_moments(values, truth, *, smallest_ess, detectable):
    """Gates: enough effective draws, power as claimed (in standard deviations), then |z| by Bonferroni at 1e-3."""
    z, ess = z_scores(np.asarray(values), np.asarray(truth))
    assert ess.min() > smallest_ess, f"inconclusive: effective sample sizes {ess}"
    num_batches = 20 * values.shape[0]
    threshold = stats.t.ppf(1 - 1e-3 / (2 * len(z)), num_batches - 1)
    assert 1.3 * threshold / np.sqrt(smallest_ess) <= detectable, (
        "the power claimed in the test is not there"
    )
    assert np.abs(z).max() < threshold, f"z-scores {z}, threshold {threshold:.2f}"


COVARIANCE = ((2.0, 1.2, -0.3), (1.2, 1.5, 0.4), (-0.3, 0.4, 0.7))
MEAN = (1.0, -2.0, 0.5)


def test_moments_of_a_correlated_normal_by_whitened_mala():
    mean, covariance = jnp.array(MEAN), jnp.array(COVARIANCE)
    precision = jnp.linalg.inv(covariance)

    def logdensity(x):
        return -0.5 * (x - mean) @ precision @ (x - mean)

    # The metric is off by a factor on purpose: draws must not depend on it.
    off = jnp.outer(*2 * [jnp.array([1.2, 1.0, 0.8])])
    kernel = mala(logdensity, 0.8, Whitening.of_covariance(mean, mean + 0.3, covariance * off))
    draws = sample(
        jax.random.key(11),
        Target(logdensity, mean),
        kernel,
        num_samples=4000,
        num_chains=4,
        solver=quasi_deer(),
        schedule=Windows(500),
    ).or_raise()
    assert draws.report.fallbacks == () and (np.asarray(draws.certificate.num_rejected) > 400).all()
    x = np.asarray(draws.positions)
    first, second = np.triu_indices(3)
    centred = x - np.array(MEAN)
    values = np.concatenate([x, centred[..., first] * centred[..., second]], axis=-1)
    truth = [*MEAN, *np.array(COVARIANCE)[first, second]]
    assert_moments(values, truth, smallest_ess=1500, detectable=0.15)


def test_moments_of_the_banana_by_hmc():
    """In coordinates in which it is standard normal, so that no moment depends on a few far points.

    The step is short for the curvature of the far ends: with a longer one chains stick there, and a right kernel fails.
    """
    scale, num_chains, num_samples = jnp.array([banana.SCALE, 4.0]), 8, 1000
    kernel = hmc(
        banana.logdensity, 0.1, Whitening.of_covariance(jnp.zeros(2), jnp.zeros(2), scale**2), 20
    )
    # Exact starts: no burn-in to argue about.
    starts = banana.exact_draws(jax.random.key(5), num_chains)
    raw = jax.random.key_data(
        jax.random.split(jax.random.split(jax.random.key(12), 3)[0], num_chains)
    )

    def initial(key):
        return starts[jnp.argmax(jnp.all(raw == jax.random.key_data(key), axis=1))]

    draws = sample(
        jax.random.key(12),
        Target(banana.logdensity, initial),
        kernel,
        num_samples=num_samples,
        num_chains=num_chains,
        schedule=Windows(250),
    ).or_raise()
    assert draws.report.num_sequential.mean() < num_samples / 2, (
        "most of it was solved in parallel time"
    )
    assert (np.asarray(draws.certificate.num_rejected) > 2).all()
    x1, x2 = np.moveaxis(np.asarray(draws.positions), -1, 0)
    straight, bent = x1 / banana.SCALE, x2 - banana.CURVATURE * (x1**2 - banana.SCALE**2)
    values = np.stack(
        [straight, bent, straight**2, bent**2, straight * bent, straight**2 * bent], axis=-1
    )
    assert_moments(values, [0, 0, 1, 1, 0, 0], smallest_ess=1200, detectable=0.15)


# --- conservation: exact draws stay exact

NUM_STARTS, NUM_STEPS = 20_000, 8


@functools.cache
def conjugate():
    """Linear regression with normal prior and noise: posterior normal, known. D = 3."""
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(12, 3)) * np.array([1.0, 0.3, 2.0])
    outcomes = rows @ np.array([0.5, -1.0, 0.2]) + rng.normal(size=12)
    covariance = np.linalg.inv(np.eye(3) / 4 + rows.T @ rows)
    mean = covariance @ rows.T @ outcomes
    rows, outcomes = jnp.asarray(rows), jnp.asarray(outcomes)

    def logdensity(x):
        return -jnp.sum(x**2) / 8 - jnp.sum((outcomes - rows @ x) ** 2) / 2

    return SimpleNamespace(logdensity=logdensity, mean=mean, covariance=covariance)


@functools.cache
def _walk(build):
    @jax.jit
    def walk(numbers, starts, keys):
        kernel = build(*numbers)

        def one(start, key):
            state = kernel.init(start)
            path = rollout(
                kernel.dynamics(), kernel.carry(state), kernel.tape(key, NUM_STEPS, state)
            )
            return kernel.position(jax.tree.map(lambda leaf: leaf[-1], path))

        return jax.vmap(one)(starts, keys)

    return walk


def distances(build, *numbers):
    """Largest distances between empirical and exact distribution functions, after some steps from exact starts.

    Looked at are three whitened coordinates, one direction across them, and the squared radius; of the moves as well as
    of the states nothing else is needed, for a chain that moves (asserted) and whose start is exact. `build(*numbers)`
    is the kernel; kernels that differ in numbers only are compiled once.
    """
    target, _ = conjugate(), (metric("dense"), metric("diagonal"))  # made here, not inside a trace
    root = np.linalg.cholesky(target.covariance)
    starts = target.mean + jax.random.normal(jax.random.key(3), (NUM_STARTS, 3)) @ jnp.asarray(
        root.T
    )
    ends = np.asarray(
        _walk(build)(numbers, starts, jax.random.split(jax.random.key(4), NUM_STARTS))
    )
    assert np.isfinite(ends).all() and (ends != np.asarray(starts)).any(axis=1).mean() > 0.9
    z = np.linalg.solve(root, (ends - target.mean).T).T
    across = z @ np.array([1.0, -1.0, 1.0]) / np.sqrt(3)
    uniforms = [
        *stats.norm.cdf(z.T),
        stats.norm.cdf(across),
        stats.chi2.cdf(np.sum(z**2, axis=1), 3),
    ]
    grid = np.arange(NUM_STARTS + 1) / NUM_STARTS
    return [max(np.max(np.sort(u) - grid[:-1]), np.max(grid[1:] - np.sort(u))) for u in uniforms]


# Dvoretzky-Kiefer-Wolfowitz with Massart's constant: P(distance > band) ≤ 2 exp(−2 n band²) = 1e-6; 0.019 here.
BAND = np.sqrt(np.log(2 / 1e-6) / (2 * NUM_STARTS))


@functools.cache
def metric(shape):
    """Whitened coordinates, not quite those of the posterior."""
    covariance = conjugate().covariance * np.outer([1.3, 1.0, 0.8], [1.3, 1.0, 0.8])
    covariance = covariance if shape == "dense" else np.diag(covariance)
    return Whitening.of_covariance(jnp.zeros(3), conjugate().mean, covariance)


CONSERVING = {
    "mala": lambda: mala(conjugate().logdensity, 0.7, metric("dense")),
    "mala, diagonal": lambda: mala(conjugate().logdensity, 0.4, metric("diagonal")),
    "hmc": lambda: hmc(conjugate().logdensity, 0.9, metric("dense"), 2),
    "nuts": lambda: nuts(conjugate().logdensity, 0.7, metric("dense"), 4),
    "mala, coalescing": lambda: mala(
        conjugate().logdensity, 0.7, metric("dense"), coupling=MultishiftCoupling()
    ),
    "hmc, steered": lambda: hmc(
        conjugate().logdensity, 0.9, metric("diagonal"), 2, coupling=MultishiftCoupling()
    ),
    "coalescing hmc": lambda: coalescing_hmc(
        conjugate().logdensity, 0.9, metric("dense"), 2, every=3
    ),
    "random walk, coalescing": lambda: random_walk(
        conjugate().logdensity, 1.2, metric("dense"), coupling=MultishiftCoupling()
    ),
    "random walk, blocks": lambda: random_walk(
        conjugate().logdensity, 1.2, metric("dense"), coupling=MultishiftCoupling(), block=2
    ),
}


@pytest.mark.parametrize("name", CONSERVING)
def test_kernel_conserves_its_target(name):
    assert max(distances(CONSERVING[name])) < BAND


class _Point(NamedTuple):
    position: jax.Array


def langevin(gain, forward, backward):
    """A Langevin kernel of step 0.7 that accepts with log probability `gain · Δlog p + forward · F + backward · B`.

    F and B are the squared noises, in units of twice the variance, of the move and of its reverse; right is (1, 1, -1).
    """
    whitening, step_size = metric("dense"), 0.7

    def logdensity(z):
        return conjugate().logdensity(whitening.leave(z))

    def step(key, state):
        noise_key, accept_key = jax.random.split(key)
        x, noise = state.position, jax.random.normal(noise_key, (3,))
        value, slope = jax.value_and_grad(logdensity)(x)
        y = x + step_size * slope + jnp.sqrt(2 * step_size) * noise
        new_value, new_slope = jax.value_and_grad(logdensity)(y)
        back = jnp.sum((x - y - step_size * new_slope) ** 2) / (4 * step_size)
        ratio = gain * (new_value - value) + forward * jnp.sum(noise**2) / 2 + backward * back
        return _Point(jnp.where(jnp.log(jax.random.uniform(accept_key)) < ratio, y, x)), ()

    return Kernel(SimpleNamespace(init=_Point, step=step), whitening.enter, whitening.leave)


MUTANTS = {
    "no Hastings correction": (1.0, 0.0, 0.0),
    "correction upside down": (1.0, -1.0, 1.0),
    "no rejection": (0.0, 0.0, 0.0),
    "accepts too easily": (0.5, 0.5, -0.5),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_conservation_test_catches_wrong_kernels(name):
    assert max(distances(langevin, *MUTANTS[name])) > 1.5 * BAND


def test_hand_written_langevin_is_right_when_its_rule_is():
    """So that the mutants above are caught for the one thing that is wrong with them."""
    assert max(distances(langevin, 1.0, 1.0, -1.0)) < BAND


def test_a_wrong_change_of_coordinates_is_caught():
    """Whitening that leaves by another affine map than the density was written for."""

    def wrong():
        good = mala(conjugate().logdensity, 0.7, metric("dense"))
        other = Whitening(jnp.zeros(3), metric("dense").center, metric("dense").scale * 1.1)
        return Kernel(good.algorithm, good.enter, other.leave)

    assert max(distances(wrong)) > 1.5 * BAND
