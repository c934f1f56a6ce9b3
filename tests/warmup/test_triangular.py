"""Triangular maps: the map itself, what exact draws lead to, and runs in the coordinates that were learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import MCMC
from scipy.optimize import minimize

from partime_mcmc import CoalescingHMC, ParallelMCMC, Store, Target, coalescing_hmc, resume, sample
from partime_mcmc.kernels.coordinates import (
    Recentring,
    enter_all,
    learned_maps,
    leave_all,
    weights_of,
)
from partime_mcmc.kernels.kernel_program import density_of
from partime_mcmc.kernels.triangular_map import TriangularMap
from partime_mcmc.numpyro.model import Posterior
from partime_mcmc.warmup import triangular_fit
from partime_mcmc.warmup.hmc_batch import HMCBatchResult
from partime_mcmc.warmup.triangular_fit import (
    enter_map,
    first_maps,
    learn_triangular_map,
    leave_map,
)

NUM_STEPS, NUM_CHAINS, DIMENSION, SCALE = 128, 8, 6, 2
OTHERS = np.delete(np.arange(DIMENSION), SCALE)
DEPTH = 1.5


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def some_map():
    """Two scales with a column of zeros between them, which names a scale once more."""
    rng = np.random.default_rng(0)
    slopes, log_slopes = rng.normal(size=(2, DIMENSION, 3))
    for leaf in (slopes, log_slopes):
        leaf[[1, 4]] = leaf[:, 1] = 0
    origin = np.where(np.isin(np.arange(DIMENSION), [1, 4]), 0, rng.normal(size=DIMENSION))
    return TriangularMap(
        np.array([4, 1, 1], np.int32), rng.normal(size=3), origin, slopes, log_slopes
    )


def window(x, logdensity):
    """Draws `(S, C, D)` with log densities and gradients."""
    value, gradient = jax.vmap(jax.vmap(jax.value_and_grad(logdensity)))(x)
    value = np.asarray(value)
    return HMCBatchResult(
        np.asarray(x), np.asarray(gradient), value, np.ones_like(value), np.ones(x.shape[1])
    )


def test_a_map_is_a_bijection_with_its_jacobian():
    found, x = some_map(), np.random.default_rng(1).normal(size=DIMENSION)
    y = found.enter(x)
    back, log_jacobian = found.leave(y)
    np.testing.assert_allclose(back, x, rtol=1e-12)
    jacobian = jax.jacobian(lambda y: found.leave(y)[0])(y)
    np.testing.assert_allclose(log_jacobian, np.linalg.slogdet(jacobian)[1], rtol=1e-10)


def test_draws_go_through_a_map_with_gradients_and_densities():
    found = some_map()

    def logdensity(x):
        return -jnp.sum(jnp.cosh(x)) + x[0] * x[1] * x[4]

    def of_y(y):
        x, log_jacobian = found.leave(y)
        return logdensity(x) + log_jacobian

    draws = window(np.random.default_rng(2).normal(size=(5, 3, DIMENSION)), logdensity)
    moved = enter_map(found, draws)
    np.testing.assert_allclose(
        moved.positions, jax.vmap(jax.vmap(found.enter))(draws.positions), rtol=1e-10
    )
    expected = window(moved.positions, of_y)
    for name in ("gradients", "logdensity"):
        np.testing.assert_allclose(getattr(moved, name), getattr(expected, name), rtol=1e-8)
    for one, two in zip(leave_map(found, moved)[:3], draws[:3]):
        np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-10)


def funnel(x, slope=0.5, origin=3.0):
    """One coordinate is normal; the others have its exponential as their width, and a place that goes with it."""
    log_width = x[SCALE]
    z = (x[OTHERS] - origin - slope * log_width) * jnp.exp(-log_width)
    return -0.5 * (log_width / DEPTH) ** 2 - 0.5 * jnp.sum(z**2) - len(OTHERS) * log_width


def funnel_draws(origin=3.0, slope=0.5, dtype=float):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(NUM_STEPS, NUM_CHAINS, DIMENSION))
    x[..., SCALE] *= DEPTH
    depth = x[..., SCALE, None]
    x[..., OTHERS] = origin + slope * depth + np.exp(depth) * x[..., OTHERS]
    return window(x.astype(dtype), functools.partial(funnel, slope=slope, origin=origin))


@pytest.mark.parametrize("origin, slope", [(0.0, 0.0), (3.0, 0.5)])
def test_a_funnel_is_found_in_exact_draws(origin, slope):
    draws = funnel_draws(origin, slope)
    found = learn_triangular_map(None, draws)
    used = (found.log_slopes != 0).any(axis=0)
    assert set(found.scales[used]) == {SCALE}
    # The penalty and 512 draws leave the log width wrong by less than a tenth at a standard deviation.
    np.testing.assert_allclose(found.log_slopes[OTHERS][:, used], 1, atol=0.1 / DEPTH)
    np.testing.assert_allclose(
        found.origin[OTHERS] - found.slopes[OTHERS] @ found.middle, origin, atol=0.5
    )
    assert (found.slopes != 0).any() == (slope != 0), "slopes are kept where other draws show them"
    assert learn_triangular_map(found, draws) is found, "there is nothing left to learn"
    assert "1 scale" in found.describe() and f"{len(OTHERS)} other" in found.describe()


def neal(seed, num_steps, lowest, origin):
    """Draws of Neal's funnel whose scale is above `lowest`, its nine effects about `origin`."""
    rng = np.random.default_rng(seed)
    scale = 3 * rng.normal(size=20 * 8 * num_steps)
    scale = scale[scale > lowest][: 8 * num_steps].reshape(num_steps, 8)
    x = origin + np.exp(scale / 2)[..., None] * rng.normal(size=(num_steps, 8, 9))

    def logdensity(x):
        apart = jnp.sum((x[1:] - origin) ** 2)
        return -(x[0] ** 2) / 18 - 0.5 * apart * jnp.exp(-x[0]) - 4.5 * x[0]

    return window(np.concatenate([scale[..., None], x], axis=2), logdensity)


