"""NumPyro models as targets: NumPyro's own density and starts, and faults named by site or argument."""

import functools
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import init_to_median, init_to_uniform, init_to_value
from numpyro.infer.util import initialize_model, potential_energy
from scipy.stats import ks_2samp

from partime_mcmc.diagnostics.checks import check_deterministic, check_precision, check_start
from partime_mcmc.numpyro import HMC, from_numpyro
from partime_mcmc.numpyro.hmc_state import _models_starts
from partime_mcmc.validation import InvalidStart

KEY = jax.random.key(0)


def rows():
    """Data are made anew for every test: JAX remembers a captured NumPy array in the precision it was captured in."""
    return np.array([[1.0, 0.5], [1.0, -1.0], [1.0, 2.0], [1.0, 0.1]])


def outcomes():
    return np.array([0.3, -0.4, 1.9, 0.2])


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def precision(request):
    with jax.enable_x64(request.param):
        yield jnp.dtype("float64" if request.param else "float32")


def regression(x, y=None):
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    with numpyro.plate("column", x.shape[1]):
        beta = numpyro.sample("beta", dist.Normal(0.0, 3.0))
    mean = numpyro.deterministic("mean", x @ beta)
    numpyro.sample("y", dist.Normal(mean, scale), obs=y)


# --- what a good model gives


def test_density_starts_and_named_values(precision):
    target = from_numpyro(regression, rows(), y=outcomes(), key=KEY)
    start = target.start(jax.random.key(1))
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in start.items()} == {
        "beta": ((2,), precision), "scale": ((), precision)}  # fmt: skip
    eps = jnp.finfo(precision).eps
    reference = potential_energy(
        regression, (jnp.asarray(rows()),), {"y": jnp.asarray(outcomes())}, start
    )
    np.testing.assert_allclose(target.logdensity(start), -reference, rtol=50 * eps)
    named = target.constrain(start)
    assert (
        set(named) == {"scale", "beta", "mean"} == set(target.names)
    )  # latent and deterministic, not observed
    np.testing.assert_allclose(named["scale"], np.exp(start["scale"]), rtol=50 * eps)
    np.testing.assert_allclose(
        named["mean"], rows() @ np.asarray(start["beta"]), rtol=50 * eps, atol=50 * eps
    )
    assert target.dims == {"beta": ("column",)}
    check_start(target.logdensity, start)
    check_deterministic(target.logdensity, start)


def test_starts_are_numpyros_own(precision):
    target = from_numpyro(regression, rows(), y=outcomes(), key=KEY)
    for seed in (1, 2):
        key = jax.random.key(seed)
        data = (jnp.asarray(rows()), jnp.asarray(outcomes()))
        theirs = initialize_model(key, regression, model_args=data).param_info.z
        for name, value in target.start(key).items():
            np.testing.assert_array_equal(value, theirs[name])


def test_under_jit_and_vmap():
    target = from_numpyro(regression, rows(), y=outcomes(), key=KEY)
    keys = jax.random.split(jax.random.key(4), 3)
    starts = jax.vmap(target.start)(keys)
    np.testing.assert_allclose(starts["beta"][2], target.start(keys[2])["beta"], rtol=1e-6)
    values = jax.jit(jax.vmap(target.logdensity))(starts)
    alone = [target.logdensity(jax.tree.map(itemgetter(number), starts)) for number in range(3)]
    np.testing.assert_allclose(values, alone, rtol=1e-5)
    assert jax.jit(jax.vmap(target.constrain))(starts)["mean"].shape == (3, 4)


def test_data_can_travel_as_arguments():
    target = from_numpyro(regression, rows(), y=outcomes(), key=KEY)
    consts = jax.make_jaxpr(jax.grad(target.logdensity))(target.start(KEY)).consts
    assert (4, 2) in [np.shape(const) for const in consts]


