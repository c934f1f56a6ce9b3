"""Verdicts on pairs of runs: what must pass, what must not, and how often chance alone upsets them."""

import json

import numpy as np
import pytest

from partime_mcmc.diagnostics.compare import compare
from partime_mcmc.diagnostics.describe import WIDTH, text_table
from partime_mcmc.diagnostics.report import Disagreement, Level
from partime_mcmc.diagnostics.values import plain
from tests import fakes

QUIET = fakes.chains(0)


def pair(seed=0, **options):
    """The same path twice, the second with rounding noise: (parallel, sequential)."""
    x = fakes.chains(seed, **options)
    noise = np.random.default_rng(99).normal(scale=1e-12, size=x.shape)
    return fakes.draws((x + noise).astype(x.dtype)), fakes.draws(x)


def excursion(x, chain, start, length):
    """``x`` with another, independent path from ``start`` on for ``length`` steps."""
    x = x.copy()
    x[chain, start : start + length] = fakes.chains(5)[0, :length]
    return x


def test_equal_bits_are_bitwise():
    report = compare(fakes.draws(QUIET), fakes.draws(QUIET.copy()))
    assert report.level == Level.BITWISE and report.ok and report.reasons == []
    assert report.path.first_difference == [-1] * 4 and report.path.fraction_equal == [1.0] * 4


def test_the_last_bit_alone_is_not_bitwise():
    x = QUIET.copy()
    x[2, 500, 1] = np.nextafter(x[2, 500, 1], np.inf)
    report = compare(fakes.draws(x), fakes.draws(QUIET))
    assert report.level == Level.CERTIFIED_PATH
    assert report.path.first_difference == [-1, -1, 500, -1]
    assert report.path.fraction_equal == [1.0, 1.0, 0.999, 1.0]


def test_signed_zeros_are_different_bits():
    x, y = QUIET.copy(), QUIET.copy()
    x[0, 3, 0], y[0, 3, 0] = 0.0, -0.0
    assert compare(fakes.draws(x), fakes.draws(y)).path.first_difference[0] == 3


def test_the_same_path_up_to_rounding_is_certified():
    report = compare(*pair())
    assert report.level == Level.CERTIFIED_PATH and report.ok and report.or_raise() is report
    assert report.path.num_flips == [0] * 4 and 0 < max(report.path.max_distance) < 1e-10
    assert report.path.mean_shift < 1e-6 and report.verdict.startswith("CERTIFIED PATH")
    assert (
        report.max_residual == 3e-10
        and report.worst_step == (1, 5)
        and report.residual_tolerance == 1e-8
    )
    assert (
        report.iterations == [12, 13, 14, 15]
        and report.status == ["CONVERGED"] * 4
        and report.dtype == "float64"
    )


@pytest.mark.parametrize("num_chains, num_samples", [(1, 2000), (4, 20), (1, 1), (2, 2)])
def test_short_runs_and_single_chains_can_be_certified(num_chains, num_samples):
    report = compare(*pair(num_chains=num_chains, num_samples=num_samples))
    assert report.level == Level.CERTIFIED_PATH, str(report)


def test_without_a_certificate_no_path_is_certified():
    parallel, sequential = pair()
    parallel.certificate.certified = np.array([True, False, True, True])
    report = compare(parallel, sequential)
    assert report.level == Level.STATISTICAL and not report.ok
    assert "certificate does not hold for chains [1]" in report.reasons[0]
    parallel.certificate = None
    assert compare(parallel, sequential).level == Level.STATISTICAL


def test_a_flipped_decision_in_float64_is_not_rounding():
    parallel, sequential = pair()
    x = excursion(sequential.positions["mu"][..., None].repeat(2, -1), 1, 300, 4)
    parallel.positions["mu"] = parallel.constrained["mu"] = x[..., 0]
    parallel.info["accepted"] = parallel.info["accepted"].copy()
    parallel.info["accepted"][1, 300] ^= True
    report = compare(parallel, sequential)
    assert report.level == Level.STATISTICAL and not report.ok
    assert report.path.num_flips == [0, 1, 0, 0] and report.path.num_excursions == [0, 1, 0, 0]
    assert report.path.longest_excursion == [0, 4, 0, 0] and report.path.max_knife_edges == 0
    assert report.path.first_difference[1] <= 300 and any(
        "rounding explains 0" in reason for reason in report.reasons
    )


