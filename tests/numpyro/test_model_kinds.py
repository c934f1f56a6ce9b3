"""Kinds of models that NumPyro samples: discrete sites summed out, nothing to sample, masked observations, laws of the user's own,
parameters of networks. Densities are NumPyro's, at a point; hardly anything is run.
"""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import random_flax_module
from numpyro.handlers import block, seed
from numpyro.infer import Predictive, init_to_value
from numpyro.infer.util import potential_energy

from partime_mcmc.numpyro import HMC, ParallelMCMC, from_numpyro
from partime_mcmc.numpyro.model import Posterior
from partime_mcmc.validation import InvalidStart

KEY = jax.random.key(0)
Y = np.array([-2.9, -3.2, 3.1, 2.8], np.float32)


def run(kernel, *data, init_params=None):
    mcmc = ParallelMCMC(kernel, num_warmup=0, num_samples=6)
    mcmc.run(KEY, *data, init_params=init_params)
    return mcmc


# --- discrete sites


def mixture(y):
    weight = numpyro.sample("weight", dist.Beta(2, 2))
    means = numpyro.sample("means", dist.Normal(jnp.array([-3.0, 3.0]), 1).to_event(1))
    with numpyro.plate("row", len(y)):
        which = numpyro.sample("which", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(means[which], 1), obs=y)


def hidden_markov(y):
    rows = numpyro.sample("rows", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    means = numpyro.sample("means", dist.Normal(jnp.array([-3.0, 3.0]), 1).to_event(1))

    def step(state, value):
        state = numpyro.sample(
            "state", dist.Categorical(rows[state]), infer={"enumerate": "parallel"}
        )
        numpyro.sample("y", dist.Normal(means[state], 1), obs=value)
        return state, None

    scan(step, 0, y)


def capture_recapture(y):
    """Animals that live on or not, and are seen or not while they live."""
    survival = numpyro.sample("survival", dist.Uniform(0, 1))
    seen = numpyro.sample("seen", dist.Uniform(0, 1))
    with numpyro.plate("animal", len(y)):
        alive = 1
        for year, observed in enumerate((jnp.ones(len(y)), (y > 0).astype(float))):
            alive = numpyro.sample(
                f"alive {year}", dist.Bernoulli(alive * survival), infer={"enumerate": "parallel"}
            )
            numpyro.sample(f"y {year}", dist.Bernoulli(alive * seen), obs=observed)


def mixture_summed(weight, means, y):
    weights = jnp.stack([1 - weight, weight])
    return jnp.sum(jnp.log(jnp.exp(dist.Normal(means, 1).log_prob(y[:, None])) @ weights))


def hidden_markov_summed(rows, means, y):
    forward = rows[0]
    for value in y:
        seen = forward * jnp.exp(dist.Normal(means, 1).log_prob(value))
        forward = seen @ rows
    return jnp.log(seen.sum())


def capture_recapture_summed(survival, seen, y):
    """Alive and seen in the first year; then seen again, or alive and missed, or dead."""
    again = survival * seen
    return jnp.sum(jnp.log(survival * seen) + jnp.where(y > 0, jnp.log(again), jnp.log1p(-again)))


SUMMED = {
    "mixture": (mixture, mixture_summed),
    "hidden Markov": (hidden_markov, hidden_markov_summed),
    "capture-recapture": (capture_recapture, capture_recapture_summed),
}


@pytest.mark.parametrize("case", SUMMED)
def test_discrete_sites_are_summed_out(case):
    """The density differs from that of the continuous sites alone by the likelihood, summed by hand."""
    pytest.importorskip("funsor")
    model, likelihood = SUMMED[case]
    target = HMC(model).target((Y,), {}, KEY)
    shapes = target.example()

    @jax.jit
    def both(key):
        x = {name: 0.3 * jax.random.normal(key, one.shape) for name, one in shapes.items()}
        values = {name: target.constrain(x)[name] for name in x}
        kept = (*x, *(f"_{name}_log_det" for name in x))
        prior = block(seed(model, 0), hide_fn=lambda site: site.get("name") not in kept)
        energy = potential_energy(prior, (Y,), {}, x)
        return target.logdensity(x), likelihood(**values, y=Y) - energy

    np.testing.assert_allclose(*both(KEY), rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_discrete_values_are_drawn_afterwards():
    pytest.importorskip("funsor")
    start = {"weight": jnp.zeros(()), "means": jnp.array([-3.0, 3.0])}
    mcmc = run(HMC(mixture, step_size=0.1, num_steps=1), Y, init_params=start)
    drawn = Predictive(mixture, mcmc.get_samples(), infer_discrete=True)(KEY, Y)["which"]
    np.testing.assert_array_equal(drawn, np.tile(Y > 0, (6, 1)))


def test_a_discrete_site_that_is_not_marked_is_summed_out_with_a_warning():
    pytest.importorskip("funsor")

    def unmarked():
        level = numpyro.sample("level", dist.Normal())
        numpyro.sample(
            "y", dist.Normal(level, 1 + numpyro.sample("wide", dist.Bernoulli(0.5))), obs=1
        )

    with pytest.warns(FutureWarning, match="'wide': summed out.*enumerated sites"):
        Posterior(unmarked, (), {}, KEY)


def test_without_funsor_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpyro.contrib.funsor", None)
    with pytest.raises(ModuleNotFoundError, match=r"'which'.*install partime_mcmc\[funsor\]"):
        from_numpyro(mixture, Y, key=KEY)


# --- nothing to sample


def test_models_without_a_free_coordinate():
    """One category has probability 1; what is deterministic has a value; both have as many draws as any site."""

    def model():
        numpyro.sample("share", dist.Dirichlet(jnp.ones(1)))
        numpyro.sample("none", dist.Normal(0, 1), sample_shape=(0,))
        numpyro.deterministic("pair", {"a": 2.0, "b": (jnp.ones(2),)})

    mcmc = run(HMC(model, step_size=0.5, num_steps=2))
    samples = mcmc.get_samples()
    np.testing.assert_array_equal(samples["share"], np.ones((6, 1)))
    assert samples["none"].shape == (6, 0) and samples["pair"]["b"][0].shape == (6, 2)
    assert mcmc.report.level.name == "CERTIFIED_PATH"


def test_empty_sites_beside_others_and_names_of_any_kind(capsys):
    def model():
        mean = numpyro.sample("", dist.Normal(0, 5))
        numpyro.sample("none", dist.Normal(mean, 1), sample_shape=(0,))
        numpyro.sample("a/b", dist.Normal())
        numpyro.sample("draw", dist.Normal())

    mcmc = run(HMC(model, step_size=0.5, num_steps=2))
    mcmc.print_summary()
    assert "a/b" in capsys.readouterr().out
    assert {name: one.shape for name, one in mcmc.get_samples().items()} == {
        "": (6,), "a/b": (6,), "draw": (6,), "none": (6, 0)}  # fmt: skip


# --- observations


def test_masked_values_are_nobodys_business():
    values = np.array([0.3, np.nan, 1.2], np.float32)
    counts = ~np.isnan(values)

    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0, 1))
        law = dist.Normal(mean, 1).expand([3])
        numpyro.sample("event", law.mask(counts).to_event(1), obs=y)
        with numpyro.plate("copy", 2, dim=-2), numpyro.plate("row", 3, dim=-1):
            numpyro.sample("plate", law.mask(counts), obs=np.stack([y, y]))

    target = from_numpyro(model, values, key=KEY)
    normal = dist.Normal(0.5, 1).log_prob(values[counts]).sum()
    np.testing.assert_allclose(
        target.logdensity({"mean": jnp.float32(0.5)}),
        dist.Normal().log_prob(0.5) + 3 * normal,
        rtol=1e-6,
    )
    counts = np.ones(3, bool)
    with pytest.raises(ValueError, match="site 'event': got 1 NaN"):
        from_numpyro(model, values, key=KEY)


