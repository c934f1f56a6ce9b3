"""Pooled warm-up: metrics, paths and rescue by their own laws; windows in parallel time are the windows side by side."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc.kernels import hmc
from partime_mcmc.kernels.kernel_program import density_of
from partime_mcmc.kernels.leapfrog import exact_drift
from partime_mcmc.kernels.metric_root import LowRank, metric_of
from partime_mcmc.warmup import hmc_batch as trajectories
from partime_mcmc.warmup.hmc_batch import STEPS, HMCBatch, HMCBatchResult, SeedTree
from partime_mcmc.warmup.metric import (
    DenseMetric,
    DiagonalMetric,
    LowRankMetric,
    metric_for,
    root_of,
)
from partime_mcmc.warmup.pooled import (
    Pool,
    PooledAdaptation,
    in_parallel_time,
    rescue,
    side_by_side,
)
from partime_mcmc.warmup.tuning import (
    LENGTHS,
    Path,
    TrajectoryRule,
    Trials,
    best_angle,
    boldest_step,
)
from partime_mcmc.warmup.warmup import WindowAdaptation, warm_up

D, C, SEED = 3, 8, SeedTree((0, 1))
COVARIANCE = np.array([[4.0, 1.0, 0.0], [1.0, 0.5, 0.003], [0.0, 0.003, 1e-4]])
PRECISION = np.linalg.inv(COVARIANCE)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def normal(x):
    return -0.5 * x @ jnp.asarray(PRECISION) @ x


def draws(rule_size, seed=0, covariance=COVARIANCE):
    """Exact draws `(n, C, D)` and gradients of a normal density."""
    rng, size = np.random.default_rng(seed), len(covariance)
    x = rng.normal(size=(rule_size, C, size)) @ np.linalg.cholesky(covariance).T
    return x, -x @ np.linalg.inv(covariance)


def width(metric, covariance=COVARIANCE):
    """Extreme eigenvalues of the target's covariance in the metric's coordinates."""
    root = root_of(metric) if metric.ndim == 2 else np.diag(root_of(metric))
    inverse = np.linalg.inv(root)
    return np.linalg.eigvalsh(inverse @ covariance @ inverse.T)[[0, -1]]


def test_a_fisher_metric_needs_hardly_more_draws_than_dimensions():
    x, g = draws(16)
    # What was believed before is of the right order, as it is after the first batches.
    low, high = width(DenseMetric().fisher(x, g, np.diag(np.diag(COVARIANCE))))
    assert low > 0.5 and high < 2
    plain = np.cov(x[:1].reshape(-1, D), rowvar=False)
    assert width(plain)[1] > high, "a covariance of few draws is worse"


def test_metrics_by_shape():
    x, g = draws(64)
    diagonal = DiagonalMetric().fisher(x, g, 2 * np.diag(COVARIANCE))
    np.testing.assert_allclose(
        diagonal, np.sqrt(np.diag(COVARIANCE) / np.diag(PRECISION)), rtol=0.3
    )
    assert metric_for(10).__class__ is DenseMetric and metric_for(500).__class__ is LowRankMetric
    wide = np.diag(np.exp(np.linspace(-2, 2, 60)))
    wide = wide + 30 * np.outer(
        *2 * [np.sqrt(np.diag(wide)) / np.sqrt(60)]
    )  # one direction of 31 times the variance
    found = LowRankMetric().fisher(*draws(8, 1, wide), np.ones(60))
    assert isinstance(found, LowRank) and 1 <= found.num_used <= 32
    low, high = width(metric_of(found), wide)
    assert (
        high / low
        < 12
        < width(DiagonalMetric().fisher(*draws(8, 1, wide), np.ones(60)), wide) @ [0, 1]
    )


def trials(accept):
    """Trials from states of which one in each row lies far out."""
    return Trials(accept, np.where(np.arange(C) == 0, 9.0, 1.0) * np.ones((STEPS, 1)))


def test_paths_are_the_cheapest_that_are_accepted():
    trial = trials(lambda path: np.full((STEPS, C), 1.0 - 0.4 * path.step_size))
    path = TrajectoryRule(0.8).choose(trial)
    assert path.num_steps == 4 and path.angle == pytest.approx(np.pi / 2)
    assert path.step_size == pytest.approx(2 * np.tan(np.pi / 16))
    assert path.drift_fraction == exact_drift(path.step_size) < 1
    plain = TrajectoryRule(0.8, drift_fraction=1.0).choose(trial)
    assert plain[:3] == (pytest.approx(2 * np.sin(np.pi / 16)), 4, 1.0)
    assert TrajectoryRule(0.8, length=3.0).choose(trial) == Path(0.5, 6, 1.0, pytest.approx(0.8))
    assert TrajectoryRule(0.8, step_size=0.3).choose(trial)[:2] == (0.3, 5)
    # Six steps would be accepted as well, and turn a normal by 8.7 instead of 8.
    for fraction in (None, 1.0):
        rule = TrajectoryRule(0.8, drift_fraction=fraction, length=8.0)
        path = rule.choose(trials(lambda path: np.ones((STEPS, C))))
        assert path.step_size * path.num_steps == pytest.approx(8.0)
        assert path.angle == pytest.approx(8.0, abs=0.2)
    assert boldest_step(trial.accept, 1.0, 0.8).step_size == pytest.approx(0.85**5)
    stuck = TrajectoryRule(0.8).choose(
        trials(lambda path: np.where(np.arange(C) == 0, 0.1, 1.0) * np.ones((STEPS, 1)))
    )
    assert stuck.acceptance == pytest.approx(0.8875), (
        "one chain that is stuck is enough to go on trying"
    )


def turning(width, rate, angle=np.pi / 2, num_steps=800, seed=0):
    """Draws of HMC's exact flow on normals as wide as `width` says, in a unit metric; proposals are accepted at a rate."""
    rng = np.random.default_rng(seed)
    turn = angle / np.asarray(width, float)
    x = [rng.normal(size=(C, len(turn)))]
    for _ in range(num_steps):
        proposal = np.cos(turn) * x[-1] + np.sin(turn) * rng.normal(size=x[-1].shape)
        x.append(np.where(rng.random((C, 1)) < rate, proposal, x[-1]))
    x = np.stack(x) * width + 5.0
    rates = np.full(x.shape[:2], rate)
    return HMCBatchResult(x, -x, rates, rates, np.ones(C))