def test_a_knife_edge_in_float32_that_merges_again_is_certified_and_counted():
    x = fakes.chains(0, num_samples=4000).astype(np.float32)
    y = excursion(x, 1, 300, 4).astype(np.float32)
    report = compare(fakes.draws(y), fakes.draws(x))
    assert report.level == Level.CERTIFIED_PATH and sum(report.path.num_excursions) == 1
    assert any("knife-edge" in note for note in report.notes) and "1 re-merged" in report.verdict


@pytest.mark.parametrize(
    "start, length, reason", [(3996, 4, "apart at the last step"), (1000, 900, "means differ")]
)
def test_a_path_that_leaves_for_long_is_not_certified(start, length, reason):
    x = fakes.chains(0, num_samples=4000).astype(np.float32)
    y = excursion(x, 1, start, length).astype(np.float32)
    report = compare(fakes.draws(y), fakes.draws(x))
    assert report.level == Level.STATISTICAL and any(reason in one for one in report.reasons), (
        report.reasons
    )


def test_a_knife_edge_is_no_excuse_where_the_distributions_differ():
    x = fakes.chains(0, num_samples=4000).astype(np.float32)
    parallel, sequential = fakes.draws(excursion(x, 1, 300, 4).astype(np.float32)), fakes.draws(x)
    parallel.info["acceptance_rate"] = parallel.info["acceptance_rate"] - 0.1
    report = compare(parallel, sequential)
    assert report.level == Level.FAIL and any(
        "acceptance rate: z" in reason for reason in report.reasons
    )


def test_wrong_records_on_an_equal_path_are_noted():
    parallel, sequential = pair()
    parallel.info["acceptance_rate"] = parallel.info["acceptance_rate"] - 0.1
    report = compare(parallel, sequential)
    assert report.level == Level.CERTIFIED_PATH
    assert any("although the paths agree: run, acceptance rate" in note for note in report.notes)


def test_more_knife_edges_than_rounding_explains():
    x = fakes.chains(0, num_samples=4000).astype(np.float32)
    y = x.copy()
    y[:, 100::100, 0] += np.float32(0.002)
    report = compare(fakes.draws(y), fakes.draws(x))
    assert (
        report.level == Level.STATISTICAL
        and report.path.num_knife_edges > report.path.max_knife_edges > 8
    )


def test_wrong_accept_records_are_not_certified():
    parallel, sequential = pair()
    parallel.info["accepted"] = ~parallel.info["accepted"]
    report = compare(parallel, sequential)
    assert report.level < Level.CERTIFIED_PATH and sum(report.path.num_flips) == 4000


def test_decisions_may_be_missing():
    parallel, sequential = pair()
    del sequential.info["accepted"]
    report = compare(parallel, sequential)
    assert report.level == Level.CERTIFIED_PATH and report.path.num_flips == [-1] * 4


def test_accept_everything_is_caught():
    parallel, sequential = fakes.draws(fakes.chains(1), key=1), fakes.draws(fakes.chains(2), key=2)
    parallel.info["accepted"] = np.ones((4, 1000), bool)
    report = compare(parallel, sequential)
    assert report.level == Level.FAIL and any("accepted: z" in reason for reason in report.reasons)


def test_independent_runs_agree_statistically_at_best():
    report = compare(fakes.draws(fakes.chains(1), key=1), fakes.draws(fakes.chains(2), key=2))
    assert report.level == Level.STATISTICAL and not report.ok and report.path is None
    assert any("do not share their random numbers" in reason for reason in report.reasons)
    assert report.or_raise(Level.STATISTICAL) is report
    with pytest.raises(Disagreement, match="random numbers") as raised:
        report.or_raise()
    assert raised.value.report is report


def test_runs_of_other_lengths_and_from_elsewhere_can_be_compared():
    reference = fakes.draws(fakes.chains(2, num_chains=6, num_samples=700))
    reference.positions = reference.certificate = reference.plan = reference.report = (
        reference.info
    ) = None
    report = compare(fakes.draws(fakes.chains(1)), reference)
    assert (
        report.level == Level.STATISTICAL
        and report.num_samples == (1000, 700)
        and report.num_chains == (4, 6)
    )


def test_different_keys_with_one_path_fail():
    report = compare(fakes.draws(QUIET, key=1), fakes.draws(QUIET.copy(), key=2))
    assert report.level == Level.FAIL and "keys were not used" in report.reasons[0]