class Square(dist.Distribution):
    """A likelihood that somebody wrote, without a support."""

    def __init__(self, mean):
        self.mean_ = mean
        super().__init__(batch_shape=jnp.shape(mean))

    def log_prob(self, value):
        return -((value - self.mean_) ** 2)

    def sample(self, key, sample_shape=()):
        return self.mean_ + jax.random.normal(key, sample_shape + self.batch_shape)


def test_laws_without_a_support():
    def observed():
        numpyro.sample("y", Square(numpyro.sample("mean", dist.Normal()) * jnp.ones(2)), obs=Y[:2])

    value = from_numpyro(observed, key=KEY).logdensity({"mean": jnp.float32(0)})
    np.testing.assert_allclose(value, dist.Normal().log_prob(0) - (Y[:2] ** 2).sum(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"site 'x': got a latent.*\(Square\) has no support"):
        from_numpyro(lambda: numpyro.sample("x", Square(0.0)), key=KEY)


# --- starts


def test_a_start_that_numpyro_refuses_is_followed_by_another():
    """Half of all starts have a negative scale, some at the key with which the model is looked at."""

    def model(y):
        scale = numpyro.sample("scale", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(0, scale), obs=y)

    for key in jax.random.split(KEY, 3):
        start = from_numpyro(model, Y, key=key).start(KEY)
        assert start["scale"] > 0
    with pytest.raises(InvalidStart, match="invalid scale parameter"):
        strategy = init_to_value(values={"scale": -1.0})
        from_numpyro(model, Y, key=KEY, init_strategy=strategy)


@pytest.mark.filterwarnings("ignore:Out-of-support")
def test_a_start_outside_of_a_support_is_named():
    def model():
        numpyro.sample("rate", dist.Exponential(1.0))

    with pytest.raises(InvalidStart, match="site 'rate' starts at -1.0, which is not in its"):
        from_numpyro(model, key=KEY, init_strategy=init_to_value(values={"rate": -1.0}))


def test_float32_among_float64_loses_nothing():
    with jax.enable_x64(True):

        def model():
            mean = numpyro.sample("mean", dist.Normal(jnp.float32(0), jnp.float32(1)))
            numpyro.sample("y", dist.Normal(mean, 1.0), obs=Y)

        strategy = init_to_value(values={"mean": np.float32(1)})
        target = from_numpyro(model, key=KEY, init_strategy=strategy)
        start = target.start(KEY)
        assert start["mean"].dtype == target.logdensity(start).dtype == jnp.float64


# --- parameters


def test_of_parameters_those_without_a_prior_are_reported():
    linen = pytest.importorskip("flax.linen")

    def net(priors):
        def model(x):
            layer = random_flax_module("net", linen.Dense(1), priors, input_shape=(1,))
            numpyro.sample("y", dist.Normal(layer(x[:, None])[:, 0], 1.0), obs=x)

        return model

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every = from_numpyro(net(dist.Normal()), Y, key=KEY)
    assert set(every.names) == {"net/kernel", "net/bias"}
    with pytest.warns(UserWarning, match=r"param sites \[\"net\$params\['bias'\]\"\] are not"):
        from_numpyro(net({"kernel": dist.Normal()}), Y, key=KEY)
