"""A `Target` refuses what is no target, and its starts are JAX arrays of one dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import python

from partime_mcmc.sampling.target import Target
from partime_mcmc.validation import InvalidStart


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def precision(request):
    with jax.enable_x64(request.param):
        yield jnp.dtype("float64" if request.param else "float32")


def logdensity(x):
    return -0.5 * jnp.sum(x**2)


def test_one_start_for_every_chain(precision):
    target = Target(logdensity, np.arange(3.0))
    for key in jax.random.split(jax.random.key(0), 2):
        start = target.start(key)
        assert isinstance(start, jax.Array) and start.dtype == precision
        np.testing.assert_array_equal(start, [0, 1, 2])


def test_one_start_per_key(precision):
    target = Target(logdensity, lambda key: {"a": jax.random.normal(key, (2,)), "b": 0.5})
    one, two = (target.start(jax.random.key(seed)) for seed in (1, 2))
    assert one["a"].dtype == one["b"].dtype == precision and not np.array_equal(one["a"], two["a"])
    np.testing.assert_array_equal(one["a"], target.start(jax.random.PRNGKey(1))["a"])
    many = jax.vmap(target.start)(jax.random.split(jax.random.key(0), 5))
    assert many["a"].shape == (5, 2) and many["b"].shape == (5,)


def test_starts_of_the_wrong_kind(precision):
    with pytest.warns(UserWarning, match="initial: got integers"):
        start = Target(logdensity, np.arange(3)).start(jax.random.key(0))
    assert start.dtype == precision
    for bad in (np.array([True, False]), 2j, np.array(["x"]), np.array([object()])):
        with pytest.raises(InvalidStart, match="initial: got .*wanted real floating-point"):
            Target(logdensity, bad).start(jax.random.key(0))
    with pytest.raises(TypeError, match="key: got 3"):
        Target(logdensity, np.zeros(2)).start(3)


def test_mixed_precisions_become_float64_where_that_is_on():
    target = Target(logdensity, lambda key: {"a": jnp.ones(2, jnp.float32), "b": np.ones(2)})
    assert target.start(jax.random.key(0))["b"].dtype == jnp.float32
    with jax.enable_x64(True):
        start = target.start(jax.random.key(0))
    assert {leaf.dtype for leaf in start.values()} == {jnp.dtype("float64")}


@pytest.mark.parametrize(
    "field, bad",
    [
        ("logdensity", 3.0),
        ("constrain", {"a": 1}),
        ("initial", None),
        ("names", "mu"),
        ("names", [1]),
        ("dims", ["a"]),
    ],
)
def test_fields_are_checked(field, bad):
    with pytest.raises(TypeError, match=f"^{field}: got .*; wanted"):
        Target(**{"logdensity": logdensity, "initial": np.zeros(2), field: bad})


def test_a_target_is_frozen_and_hashable():
    target = Target(
        logdensity, np.zeros(2), constrain=lambda x: {"x": x}, names=("x",), dims={"x": ("axis",)}
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.initial = np.ones(2)
    assert {target: 1}[target] == 1


ON_TWO_DEVICES = """
import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
from partime_mcmc import CoalescingHMC, ParallelMCMC, Target, mala, sample

first, second = jax.devices()
data = jax.device_put(jnp.ones(2), second)

def places(target, key):
    draws = sample(key, target, mala, num_samples=8, num_chains=2, num_warmup=20, progress=False)
    return jax.tree.leaves(draws.positions)[0].devices()

def model():
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)), 1), obs=data[0])

normal = lambda x: -0.5 * jnp.sum(x**2)
key = jax.random.key(0)
runs = (
    (Target(normal, jnp.zeros(2)), key),
    (Target(lambda x: normal(x - data), jnp.zeros(2)), key),
    (Target(normal, jax.device_put(jnp.zeros(2), second)), key),
    (Target(normal, jnp.zeros(2)), jax.device_put(key, second)),
)
mcmc = ParallelMCMC(CoalescingHMC(model), num_warmup=20, num_samples=8, num_chains=2, progress_bar=False)
mcmc.run(key)
for found in (*(places(*run) for run in runs), mcmc.draws.positions["x"].devices()):
    print(*(device.id for device in found))
"""


def test_runs_where_data_starts_or_key_are():
    found = python(
        ON_TWO_DEVICES,
        *("-W", "ignore"),
        PARTIME_CACHE="0",
        XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    )
    assert found.stdout.split() == ["0", "1", "1", "1", "1"]