def test_equal_positions_with_other_values_fail():
    parallel = fakes.draws(QUIET)
    parallel.constrained["theta"] = parallel.constrained["theta"] * 1.1
    report = compare(parallel, fakes.draws(QUIET.copy()))
    assert report.level == Level.FAIL and "model's space" in report.reasons[0]


@pytest.mark.parametrize("side", [0, 1])
def test_a_frozen_chain_fails(side):
    runs = pair()
    for values in (runs[side].positions, runs[side].constrained):
        values["mu"] = values["mu"].copy()
        values["mu"][3] = 0.5
    report = compare(*runs)
    assert report.level == Level.FAIL and report.num_frozen == 1
    assert report.reasons == [f"{runs_title(side)}: chains [3] never moved"]


def test_frozen_alike_is_no_agreement():
    x = QUIET.copy()
    x[1] = x[1, 0]
    assert compare(fakes.draws(x), fakes.draws(x.copy())).level == Level.FAIL


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_fails(side, value):
    runs = pair()
    runs[side].positions["theta"] = runs[side].positions["theta"].copy()
    runs[side].positions["theta"][2, 10, 0] = value
    report = compare(*runs)
    assert report.level == Level.FAIL
    assert report.reasons == [f"{runs_title(side)}: chains [2] hold values that are not finite"]
    with pytest.raises(Disagreement, match="not finite"):
        report.or_raise(Level.STATISTICAL)


def runs_title(side):
    return ("parallel", "sequential")[side]


@pytest.mark.parametrize("options", [{"num_chains": 3}, {"num_samples": 100}, {"memory": 0.97}])
def test_too_little_is_inconclusive_and_never_a_pass(options):
    report = compare(
        fakes.draws(fakes.chains(1, **options), key=1),
        fakes.draws(fakes.chains(2, **options), key=2),
    )
    assert report.level == Level.INCONCLUSIVE and not report.ok


def test_constants_of_the_model_are_left_out_unless_they_differ():
    parallel, sequential = fakes.draws(fakes.chains(1), key=1), fakes.draws(fakes.chains(2), key=2)
    parallel.constrained["one"] = sequential.constrained["one"] = np.ones((4, 1000))
    report = compare(parallel, sequential)
    assert report.level == Level.STATISTICAL and any(
        "one is constant" in note for note in report.notes
    )
    parallel.constrained["one"] = 2 * np.ones((4, 1000))
    assert compare(parallel, sequential).level == Level.FAIL


def test_nothing_that_varies_is_nothing_tested():
    parallel, sequential = fakes.draws(fakes.chains(1), key=1), fakes.draws(fakes.chains(2), key=2)
    parallel.constrained = sequential.constrained = {"one": np.ones((4, 1000))}
    assert compare(parallel, sequential).level == Level.INCONCLUSIVE


def scaled(x):
    return 1.35 * x


def skewed(x):
    return (x + 0.4 * (x**2 - 1)) / np.sqrt(1 + 2 * 0.4**2)


@pytest.mark.parametrize(
    "change, quantity", [(lambda x: x + 0.3, "mean"), (scaled, "log sd"), (skewed, "q05")]
)
def test_another_law_fails(change, quantity):
    report = compare(
        fakes.draws(change(fakes.chains(1)), key=1), fakes.draws(fakes.chains(2), key=2)
    )
    assert report.level == Level.FAIL
    assert any(f"mu, {quantity}: z" in reason for reason in report.reasons), report.reasons


def test_rank_and_distance_tests_see_a_shift_of_their_own():
    x, y = fakes.chains(1, num_samples=3000), fakes.chains(2, num_samples=3000)
    reasons = compare(fakes.draws(x + 0.5, key=1), fakes.draws(y, key=2)).reasons
    assert any(reason.startswith("mu: R-hat over both sides 1.0") for reason in reasons)
    assert any(reason.startswith("mu: Kolmogorov-Smirnov distance") for reason in reasons)


def test_dependence_that_no_coordinate_shows_fails_the_joint_test():
    x = fakes.chains(1)
    x[..., 1] = 0.9 * x[..., 0] + np.sqrt(1 - 0.81) * x[..., 1]
    runs = fakes.draws(x, key=1), fakes.draws(fakes.chains(2), key=2)
    for run in runs:
        run.constrained = {"mu": run.positions["mu"], "theta": run.positions["theta"]}
    report = compare(*runs)
    assert report.level == Level.FAIL and all(
        "joint test" in reason or "random numbers" in reason for reason in report.reasons
    )