def test_paths_are_longer_where_the_metric_does_not_fit():
    quarter, path = np.pi / 2, Path(2 * np.sin(np.pi / 16), 4)
    assert path.angle == pytest.approx(quarter)
    # 6,400 draws tell a correlation to 0.0125, by which a width of 1 may be taken for one of 1.04.
    for rate in (1.0, 0.8):
        assert best_angle(turning([1.0, 1.0, 0.5], rate), path) < quarter + 0.1
        assert best_angle(turning([1.0, 1.0, 3.0], rate), path) == pytest.approx(2.0)
        between = best_angle(turning([1.0, 1.4], rate), path)
        assert quarter + 0.15 < between < 2.0
    # What was found with a longer path is found with it again: it is the width that is read, not the correlation.
    longer = Path(2 * np.sin(between / 8), 4)
    again = best_angle(turning([1.0, 1.4], 0.8, between), longer)
    assert again == pytest.approx(between, abs=0.1)
    rule = dataclasses.replace(TrajectoryRule(0.8), angle=between)
    assert rule.choose(trials(lambda path: np.ones((STEPS, C))), 4).angle == pytest.approx(between)
    nothing = turning([1.0], 1.0)
    assert best_angle(nothing._replace(gradients=nothing.gradients * np.nan), path) == quarter


def test_a_path_is_accepted_from_nearly_everywhere_or_very_often():
    """Fine in the mean, but from some states nothing is accepted: chains would stand still there."""

    def from_others(share, far=1.0):
        rates = np.where(np.arange(STEPS * C) % share == 0, 0.0, far).reshape(STEPS, C)
        return trials(lambda path: rates - 0.001 * path.step_size)

    # 0.967 of the states: more than three quarters of the way from 0.8 to 1, so there is no more to ask for, but of one gradient.
    assert TrajectoryRule(0.8).choose(from_others(30)).num_steps == 2
    assert TrajectoryRule(0.8).choose(from_others(STEPS * C)).num_steps == 1
    # 0.95 of them are not enough, but no path is better, nor would a shorter one be: the cheapest of those that were tried.
    anyway = TrajectoryRule(0.8).choose(from_others(20))
    assert anyway.num_steps == 3 and anyway.angle == pytest.approx(np.pi / 2)
    # Less than half way to 1: the one accepted most often, still of the whole angle.
    anyway = TrajectoryRule(0.8).choose(from_others(6))
    assert anyway.num_steps == LENGTHS[-1] and anyway.angle == pytest.approx(np.pi / 2)
    # Below 0.8 paths get shorter.
    assert TrajectoryRule(0.8).choose(from_others(4)).angle < 0.1
    # A path of one gradient must be accepted half way to 1 in any case.
    often = trials(lambda path: np.full((STEPS, C), 0.88))
    assert TrajectoryRule(0.8).choose(often).num_steps == 2

    # Of every eighth state, with small steps of all: the cheapest path from which chains leave.
    def neck(path):
        rate = 0.0 if path.num_steps < 6 else 0.3
        return np.where(np.arange(STEPS * C) % 8 == 3, rate, 0.97).reshape(C, STEPS).T

    found = TrajectoryRule(0.8).choose(Trials(neck, np.ones((STEPS, C, 1))))
    assert found.num_steps == 6 and found.acceptance == pytest.approx(0.875 * 0.97 + 0.125 * 0.3)


