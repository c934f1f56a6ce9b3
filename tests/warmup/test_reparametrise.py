"""Learned coordinates: the divergence that judges them, its derivative, and the weights that exact draws lead to."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels.coordinates import Recentring
from partime_mcmc.numpyro.model import Posterior
from partime_mcmc.warmup import reparametrise
from partime_mcmc.warmup.hmc_batch import HMCBatchResult
from partime_mcmc.warmup.pooled import split_rhat, window_sizes
from partime_mcmc.warmup.reparametrise import carry_over, half_log_det, learn_map

NUM_STEPS, NUM_CHAINS, NUM_GROUPS = 128, 8, 6


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("shape", [(64, 8, 5), (4, 2, 30)])
def test_the_log_determinant_and_its_derivative(shape):
    """Many draws for few coordinates, where nothing is shrunk, and few for many."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=shape) @ rng.normal(size=(shape[-1],) * 2)
    value, slope = half_log_det(draws)
    if shape[0] * shape[1] > 4 * shape[2]:
        within = (draws - draws.mean(axis=0)).reshape(-1, shape[-1])
        expected = 0.5 * np.linalg.slogdet(within.T @ within / len(within))[1]
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    direction, step = rng.normal(size=shape), 1e-5
    ends = [half_log_det(draws + sign * step * direction)[0] for sign in (1, -1)]
    np.testing.assert_allclose(
        (ends[0] - ends[1]) / (2 * step), (slope * direction).sum(), rtol=1e-5
    )


def test_the_divergence_of_a_normal_is_zero_and_no_affine_map_changes_it():
    rng = np.random.default_rng(1)
    root = rng.normal(size=(4, 4))
    x = rng.normal(size=(400, 8, 4)) @ root.T
    g = -x @ np.linalg.inv(root @ root.T)
    # The logarithm of each coordinate is normal with a standard deviation of a half.
    logarithm = 0.5 * rng.normal(size=x.shape)
    skewed = np.exp(logarithm), -(4 * logarithm + 1) / np.exp(logarithm)
    for draws, gradients, is_normal in ((x, g, True), (*skewed, False)):
        before = half_log_det(draws)[0] + half_log_det(gradients)[0]
        moved = half_log_det(draws @ root)[0] + half_log_det(gradients @ np.linalg.inv(root).T)[0]
        np.testing.assert_allclose(before, moved, atol=1e-3)
        # Four standard errors of a log determinant.
        assert (abs(before) < 4 * np.sqrt(2 * 4 / 3200)) == is_normal


def hierarchy(noise):
    """Effects of which each is seen once, with so much noise."""

    def model():
        log_scale = numpyro.sample("log_scale", dist.Normal(0.0, 1.0))
        scale = jnp.exp(log_scale)
        effect = numpyro.sample("effect", dist.Normal(0.0, scale).expand([NUM_GROUPS]).to_event(1))
        numpyro.sample("seen", dist.Normal(effect, noise), obs=jnp.linspace(-2.0, 2.0, NUM_GROUPS))

    return Posterior(model, (), {}, jax.random.key(0)).target


def exact_draws(target, noise):
    """Draws of the posterior: the scale on a grid, then the effects, which are normal; with gradients."""
    rng, seen = np.random.default_rng(2), np.linspace(-2.0, 2.0, NUM_GROUPS)
    grid = np.linspace(-6, 4, 4001)
    variance = np.exp(2 * grid)[:, None] + noise**2
    logp = -0.5 * grid**2 - 0.5 * (np.log(variance) + seen**2 / variance).sum(axis=1)
    weights = np.exp(logp - logp.max())
    count = NUM_STEPS * NUM_CHAINS
    log_scale = rng.choice(grid, count, p=weights / weights.sum())
    precision = np.exp(-2 * log_scale)[:, None] + noise**-2
    effect = seen / noise**2 / precision + rng.normal(size=(count, NUM_GROUPS)) / np.sqrt(precision)
    positions = {"effect": effect, "log_scale": log_scale}
    flat = jax.vmap(lambda position: ravel_pytree(position)[0])(positions)
    value, gradient = jax.vmap(jax.value_and_grad(target.logdensity))(positions)
    slopes = jax.vmap(lambda one: ravel_pytree(one)[0])(gradient)
    shape = (NUM_STEPS, NUM_CHAINS, -1)
    value = np.asarray(value).reshape(shape[:2])
    return HMCBatchResult(
        np.asarray(flat).reshape(shape),
        np.asarray(slopes).reshape(shape),
        value,
        np.ones_like(value),
        np.ones(NUM_CHAINS),
    )


