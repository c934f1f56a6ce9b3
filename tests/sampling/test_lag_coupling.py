"""Lagged pairs of chains: bounds lie above what is known exactly, and chains that stay apart bound nothing."""

import dataclasses
import math
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from kernel_catalogue import multishift_autoregression
from scipy.stats import norm

from partime_mcmc import (
    CoalescingHMC,
    Kernel,
    ParallelMCMC,
    Target,
    coalescing_hmc,
    convergence,
    mala,
)
from partime_mcmc.diagnostics.verdict import judge
from partime_mcmc.kernels import Whitening

MEMORY, PLACE, WIDTH = 0.9, 4.0, 2.0


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def normal(x):
    return -0.5 * jnp.sum(x**2)


AUTOREGRESSION = multishift_autoregression(MEMORY)
FAR = Target(normal, lambda key: PLACE + WIDTH * jax.random.normal(key, (1,)))


def law_after(steps):
    """Mean and standard deviation of the autoregression from N(4, 2²)."""
    return MEMORY**steps * PLACE, np.sqrt(1 + MEMORY ** (2 * steps) * (WIDTH**2 - 1))


def exact_total_variation(steps):
    place, width = law_after(steps)
    x = np.linspace(-12, 20, 40_001)
    return 0.5 * np.trapezoid(np.abs(norm.pdf(x, place, width) - norm.pdf(x)), x)


def exact_wasserstein(steps):
    place, width = law_after(steps)
    p = (np.arange(20_000) + 0.5) / 20_000
    return np.abs(norm.ppf(p, place, width) - norm.ppf(p)).mean()


@pytest.fixture(scope="module")
def found():
    with jax.enable_x64(True):
        return convergence(jax.random.key(0), FAR, AUTOREGRESSION, num_pairs=1024)


def test_bounds_lie_above_the_truth_and_near_it(found):
    assert found.num_unmet == 0 and not found.same_start and found.lag > 10
    times = np.arange(len(found.total_variation))
    truth = np.array([exact_total_variation(time) for time in times])
    # 3.5 standard errors: some hundred correlated times are looked at. Where few pairs are left their share is not normal.
    assert (found.total_variation + 3.5 * found.total_variation_error > truth - 4 / 1024).all()
    mid = (truth > 0.02) & (truth < 0.9)
    assert mid.sum() > 20
    assert (found.total_variation[mid] < 3 * truth[mid]).all()
    assert (found.total_variation_limit >= found.total_variation).all()
    assert found.total_variation_limit[-1] == pytest.approx(1 - 0.05 ** (1 / 1024), rel=1e-3)
    until = int(found.steps_until(0.1))
    assert found.total_variation[until] <= 0.1 < found.total_variation[until - 1]
    assert exact_total_variation(until) < 0.1 + 3.5 * found.total_variation_error[until]


def test_the_wasserstein_bound_does_too(found):
    # In units of the spread of the chains ahead, which have made L steps.
    unit = law_after(found.lag)[1]
    times = np.arange(0, len(found.wasserstein), 3)
    truth = np.array([exact_wasserstein(time) for time in times]) / unit
    bound, error = found.wasserstein[times], found.wasserstein_error[times]
    early = truth > 0.02
    # The unit itself is estimated, to 1 / √(2 · 1024).
    assert early.sum() > 10 and (bound + 3.5 * error > 0.93 * truth)[early].all()
    assert (bound < 3 * truth)[truth > 0.1].all()


def test_a_longer_lag_is_tighter_and_a_short_one_still_a_bound():
    at_zero = []
    for lag in (1, 8, 64):
        one = convergence(jax.random.key(1), FAR, AUTOREGRESSION, num_pairs=256, lag=lag)
        assert one.lag == lag
        for time in (0, 10, 20):
            bound, error = one.total_variation[time], one.total_variation_error[time]
            assert bound + 3 * error > exact_total_variation(time)
        at_zero.append(one.total_variation[0])
    assert at_zero[0] > 2 * at_zero[1] > 2 * at_zero[2]


def whitening(dimension):
    return Whitening.of_covariance(jnp.zeros(dimension), jnp.zeros(dimension), jnp.ones(dimension))