@pytest.mark.parametrize("seed", range(3))
def test_few_draws_of_a_funnel_do_not_bend_or_shift_it(seed):
    """None from its neck: slopes or origins that noise has made would shift the neck by many of its widths."""
    found = learn_triangular_map(None, neal(seed, 16, lowest=-4, origin=0))
    np.testing.assert_array_equal(found.slopes, np.zeros_like(found.slopes))
    np.testing.assert_allclose(found.origin, 0, atol=1e-12)
    # 128 draws are fitted to, of a width that the scale changes by 0.5 per unit.
    np.testing.assert_allclose(found.log_slopes[1:, 0], 0.5, atol=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_where_a_neck_leads_becomes_as_exact_as_the_neck_is_narrow(seed):
    """Effects lie about 3, which has to be learned, and learned again when draws come from further down."""
    first = learn_triangular_map(None, neal(seed, 16, lowest=-2, origin=3))
    again = learn_triangular_map(first, neal(seed, 128, lowest=-np.inf, origin=3))
    rough, exact = (np.abs(found.origin[1:] - 3).max() for found in (first, again))
    # Widths where the scale is as low as in one draw of a hundred.
    width = np.exp(-7 / 2)
    assert exact < width < rough


def test_longer_windows_make_the_same_scales_more_exact():
    """By less than the divergence must fall for other scales."""
    errors = []
    for seed in range(6):
        first = learn_triangular_map(None, neal(seed, 32, lowest=-5, origin=3))
        again = learn_triangular_map(first, neal(seed + 100, 128, lowest=-np.inf, origin=3))
        errors.append([np.abs(found.origin[1:] - 3).max() for found in (first, again)])
    before, after = np.median(errors, axis=0)
    assert after < before / 3


def test_a_fit_goes_on_from_the_map_there_is(monkeypatch):
    counts = []

    def counted(*args, **options):
        found = minimize(*args, **options)
        counts.append(found.nfev)
        return found

    first = learn_triangular_map(None, neal(0, 64, lowest=-5, origin=3))
    draws = neal(100, 128, lowest=-np.inf, origin=3)
    monkeypatch.setattr(triangular_fit, "minimize", counted)
    found = [learn_triangular_map(old, draws) for old in (None, first)]
    of_each = len(counts) // 2
    assert sum(counts[of_each:]) < 0.75 * sum(counts[:of_each]), counts
    for one in found:
        np.testing.assert_allclose(one.log_slopes[1:, 0], 0.5, atol=0.05)


def test_a_map_waits_for_two_draws_of_each_coordinate():
    few, enough = (neal(0, count, lowest=-2, origin=0) for count in (4, 5))
    assert learn_triangular_map(None, few) is None
    assert learn_triangular_map(None, enough) is not None


def test_draws_in_single_precision_lead_to_a_map_of_it():
    found = learn_triangular_map(None, funnel_draws(dtype=np.float32))
    assert all(leaf.dtype in (np.float32, np.int32) for leaf in jax.tree.leaves(found))


def test_correlated_normals_and_heavy_tails_need_no_map():
    rng = np.random.default_rng(4)
    root = rng.normal(size=(DIMENSION, DIMENSION))
    precision = np.linalg.inv(root @ root.T)
    x = rng.normal(size=(NUM_STEPS, NUM_CHAINS, DIMENSION)) @ root.T
    normal = window(x, lambda x: -0.5 * x @ precision @ x)
    tails = window(rng.standard_t(4, size=x.shape), lambda x: -2.5 * jnp.sum(jnp.log1p(x**2 / 4)))
    for draws in (normal, tails):
        assert learn_triangular_map(None, draws) is None
        left = learn_triangular_map(some_map(), draws)
        assert not left.describe(), "a map that does harm goes"
        np.testing.assert_array_equal(left.leave(draws.positions[0, 0])[0], draws.positions[0, 0])
        assert left.scales.shape == some_map().scales.shape, "and leaves no other program behind"
        assert learn_triangular_map(left, draws) is left


@pytest.mark.parametrize("size, wanted", [(1, 0), (100_000, 1)])
def test_a_density_that_costs_much_begins_with_a_map_without_effect(size, wanted):
    numbers = np.ones(size)
    density, data = density_of(lambda x: -jnp.sum(numbers) * jnp.sum(jnp.cosh(x)), np.zeros(3))
    whole, _ = density_of(lambda x: -jnp.sum(jnp.cosh(x.sum() * numbers)), np.zeros(3))
    assert len(first_maps(whole, np.zeros(3), None)) == wanted
    assert not first_maps(density, np.zeros(3), None), "no operation of the density itself is large"


def test_scales_are_learned_where_a_map_is_there_from_the_beginning():
    def logdensity(x):
        # Many numbers by count, which the compiler makes few.
        return funnel(x) + jnp.broadcast_to(x[0], 5_000).sum() * 0

    run = sample(
        jax.random.key(3),
        Target(logdensity, jnp.zeros(DIMENSION)),
        coalescing_hmc,
        num_samples=100,
        num_chains=2,
        num_warmup=400,
        progress=False,
    )
    (found,) = run.warmup.kernel.numbers.whitening.maps
    assert found.scales.shape == (4,) and SCALE in found.scales[(found.log_slopes != 0).any(axis=0)]
    assert "1 scale" in str(run.warmup)


def both():
    """A funnel that no site's law tells, beside effects that can be recentred."""
    depth = numpyro.sample("depth", dist.Normal(0, DEPTH))
    x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (4,)))
    numpyro.factor("width", -0.5 * jnp.sum(x**2) * jnp.exp(-2 * depth) - 4 * depth)
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    effect = numpyro.sample("effect", dist.Normal(0, scale).expand([4]).to_event(1))
    numpyro.sample("seen", dist.Normal(effect, 5.0), obs=jnp.arange(4.0))


