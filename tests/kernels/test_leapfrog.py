"""Leapfrogs: written out once more, reversible, of volume one, exact on a standard normal with the right drifts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import MultishiftCoupling, Target, coalescing_hmc, hmc, sample
from partime_mcmc.kernels import Whitening
from partime_mcmc.kernels.leapfrog import (
    exact_drift,
    exact_step,
    leapfrogs,
    row_of_trajectory,
    step_for_angle,
    turned_angle,
)
from partime_mcmc.kernels.multishift_hmc import steered_hmc

pytestmark = pytest.mark.fast


def quartic(x):
    return -0.5 * jnp.sum(x**2) - 0.1 * jnp.sum(x**4) + 0.3 * x[0] * x[1]


def written_out(gradient, x, p, step_size, num_steps, drift_fraction=1.0):
    """A trajectory, kick by kick and drift by drift."""
    for _ in range(num_steps):
        p = p + step_size / 2 * gradient(x)
        x = x + drift_fraction * step_size * p
        p = p + step_size / 2 * gradient(x)
    return x, p


def blackjaxs(x, p, step_size, num_steps, drift_fraction):
    """The trajectory that kernels make."""
    from blackjax.mcmc import integrators, metrics

    energy = metrics.gaussian_euclidean(jnp.ones_like(x)).kinetic_energy
    start = integrators.IntegratorState(x, p, quartic(x), jax.grad(quartic)(x))
    end = leapfrogs(num_steps, drift_fraction)(quartic, energy)(start, step_size)
    return end.position, end.momentum, end.logdensity, end.logdensity_grad


PATHS = [(1, 1.0), (1, 0.5), (5, 0.7), (12, 0.9)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("traced", [False, True])
def test_trajectories_are_leapfrogs(path, traced):
    with jax.enable_x64(True):
        x, p = jnp.array([0.4, -1.1, 0.7]), jnp.array([1.2, 0.3, -0.8])
        run = blackjaxs
        if traced:  # counts are numbers of the program there
            run = jax.jit(blackjaxs)
        gradient = jax.grad(quartic)
        end, momentum = written_out(gradient, x, p, 0.3, *path)
        wanted = end, momentum, quartic(end), gradient(end)
        found = run(x, p, 0.3, *path)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11)


@pytest.mark.parametrize("path", PATHS)
def test_trajectories_are_reversible_and_preserve_volume(path):
    with jax.enable_x64(True):
        x, p = jnp.array([0.4, -1.1, 0.7]), jnp.array([1.2, 0.3, -0.8])
        go = functools.partial(blackjaxs, step_size=0.3, num_steps=path[0], drift_fraction=path[1])
        end, momentum, *_ = go(x, p)
        back, reversed_momentum, *_ = go(end, -momentum)
        np.testing.assert_allclose(back, x, rtol=1e-10)
        np.testing.assert_allclose(reversed_momentum, -p, rtol=1e-10)
        gradient = jax.grad(quartic)
        flow = lambda both: jnp.concatenate(written_out(gradient, both[:3], both[3:], 0.3, *path))
        volume = jnp.linalg.det(jax.jacobian(flow)(jnp.concatenate([x, p])))
        assert volume == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_a_standard_normal_is_turned(path):
    num_steps, fraction = path
    with jax.enable_x64(True):
        c, s = row_of_trajectory(0.4, *path)
        for x, p in ((1.3, 0.0), (0.0, -0.7), (0.4, 1.9)):
            end, _ = written_out(lambda x: -x, x, p, 0.4, *path)
            assert end == pytest.approx(float(c * x + s * p), abs=1e-12)
        assert turned_angle(0.4, *path) % (2 * math.pi) == pytest.approx(
            math.acos(c) if s > 0 else 2 * math.pi - math.acos(c)
        )
    limit = 2 / math.sqrt(fraction)
    assert turned_angle(0.999 * limit, *path) < math.inf
    assert turned_angle(limit, *path) == turned_angle(1.001 * limit, *path) == math.inf
    # Beyond the limit a normal is not turned but driven apart.
    far, _ = written_out(lambda x: -x, 1.0, 0.0, 1.01 * limit, 100, fraction)
    assert abs(far) > 1e3
    for angle in (0.9, math.pi / 2, 2.0):
        step = step_for_angle(angle, *path)
        assert turned_angle(step, *path) == pytest.approx(angle)


@pytest.mark.parametrize("angle", [1.0, math.pi / 2, 2.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_exact_steps_turn_a_normal_and_keep_its_energy(angle, num_steps):
    step = exact_step(angle / num_steps)
    fraction = exact_drift(step)
    assert fraction == pytest.approx(math.cos(angle / num_steps / 2) ** 2)
    assert turned_angle(step, num_steps, fraction) == pytest.approx(angle)
    for x, p in ((1.3, 0.0), (0.0, -0.7), (0.4, 1.9)):
        end, last = written_out(lambda x: -x, x, p, step, num_steps, fraction)
        assert end == pytest.approx(math.cos(angle) * x + math.sin(angle) * p)
        assert last == pytest.approx(math.cos(angle) * p - math.sin(angle) * x)


def test_exact_steps_are_accepted_oftener_where_a_density_is_nearly_normal():
    """t distributions with 30 degrees of freedom in 20 dimensions, at a quarter period of three gradients."""
    score = lambda x: -31 * x / (30 + x**2)

    def acceptance(step, fraction):
        rng = np.random.default_rng(0)
        x, p = rng.standard_t(30, size=(20_000, 20)), rng.normal(size=(20_000, 20))
        end, last = written_out(score, x, p, step, 3, fraction)
        potential = lambda x: 15.5 * np.log1p(x**2 / 30)
        fall = (potential(x) - potential(end) + 0.5 * (p**2 - last**2)).sum(axis=1)
        return np.exp(np.minimum(fall, 0)).mean()

    angle = math.pi / 2
    exact = exact_step(angle / 3)
    # 20,000 trajectories tell a mean to 0.002.
    plain, better = acceptance(step_for_angle(angle, 3), 1.0), acceptance(exact, exact_drift(exact))
    assert better > plain + 0.03 and better > 0.95


def test_drifts_and_counts_that_cannot_be():
    metric = Whitening.of_covariance(jnp.zeros(3), jnp.zeros(3), jnp.eye(3))
    for builder in (hmc, coalescing_hmc):
        for fraction in (0.0, 1.5, math.nan, "half", np.ones(2)):
            with pytest.raises(ValueError, match="drift_fraction: got .*, wanted a number in"):
                builder(quartic, 0.3, metric, 4, drift_fraction=fraction)
    # Before warm-up, too.
    target = Target(quartic, jnp.zeros(3))
    for fixed, words in (
        ({"num_integration_steps": 0}, "num_integration_steps: got 0"),
        ({"drift_fraction": 2.0}, "drift_fraction: got 2.0"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(jax.random.key(0), target, functools.partial(hmc, **fixed), num_samples=10)
    coupling = MultishiftCoupling()
    with pytest.raises(ValueError, match="step_size: got 2.0, wanted .*: below 2"):
        hmc(quartic, 2.0, metric, 3, coupling=coupling)
    with pytest.raises(ValueError, match="step_size: got 2.5, wanted .*: below 2.31"):
        hmc(quartic, 2.5, metric, 2, drift_fraction=0.75, coupling=coupling)
    # Where nothing is said a path is nearly a quarter period.
    for step_size, fraction, wanted in (
        (0.5, 1.0, 3),
        (0.5, 0.25, 6),
        (1.5, 1.0, 1),
        (9.0, 1.0, 1),
    ):
        kernel = hmc(quartic, step_size, metric, drift_fraction=fraction)
        info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))[1]
        assert info.num_integration_steps == wanted


@pytest.mark.parametrize("step_size, wanted", [(0.3, 0.66**2 / 2), (1.1, 1.0)])
def test_the_langevin_step_of_a_cycle_where_none_is_given(step_size, wanted):
    """ε = h²/2 for h = 2.2 times the leapfrog's step, at most √2."""
    metric = Whitening.of_covariance(jnp.zeros(3), jnp.zeros(3), jnp.eye(3))
    build = functools.partial(coalescing_hmc, quartic, step_size, metric, 2, every=1)
    paths = []
    for kernel in (build(), build(mala_step_size=wanted), build(mala_step_size=2 * wanted)):
        state = kernel.init(jnp.ones(3))
        for seed in range(3):
            state = kernel.step(jax.random.key(seed), state)[0]
        paths.append(np.asarray(state.position))
    np.testing.assert_allclose(paths[0], paths[1], rtol=1e-5)
    assert np.abs(paths[0] - paths[2]).max() > 1e-2


def test_steered_paths_are_plain_leapfrogs_unless_told_otherwise():
    density = lambda x: -0.5 * jnp.sum(x**2)
    ends = []
    for more in ((), (1.0,), (0.9,)):
        kernel = steered_hmc(density, 0.8, 2, *more)
        state = kernel.init(jnp.ones(3))
        randomness = kernel.draw(jax.random.key(0), state)
        ends.append(np.asarray(kernel.step_with(randomness, state)[1].proposal.position))
    np.testing.assert_array_equal(ends[0], ends[1])
    assert np.abs(ends[0] - ends[2]).max() > 1e-3


def test_one_of_two_numbers_of_a_path_may_be_traced():
    metric = Whitening.of_covariance(jnp.zeros(3), jnp.zeros(3), jnp.eye(3))

    def end(step_size, drift_fraction):
        kernel = hmc(
            quartic,
            step_size,
            metric,
            3,
            drift_fraction=drift_fraction,
            coupling=MultishiftCoupling(),
        )
        return kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))[0].position

    wanted = end(0.4, 0.9)
    np.testing.assert_allclose(jax.jit(lambda f: end(0.4, f))(0.9), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda h: end(h, 0.9))(0.4), wanted, rtol=1e-5)