def test_numpy_data_are_used_in_either_precision():
    x, y = rows(), outcomes()
    target = from_numpyro(regression, x, y=y, key=KEY)
    start = target.start(KEY)
    narrow = target.logdensity(start)
    assert check_precision(target.logdensity, start) < 1e-5
    with jax.enable_x64(True):
        wide = target.logdensity(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), start))
        assert wide.dtype == jnp.float64 and target.start(KEY)["beta"].dtype == jnp.float64
        jax.jit(target.logdensity)(start)
    assert target.logdensity(start) == narrow and narrow.dtype == jnp.float32
    assert (
        jnp.asarray(x).dtype == jnp.asarray(y).dtype == jnp.float32
    )  # the caller's arrays are left alone


def test_models_may_index_and_branch_on_numpy_data():
    def model(y, group):
        with numpyro.plate("group", int(group.max()) + 1):
            mean = numpyro.sample("mean", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mean[group[y > 0]], 1.0), obs=y[y > 0])

    target = from_numpyro(model, outcomes(), np.array([0, 1, 1, 2]), key=KEY)
    assert jax.jit(target.logdensity)(target.start(KEY)).shape == ()


def test_supports_that_hang_on_latent_values():
    def model(y):
        top = numpyro.sample("top", dist.Uniform(3.0, 9.0))
        numpyro.sample("y", dist.Uniform(0.0, top), obs=y)

    target = from_numpyro(model, np.array([0.5, 2.9]), key=KEY)
    assert np.isfinite(target.logdensity(target.start(KEY)))
    with pytest.raises(InvalidStart, match="site 'y' has log probability -inf"):
        _without_warnings(lambda: from_numpyro(model, np.array([0.5, -2.9]), key=KEY))


def test_init_strategies():
    target = from_numpyro(regression, rows(), y=outcomes(), key=KEY, init_strategy=init_to_median)
    assert abs(float(target.start(KEY)["scale"])) < 2
    values = {"scale": 2.0, "beta": np.array([1.0, -1.0])}
    target = from_numpyro(
        regression, rows(), y=outcomes(), key=KEY, init_strategy=init_to_value(values=values)
    )
    np.testing.assert_allclose(target.start(KEY)["scale"], np.log(2.0), rtol=1e-6)
    np.testing.assert_array_equal(target.start(KEY)["beta"], [1.0, -1.0])


def test_masked_missing_values_and_factors_pass():
    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mean, 1.0).mask(~np.isnan(y)), obs=np.nan_to_num(y))
        numpyro.factor("more", -(mean**2))

    target = from_numpyro(model, np.array([0.5, np.nan]), key=KEY)
    check_start(target.logdensity, target.start(KEY))


# --- faults


def poisson():
    z = numpyro.sample("z", dist.Poisson(3.0))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=1.0)


def delta():
    z = numpyro.sample("z", dist.Delta(1.0))
    numpyro.sample("x", dist.Normal(z, 1.0))


def twice():
    numpyro.sample("z", dist.Normal())
    numpyro.sample("z", dist.Normal())


def branch():
    numpyro.sample("a", dist.Normal())
    z = numpyro.sample("z", dist.Normal())
    numpyro.sample("x", dist.Normal(0.0, 1.0 if z > 0 else 2.0), obs=0.0)


def subsample():
    mean = numpyro.sample("mean", dist.Normal())
    with numpyro.plate("rows", 4, subsample_size=2) as chosen:
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=jnp.asarray(outcomes())[chosen])


@pytest.mark.parametrize(
    "model, words",
    [
        (poisson, r"site 'z': got a discrete latent variable \(Poisson, .*wanted a continuous one"),
        (delta, "site 'z': got a latent variable with a Delta distribution.*numpyro.deterministic"),
        (twice, "site 'z': got two sites of this name"),
        (branch, "site 'z': got Python control flow"),
        (subsample, "plate 'rows': got a subsample of 2 out of 4"),
    ],
)
def test_models_that_cannot_be_sampled(model, words):
    with pytest.raises(ValueError, match=words):
        from_numpyro(model, key=KEY)


def exponential(y):
    rate = numpyro.sample("rate", dist.HalfNormal())
    numpyro.sample("y", dist.Exponential(rate), obs=y)


