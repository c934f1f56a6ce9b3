"""Figures of a run: parallel over sequential draws, how far apart they are, and the residual by iteration.

The distance of two runs at draw t of a chain is max_j |a_tj - b_tj| / s_j, with s_j the sequential run's standard
deviation of coordinate j. On logarithmic axes a distance or residual of exactly 0 is drawn on the floor of the axis.

Figures are ``matplotlib.figure.Figure`` objects made without pyplot, so that no global state, window or backend is
touched. matplotlib is imported inside the functions. Left out: what ArviZ draws well (densities, ranks, pairs).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partime_mcmc.diagnostics import named as by_name

_PARALLEL, _SEQUENTIAL, _LIMIT = "#4c9be8", "#1b2a41", "#c8553d"
_CHAINS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#a6761d")
_FLOOR = 1e-17


def trace_overlay(
    parallel: Any, sequential: Any, names: Sequence[str] | None = None, *, chain: int = 0, num_draws: int = 300
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
        ValueError: if a name, or all of them, is not in both runs, or there is no such chain.
    """
    pairs = _pairs(parallel, sequential, names, 4, chain)
    figure = _figure(10, 1.2 + 1.5 * len(pairs))
    axes = figure.subplots(len(pairs), 1, sharex=True, squeeze=False)[:, 0]
    _draw_traces(axes, pairs, chain, num_draws)
    return figure


def residual_by_iteration(draws: Any) -> Any:
    """The residual of every chain's path after each iteration of the solver, down to its tolerance.

    Args:
        draws: a run with ``report.residual_history``, or such a history itself: (C, max_iterations), where NaN stands
            for iterations that did not happen and infinity for a path that was not finite (neither is drawn).

    Returns:
        ``matplotlib.figure.Figure``; one that says so if no iteration was recorded.
    """
    figure = _figure(7, 4.2)
    _draw_residuals(figure.subplots(), draws)
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
    figure = _figure(11, 2.9 + 1.5 * len(pairs))
    grid = figure.add_gridspec(len(pairs) + 1, 2, height_ratios=[1] * len(pairs) + [2.1])
    axes = [figure.add_subplot(grid[0, :])]
    axes += [figure.add_subplot(grid[row, :], sharex=axes[0]) for row in range(1, len(pairs))]
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    _draw_traces(axes, pairs, 0, 300)
    _draw_distances(figure.add_subplot(grid[-1, 0]), parallel, sequential)
    _draw_residuals(figure.add_subplot(grid[-1, 1]), parallel)
    return figure