OPTIONS = {"num_samples": 96, "num_chains": 4, "progress_bar": False}


@functools.cache
def recentred_run():
    mcmc = ParallelMCMC(CoalescingHMC(both), num_warmup=600, **OPTIONS)
    mcmc.run(jax.random.key(3))
    return mcmc


def test_it_comes_before_recentred_sites():
    mcmc = recentred_run()
    maps = mcmc.report.warmup.whitening.maps
    assert [type(one) for one in maps] == [TriangularMap, Recentring]
    assert "Re-centred" in str(mcmc.report) and "triangular map on 1 scale" in str(mcmc.report)
    target = Posterior(both, (), {}, jax.random.key(0)).target
    again = learned_maps(target.centring, target.start(jax.random.key(1)), weights_of(maps))
    x = np.random.default_rng(5).normal(size=10)
    np.testing.assert_allclose(leave_all(again, enter_all(maps, x))[0], x, rtol=1e-8)


@pytest.mark.slow
def test_numpyros_own_loop_draws_the_same_chain():
    key, sampler = jax.random.key(3), CoalescingHMC(both)
    warmed = ParallelMCMC(sampler, num_warmup=600, **OPTIONS)
    warmed.warmup(key)
    theirs = MCMC(sampler, num_warmup=0, chain_method="vectorized", **OPTIONS)
    theirs.post_warmup_state = warmed.post_warmup_state
    theirs.run(jax.random.split(key, 4))
    for name, value in recentred_run().get_samples().items():
        np.testing.assert_allclose(value, theirs.get_samples()[name], rtol=1e-6, atol=1e-6)


def test_a_bare_density_is_sampled_exactly_and_a_stored_run_goes_on(tmp_path):
    key, target = (
        jax.random.key(0),
        Target(funnel, lambda key: jax.random.normal(key, (DIMENSION,))),
    )
    draws = sample(key, target, coalescing_hmc, num_samples=1000, num_chains=4)
    (found,) = draws.warmup.whitening.maps
    assert isinstance(found, TriangularMap) and "triangular map on 1 scale" in str(draws.warmup)
    x = np.asarray(draws.positions)
    z = (x[..., OTHERS] - 3 - 0.5 * x[..., [SCALE]]) * np.exp(-x[..., [SCALE]])
    standard = np.concatenate([x[..., [SCALE]] / DEPTH, z], axis=-1).reshape(-1, DIMENSION)
    # Four standard errors at 500 effective draws, of means and of standard deviations.
    np.testing.assert_allclose(standard.mean(axis=0), 0, atol=4 / np.sqrt(500))
    np.testing.assert_allclose(standard.std(axis=0), 1, atol=4 / np.sqrt(1000))
    store = Store(tmp_path / "run", chunk=500)
    stored = sample(key, target, draws.warmup, num_samples=1000, num_chains=4, store=store)
    x = np.asarray(stored.load().positions)
    max((tmp_path / "run").glob("chunk-*.npz")).unlink()
    again = resume(tmp_path / "run", target, draws.warmup, progress=False)
    np.testing.assert_array_equal(again.load().positions, x)