def test_a_path_is_accepted_in_tails_too():
    """From one chain's states, which lie three times as far out, paths are accepted less often the coarser they are."""

    def tail(path):
        rates = np.full((STEPS, C), 0.97)
        rates[:, 0] = 1 - 0.8 * path.step_size
        return rates

    far = np.where(np.arange(C) == 0, 9.0, 1.0) * np.ones((STEPS, 1))
    apart = np.stack([far, np.ones_like(far)], axis=-1)
    one, other = Trials(tail, apart), Trials(tail, np.ones_like(apart))
    share = 9 / (9 + C - 1)
    for path in TrajectoryRule(0.8).candidates():
        rates = tail(path)
        worst = min(share * rates[0, 0] + (1 - share) * 0.97, rates.mean())
        assert one.in_tails(rates) == pytest.approx(worst)
        assert other.in_tails(rates) == pytest.approx(rates.mean())
    careful, careless = TrajectoryRule(0.8).choose(one), TrajectoryRule(0.8).choose(other)
    assert careful.num_steps > careless.num_steps
    assert one.in_tails(tail(careful)) >= 0.7 > one.in_tails(tail(careless))


def test_a_lost_chain_goes_on_from_a_good_one():
    x = np.zeros((STEPS, C, D)) + np.arange(C)[:, None]
    level = np.where(np.arange(C) == 5, -1e6, -1.0) * np.ones((STEPS, 1))
    pool = Pool(
        x[-1], np.eye(D), np.zeros(D), HMCBatchResult(x, x, level, level, np.ones(C)), 0, []
    )
    rescue(pool, SeedTree((0, 0)))
    assert pool.num_rescued == 1 and pool.positions[5, 0] != 5 and pool.positions[4, 0] == 4
    np.testing.assert_array_equal(pool.draws.positions[-1], pool.positions)


def batch():
    density, data = density_of(normal, jnp.zeros(D))
    return HMCBatch(density, data, jnp.zeros(D), C)


def test_windows_in_parallel_time_are_chains_of_the_same_law():
    """Solved, not fallen back; less deep than side by side; and with exact starts still the target's draws."""
    starts, root = draws(1)[0][0], root_of(COVARIANCE * 1.2)
    path = Path(0.7, 2, 0.9)
    parallel, one_by_one = batch(), batch()
    found = in_parallel_time(parallel, SEED, starts, root, path, 512)
    other = side_by_side(one_by_one, SEED, starts, root, path, 512)
    assert (
        parallel.num_steps == one_by_one.num_steps == 512
        and parallel.depth < 0.75 * one_by_one.depth
    )
    for window in (found, other):
        assert window.positions.shape == (512, C, D) and window.acceptance.shape == (512, C)
        np.testing.assert_allclose(
            window.gradients, -window.positions @ PRECISION, rtol=1e-6, atol=1e-8
        )
        z = window.positions @ np.linalg.inv(np.linalg.cholesky(COVARIANCE)).T
        assert (
            np.abs(z.mean(axis=(0, 1))).max() < 0.12 and np.abs(z.var(axis=(0, 1)) - 1).max() < 0.15
        )
    assert abs(found.acceptance.mean() - other.acceptance.mean()) < 0.02


@pytest.mark.parametrize(
    "adaptation",
    [PooledAdaptation(run=in_parallel_time), WindowAdaptation()],
    ids=["pooled, parallel in time", "window adaptation"],
)
def test_whole_warm_ups(adaptation):
    starts = jax.random.uniform(jax.random.key(2), (C, D), minval=-2.0, maxval=2.0)
    warmup = warm_up(jax.random.key(3), normal, hmc, starts, 700, adaptation)
    low, high = width(np.asarray(warmup.whitening.scale @ warmup.whitening.scale.T))
    assert low > 0.6 and high < 1.7
    assert warmup.settings["num_integration_steps"] <= 2 and warmup.acceptance >= 0.8
    assert warmup.num_steps <= 700 and warmup.num_rescued == 0 and warmup.depth > 0
    assert "one after another" in str(warmup) and dataclasses.asdict(warmup.whitening)


@pytest.mark.parametrize("numbers", [2**20, 64 * C * D, 1])
def test_a_window_is_one_chain_however_many_calls_it_takes(numbers, monkeypatch):
    monkeypatch.setattr(trajectories, "_MOST_NUMBERS", numbers)
    calls = max(1, 128 // trajectories.max_batch_steps(C * D))
    # Far from the mode and slow: who began anew would leap.
    starts, h, chains = 100.0 + np.arange(C * D, dtype=float).reshape(C, D), 0.01, batch()
    window = side_by_side(chains, SEED, starts, np.eye(D) * 1e-3, Path(h, 3), 128)
    path = np.concatenate([starts[None], window.positions])
    leaps = np.abs(np.diff(path, axis=0)).max(axis=(1, 2))
    assert window.positions.shape == (128, C, D) and chains.num_steps == 128
    assert np.abs(path[-1] - path[0]).max() > 3 * leaps.max() > 0
    np.testing.assert_allclose(window.gradients, -window.positions @ PRECISION, rtol=1e-6)
    np.testing.assert_allclose(
        window.logdensity, -0.5 * np.sum(window.positions @ PRECISION * window.positions, axis=-1)
    )
    # No two parts of a window have the same random numbers.
    assert len(np.unique(np.diff(path, axis=0)[:, 0, 0])) > 0.8 * 128
    assert chains.num_gradients == 128 * C * 3 + calls * C
