"""Integrators of one, two and three stages: written out once more, reversible, of volume one, and worth their gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import MultishiftCoupling, Target, coalescing_hmc, hmc, sample
from partime_mcmc.kernels import Whitening
from partime_mcmc.kernels.multishift_hmc import leapfrogs
from partime_mcmc.kernels.splitting import (
    Splitting,
    exact_leapfrog,
    rotation,
    row_of_trajectory,
    stages_to_try,
    step_for_angle,
    turned_angle,
)

pytestmark = pytest.mark.fast

# Blanes, Casas & Sanz-Serna 2014, eqs. (5.2) and (5.8), as kicks and drifts of a whole integration step.
B2 = 0.21178
A3, B3 = 0.29619504261126, 0.11888010966548
PALINDROMES = {
    1: ([0.5, 0.5], [1.0]),
    2: ([B2, 1 - 2 * B2, B2], [0.5, 0.5]),
    3: ([B3, 0.5 - B3, 0.5 - B3, B3], [A3, 1 - 2 * A3, A3]),
}


def quartic(x):
    return -0.5 * jnp.sum(x**2) - 0.1 * jnp.sum(x**4) + 0.3 * x[0] * x[1]


def written_out(gradient, x, p, step_size, num_steps, num_stages, drift_fraction=1.0):
    """A trajectory, kick by kick and drift by drift."""
    kicks, drifts = PALINDROMES[num_stages]
    for _ in range(num_steps // num_stages):
        for kick, drift in zip(kicks, drifts):
            p = p + kick * num_stages * step_size * gradient(x)
            x = x + drift_fraction * drift * num_stages * step_size * p
        p = p + kicks[-1] * num_stages * step_size * gradient(x)
    return x, p


def blackjaxs(x, p, step_size, num_steps, num_stages, drift_fraction):
    """The trajectory that kernels make."""
    from blackjax.mcmc import integrators, metrics

    energy = metrics.gaussian_euclidean(jnp.ones_like(x)).kinetic_energy
    start = integrators.IntegratorState(x, p, quartic(x), jax.grad(quartic)(x))
    splitting = Splitting(num_stages, drift_fraction)
    end = leapfrogs(num_steps, splitting)(quartic, energy)(start, step_size)
    return end.position, end.momentum, end.logdensity, end.logdensity_grad


PATHS = [(1, 1, 1.0), (5, 1, 0.7), (2, 2, 1.0), (12, 2, 0.9), (3, 3, 1.0), (12, 3, 1.0)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("traced", [False, True])
def test_trajectories_are_the_published_ones(path, traced):
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
        go = functools.partial(
            blackjaxs,
            step_size=0.3,
            num_steps=path[0],
            num_stages=path[1],
            drift_fraction=path[2],
        )
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
    num_steps, splitting = path[0], Splitting(*path[1:])
    with jax.enable_x64(True):
        c, s = row_of_trajectory(0.4, num_steps, splitting)
        for x, p in ((1.3, 0.0), (0.0, -0.7), (0.4, 1.9)):
            end, _ = written_out(lambda x: -x, x, p, 0.4, *path)
            assert end == pytest.approx(float(c * x + s * p), abs=1e-12)
        assert turned_angle(0.4, num_steps, splitting) % (2 * math.pi) == pytest.approx(
            math.acos(c) if s > 0 else 2 * math.pi - math.acos(c)
        )
    limit = {1: 2.0, 2: 1.317, 3: 1.554}[path[1]] / math.sqrt(path[2])
    assert turned_angle(0.999 * limit, num_steps, splitting) < math.inf
    assert turned_angle(1.001 * limit, num_steps, splitting) == math.inf
    assert abs(rotation(1.01 * limit, *splitting)[0]) > 1
    steps = np.linspace(0.01, 0.99 * limit, 50)
    turned = [turned_angle(step, num_steps, splitting) for step in steps]
    assert (np.diff(turned) > 0).all(), "it turns on and on"
    for angle in (1.0, math.pi / 2, 2.0):
        step = step_for_angle(angle, num_steps, splitting)
        assert turned_angle(step, num_steps, splitting) == pytest.approx(angle)


@pytest.mark.parametrize("angle", [1.0, math.pi / 2, 2.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_an_exact_leapfrog_turns_a_normal_and_keeps_its_energy(angle, num_steps):
    splitting = exact_leapfrog(angle, num_steps)
    step = step_for_angle(angle, num_steps, splitting)
    assert step == pytest.approx(2 * math.tan(angle / num_steps / 2))
    for x, p in ((1.3, 0.0), (0.0, -0.7), (0.4, 1.9)):
        end, last = written_out(lambda x: -x, x, p, step, num_steps, *splitting)
        assert end == pytest.approx(math.cos(angle) * x + math.sin(angle) * p)
        assert last == pytest.approx(math.cos(angle) * p - math.sin(angle) * x)


def test_more_stages_are_worth_their_gradients():
    """At a quarter period in 100 dimensions: two gradients of a two-stage step are accepted at 0.89, four leapfrogs at 0.84."""

    def acceptance(num_steps, num_stages):
        rng = np.random.default_rng(0)
        x, p = rng.normal(size=(2, 40_000, 100))
        step = step_for_angle(math.pi / 2, num_steps, Splitting(num_stages))
        end, last = written_out(lambda x: -x, x, p, step, num_steps, num_stages)
        fall = 0.5 * (x**2 + p**2 - end**2 - last**2).sum(axis=1)
        return np.exp(np.minimum(fall, 0)).mean()

    # 40,000 trajectories tell a mean to 0.001.
    assert acceptance(2, 2) == pytest.approx(0.89, abs=0.01)
    assert acceptance(4, 1) == pytest.approx(0.84, abs=0.01)
    assert acceptance(3, 3) > 0.95 > acceptance(6, 1)
    tried = {1: (1,), 2: (2, 1), 3: (3, 1), 5: (1,), 6: (3, 1), 8: (2, 1), 12: (1,)}
    assert {steps: stages_to_try(steps) for steps in tried} == tried


def test_stages_that_cannot_be():
    metric = Whitening.of_covariance(jnp.zeros(3), jnp.zeros(3), jnp.eye(3))
    for builder in (hmc, coalescing_hmc):
        with pytest.raises(ValueError, match="num_integration_steps: got 5, wanted a multiple of"):
            builder(quartic, 0.3, metric, 5, num_stages=2)
        with pytest.raises(ValueError, match="num_stages: got 4, wanted 1, 2 or 3"):
            builder(quartic, 0.3, metric, 4, num_stages=4)
        with pytest.raises((ValueError, TypeError), match="num_stages: got 0"):
            builder(quartic, 0.3, metric, 4, num_stages=0)
        for fraction in (0.0, 1.5, math.nan, "half"):
            with pytest.raises(ValueError, match="drift_fraction: got .*, wanted a number in"):
                builder(quartic, 0.3, metric, 4, drift_fraction=fraction)
    # Before warm-up, too.
    target = Target(quartic, jnp.zeros(3))
    for fixed, words in (
        ({"num_stages": 5}, "num_stages: got 5"),
        ({"num_stages": 2, "num_integration_steps": 5}, "num_integration_steps: got 5"),
        ({"drift_fraction": 2.0}, "drift_fraction: got 2.0"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(jax.random.key(0), target, functools.partial(hmc, **fixed), num_samples=10)
    coupling = MultishiftCoupling()
    with pytest.raises(ValueError, match="step_size: got 2.0, wanted one with which"):
        hmc(quartic, 2.0, metric, 3, coupling=coupling)
    with pytest.raises(ValueError, match="step_size: got 1.5, wanted one with which"):
        hmc(quartic, 1.5, metric, 2, num_stages=2, coupling=coupling)
    # A quarter period, to the nearest multiple.
    kernel = hmc(quartic, 0.5, metric, num_stages=2)
    info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))[1]
    assert info.num_integration_steps == 4