def categorical(y):
    numpyro.sample(
        "y", dist.Categorical(probs=numpyro.sample("p", dist.Dirichlet(np.ones(3)))), obs=y
    )


@pytest.mark.parametrize(
    "model, data, words",
    [
        (
            exponential,
            np.array([1.0, -2.0, 3.0]),
            r"site 'y': got 1 .*outside .*Exponential, the first -2.0 .*\(1,\)",
        ),
        (
            exponential,
            np.array([1.0, np.nan]),
            r"site 'y': got 1 NaN among its 2 observed values .*\(1,\)",
        ),
        (categorical, np.array([0, 1, 3]), "site 'y': got 1 .*outside .*Categorical.* the first 3"),
    ],
)
def test_observations_that_cannot_be(model, data, words):
    with pytest.raises(ValueError, match=words):
        from_numpyro(model, data, key=KEY)


def test_data_with_nan_are_named():
    bad = rows()
    bad[2, 1] = np.nan
    with pytest.raises(
        ValueError, match="argument 'x' has 1 NaN or infinite of 8 entries.*after site 'mean'"
    ):
        from_numpyro(regression, bad, y=outcomes(), key=KEY)

    def by_hand(y):
        numpyro.factor("likelihood", -jnp.sum((y - numpyro.sample("mean", dist.Normal())) ** 2))

    with pytest.raises(
        InvalidStart, match="argument 'y' has 1 NaN.*site 'likelihood' has log probability nan"
    ):
        from_numpyro(by_hand, np.array([1.0, np.nan]), key=KEY)


def test_param_sites_are_held_and_reported():
    def model():
        centre = numpyro.param("centre", lambda key: jax.random.normal(key))
        numpyro.sample("z", dist.Normal(centre, 1.0))

    with pytest.warns(UserWarning, match=r"numpyro.param sites \['centre'\] are not sampled"):
        target = from_numpyro(model, key=KEY)
    values = [target.logdensity({"z": jnp.zeros(())}) for _ in range(2)]
    assert values[0] == values[1] and set(target.start(KEY)) == {"z"}


def test_a_model_that_fails_keeps_its_error_with_a_note():
    def model():
        numpyro.sample("z", dist.Normal())
        numpyro.sample("x", dist.Normal(jnp.ones(3) @ jnp.ones(4), 1.0))

    with pytest.raises(TypeError) as caught:
        from_numpyro(model, key=KEY)
    assert "The NumPyro model failed after site 'z'." in caught.value.__notes__
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        from_numpyro(regression, key=KEY)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="model: got 3 of type int"):
        from_numpyro(3, key=KEY)
    with pytest.raises(TypeError, match="init_strategy: got 'median'"):
        from_numpyro(regression, rows(), outcomes(), key=KEY, init_strategy="median")
    with pytest.raises(TypeError, match="key: got 0 of type int"):
        from_numpyro(regression, rows(), outcomes(), key=0)


def _without_warnings(function):
    """NumPyro warns of values outside a support; here they are the point."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


def test_hosts_starts_have_the_law_of_numpyros():
    """Uniform on (-2, 2) given that density and gradient are finite, where half of the space has neither."""

    def half():
        x = numpyro.sample("x", dist.Normal(jnp.zeros(2), 1))
        numpyro.factor("wall", jnp.where(x[0] > 0, 0.0, -jnp.inf))

    sampler = HMC(half)
    target = sampler.target((), {}, KEY, None)
    starts = np.asarray(_models_starts(sampler, target, KEY, 400)["x"])
    theirs = np.asarray(target.starts(jax.random.split(KEY, 400))["x"])
    for coordinate in range(2):
        assert ks_2samp(starts[:, coordinate], theirs[:, coordinate]).pvalue > 0.01
    assert starts.min(axis=0)[0] > 0 > starts.min(axis=0)[1] and np.abs(starts).max() < 2
    narrow = HMC(half, init_strategy=functools.partial(init_to_uniform, radius=0.1))
    target = narrow.target((), {}, KEY, None)
    assert np.abs(_models_starts(narrow, target, KEY, 50)["x"]).max() < 0.1
