"""Figures show what their titles promise, on any run, without touching matplotlib's global state."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import Dynamics, iterates, jacobi
from partime_mcmc.diagnostics import arviz, plots
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
    *traces, distances = plots.path_overlay(*runs).axes
    assert [axis.get_ylabel() for axis in traces] == ["mu", "theta[0]", "theta[1]"]
    for axis, values in zip(traces, [X[0, :, 0], *np.exp(X[0, :, 1:3].T)], strict=True):
        np.testing.assert_allclose(data(axis.lines[0]), values[:300], rtol=1e-9)
        np.testing.assert_array_equal(data(axis.lines[1]), values[:300])
    assert distances.get_ylabel() == "difference [sd]"


def test_runs_without_a_common_coordinate_are_refused(runs):
    other = types.SimpleNamespace(constrained={"other": X[..., 0]})
    with pytest.raises(ValueError, match="share no coordinate"):
        plots.path_overlay(runs[0], other)


def test_distances_show_every_peak(runs):
    runs[0].constrained["mu"] = runs[0].constrained["mu"].copy()
    runs[0].constrained["mu"][2, 613] += 0.5
    axis = panel(plots.path_overlay(*runs), "Distance")
    peaks = [data(line).max() for line in axis.lines[:4]]
    assert abs(peaks[2] - 0.5 / runs[1].constrained["mu"].std()) < 1e-6 and max(peaks[:2]) < 1e-10


def test_runs_of_other_lengths_have_no_distances(runs):
    axis = panel(plots.path_overlay(runs[0], fakes.draws(X[:, :100])), "Distance")
    assert "no steps to compare" in axis.texts[0].get_text() and not axis.lines


def test_equal_runs_and_missing_reports_can_be_drawn(runs, tmp_path):
    same = types.SimpleNamespace(positions=runs[1].positions)
    plots.path_overlay(same, same).savefig(tmp_path / "figure.png")
    blob = (tmp_path / "figure.png").read_bytes()
    assert blob.startswith(b"\x89PNG") and len(blob) > 30_000


def test_the_residual_map_shows_peaks_and_what_is_not_finite():
    residuals = np.full((3, 900), 1e-6)
    residuals[1, 601], residuals[0, 5], residuals[2, 7] = 1e-2, np.nan, 0.0
    shown = plots.residual_map(residuals).axes[0].images[0].get_array()
    assert shown.shape == (3, 300) and shown[1].max() == pytest.approx(-2)
    assert np.argwhere(np.ma.getmaskarray(shown)).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="num_passes, num_steps"):
        plots.residual_map(np.zeros(3))


def test_iterates_are_shown_becoming_the_path():
    network = Dynamics(lambda w, x, u: jnp.tanh(w @ x + u), 0.6 * jnp.eye(2)[::-1])
    drives = jax.random.normal(jax.random.key(0), (30, 2))
    found = iterates(network, jnp.zeros(2), drives, solver=jacobi(), num_iterations=40)
    last = int(found.iterations)
    drawn = plots.iterates_converging(found, 1)
    paths = drawn.axes[0].lines
    np.testing.assert_array_equal(data(paths[0]), found.states[0, :, 1])
    np.testing.assert_array_equal(data(paths[-1]), found.states[last, :, 1])
    assert drawn.axes[1].images[0].get_array().shape == (last + 1, 30)
    residual, _, exact = drawn.axes[2].lines
    assert data(residual)[0] == pytest.approx(found.residual[0]) and data(exact)[-1] == 1
    with pytest.raises(ValueError, match="2 numbers"):
        plots.iterates_converging(found, 2)


def test_coalescence_counts_pairs_that_have_not_met_for_good():
    distances = np.array([[1.0, 1e-9, 0.5, 1e-9, 1e-9], [1.0, 1.0, np.nan, 0.0, 0.0]])
    share = data(plots.coalescence(distances).axes[1].lines[0])
    np.testing.assert_array_equal(share, [1, 1, 1, 0, 0])
    with pytest.raises(ValueError, match="num_pairs, num_steps"):
        plots.coalescence(np.zeros(3))


def test_arvizs_own_figures_are_taken_from_pyplot(runs):
    from matplotlib import pyplot

    series = {"mu": runs[0].constrained["mu"], "$x_1$/y": runs[0].constrained["theta"][..., 0]}
    for draw in (arviz.trace_plot, arviz.rank_plot):
        figure = draw(series)
        assert len(figure.axes) >= 2 and figure.canvas is not None
        assert not pyplot.get_fignums()


def test_importing_is_light_and_drawing_leaves_pyplot_alone():
    script = (
        "import sys, partime_mcmc.diagnostics.plots as p, numpy as np\n"
        "assert 'matplotlib' not in sys.modules\n"
        "p.residual_map(np.ones((1, 3)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