@pytest.mark.parametrize("noise, low, high", [(5.0, 0.0, 0.35), (0.05, 0.65, 1.0)])
def test_effects_are_centred_as_far_as_data_inform_them(noise, low, high):
    target = hierarchy(noise)
    draws = exact_draws(target, noise)
    found = Recentring.of(target.centring, target.start(jax.random.key(1)))
    other = found.reweighted(jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), found.weights))
    start = found if high < 1 else other
    moved = draws if start is found else carry_over(found, other, draws)
    learned = learn_map(start, moved, np.ones(NUM_GROUPS + 1))
    mean = float(learned.map.weights["effect"].mean())
    assert low <= mean <= high and learned.after < learned.before


def test_a_later_fit_goes_on_from_the_minima_of_the_one_before(monkeypatch):
    calls, move = [], reparametrise._moved
    monkeypatch.setattr(reparametrise, "_moved", lambda *args: calls.append(1) or move(*args))
    target = hierarchy(5.0)
    draws = exact_draws(target, 5.0)
    found = Recentring.of(target.centring, target.start(jax.random.key(1)))
    first = learn_map(found, draws, np.ones(NUM_GROUPS + 1))
    num_first = len(calls)
    again = learn_map(found, draws, np.ones(NUM_GROUPS + 1), first.minima)
    # One descent instead of two.
    assert len(first.minima) == 2 and len(calls) - num_first <= num_first / 2
    # The same draws: the minimum is where it was, to the accuracy at which descents end.
    assert again.after == pytest.approx(first.after, abs=0.01)
    np.testing.assert_allclose(again.minima[0], first.minima[0], atol=0.05)


@pytest.mark.parametrize("num_chains", [3, 10, 64])
def test_any_number_of_chains_learns_in_single_precision(num_chains):
    noise = 5.0
    draws = exact_draws(hierarchy(noise), noise)
    shape = (-1, num_chains, NUM_GROUPS + 1)
    count = NUM_STEPS * NUM_CHAINS // num_chains * num_chains
    y, g = (
        leaf.reshape(-1, NUM_GROUPS + 1)[:count].reshape(shape).astype(np.float32)
        for leaf in (draws.positions, draws.gradients)
    )
    value = draws.logdensity.ravel()[:count].reshape(shape[:2]).astype(np.float32)
    with jax.enable_x64(False):
        target = hierarchy(noise)
        found = Recentring.of(target.centring, target.start(jax.random.key(1)))
        window = HMCBatchResult(y, g, value, np.ones_like(value), np.ones(num_chains))
        learned = learn_map(found, window, np.ones(NUM_GROUPS + 1))
        assert float(learned.map.weights["effect"].mean()) < 0.4
        moved = carry_over(found, learned.map, window)
        assert moved.positions.shape == window.positions.shape
        assert np.isfinite(moved.gradients).all() and moved.positions.dtype == np.float32


def test_draws_are_carried_over_with_gradients_and_densities():
    target = hierarchy(1.0)
    draws = exact_draws(target, 1.0)
    found = Recentring.of(target.centring, target.start(jax.random.key(1)))
    new = found.reweighted({"effect": jnp.linspace(0.0, 1.0, NUM_GROUPS)})
    moved = carry_over(found, new, draws)
    unravel = ravel_pytree(found.example)[1]

    def density(y):
        x, change = new.leave(y)
        return target.logdensity(unravel(x)) + change

    y = jnp.asarray(moved.positions.reshape(-1, NUM_GROUPS + 1))
    value, gradient = jax.vmap(jax.value_and_grad(density))(y)
    np.testing.assert_allclose(moved.logdensity.ravel(), value, rtol=1e-8)
    np.testing.assert_allclose(
        moved.gradients.reshape(gradient.shape), gradient, rtol=1e-6, atol=1e-6
    )
    back = carry_over(new, found, moved)
    np.testing.assert_allclose(back.positions, draws.positions, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_steps", [16, 36, 100, 500, 1000, 10_000])
def test_windows_double_and_use_all_steps(num_steps):
    sizes = window_sizes(num_steps, 32)
    assert sum(sizes) == num_steps and min(sizes) >= 16
    assert all(later <= 3 * former for former, later in zip(sizes, sizes[1:]))


def test_chains_in_two_modes_disagree():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(128, 8, 3))
    rest = np.zeros_like(x), x.sum(axis=2), np.ones(x.shape[:2]), np.ones(8)
    assert split_rhat(HMCBatchResult(x, *rest)) < 1.1
    x[:, 3, 1] += 5
    assert split_rhat(HMCBatchResult(x, *rest)) > 1.3
