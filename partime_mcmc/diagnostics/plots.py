"""Figures of a run: parallel over sequential draws, how far apart they are, and the residual by iteration.

The distance of two runs at draw t of a chain is max_j |a_tj - b_tj| / s_j, with s_j the sequential run's standard
deviation of coordinate j. On logarithmic axes a distance or residual of exactly 0 is drawn on the floor of the axis.

Figures are ``matplotlib.figure.Figure`` objects made without pyplot (:mod:`partime_mcmc.diagnostics.canvas`). Left
out: what ArviZ draws well (densities, ranks, pairs), and pictures of a single run (``run_plots``).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from partime_mcmc.diagnostics import canvas
from partime_mcmc.diagnostics import named as by_name
from partime_mcmc.diagnostics.canvas import NoPlots, save

__all__ = [
    "NoPlots",
    "demo_figure",
    "paths_overlay",
    "residual_by_iteration",
    "save",
    "trace_overlay",
]


def trace_overlay(
    parallel: Any,
    sequential: Any,
    names: Sequence[str] | None = None,
    *,
    chain: int = 0,
    num_draws: int = 300,
) -> Any:
    """The first draws of one chain, the sequential run as a thin line upon the parallel one.

    Args:
        parallel: draws with ``constrained`` or ``positions`` (C, T, ...).
        sequential: likewise.
        names: variables (``"theta"``, shown coordinate by coordinate) or coordinates (``"theta[3]"``); the first four
            coordinates if None.
        chain: which chain to show.
        num_draws: how many draws to show.

    Returns:
        ``matplotlib.figure.Figure``, a panel per coordinate.

    Raises:
        NoPlots: if matplotlib is missing, here and in all that draws.
        ValueError: if a name, or all of them, is not in both runs, or there is no such chain.
    """
    pairs = _pairs(parallel, sequential, names, 4, chain)
    figure = canvas.figure(10, 1.2 + 1.5 * len(pairs))
    axes = figure.subplots(len(pairs), 1, sharex=True, squeeze=False)[:, 0]
    _draw_traces(axes, pairs, chain, num_draws)
    return figure


def paths_overlay(parallel: Any, sequential: Any) -> Any:
    """Traces of three coordinates, the sequential run upon the parallel one, and how far apart the paths are.

    Args:
        parallel: draws with ``constrained`` or ``positions`` (C, T, ...).
        sequential: likewise.

    Returns:
        ``matplotlib.figure.Figure``.

    Raises:
        ValueError: if the runs share no coordinate.
    """
    pairs = _pairs(parallel, sequential, None, 3, 0)
    figure = canvas.figure(11, 2.4 + 1.5 * len(pairs))
    *axes, last = figure.subplots(len(pairs) + 1, 1, height_ratios=[1] * len(pairs) + [1.6])
    _draw_traces(axes, pairs, 0, 300)
    _draw_distances(last, parallel, sequential)
    return figure


def residual_by_iteration(draws: Any) -> Any:
    """The residual of every chain's path after each iteration of the solver, down to its tolerance.

    Args:
        draws: a run with ``report.residual_history``, or such a history itself: (C, max_iterations), where NaN stands
            for iterations that did not happen and infinity for a path that was not finite (neither is drawn).

    Returns:
        ``matplotlib.figure.Figure``; one that says so if no iteration was recorded.
    """
    figure = canvas.figure(7, 4.2)
    draw_residuals(figure.subplots(), draws)
    return figure


def demo_figure(parallel: Any, sequential: Any) -> Any:
    """All there is to see at a glance: traces of three coordinates, distances of the paths, residuals by iteration.

    Args:
        parallel: draws with ``constrained`` or ``positions`` (C, T, ...) and ``report.residual_history``.
        sequential: draws with the same dice, else the panel of distances says that there are none.

    Returns:
        ``matplotlib.figure.Figure``.

    Raises:
        ValueError: if the runs share no coordinate.
    """
    pairs = _pairs(parallel, sequential, None, 3, 0)
    figure = canvas.figure(11, 2.9 + 1.5 * len(pairs))
    grid = figure.add_gridspec(len(pairs) + 1, 2, height_ratios=[1] * len(pairs) + [2.1])
    axes = [figure.add_subplot(grid[0, :])]
    axes += [figure.add_subplot(grid[row, :], sharex=axes[0]) for row in range(1, len(pairs))]
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    _draw_traces(axes, pairs, 0, 300)
    _draw_distances(figure.add_subplot(grid[-1, 0]), parallel, sequential)
    draw_residuals(figure.add_subplot(grid[-1, 1]), parallel)
    return figure


def _pairs(
    parallel: Any, sequential: Any, names: Sequence[str] | None, limit: int, chain: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Coordinates of both runs, (C, T) each, by label."""
    ours, theirs = (
        dict(by_name.coordinates(by_name.named_draws(draws))) for draws in (parallel, sequential)
    )
    both = [label for label in ours if label in theirs]
    if names is None:
        wanted = spread(both, limit)
    else:
        wanted = [
            label
            for name in names
            for label in both
            if label == name or label.startswith(f"{name}[")
        ]
        missing = [
            name for name in names if not any(w == name or w.startswith(f"{name}[") for w in wanted)
        ]
        if missing:
            raise ValueError(f"names: {missing} not in both runs, which share {both[:12]}")
    if not wanted:
        raise ValueError(f"the runs share no coordinate: {list(ours)[:5]} and {list(theirs)[:5]}")
    for label in wanted:
        if not 0 <= chain < min(len(ours[label]), len(theirs[label])):
            raise ValueError(
                f"chain: got {chain}, and there are {len(ours[label])} and {len(theirs[label])} chains"
            )
    return {label: (ours[label], theirs[label]) for label in wanted}


