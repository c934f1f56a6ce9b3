"""Unbiased estimates: on a normal target, from far off, they are right, and as precise as they say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_catalogue import multishift_autoregression
from scipy import stats

from partime_mcmc import Target, unbiased

MEMORY, REPLICATES, PAIRS = 0.7, 1000, 16


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


KERNEL = multishift_autoregression(MEMORY)
TARGET = Target(
    lambda x: -0.5 * jnp.sum(x**2),
    lambda key: 5 + jax.random.normal(key, (1,)),
    lambda x: {"x": x[0]},
)


def moments(draw):
    return jnp.stack([draw["x"], draw["x"] ** 2])


MOMENTS = np.array([0.0, 1.0])


def test_replicates_are_as_far_off_as_their_standard_errors_say():
    found = unbiased(
        jax.random.key(0), TARGET, KERNEL, moments, num_pairs=REPLICATES * PAIRS, lag=8, last=24
    )
    assert found.first == 8 and found.num_unmet == 0
    groups = found.estimates.reshape(REPLICATES, PAIRS, 2)
    errors = groups.std(axis=1, ddof=1) / math.sqrt(PAIRS)
    scores = (groups.mean(axis=1) - MOMENTS) / errors
    # Of few pairs the standard error is itself estimated: Student's t. Squares are skewed, so of them only all pairs together.
    assert stats.kstest(scores[:, 0], stats.t(PAIRS - 1).cdf).pvalue > 0.01
    total = (found.mean - MOMENTS) / found.standard_error
    assert (np.abs(total) < 3.5).all()
    # Per step a long chain has (1 + ρ) / (1 − ρ), and 2 (1 + ρ²) / (1 − ρ²) for squares; of 17 steps it is underestimated.
    assert np.isnan(found.chain_variance).all(), "too few steps to tell"


def test_without_burn_in_the_correction_does_it_all():
    found = unbiased(
        jax.random.key(1), TARGET, KERNEL, moments, num_pairs=4096, first=0, last=0, lag=2
    )
    assert (np.abs(found.mean - MOMENTS) < 3.5 * found.standard_error).all()
    # Without the correction these would be 5 and 26.
    assert (found.standard_error < [0.2, 2]).all()


def test_a_long_average_is_nearly_as_good_as_a_long_chain():
    found = unbiased(jax.random.key(2), TARGET, KERNEL, moments, num_pairs=256)
    assert found.last == 10 * found.first and found.first == found.lag
    square = MEMORY**2
    exact = np.array([(1 + MEMORY) / (1 - MEMORY), 2 * (1 + square) / (1 - square)])
    np.testing.assert_allclose(found.chain_variance, exact, rtol=0.2)
    assert ((found.inefficiency > 0.8) & (found.inefficiency < 2)).all()
    assert (found.num_steps == found.steps + np.maximum(found.last, found.lag + found.steps)).all()
    assert str(found).startswith("Unbiased: ") and "256 pairs" in str(found)


def test_pairs_that_do_not_meet_leave_no_estimate():
    found = unbiased(
        jax.random.key(3), TARGET, KERNEL, moments, num_pairs=64, lag=1, first=1, max_steps=4
    )
    assert found.num_unmet > 0 and np.isnan(found.mean).all()
    assert str(found).startswith(f"{found.num_unmet} OF 64 PAIRS OF CHAINS DID NOT MEET in 4 steps")


def test_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match="function: got None"):
        unbiased(jax.random.key(0), TARGET, KERNEL)
    with pytest.raises(ValueError, match="last: got 3, wanted at least first, 5"):
        unbiased(jax.random.key(0), TARGET, KERNEL, moments, first=5, last=3)
