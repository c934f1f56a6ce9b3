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