def spread(labels: list[str], limit: int) -> list[str]:
    """The first coordinates of different variables before second ones of any."""
    variables: dict[str, list[str]] = {}
    for label in labels:
        variables.setdefault(label.split("[")[0], []).append(label)
    first = [entries[0] for entries in variables.values()][:limit]
    rest = [label for label in labels if label not in first][: limit - len(first)]
    return [label for label in labels if label in first or label in rest]


def _draw_traces(
    axes: Sequence[Any], pairs: dict[str, tuple[np.ndarray, np.ndarray]], chain: int, num_draws: int
) -> None:
    for axis, (label, (a, b)) in zip(axes, pairs.items(), strict=True):
        a, b = a[chain, :num_draws], b[chain, :num_draws]
        axis.plot(
            np.arange(1, a.size + 1),
            a,
            color=canvas.PARALLEL,
            linewidth=3.2,
            alpha=0.75,
            label="parallel",
        )
        axis.plot(np.arange(1, b.size + 1), b, color=canvas.INK, linewidth=0.9, label="sequential")
        axis.set_ylabel(canvas.label(label), fontsize=10)
        axis.margins(x=0.005)
        canvas.tidy(axis)
    axes[0].set_title(f"First draws of chain {chain}", fontsize=11, loc="left")
    axes[0].legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        fontsize=9,
        borderaxespad=0.2,
    )
    axes[-1].set_xlabel("draw", fontsize=10)


def _draw_distances(axis: Any, parallel: Any, sequential: Any) -> None:
    canvas.title(axis, "Distance of the two paths")
    ours, theirs = (
        dict(by_name.coordinates(by_name.named_draws(draws))) for draws in (parallel, sequential)
    )
    shapes = {x.shape for x in (*ours.values(), *theirs.values())}
    if len(shapes) != 1 or list(ours) != list(theirs):
        canvas.say(axis, "runs of different shapes:\nno steps to compare")
        return
    distance = np.zeros(shapes.pop())
    for label, b in theirs.items():
        sd = b.std()
        distance = np.maximum(distance, np.abs(ours[label] - b) / (sd if sd > 0 else 1.0))
    for chain, values in enumerate(distance):
        steps, values = canvas.envelope(values)
        colour = canvas.CHAINS[chain % len(canvas.CHAINS)]
        axis.plot(steps, np.maximum(values, canvas.FLOOR), color=colour, linewidth=0.9, alpha=0.85)
    axis.set_yscale("log")
    top = float(np.nanmax(distance, initial=0.0, where=np.isfinite(distance)))
    canvas.level(axis, 1.0, "one posterior sd")
    axis.set_ylim(canvas.FLOOR / 3, max(30.0, 10 * top))
    axis.margins(x=0.01)
    axis.set_xlabel("draw", fontsize=10)
    axis.set_ylabel("difference [sd]", fontsize=10)
    canvas.tidy(axis)


def draw_residuals(axis: Any, draws: Any) -> None:
    """The panel of :func:`residual_by_iteration`."""
    bare = isinstance(draws, (list, tuple)) or hasattr(draws, "__array__")
    history = draws if bare else getattr(getattr(draws, "report", None), "residual_history", None)
    history = np.atleast_2d(np.asarray([] if history is None else history, dtype=np.float64))
    canvas.title(axis, "Residual by iteration")
    if not np.isfinite(history).any():
        canvas.say(axis, "no iterations recorded")
        return
    iterations = np.arange(1, history.shape[1] + 1)
    for chain, values in enumerate(history):
        shown = np.where(np.isfinite(values), np.maximum(values, canvas.FLOOR), np.nan)
        thin = chain / max(
            1, len(history) - 1
        )  # later chains are drawn thinner, so that equal curves stay visible
        style = {"marker": "o", "markersize": 6.5 - 4 * thin, "linewidth": 3.2 - 2.2 * thin}
        axis.plot(
            iterations,
            shown,
            color=canvas.CHAINS[chain % len(canvas.CHAINS)],
            label=f"chain {chain}",
            **style,
        )
    axis.set_yscale("log")
    tolerance = getattr(getattr(draws, "certificate", None), "tolerance", None)
    if tolerance is not None:
        canvas.level(axis, float(np.max(np.asarray(tolerance))), "tolerance")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.set_xlim(0.5, np.flatnonzero(np.isfinite(history).any(axis=0)).max() + 1.5)
    axis.set_xlabel("iteration", fontsize=10)
    axis.set_ylabel("largest residual", fontsize=10)
    if len(history) <= len(canvas.CHAINS):
        axis.legend(frameon=False, fontsize=9, loc="best")
    canvas.tidy(axis)
