"""Figures show what they say they show, on any run, without touching matplotlib's global state."""

import subprocess
import sys
import types

import numpy as np
import pytest

from partime_mcmc.diagnostics import plots
from tests import fakes

X = fakes.chains(0, dim=5, num_samples=800)


@pytest.fixture
def runs():
    noise = np.random.default_rng(1).normal(scale=1e-13, size=X.shape)
    return fakes.draws(X + noise), fakes.draws(X)


def panel(figure, title):
    return next(axis for axis in figure.axes if title in axis.get_title(loc="left"))


def data(line):
    return np.asarray(line.get_ydata())


def test_traces_hold_both_runs(runs):
    figure = plots.trace_overlay(*runs, names=["theta[2]"], chain=3, num_draws=50)
    (axis,) = figure.axes
    np.testing.assert_array_equal(data(axis.lines[0]), runs[0].constrained["theta"][3, :50, 2])
    np.testing.assert_array_equal(data(axis.lines[1]), runs[1].constrained["theta"][3, :50, 2])
    assert axis.get_ylabel() == "theta[2]" and axis.get_legend() is not None


def test_names_may_be_variables_and_default_to_a_few(runs):
    assert [axis.get_ylabel() for axis in plots.trace_overlay(*runs, names=["theta"]).axes] == [
        f"theta[{i}]" for i in range(4)
    ]
    assert len(plots.trace_overlay(*runs).axes) == 4
    assert plots.demo_figure(*runs).axes[0].get_ylabel() == "mu"


def test_wrong_names_and_chains_are_named(runs):
    with pytest.raises(ValueError, match="tau"):
        plots.trace_overlay(*runs, names=["mu", "tau"])
    with pytest.raises(ValueError, match="chain: got 9"):
        plots.trace_overlay(*runs, chain=9)
    other = types.SimpleNamespace(constrained={"other": X[..., 0]})
    with pytest.raises(ValueError, match="share no coordinate"):
        plots.demo_figure(runs[0], other)


def test_residuals_leave_out_padding_and_show_the_tolerance(runs):
    axis = plots.residual_by_iteration(runs[0]).axes[0]
    curves = [data(line) for line in axis.lines]
    assert len(curves) == 5 and axis.get_yscale() == "log"
    assert (
        np.isnan(curves[0][0])
        and np.isnan(curves[0][12:]).all()
        and np.isfinite(curves[0][1:12]).all()
    )
    assert curves[-1][0] == 1e-8
    assert axis.get_xlim()[1] < 17  # chain 3 took 15 of the 20 iterations there was room for


def test_a_bare_history_and_an_exact_zero_are_drawn():
    axis = plots.residual_by_iteration(np.array([[1.0, 0.0, np.nan]])).axes[0]
    assert 0 < data(axis.lines[0])[1] < 1e-16


@pytest.mark.parametrize("history", [None, np.full((4, 3), np.nan), np.zeros((4, 0))])
def test_no_iterations_is_said(runs, history):
    runs[0].report.residual_history = history
    axis = plots.residual_by_iteration(runs[0]).axes[0]
    assert [text.get_text() for text in axis.texts] == ["no iterations recorded"]


def test_distances_show_every_peak(runs):
    runs[0].constrained["mu"] = runs[0].constrained["mu"].copy()
    runs[0].constrained["mu"][2, 613] += 0.5
    axis = panel(plots.demo_figure(*runs), "Distance")
    peaks = [data(line).max() for line in axis.lines[:4]]
    assert abs(peaks[2] - 0.5 / runs[1].constrained["mu"].std()) < 1e-6 and max(peaks[:2]) < 1e-10


def test_runs_of_other_lengths_are_said_to_be_so(runs):
    axis = panel(plots.demo_figure(runs[0], fakes.draws(X[:, :100])), "Distance")
    assert "no steps to compare" in axis.texts[0].get_text()


def test_equal_runs_and_missing_reports_can_be_drawn(runs, tmp_path):
    same = types.SimpleNamespace(positions=runs[1].positions)
    plots.save(plots.demo_figure(same, same), tmp_path / "figure.png")


def test_a_figure_is_a_real_png(runs, tmp_path):
    path = plots.save(plots.demo_figure(*runs), tmp_path / "figure.png")
    blob = path.read_bytes()
    assert blob.startswith(b"\x89PNG") and len(blob) > 50_000


def test_importing_is_light_and_drawing_leaves_pyplot_alone():
    script = (
        "import sys, partime_mcmc.diagnostics.plots as p, numpy as np\n"
        "assert 'matplotlib' not in sys.modules\n"
        "p.residual_by_iteration(np.ones((1, 3)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
