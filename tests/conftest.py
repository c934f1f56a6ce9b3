"""Fixtures and options shared by all tests.

Nothing global is set: 64-bit floats are switched on inside a fixture and off again, and no compilation cache is kept
between runs (a stale one would hide what a compiler does today).
"""

import hypothesis
import jax
import jax.numpy as jnp
import pytest

hypothesis.settings.register_profile(
    # The same examples in every run, and no clock: the first example of a shape compiles.
    "partime", derandomize=True, deadline=None, database=None, max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("partime")


# What depends on the generation of Python, JAX and ArviZ: run on a second one, too.
SMOKE = {"test_architecture", "test_arviz", "test_certify", "test_derivatives", "test_numpyro", "test_selftest",
         "test_shooting", "test_theorem"}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SMOKE:
            item.add_marker(pytest.mark.smoke)


def pytest_addoption(parser):
    parser.addoption("--full-catalogue", action="store_true",
                     help="every solver x dynamics x floating-point type x length, not a covering choice of them")


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """The floating-point type of a test, which runs once in each."""
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


@pytest.fixture
def double():
    """A test in float64."""
    with jax.enable_x64(True):
        yield jnp.dtype("float64")