def save(figure: Any, path: str | os.PathLike) -> Path:
    """Write a figure to a file of the type its suffix names (PNG, PDF, SVG).

    Returns:
        The path written.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there is no such type.
    """
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _pairs(
    parallel: Any, sequential: Any, names: Sequence[str] | None, limit: int, chain: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Coordinates of both runs, (C, T) each, by label."""
    ours, theirs = (dict(by_name.coordinates(by_name.named_draws(draws))) for draws in (parallel, sequential))
    both = [label for label in ours if label in theirs]
    if names is None:
        wanted = _spread(both, limit)
    else:
        wanted = [label for name in names for label in both if label == name or label.startswith(f"{name}[")]
        missing = [name for name in names if not any(w == name or w.startswith(f"{name}[") for w in wanted)]
        if missing:
            raise ValueError(f"names: {missing} not in both runs, which share {both[:12]}")
    if not wanted:
        raise ValueError(f"the runs share no coordinate: {list(ours)[:5]} and {list(theirs)[:5]}")
    for label in wanted:
        if not 0 <= chain < min(len(ours[label]), len(theirs[label])):
            raise ValueError(f"chain: got {chain}, and there are {len(ours[label])} and {len(theirs[label])} chains")
    return {label: (ours[label], theirs[label]) for label in wanted}


def _spread(labels: list[str], limit: int) -> list[str]:
    """The first coordinates of different variables before second ones of any."""
    variables: dict[str, list[str]] = {}
    for label in labels:
        variables.setdefault(label.split("[")[0], []).append(label)
    first = [entries[0] for entries in variables.values()][:limit]
    rest = [label for label in labels if label not in first][: limit - len(first)]
    return [label for label in labels if label in first or label in rest]


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9)


def _draw_traces(
    axes: Sequence[Any], pairs: dict[str, tuple[np.ndarray, np.ndarray]], chain: int, num_draws: int
) -> None:
    for axis, (label, (a, b)) in zip(axes, pairs.items(), strict=True):
        a, b = a[chain, :num_draws], b[chain, :num_draws]
        axis.plot(np.arange(1, a.size + 1), a, color=_PARALLEL, linewidth=3.2, alpha=0.75, label="parallel")
        axis.plot(np.arange(1, b.size + 1), b, color=_SEQUENTIAL, linewidth=0.9, label="sequential")
        axis.set_ylabel(label, fontsize=10)
        axis.margins(x=0.005)
        _tidy(axis)
    axes[0].set_title(f"First draws of chain {chain}", fontsize=11, loc="left")
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2)
    axes[-1].set_xlabel("draw", fontsize=10)


def _draw_distances(axis: Any, parallel: Any, sequential: Any) -> None:
    axis.set_title("Distance of the two paths", fontsize=11, loc="left")
    ours, theirs = (dict(by_name.coordinates(by_name.named_draws(draws))) for draws in (parallel, sequential))
    shapes = {x.shape for x in (*ours.values(), *theirs.values())}
    if len(shapes) != 1 or list(ours) != list(theirs):
        _say(axis, "runs of different shapes:\nno steps to compare")
        return
    distance = np.zeros(shapes.pop())
    for label, b in theirs.items():
        sd = b.std()
        distance = np.maximum(distance, np.abs(ours[label] - b) / (sd if sd > 0 else 1.0))
    for chain, values in enumerate(distance):
        steps, values = _envelope(values)
        colour = _CHAINS[chain % len(_CHAINS)]
        axis.plot(steps, np.maximum(values, _FLOOR), color=colour, linewidth=0.9, alpha=0.85)
    axis.set_yscale("log")
    top = float(np.nanmax(distance, initial=0.0, where=np.isfinite(distance)))
    axis.axhline(1.0, color=_LIMIT, linewidth=1.2, linestyle="--")
    place = {"va": "bottom", "transform": axis.get_yaxis_transform()}
    axis.text(0.01, 1.0, "one posterior sd", color=_LIMIT, fontsize=9, **place)
    axis.set_ylim(_FLOOR / 3, max(30.0, 10 * top))
    axis.margins(x=0.01)
    axis.set_xlabel("draw", fontsize=10)
    axis.set_ylabel("largest difference [posterior sd]", fontsize=10)
    _tidy(axis)


def _envelope(values: np.ndarray, most: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Maxima over blocks, so that a long run stays readable and no peak is lost: (draw numbers, maxima)."""
    size = max(1, -(-values.size // most))
    starts = np.arange(0, values.size, size)
    return starts + 1, np.maximum.reduceat(values, starts) if values.size else values


def _draw_residuals(axis: Any, draws: Any) -> None:
    bare = isinstance(draws, (list, tuple)) or hasattr(draws, "__array__")
    history = draws if bare else getattr(getattr(draws, "report", None), "residual_history", None)
    history = np.atleast_2d(np.asarray([] if history is None else history, dtype=np.float64))
    axis.set_title("Residual by iteration", fontsize=11, loc="left")
    if not np.isfinite(history).any():
        _say(axis, "no iterations recorded")
        return
    iterations = np.arange(1, history.shape[1] + 1)
    for chain, values in enumerate(history):
        shown = np.where(np.isfinite(values), np.maximum(values, _FLOOR), np.nan)
        thin = chain / max(1, len(history) - 1)  # later chains are drawn thinner, so that equal curves stay visible
        style = {"marker": "o", "markersize": 6.5 - 4 * thin, "linewidth": 3.2 - 2.2 * thin}
        axis.plot(iterations, shown, color=_CHAINS[chain % len(_CHAINS)], label=f"chain {chain}", **style)
    axis.set_yscale("log")
    tolerance = getattr(getattr(draws, "certificate", None), "tolerance", None)
    if tolerance is not None:
        tolerance = float(np.max(np.asarray(tolerance)))
        axis.axhline(tolerance, color=_LIMIT, linewidth=1.2, linestyle="--")
        place = {"va": "bottom", "transform": axis.get_yaxis_transform()}
        axis.text(0.01, tolerance, "tolerance", color=_LIMIT, fontsize=9, **place)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlim(0.5, np.flatnonzero(np.isfinite(history).any(axis=0)).max() + 1.5)
    axis.set_xlabel("iteration", fontsize=10)
    axis.set_ylabel("largest residual", fontsize=10)
    if len(history) <= len(_CHAINS):
        axis.legend(frameon=False, fontsize=9, loc="upper right")
    _tidy(axis)


def _say(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", color="#666666", transform=axis.transAxes)
    axis.set_axis_off()