@pytest.mark.slow
def test_chance_rarely_upsets_the_verdict_and_a_detectable_shift_always_does():
    """100 pairs of one law; the same pairs with one mean moved by the shift that is promised to be found."""
    passed, found = 0, 0
    for seed in range(100):
        x, y = fakes.chains(2 * seed, num_samples=300), fakes.chains(2 * seed + 1, num_samples=300)
        report = compare(fakes.draws(x, key=1), fakes.draws(y, key=2))
        assert report.level in (Level.STATISTICAL, Level.FAIL), str(report)
        passed += report.level == Level.STATISTICAL
        if seed % 4 == 0:
            moved = fakes.draws(x + report.min_detectable_shift, key=1)
            found += compare(moved, fakes.draws(y, key=2)).level == Level.FAIL
    assert (
        passed >= 98
    )  # three families at 1e-3 and R-hat: two failures in 100 happen once in 100 rotations of seeds
    assert found >= 24  # 25 at 99% each: fewer than 24 happens once in 40


def test_the_power_stated_is_the_one_of_the_definition():
    report = compare(fakes.draws(fakes.chains(1), key=1), fakes.draws(fakes.chains(2), key=2))
    ess = [
        min(row[f"ess_bulk_{side}"] for row in report.table) for side in ("parallel", "sequential")
    ]
    factor = report.min_detectable_shift / np.sqrt(1 / ess[0] + 1 / ess[1])
    assert 5 < factor < 7.5 and "sd would show" in report.verdict


def test_a_smaller_alpha_allows_more():
    runs = fakes.draws(fakes.chains(1), key=1), fakes.draws(fakes.chains(2), key=2)
    assert compare(*runs, family_alpha=1e-4).tests["max_z"] > compare(*runs).tests["max_z"] > 3.3


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1e-3, np.nan])
def test_alpha_is_checked(alpha):
    with pytest.raises(ValueError, match="family_alpha"):
        compare(*pair(), family_alpha=alpha)


def test_nothing_to_compare_is_refused():
    parallel, sequential = pair()
    sequential.constrained = {"other": sequential.constrained["mu"]}
    with pytest.raises(ValueError, match="share no coordinate"):
        compare(parallel, sequential)
    with pytest.raises(ValueError, match="parallel holds no draws"):
        compare(fakes.draws(QUIET[:, :0]), sequential)


@pytest.mark.parametrize("dim", [2, 40])
def test_text_fits_the_page_and_opens_with_the_verdict(dim):
    report = compare(
        fakes.draws(fakes.chains(1, dim=dim), key=1), fakes.draws(fakes.chains(2, dim=dim), key=2)
    )
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert (
        lines[0] == report.verdict
        and lines[0].startswith("STATISTICAL")
        and lines[0].endswith(").")
    )
    assert any(line.startswith("mu ") for line in lines) or dim > 30
    assert any("more with smaller" in line for line in lines) == (dim > 30)


def test_json_is_strict_and_whole():
    parallel, sequential = pair()
    parallel.certificate.min_margin = np.full(4, np.nan)
    found = json.loads(compare(parallel, sequential).to_json())
    assert (
        found["level"] == "CERTIFIED_PATH" and found["ok"] is True and found["min_margin"] == "nan"
    )
    assert found["path"]["num_flips"] == [0] * 4 and {row["name"] for row in found["table"]} == {
        "mu",
        "theta[0]",
    }
    assert set(found["table"][0]["z"]) == {"mean", "log sd", "q05", "q50", "q95", "square"}


def test_plain_values():
    value = plain(
        {"a": np.float32([1, np.inf]), 2: (np.int64(3), None, Level.FAIL), "b": np.bool_(True)}
    )
    assert value == {"a": [1.0, "inf"], "2": [3, None, "FAIL"], "b": True}


def test_long_names_are_cut_to_the_page():
    lines = text_table([{"name": "x" * 300, "value": 1.0}, {"name": "y", "value": float("nan")}])
    assert max(map(len, lines)) <= WIDTH and "…" in lines[1] and lines[2].endswith("-")
