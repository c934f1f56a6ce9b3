"""Recentred sites: which they are, that the map is a bijection with the Jacobian it says, and runs of recentred models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.contrib.control_flow import scan
from numpyro.handlers import reparam
from numpyro.infer import MCMC
from numpyro.infer.reparam import LocScaleReparam

from partime_mcmc import CoalescingHMC, ParallelMCMC, Store
from partime_mcmc.kernels.coordinates import Recentring, enter_all, leave_all
from partime_mcmc.numpyro.model import Posterior

SIGMA = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
EFFECT = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])


def schools(y=EFFECT, sigma=SIGMA):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def every_law():
    """A site of every kind, and beside each what must not be touched."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    place = numpyro.sample("place", dist.Normal(0.0, 1.0))
    numpyro.sample("student", dist.StudentT(4.0, place, 1.0).expand([3]).to_event(1))
    numpyro.sample("positive", dist.LogNormal(place, scale))
    numpyro.sample("walk", dist.GaussianRandomWalk(scale, num_steps=5))
    numpyro.sample("joint", dist.MultivariateNormal(jnp.zeros(3), scale * (jnp.eye(3) + 0.3)))
    with numpyro.plate("groups", 2, dim=-1), numpyro.plate("members", 3, dim=-2):
        chained = numpyro.sample("chained", dist.Laplace(place * jnp.arange(2.0), scale))
        numpyro.sample("seen", dist.Normal(chained, 1.0), obs=jnp.ones((3, 2)))
    numpyro.sample("half", dist.HalfNormal(scale))
    numpyro.sample("bounded", dist.TruncatedNormal(place, scale, low=0.0))


def target_of(model):
    posterior = Posterior(model, (), {}, jax.random.key(0))
    position = posterior.target.start(jax.random.key(1))
    return posterior.target, position


def test_location_scale_sites_that_depend_on_others_are_found(double):
    target, _ = target_of(every_law)
    assert set(target.centring.names) == {"student", "positive", "walk", "joint", "chained"}
    assert target_of(lambda: numpyro.sample("x", dist.Normal(0, 1)))[0].centring is None


def test_what_the_user_reparametrised_is_left_alone(double):
    config = {"theta": LocScaleReparam(0.5)}
    assert target_of(reparam(schools, config=config))[0].centring is None


def test_sites_of_a_scan_are_left_alone(double):
    def model():
        step = numpyro.sample("step", dist.HalfNormal(1.0))

        def move(x, _):
            x = numpyro.sample("x", dist.Normal(x, step))
            return x, x

        level = numpyro.sample("level", dist.Normal(0.0, step))
        scan(move, level, jnp.arange(3))

    target, position = target_of(model)
    assert target.centring.names == ("level",)
    found = Recentring.of(target.centring, position)
    found = found.reweighted(jax.tree.map(jnp.zeros_like, found.weights))
    x = ravel_pytree(position)[0]
    np.testing.assert_allclose(found.leave(found.enter(x))[0], x, rtol=1e-10)


@pytest.mark.parametrize("model", [schools, every_law])
def test_a_recentring_is_a_bijection_with_its_jacobian(double, model):
    target, position = target_of(model)
    as_written = Recentring.of(target.centring, position)
    x = ravel_pytree(position)[0]
    np.testing.assert_allclose(as_written.enter(x), x, rtol=1e-12, atol=1e-12)
    assert not as_written.describe()
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda leaf: rng.uniform(size=leaf.shape), as_written.weights)
    maps = (as_written.reweighted(weights),)
    y = enter_all(maps, x)
    assert np.abs(y - x).max() > 0.01, "the map does something"
    back, log_jacobian = leave_all(maps, y)
    np.testing.assert_allclose(back, x, rtol=1e-10, atol=1e-10)
    jacobian = jax.jacobian(lambda y: leave_all(maps, y)[0])(y)
    np.testing.assert_allclose(log_jacobian, np.linalg.slogdet(jacobian)[1], rtol=1e-10)
    assert all(name in maps[0].describe() for name in target.centring.names)


