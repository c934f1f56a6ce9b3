"""Nine reference posteriors with default settings, float64: draws agree with the reference, chains are certified.

Which kernels run on which posterior per commit is `PER_COMMIT`; the full matrix runs with `-m slow`. Without the
variable that names the folder these tests are skipped, and with it nothing is.
"""

import warnings

import jax
import numpy as np
import pytest
import reference

from partime_mcmc.diagnostics.report import Level

PER_COMMIT = {
    "CoalescingHMC": reference.NAMES[::2],
    "HMC": reference.NAMES[2:3],
    "NUTS": reference.NAMES[4:5],
    "MALA": reference.NAMES[8:9],
}
MATRIX = [
    pytest.param(
        kernel,
        name,
        marks=() if name in PER_COMMIT[kernel] else pytest.mark.slow,
        id=f"{kernel}-{name}",
    )
    for kernel in reference.KERNELS
    for name in reference.NAMES
]
# Posteriors on which the default solver may give up and report why: at most one of the nine, and at present none.
MAY_RUN_SEQUENTIALLY: frozenset[str] = frozenset()


@pytest.fixture(autouse=True)
def in_float64():
    if reference.folder() is None:
        pytest.skip(f"{reference.VARIABLE} is not set")
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("kernel, name", MATRIX)
def test_posterior(kernel, name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mcmc, verdict = reference.sampled(kernel, name)
    report = mcmc.or_raise().report
    with capsys.disabled():
        print(f"\n{kernel} on {name}, {report.run.dtype}: {verdict}; {report.run}")
    assert report.level == Level.CERTIFIED_PATH and report.run.dtype == "float64"
    assert not verdict.gates, verdict
    assert not verdict.failures, verdict
    assert verdict.detectable < 0.4
    assert report.parallel or name in MAY_RUN_SEQUENTIALLY, report.run.fallbacks


def test_at_most_one_posterior_may_run_sequentially():
    assert len(MAY_RUN_SEQUENTIALLY & set(reference.NAMES)) == len(MAY_RUN_SEQUENTIALLY) <= 1


def test_a_shifted_reference_is_found():
    """The power claimed is there: draws off by what a verdict calls detectable do fail."""
    stored = reference.load("sblri-blr").reference
    rng = np.random.default_rng(0)
    draws = {
        name: one["mean"] + one["sd"] * rng.normal(size=(4, 1000)) for name, one in stored.items()
    }
    fine = reference.judge(draws, stored)
    assert not fine.gates and not {key for key in fine.failures if key[1] == "mean"}
    shifted = {name: x + fine.detectable * stored[name]["sd"] for name, x in draws.items()}
    assert (
        len(
            {
                name
                for name, quantity in reference.judge(shifted, stored).failures
                if quantity == "mean"
            }
        )
        >= 5
    )
    stuck = {name: np.where(np.arange(4)[:, None] == 1, x[:, :1], x) for name, x in draws.items()}
    assert reference.judge(stuck, stored).gates