def test_chains_in_different_modes_bound_nothing():
    def logdensity(x):
        return jnp.logaddexp(*(-0.5 * jnp.sum((x - place) ** 2) for place in (-20.0, 20.0)))

    target = Target(logdensity, lambda key: 15 * jax.random.normal(key, (2,)))
    kernel = coalescing_hmc(logdensity, 0.7, whitening(2))
    found = convergence(jax.random.key(2), target, kernel, num_pairs=32, max_steps=200)
    assert 5 < found.num_unmet < 27 and (found.steps[~found.met] == 200).all()
    assert np.isinf(found.total_variation).all() and np.isinf(found.wasserstein).all()
    assert found.steps_until(0.5) == math.inf and found.survival[-1] == found.num_unmet / 32
    assert str(found).startswith(
        f"{found.num_unmet} OF 32 PAIRS OF CHAINS DID NOT MEET in 200 steps"
    )
    assert "did not meet" in found.plot().axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match="lag: got 6, wanted a multiple of 4"):
        convergence(jax.random.key(2), target, kernel, num_pairs=32, lag=6)
    assert found.lag % 4 == 0
    # From one point there is nothing to see, and that is said.
    blind = Target(logdensity, jnp.full(2, 20.0))
    found = convergence(jax.random.key(2), blind, kernel, num_pairs=32, max_steps=200)
    assert found.num_unmet == 0 and "started at one point" in str(found)


class Counted(NamedTuple):
    position: jax.Array
    count: jax.Array


def test_a_counter_that_never_returns_is_refused():
    inner = AUTOREGRESSION.algorithm

    def step(key, state):
        new = inner.step(key, inner.init(state.position))[0]
        return Counted(new.position, state.count + 1), ()

    start = lambda position: Counted(position, jnp.zeros((), jnp.int32))
    kernel = Kernel(SimpleNamespace(init=start, step=step))
    with pytest.raises(ValueError, match=r"its counters \['count'\] did not return"):
        convergence(jax.random.key(0), FAR, kernel, num_pairs=4)


def test_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match="kernel: got the function mala, wanted a tuned Kernel"):
        convergence(jax.random.key(0), FAR, mala)
    with pytest.raises(TypeError, match="target: got"):
        convergence(jax.random.key(0), normal, AUTOREGRESSION)
    with pytest.raises(ValueError, match="num_pairs: got 1"):
        convergence(jax.random.key(0), FAR, AUTOREGRESSION, num_pairs=1)


def test_a_finished_run_knows_its_kernel():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=1.0)

    mcmc = ParallelMCMC(
        CoalescingHMC(model), num_warmup=300, num_samples=100, num_chains=2, progress_bar=False
    )
    with pytest.raises(RuntimeError, match="run must be called first"):
        convergence(jax.random.key(0), mcmc)
    mcmc.run(jax.random.key(1))
    found = convergence(jax.random.key(0), mcmc, num_pairs=64)
    assert found.num_unmet == 0 and 4 <= found.steps_until(0.05) < 100
    assert str(found).startswith("Total variation at most 0.0")
    assert "Total variation at most" in str(judge(mcmc.draws, coupling=found))
    apart = dataclasses.replace(found, met=np.arange(64) > 2)
    assert "3 OF 64 PAIRS OF CHAINS DID NOT MEET" in str(judge(mcmc.draws, coupling=apart))
    again = convergence(jax.random.key(0), *mcmc.target_and_kernel(), num_pairs=64)
    assert (again.steps == found.steps).all() and again.num_gradients == found.num_gradients
    assert [axis.get_xlabel() for axis in found.plot().axes] == ["step", "step"]
    with pytest.raises(TypeError, match="kernel: got"):
        convergence(jax.random.key(0), mcmc, mcmc.target_and_kernel()[1])


def test_any_number_of_pairs_moves_in_one_program():
    # 40 pairs are a batch of 32 and one of 8, the first of 72.
    found = convergence(jax.random.key(0), FAR, AUTOREGRESSION, num_pairs=40, lag=8)
    assert found.steps.shape == (40,) and found.met.all() and len(np.unique(found.steps)) > 10
    apart = found.gaps > 0
    assert (apart.sum(axis=1) == found.steps).all(), "a gap until they meet, none afterwards"