def test_a_wholly_noncentred_site_has_a_law_of_its_own(double):
    """With c = 0 the prior of y depends on no other site."""
    target, position = target_of(lambda: schools(None))
    del position["y"]
    model = Posterior(lambda: schools(None), (), {}, jax.random.key(0))
    position = model.target.start(jax.random.key(2))
    found = Recentring.of(model.target.centring, position)
    found = found.reweighted(jax.tree.map(jnp.zeros_like, found.weights))
    rest = jnp.zeros(8)

    def density(mu, log_tau, theta):
        y = ravel_pytree({"mu": mu, "tau": log_tau, "theta": theta, "y": rest})[0]
        x, change = found.leave(y)
        mu, tau, theta = x[0], jnp.exp(x[1]), x[2:10]
        return dist.Normal(mu, tau).log_prob(theta).sum() + change

    theta = jnp.linspace(-1, 1, 8)
    one, two = density(0.3, -2.0, theta), density(-1.0, 3.0, theta)
    np.testing.assert_allclose(one, two, rtol=1e-10)
    # `y`, which is latent here, has a location that depends on `theta`, and a known scale.
    expected = dist.Normal(0, 1).log_prob(theta).sum() + np.log(SIGMA).sum()
    np.testing.assert_allclose(one, expected, rtol=1e-10)


def run_schools(num_samples=1000, **options):
    mcmc = ParallelMCMC(
        CoalescingHMC(schools),
        num_warmup=600,
        num_samples=num_samples,
        num_chains=4,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(3), **options)
    return mcmc


def exact_posterior():
    """The probability of tau < 1 and the means of the effects: given tau all else is normal, and integrated out."""
    tau = np.arange(0.0005, 200, 0.001)
    variance = SIGMA**2 + tau[:, None] ** 2
    precision = (1 / variance).sum(axis=1) + 1 / 25
    mean = (EFFECT / variance).sum(axis=1) / precision
    logp = -np.log1p((tau / 5) ** 2) - 0.5 * np.log(precision) + 0.5 * mean**2 * precision
    logp += (-0.5 * np.log(variance) - 0.5 * EFFECT**2 / variance).sum(axis=1)
    weights = np.exp(logp - logp.max())
    weights /= weights.sum()
    pulled = (EFFECT / SIGMA**2 + (mean / tau**2)[:, None]) / (SIGMA**-2 + (tau**-2)[:, None])
    return weights[tau < 1].sum(), weights @ pulled


def test_a_funnel_is_recentred_and_sampled_as_the_model_has_it(double):
    mcmc = run_schools()
    assert mcmc.report.level.name == "CERTIFIED_PATH"
    (found,) = mcmc.report.warmup.whitening.maps
    assert float(found.weights["theta"].max()) < 0.5, "hardly informed effects are non-centred"
    assert "Re-centred" in str(mcmc.report) and "theta" in str(mcmc.report)
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["tau"])
    exact, means = exact_posterior()
    assert abs((x < 1).mean() - exact) < 0.04, (
        "in the centred model's coordinates chains miss the neck"
    )
    assert mcmc.draws.certificate.num_rejected.sum() > 0
    # Four standard errors at 1,000 effective draws of effects with a standard deviation of 6.
    theta = np.asarray(mcmc.get_samples()["theta"]).mean(axis=0)
    np.testing.assert_allclose(theta, means, atol=4 * 6 / np.sqrt(1000))


@functools.cache
def whole():
    """A short run, in memory."""
    return run_schools(num_samples=96)


def test_numpyros_own_loop_draws_the_same_chain(double):
    key, ours, sampler = jax.random.key(3), whole(), CoalescingHMC(schools)
    options = {"num_samples": 96, "num_chains": 4, "progress_bar": False}
    warmed = ParallelMCMC(sampler, num_warmup=600, **options)
    warmed.warmup(key)
    theirs = MCMC(sampler, num_warmup=0, chain_method="vectorized", **options)
    theirs.post_warmup_state = warmed.post_warmup_state
    theirs.run(jax.random.split(key, 4))
    for name, value in ours.get_samples().items():
        np.testing.assert_allclose(value, theirs.get_samples()[name], rtol=1e-6, atol=1e-6)


def test_a_stored_run_and_a_continued_one_keep_the_map(double, tmp_path):
    stored = run_schools(num_samples=96, store=Store(tmp_path / "run", chunk=32))
    # In chunks of another length, which round apart, in units of coordinates as wide as 1 and more.
    for name, value in whole().get_samples().items():
        np.testing.assert_allclose(value, stored.get_samples()[name], rtol=1e-12, atol=1e-12)
    again = run_schools(num_samples=96, store=Store(tmp_path / "run", chunk=32))
    np.testing.assert_array_equal(again.get_samples()["theta"], stored.get_samples()["theta"])
    first = run_schools(num_samples=48)
    head = first.get_samples(group_by_chain=True)["theta"]
    first.post_warmup_state = first.last_state
    first.run(first.last_state.rng_key)
    tail = first.get_samples(group_by_chain=True)["theta"]
    np.testing.assert_allclose(
        np.concatenate([head, tail], axis=1),
        whole().get_samples(group_by_chain=True)["theta"],
        rtol=1e-8,
    )
