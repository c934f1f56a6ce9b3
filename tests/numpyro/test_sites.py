"""A model is looked at in one program, and closely only where something may be wrong."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.initialization import init_to_uniform, init_to_value

from partime_mcmc import from_numpyro
from partime_mcmc.kernels.kernel_program import density_of
from partime_mcmc.numpyro.model import Posterior
from partime_mcmc.numpyro.sites import (
    WithData,
    anywhere,
    checked_sites,
    traced,
    unsuspicious_sites,
)

KEY = jax.random.key(0)


def hierarchy(sigma, y=None):
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    spread = numpyro.sample("spread", dist.HalfNormal(2))
    numpyro.deterministic("double", 2 * mean)
    with numpyro.plate("groups", 4):
        effect = numpyro.sample("effect", dist.Normal(mean, spread))
        numpyro.sample("y", dist.Normal(effect, sigma), obs=y)
    numpyro.sample("simplex", dist.Dirichlet(jnp.ones(3)))


GOOD = {"sigma": np.ones(4), "y": np.array([1.0, 0.5, -1.0, 2.0])}


def looked_at(model, **data):
    return unsuspicious_sites(WithData(model, (), data), KEY, anywhere)


def test_one_look_finds_what_a_close_one_does():
    quick = looked_at(hierarchy, **GOOD)
    close = checked_sites(traced(WithData(hierarchy, (), GOOD), KEY, init_to_uniform))
    assert quick == close
    assert list(quick.shapes) == ["mean", "spread", "effect", "simplex"]
    assert quick.shapes["simplex"].shape == (2,)
    assert quick.reported == ("mean", "spread", "double", "effect", "simplex")
    assert quick.dims == {"effect": ("groups",)} and quick.discrete is None and quick.nesting == 1


@pytest.fixture
def compiled():
    """Names of what is compiled meanwhile."""
    names = []

    def hear(name, seconds, **more):
        if name.endswith("backend_compile_duration"):
            names.append(more.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield names
    jax.monitoring.unregister_event_duration_listener(hear)


def test_a_good_model_takes_few_programs(compiled):
    # Shapes that no other test has. NumPyro would look at counts with programs of its own.
    data = {"sigma": jnp.ones(37), "y": np.arange(37.0), "tries": jnp.arange(37)}

    def model(sigma, y, tries):
        mean = numpyro.sample("mean", dist.Normal(np.zeros(37), 5).to_event(1))
        numpyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=y)
        numpyro.sample("hits", dist.Binomial(tries, logits=mean).to_event(1), obs=tries // 2)

    compiled.clear()
    target = Posterior(model, (), data, KEY).target
    jax.make_jaxpr(target.logdensity)({"mean": jnp.zeros(37)})
    # The look, an attempt by which the compiler's options are found out, and copies of data.
    assert len([name for name in compiled if name not in ("jit(stage)", "stage")]) <= 2, compiled


def test_values_outside_of_a_support_have_density_0_and_parameters_are_checked_elsewhere_as_ever():
    def bounded(y):
        top = numpyro.sample("top", dist.HalfNormal(10))
        numpyro.sample("y", dist.Uniform(0, top), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logdensity = Posterior(bounded, (), {"y": jnp.array([0.5, 0.9])}, KEY).target.logdensity
        at = [float(logdensity({"top": jnp.log(top)})) for top in (0.8, 1.2)]
    assert at[0] == -np.inf < at[1]
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0, validate_args=True)


def negative_scale(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)), -1.0), obs=y)


def bad_component(y):
    numpyro.sample("x", dist.Normal(0, 1))
    parts = dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(0, -jnp.ones(2)))
    numpyro.sample("y", parts, obs=y)


def outside(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    numpyro.sample("y", dist.Gamma(2.0, scale), obs=-(y**2) - 1)


def missing_plate(y):
    numpyro.sample("x", dist.Normal(jnp.zeros(3), 1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(jnp.zeros((3, 1)), 1), obs=y)


def unmarked(y):
    which = numpyro.sample("which", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(which, 1).to_event(0), obs=y[0])


def with_param(y):
    shift = numpyro.param("shift", jnp.array(0.5))
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0, 1)) + shift, 1), obs=y[0])


def branching(y):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x if x > 0 else -x, 1), obs=y[0])


@pytest.mark.parametrize(
    "model",
    [negative_scale, bad_component, outside, missing_plate, unmarked, with_param, branching],
    ids=lambda model: model.__name__,
)
def test_whatever_may_be_wrong_is_looked_at_closely(model):
    assert looked_at(model, y=np.array([0.5, 1.0])) is None


@pytest.mark.parametrize("bad", [{"y": np.nan}, {"y": np.inf}, {"sigma": np.nan}, {"sigma": -1.0}])
def test_data_that_are_no_numbers_are_looked_at_closely(bad):
    assert looked_at(hierarchy, **GOOD) is not None
    ((name, value),) = bad.items()
    assert looked_at(hierarchy, **GOOD | {name: np.array([1.0, value, 1, 1])}) is None


def test_what_is_wrong_is_still_said_by_name():
    with pytest.raises(ValueError, match="invalid scale parameter"):
        from_numpyro(negative_scale, np.ones(2), key=KEY)
    with pytest.raises(ValueError, match="outside the support of Gamma"):
        from_numpyro(outside, np.ones(2), key=KEY)
    with pytest.raises(ValueError, match="'x'.*Python control flow"):
        from_numpyro(branching, np.ones(2), key=KEY)
    with pytest.warns(UserWarning, match="not sampled"):
        from_numpyro(with_param, np.ones(2), key=KEY)


def test_a_law_that_is_wrong_somewhere_is_no_fault():
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1))
        # Of a negative number, as at the place that is looked at, there is no such scale.
        numpyro.sample("y", dist.Normal(0, x - 1), obs=0.5)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = from_numpyro(model, key=KEY)
    assert looked_at(model) is None and target.start(KEY)["x"] > 1


def test_another_strategy_is_the_one_that_is_tried():
    start = init_to_value(values={"x": jnp.array(4.0)})
    seen = []

    def model():
        x = numpyro.sample("x", dist.Normal(0, 1))
        seen.append(x)

    posterior = Posterior(model, (), {}, KEY, start)
    assert float(posterior.target.start(KEY)["x"]) == 4.0 and seen


def test_other_data_are_another_density_also_where_a_rule_of_the_users_own_captures_them():
    def with_rule(slope, y):
        @jax.custom_jvp
        def bent(x):
            return x * 1.0

        bent.defjvp(lambda primals, tangents: (bent(primals[0]), slope[0] * tangents[0]))
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("bent", bent(x) * y[0])

    def with_pullback(slope, y):
        @jax.custom_vjp
        def bent(x):
            return x * 1.0

        bent.defvjp(lambda x: (bent(x), None), lambda _, given: (slope[0] * given,))
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("bent", bent(x) * y[0])

    def plain(slope, y):
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("line", slope[0] * x * y[0])

    for model in (with_rule, with_pullback, plain):
        slopes = []
        for slope in (2.0, 5.0):
            data = jnp.array([slope]), jnp.array([3.0])
            target = from_numpyro(model, *data, key=KEY)
            density, captured = density_of(target.logdensity, {"x": jnp.zeros(())})
            gradient = jax.grad(density, argnums=1)(captured, {"x": jnp.zeros(())})["x"]
            slopes.append(float(gradient))
        assert slopes == [6.0, 15.0], model.__name__
