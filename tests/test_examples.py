"""The examples run and show what their docstrings promise, with few steps.

Each `main(argv)` is called in this process and returns what it printed the figures from. Some scripts switch 64-bit
floats on, as scripts may; the fixture switches them back.
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from partime_mcmc.diagnostics.report import Level

pytestmark = pytest.mark.short_runs

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def settings_restored():
    """The global setting that a script may change, as it was."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


def run(name, *flags):
    """What `main` of an example returns, given flags."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(flag) for flag in flags])


def test_every_example_is_tested():
    tests = "".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py")
    )
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'"{path.stem}"' not in tests] == []


def test_eight_schools_is_one_path(capsys):
    parallel, stepwise, finding = run(
        "eight_schools", "--num-samples", 64, "--num-chains", 2, "--num-warmup", 120
    )
    printed = capsys.readouterr().out
    for draws in (parallel, stepwise):
        assert np.all(draws.certificate.certified)
        assert draws.report.dtype == "float64"
    assert parallel.report.fallbacks == ()  # solved in parallel, not by the sequential fallback
    assert stepwise.report.depth == 64 and stepwise.report.evaluations_per_sample == 1
    assert np.max(parallel.certificate.max_residual) < 1e-10
    assert finding.level >= Level.CERTIFIED_PATH
    assert np.array_equal(parallel.info["accepted"], stepwise.info["accepted"])
    assert "compare: CERTIFIED PATH" in printed or "compare: BITWISE" in printed
    assert "theta[7]" in printed and "sequential:" in printed


@pytest.mark.slow
def test_logistic_regression_needs_at_most_20_iterations(capsys):
    parallel, stepwise, finding = run(
        "logistic_regression", "--num-samples", 256, "--num-chains", 2
    )
    printed = capsys.readouterr().out
    assert parallel.report.fallbacks == ()
    assert 2 <= parallel.report.iterations.max() <= 20
    assert parallel.report.jvps_per_sample == pytest.approx(
        parallel.report.evaluations_per_sample
    )  # one probe
    for draws in (parallel, stepwise):
        assert np.all(draws.certificate.certified)
        assert draws.report.dtype == "float32"
        assert np.all(draws.certificate.num_rejected > 0)
    # In float32 a knife-edge decision may fall the other way between two compilations: then the level is STATISTICAL
    # or INCONCLUSIVE at this length, and never FAIL.
    assert finding.level > Level.FAIL
    assert f"iterations per chain: {parallel.report.iterations.tolist()}" in printed


@pytest.mark.slow
def test_rosenbrock_overflows_whole_and_is_solved_in_windows(capsys):
    rows = {
        row["method"]: row
        for row in run(
            "rosenbrock_hmc",
            "--num-samples",
            512,
            "--max-iterations",
            100,
            "--only",
            "DEER",
            "quasi-DEER clipped",
            "quasi-DEER, windows",
            "shooting",
        )
    }
    printed = capsys.readouterr().out
    assert len(rows) == 7 and all(name in printed for name in rows)
    whole = rows["DEER, whole chain"]
    assert (
        whole["status"] == "OUT_OF_ITERATIONS"
        and whole["residual"] > 1e3
        and not whole["certified"]
    )
    assert whole["exact"] >= 100  # as many exact steps as passes, even so
    assert rows["quasi-DEER clipped, whole"]["differs"] < 1e3  # clipped: no overflow
    for name in (
        "DEER, windows of 32",
        "quasi-DEER, windows of 32",
        "DEER, sliding window of 32",
    ):
        assert rows[name]["status"] == "CONVERGED", name
        assert rows[name]["certified"] and rows[name]["differs"] < 1e-6, name
        assert rows[name]["depth"] < 512, name
    assert (
        rows["shooting, 4 segments"]["certified"]
        and rows["shooting, 4 segments"]["evaluations"] < 5
    )
    assert rows["sequential"]["evaluations"] == 1 and rows["sequential"]["rejected"] > 0


def test_a_gibbs_sampler_of_ones_own(capsys):
    rows, means, exact = run("own_kernel", "--num-samples", 1000, "--num-chains", 4)
    printed = capsys.readouterr().out
    assert "by quadrature" in printed
    for row in rows:
        assert set(row["status"]) == {"CONVERGED"}, row["method"]
        assert row["residual"] < 1e-10 and row["differs"] < 1e-8, row["method"]
    newton = {row["method"]: row for row in rows}["DEER"]
    assert max(newton["iterations"]) <= 30  # of 1,000 sweeps
    # Some 400 effective draws of mu (sd 5) and of tau (sd 5.5): six standard errors.
    assert abs(means[0] - exact[0]) < 1.5 and abs(means[1] - exact[1]) < 1.7


@pytest.mark.slow
def test_a_linearizer_of_ones_own():
    rows = {
        row["method"]: row
        for row in run(
            "own_linearizer",
            "--num-samples",
            256,
            "--max-iterations",
            60,
            "--only",
            "ours",
            "exact",
            "identity",
        )
    }
    ours, diagonal, picard = (
        rows["ours: 1 - step size, or 1"],
        rows["exact diagonal"],
        rows["identity (Picard)"],
    )
    for name in ("ours: 1 - step size, or 1", "exact diagonal"):
        assert rows[name]["status"] == "CONVERGED" and rows[name]["certified"], name
        assert rows[name]["differs"] < 1e-10, name
    assert ours["jvps"] == 0 and ours["passes"] <= 1.5 * diagonal["passes"]
    assert picard["status"] != "CONVERGED" and not picard["certified"]
    assert rows["sequential"]["rejected"] > 0


@pytest.mark.slow
def test_some_chains_forget_and_some_do_not(tmp_path, capsys):
    found = run(
        "how_forgetful",
        "--kernels",
        "HMC, path π/2",
        "random walk",
        "--num-warmup",
        120,
        "--num-pairs",
        6,
        "--out",
        tmp_path / "picture.png",
    )
    quarter, walk = found["HMC, path π/2"], found["random walk"]
    assert np.all(quarter[0].met) and np.max(quarter[0].steps) < 200 and quarter[1].parallel
    assert not np.any(walk[0].met) and not walk[1].parallel
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "segments" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_law_with_a_shorter_memory(tmp_path, capsys):
    found = run(
        "coupling",
        "--models",
        "eight_schools",
        "--kernels",
        "coalescing HMC",
        "random walk, plain",
        "--num-warmup",
        120,
        "--num-pairs",
        8,
        "--num-steps",
        200,
        "--out",
        tmp_path / "picture.png",
    )
    met = found["eight_schools", "coalescing HMC"]
    assert np.all(met.met) and np.median(met.steps) <= 20
    assert not np.any(found["eight_schools", "random walk, plain"].met)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "met exactly" in capsys.readouterr().out


def test_one_line_of_a_numpyro_script_changes(capsys):
    found, mcmc = run("numpyro_drop_in", "--num-samples", 400)
    printed = capsys.readouterr().out
    assert printed.count("Number of divergences") == 2 and "CERTIFIED_PATH" in printed
    (mu, log_tau, _), (our_mu, our_log_tau, _) = found["NumPyro"], found["parallel in time"]
    # 1,600 draws a side; standard deviations are 3.3 and 1.2, ESS at least 400.
    assert abs(mu - our_mu) < 5 * 3.3 * np.sqrt(2 / 400) and abs(
        log_tau - our_log_tau
    ) < 5 * 1.2 * np.sqrt(2 / 400)
    assert not mcmc.report.run.fallbacks


@pytest.mark.slow
def test_a_model_that_lacks_the_trend_fails_its_check():
    found = run("posterior_predictive", "--num-samples", 250)
    assert found["constant"][0] < 0.01 < 0.05 < found["with_trend"][0]
    assert found["with_trend"][1] > found["constant"][1]


@pytest.mark.slow
def test_a_hierarchical_regression():
    pytest.importorskip("sklearn")
    mcmc, rows = run("hierarchical_regression", "--num-samples", 400)
    assert mcmc.report.level == Level.CERTIFIED_PATH
    assert all(row["r_hat"] < 1.03 and row["ess_bulk"] > 100 for row in rows.values())
    assert 0.4 < rows["slope"]["mean"] < 0.75
