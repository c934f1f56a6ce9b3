"""Statistics of draws that are not kept, against those of draws that are."""

import numpy as np
import pytest

from partime_mcmc.diagnostics import arviz
from partime_mcmc.storage.streaming_statistics import Fold, StreamingStatistics
from tests import fakes


def cuts_of(n, sizes):
    """Slices of n draws, of these sizes over and over."""
    start, i = 0, 0
    while start < n:
        stop = min(n, start + sizes[i % len(sizes)])
        yield slice(start, stop)
        start, i = stop, i + 1


def run(values, info=None, *, sizes=(1000, 1, 317), folds=None):
    statistics = StreamingStatistics.start(folds)
    for chunk in cuts_of(next(iter(values.values())).shape[1], sizes):
        statistics = statistics.update(
            {name: array[:, chunk] for name, array in values.items()},
            {name: array[:, chunk] for name, array in (info or {}).items()},
        )
    return statistics


X = fakes.chains(3, num_samples=20_000, dim=3, memory=0.5)
SKEWED = {"mu": 1e3 + X[..., 0], "theta": np.exp(X[..., 1:])}


def test_moments_are_those_of_all_draws():
    statistics = run(SKEWED)
    flat = np.concatenate([SKEWED["mu"][..., None], SKEWED["theta"]], axis=2)
    np.testing.assert_allclose(statistics.mean(), flat.mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(statistics.variance(), flat.var(axis=1, ddof=1), rtol=1e-11)
    np.testing.assert_allclose(
        [row["sd"] for row in statistics.summary()], flat.std(axis=(0, 1), ddof=1), rtol=1e-11
    )
    assert statistics.labels == ["mu", "theta[0]", "theta[1]"] and (
        statistics.num_chains,
        statistics.num_draws,
    ) == (4, 20_000)


@pytest.mark.parametrize("law", ["normal", "cauchy", "uniform far away", "shrinking", "two modes"])
def test_quantiles_keep_their_stated_accuracy(law):
    rng = np.random.default_rng(0)
    x = {
        "normal": lambda: rng.normal(size=(2, 30_000)),
        "cauchy": lambda: rng.standard_cauchy((2, 30_000)),
        "uniform far away": lambda: 1e6 + rng.uniform(size=(2, 30_000)),
        # The first draws, from which bins are chosen, are unlike the rest.
        "shrinking": lambda: rng.normal(size=(2, 30_000)) * np.geomspace(1e3, 1, 30_000),
        "two modes": lambda: rng.normal(size=(2, 30_000)) + 20 * rng.integers(0, 2, (2, 30_000)),
    }[law]()
    probabilities = np.array([0.0, 0.001, 0.05, 0.3, 0.5, 0.95, 0.999, 1.0])
    found, bound = (part[0] for part in run({"x": x}).quantiles(probabilities))
    below, upto = (
        (x[..., None] < found).mean(axis=(0, 1)),
        (x[..., None] <= found).mean(axis=(0, 1)),
    )
    assert (below <= probabilities + bound + 1e-4).all() and (
        upto >= probabilities - bound - 1e-4
    ).all()
    if law in ("normal", "cauchy", "uniform far away"):
        assert bound.max() < 0.012  # otherwise the bound would say little
        # What can be expected: within a bin the ranks are interpolated.
        assert np.abs(below - probabilities).max() < 1e-3


def test_a_restored_run_goes_on_bit_for_bit():
    info = {"accepted": X[..., 0] > -1, "residual": np.abs(X[..., 1])}
    fold = {
        "ours": Fold(
            {"sum": np.zeros(4)},
            lambda carry, values, _: {"sum": carry["sum"] + values["mu"].sum(axis=1)},
        )
    }
    cuts = list(cuts_of(20_000, (4096,)))
    whole = run(SKEWED, info, sizes=(4096,), folds=fold)
    statistics = StreamingStatistics.from_arrays(StreamingStatistics.start(fold).to_arrays(), fold)
    for cut in cuts:
        statistics = statistics.update(
            {n: a[:, cut] for n, a in SKEWED.items()}, {n: a[:, cut] for n, a in info.items()}
        )
        statistics = StreamingStatistics.from_arrays(
            {name: array.copy() for name, array in statistics.to_arrays().items()}, fold
        )
    ours, theirs = statistics.to_arrays(), whole.to_arrays()
    assert list(ours) == list(theirs) and all(
        "/" not in name and array.dtype != object for name, array in ours.items()
    )
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert statistics.summary() == whole.summary() and statistics.totals() == whole.totals()
    np.testing.assert_allclose(statistics.carries["ours"]["sum"], SKEWED["mu"].sum(axis=1))
    assert sum(array.nbytes for array in ours.values()) < 0.3 * sum(
        array.nbytes for array in SKEWED.values()
    )


@pytest.mark.parametrize("memory", [-0.5, 0.0, 0.5, 0.95])
def test_effective_sizes_and_rhat_agree_with_those_of_kept_draws(memory):
    x = fakes.chains(1, num_samples=30_000, dim=4, memory=memory)
    rows = run({"x": x}).summary()
    for j, row in enumerate(rows):
        kept = x[..., j]
        exact = kept.size * (1 - memory) / (1 + memory)  # of a first-order autoregression
        # 64 to 128 batches in each of four chains: three standard errors, and some for batches that are not infinitely long.
        assert 0.7 < row["ess"] / exact < 1.35
        assert 0.8 < row["mcse_mean"] / arviz.mcse_mean(kept) < 1.25
        assert 0.75 < row["mcse_sd"] / arviz.mcse_sd(kept) < 1.3
        assert abs(row["r_hat"] - arviz.rhat(kept)) < 2e-3
    assert np.mean([row["ess"] for row in rows]) == pytest.approx(exact, rel=0.15)


def test_a_displaced_chain_is_seen():
    x = X[..., 0].copy()
    x[2] += 1.0
    (row,) = run({"x": x}).summary()
    assert (
        row["r_hat"] > 1.05
        and row["r_hat"] == pytest.approx(arviz.rhat(x), abs=0.02)
        and row["ess"] < 0.01 * x.size
    )
    assert np.isnan(run({"x": x[:1]}).summary()[0]["r_hat"])


def test_what_is_not_finite_is_not_hidden():
    x, rate = np.stack([X[..., 0]] * 3, axis=2), np.full(X.shape[:2], 0.5)
    x[1, 7777, 1], x[1, 7777, 2], rate[3, 5005] = np.nan, np.inf, np.nan
    statistics = run({"x": x}, {"acceptance_rate": rate, "diverging": rate > 1})
    good, nan, infinite = statistics.summary()
    assert all(np.isfinite(value) for name, value in good.items() if name != "name")
    assert all(
        np.isnan(nan[name])
        for name in ("mean", "sd", "q05", "q50", "q95", "mcse_mean", "ess", "r_hat", "mcse_sd")
    )
    assert (
        not np.isfinite(infinite["mean"]) and np.isnan(infinite["sd"]) and np.isnan(infinite["ess"])
    )
    assert infinite["q50"] < 1
    totals = statistics.totals()
    assert np.isnan(totals["acceptance_rate"]) and totals["divergences"] == 0


def test_frozen_chains_are_flagged_and_constants_are_not():
    x = np.stack([X[..., 0], np.ones(X.shape[:2])], axis=2)
    x[1, :, 0] = x[1, 0, 0]
    moving, constant = run({"x": x}).summary()
    assert (
        moving["frozen"]
        and not constant["frozen"]
        and np.isnan(constant["ess"])
        and constant["sd"] == 0
    )
    assert constant["q05"] == constant["q95"] == 1 and constant["rank_error"] == 0
    assert run({"x": x}, {"accepted": np.zeros(X.shape[:2], bool)}).summary()[1]["frozen"]


def test_wrong_chunks_are_named():
    statistics = run(SKEWED, {"accepted": X[..., 0] > 0})
    with pytest.raises(ValueError, match="values: got .*wanted the names and shapes of before"):
        statistics.update({"mu": X[..., 0]}, {"accepted": X[..., 0] > 0})
    with pytest.raises(ValueError, match="info: got"):
        statistics.update(SKEWED, {})
    with pytest.raises(ValueError, match="3 chains, wanted 4"):
        statistics.update(
            {name: array[:3] for name, array in SKEWED.items()}, {"accepted": X[:3, :, 0] > 0}
        )
    with pytest.raises(ValueError, match="'accepted' has shape"):
        StreamingStatistics.start().update(SKEWED, {"accepted": np.zeros((4, 3))})
    with pytest.raises(ValueError, match="no draws yet"):
        StreamingStatistics.start().mean()
    with pytest.raises(ValueError, match="folds: got"):
        StreamingStatistics.from_arrays(
            StreamingStatistics.start({"a": Fold(0, max)}).to_arrays(), {}
        )
    assert (
        StreamingStatistics.start().summary() == []
        and statistics.update(
            {n: a[:, :0] for n, a in SKEWED.items()}, {"accepted": np.zeros((4, 0))}
        )
        is statistics
    )
