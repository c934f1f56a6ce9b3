"""A density that is random where no check before the run looks is never certified, and one that calls honest code always is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from partime_mcmc import (
    CertifyIndependently,
    CertifyWhileRolling,
    Target,
    hmc,
    mala,
    random_walk,
    sample,
    sequential,
    shooting,
)
from partime_mcmc.certify import certificate as certificates
from partime_mcmc.certify.certificate import describe_certification
from partime_mcmc.engine.solution import SolveError


def called_on_host(noise, distance, call=jax.pure_callback):
    """A normal density in Python, with noise of this size where a coordinate is beyond `distance`; and its gradient."""
    source = np.random.RandomState(0)

    def on_host(x):
        extra = noise * source.standard_normal() if np.abs(x).max() > distance else 0.0
        return np.asarray(-0.5 * np.sum(x**2) + extra, x.dtype)

    options = {"vmap_method": "sequential"} if call is jax.pure_callback else {}

    @jax.custom_jvp
    def logdensity(x):
        return call(on_host, jax.ShapeDtypeStruct((), x.dtype), x, **options)

    @logdensity.defjvp
    def _(point, tangent):
        return logdensity(*point), -jnp.vdot(*point, *tangent)

    return logdensity


def draws_of(logdensity, kernel, **options):
    options = {"num_samples": 200, "num_chains": 2, "solver": sequential()} | options
    target = Target(logdensity, jnp.zeros(2))
    return sample(jax.random.key(5), target, kernel, progress=False, **options)


UNORDERED = functools.partial(io_callback, ordered=False)
CASES = {
    # Decisions hardly ever change by so little, and the path is then that of the loop.
    "too little to show": (called_on_host(1e-5, 1), random_walk, 0.7, CertifyIndependently()),
    "far out": (called_on_host(0.3, 2), mala, 0.5, CertifyWhileRolling()),
    "with effects": (called_on_host(1e-5, 1, UNORDERED), random_walk, 0.7, CertifyWhileRolling()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_density_that_is_random_away_from_the_start_is_not_certified(name):
    logdensity, build, step_size, certificate = CASES[name]
    draws = draws_of(logdensity, build(logdensity, step_size), certificate=certificate)
    assert not np.asarray(draws.certificate.certified).any()
    with pytest.raises(SolveError, match="step .*gave something else: is the log density random"):
        draws.or_raise()


def test_honest_code_is_certified(tmp_path):
    """In float32, coordinates of very different size, in segments, windows and chunks."""
    units = np.asarray([1e-4, 1e3], np.float32)
    scaled = called_on_host(0.0, 0)

    def logdensity(x):
        return scaled(x / units)

    kernel = hmc(logdensity, 1.9, jnp.asarray(units**2), 3)
    draws = draws_of(
        logdensity,
        kernel,
        num_samples=600,
        solver=shooting(num_segments=4),
        store=tmp_path / "run",
        thinning=2,
    )
    certificate = draws.or_raise().certificate
    assert np.asarray(certificate.certified).all() and int(certificate.num_rejected.min()) > 20
    assert np.isfinite(certificate.max_residual).all()


@pytest.mark.parametrize("still", [False, True])
def test_the_steps_evaluated_twice_are_those_far_out_in_any_coordinate(still):
    """Far in units of each coordinate's own range, so that a coordinate of large numbers does not decide alone."""
    rng = np.random.default_rng(0)
    path = rng.uniform(-1, 1, (2000, 3)) * [1e-6, 1.0, 1e6]
    path[0] = 0
    path[700, 0], path[1400, 2] = 3e-6, 3e6
    if still:
        path[:, 1] = 5.0
    chosen = set(np.asarray(certificates._farthest(jnp.asarray(path, jnp.float32))).tolist())
    assert {700, 1400} <= chosen and len(chosen) == certificates._FARTHEST
    # The others come from the coordinate that has no such step, if it moves.
    assert still or np.mean([np.abs(path[one, 1]) > 0.9 for one in chosen]) > 0.9


def test_steps_are_chosen_all_along_the_path():
    flags = np.zeros(1000, bool)
    flags[[3, 500, 501, 999]] = True
    chosen = np.asarray(certificates._evenly(jnp.asarray(flags)))
    assert set(chosen) == {3, 500, 501, 999} and len(chosen) == 64
    every = np.asarray(certificates._evenly(jnp.ones(6400, bool)))
    np.testing.assert_array_equal(np.diff(every), 100)
    np.testing.assert_array_equal(certificates._evenly(jnp.zeros(10, bool)), 9)


def test_words_for_how_certificates_were_made():
    assert describe_certification([True, False]) == "partly by an independent pass"
    assert describe_certification([True, True]) == "by an independent pass"
    for nobody in (False, [False, False]):
        assert describe_certification(nobody) == "recorded while the chains were rolled"
