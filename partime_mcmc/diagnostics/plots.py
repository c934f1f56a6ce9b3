"""Figures that ArviZ does not have: two runs step by step, how coupled chains meet, how a solve converges.

    distance of two runs    max_j |a_tj - b_tj| / s_j at draw t, with s_j the sequential run's standard deviation
    distance of a pair      max_j |x_tj - y_tj| / s_j after t steps with the same random numbers

On logarithmic axes an exact 0 is drawn on the floor of the axis. Along time the largest value of every block of steps
is drawn, so that no peak is lost. Figures are `matplotlib.figure.Figure` objects made without pyplot, so that no global
state, window or backend is touched; this is the one module that imports matplotlib.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partime_mcmc.diagnostics.values import coordinates, named_draws

_INK, _GRID, _BLUE, _RED = "#1b2a41", "#e6e6e6", "#4c9be8", "#c8553d"
_CHAINS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#a6761d")
_FLOOR, _SHOWN_DRAWS = 1e-17, 300


class NoPlots(ImportError):
    """There is nothing to draw with."""


def figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches.

    Raises:
        NoPlots: If matplotlib is missing, which the extra `plots` brings.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoPlots('figures need matplotlib: pip install "partime_mcmc[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def adopt_figure(drawn: Any) -> Any:
    """A figure that somebody else made with pyplot, which forgets it."""
    from matplotlib import pyplot

    pyplot.close(drawn)
    drawn.set_layout_engine("constrained")
    return drawn


def first_coordinates(labels: Sequence[str], limit: int) -> list[str]:
    """At most `limit` labels: the first coordinate of every variable before the second one of any."""
    seen: Counter[str] = Counter()

    def number(label: str) -> int:
        variable = label.split("[")[0]
        seen[variable] += 1
        return seen[variable]

    return sorted(labels, key=number)[:limit]


def drawable_coordinates(named: Mapping[str, np.ndarray], limit: int) -> dict[str, np.ndarray]:
    """At most `limit` coordinates that are finite and vary, `(C, T)` by label, in the order of `first_coordinates`."""
    every = {
        label: x
        for label, x in coordinates(named)
        if x.shape[1] > 3 and np.isfinite(x).all() and np.ptp(x) > 0
    }
    return {label: every[label] for label in first_coordinates(list(every), limit)}


def path_overlay(parallel: Any, sequential: Any) -> Any:
    """The first draws of one chain, the sequential run upon the parallel one, and the distance of all chains.

    Args:
        parallel: Draws with `constrained` or `positions`, `(C, T, ...)`.
        sequential: Likewise; without the same shapes no distances are drawn.

    Returns:
        `matplotlib.figure.Figure`, a panel for each of three coordinates and one with the distances.

    Raises:
        NoPlots: If matplotlib is missing, here and in all that draws.
        ValueError: If the runs share no coordinate.
    """
    ours, theirs = (dict(coordinates(named_draws(draws))) for draws in (parallel, sequential))
    labels = first_coordinates([label for label in ours if label in theirs], 3)
    if not labels:
        raise ValueError(f"the runs share no coordinate: {list(ours)[:5]} and {list(theirs)[:5]}")
    drawn = figure(11, 2.4 + 1.5 * len(labels))
    *axes, last = drawn.subplots(len(labels) + 1, 1, height_ratios=[1] * len(labels) + [1.6])
    for axis, label in zip(axes, labels, strict=True):
        for runs, width, colour in ((ours, 3.2, _BLUE), (theirs, 0.9, _INK)):
            values = runs[label][0, :_SHOWN_DRAWS]
            axis.plot(np.arange(1, values.size + 1), values, color=colour, linewidth=width)
        _finish(axis, "", label.replace("$", r"\$"))  # a user's name is no formula
    _finish(axes[0], "First draws of one chain: parallel (thick), sequential (thin)")
    _draw_distances(last, ours, theirs)
    return drawn


def residual_map(residuals: np.ndarray) -> Any:
    """How a solve converged: the residual of every time step after every pass, as colours.

    Args:
        residuals: Shape `(P, T)`, of passes in order; NaN, drawn in red, where the path was not finite.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: If `residuals` is not of that shape, or empty.
    """
    residuals = _matrix(residuals, "residuals", "num_passes, num_steps")
    drawn = figure(11, 1.8 + 0.06 * min(max(len(residuals), 10), 40))
    axis = drawn.subplots()
    _draw_residuals(drawn, axis, residuals, 1)
    _finish(axis, "Residual by pass and step", "pass", "step")
    axis.grid(False)
    return drawn


def iterates_converging(found: Any, coordinate: int = 0) -> Any:
    """How the iterates of a solve become the path: some of them, their residuals, their merit and their front.

    Args:
        found: From `partime_mcmc.iterates`.
        coordinate: Which number of the flat state is drawn.

    Returns:
        `matplotlib.figure.Figure` of three panels: the coordinate along time in at most six iterates, the last one in ink;
        log10 of the residual by iteration and step; largest residual, merit ½ Σ ‖r_t‖² and share of exact steps by iteration.

    Raises:
        NoPlots: If matplotlib is missing.
        ValueError: If the state has no such coordinate.
    """
    import jax

    last = int(found.iterations)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(found.states)]
    flat = np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)
    if not 0 <= coordinate < flat.shape[2]:
        raise ValueError(
            f"coordinate: got {coordinate}, wanted one of the {flat.shape[2]} numbers of a state, counted from 0"
        )
    residuals = np.asarray(found.residuals, np.float64)[: last + 1]
    drawn = figure(11, 6.5)
    paths, image, numbers = drawn.subplots(3, 1, height_ratios=[1.3, 1, 1.2])
    steps = np.arange(1, flat.shape[1] + 1)
    for k in sorted({round(share * last) for share in (0, 0.1, 0.25, 0.5, 0.75)} - {last}):
        tint = 0.25 + 0.65 * k / last
        paths.plot(
            steps,
            flat[k, :, coordinate],
            color=_BLUE,
            alpha=tint,
            linewidth=0.9,
            label=f"iterate {k}",
        )
    paths.plot(steps, flat[last, :, coordinate], color=_INK, linewidth=1.3, label=f"iterate {last}")
    # An iterate on its way may be anywhere; what is looked for is where it comes from and goes to.
    middle, width = np.mean(flat[last, :, coordinate]), np.ptp(flat[last, :, coordinate]) or 1.0
    paths.set_ylim(middle - 1.5 * width, middle + 1.5 * width)
    paths.legend(fontsize=8, ncols=6, frameon=False)
    _draw_residuals(drawn, image, residuals, 0)
    index = np.arange(last + 1)
    for values, label, colour in (
        (residuals.max(axis=1), "largest residual", _BLUE),
        (np.asarray(found.merit, np.float64)[: last + 1], "merit", _RED),
        (np.asarray(found.num_exact)[: last + 1] / flat.shape[1], "share of exact steps", _INK),
    ):
        numbers.plot(index, np.maximum(values, _FLOOR), color=colour, marker=".", label=label)
    numbers.set_yscale("log")
    numbers.legend(fontsize=8, frameon=False)
    _finish(paths, f"Coordinate {coordinate} of the path", "", "step")
    _finish(image, "Residual", "iteration", "step")
    _finish(numbers, "Iterations", "", "iteration")
    image.grid(False)
    return drawn


def coalescence(distances: np.ndarray, tolerance: float = 1e-8) -> Any:
    """How fast pairs of chains with the same random numbers become one.

    Args:
        distances: Of each pair after each step, in standard deviations, `(K, T)`.
        tolerance: Below which a pair counts as one, for the panel of how many still are two.

    Returns:
        `matplotlib.figure.Figure` of two panels: all distances and their median; the share of pairs that have not met
        yet.

    Raises:
        ValueError: If `distances` is not of that shape, or empty.
    """
    distances = _matrix(distances, "distances", "num_pairs, num_steps")
    drawn = figure(11, 3.4)
    apart, open_pairs = drawn.subplots(1, 2)
    steps = np.arange(1, distances.shape[1] + 1)
    apart.plot(steps, np.maximum(distances, _FLOOR).T, color=_BLUE, linewidth=0.8, alpha=0.5)
    apart.plot(steps, np.maximum(np.median(distances, axis=0), _FLOOR), color=_INK, linewidth=1.8)
    apart.set_yscale("log")
    # A pair that was within tolerance once, and left again, has not met. NaN is never within.
    later_apart = np.logical_or.accumulate(~(distances <= tolerance)[:, ::-1], axis=1)[:, ::-1]
    open_pairs.step(steps, later_apart.mean(axis=0), where="post", color=_BLUE, linewidth=2)
    open_pairs.set_ylim(-0.03, 1.03)
    last = np.flatnonzero(later_apart.any(axis=0)).max(initial=0) + 1
    for axis in (apart, open_pairs):
        axis.set_xlim(0, min(max(10, 1.3 * last), distances.shape[1]))
    _finish(apart, "Pairs with the same random numbers", "largest difference [sd]", "step")
    _finish(
        open_pairs, f"Pairs still apart by more than {tolerance:g} sd", "share of pairs", "step"
    )
    return drawn


def coupling_bounds(found: Any) -> Any:
    """How far the law of a chain is from the posterior after t steps: both bounds, with two standard errors.

    Args:
        found: From `convergence`.

    Returns:
        `matplotlib.figure.Figure` of two panels, total variation and Wasserstein distance; if some pairs did not meet, of
        one, the share of pairs that have not.

    Raises:
        NoPlots: If matplotlib is missing.
    """
    times = np.arange(len(found.survival))
    if found.num_unmet:
        drawn = figure(6, 3.4)
        axis = drawn.subplots()
        axis.step(times, found.survival, where="post", color=_RED, linewidth=2)
        axis.set_ylim(-0.03, 1.03)
        title = f"{found.num_unmet} of {len(found.met)} pairs did not meet: nothing is bounded"
        _finish(axis, title, "share of pairs apart", "step")
        return drawn
    drawn = figure(11, 3.4)
    curves = (
        (found.total_variation, found.total_variation_error, "Total variation at most"),
        (found.wasserstein, found.wasserstein_error, "Wasserstein distance at most [sd]"),
    )
    for axis, (bound, error, title) in zip(drawn.subplots(1, 2), curves):
        axis.plot(times, bound, color=_BLUE, linewidth=2)
        low, high = np.maximum(bound - 2 * error, 0), bound + 2 * error
        axis.fill_between(times, low, high, color=_BLUE, alpha=0.25, linewidth=0)
        axis.set_ylim(bottom=0)
        _finish(axis, title, "", "step")
    return drawn


def _matrix(values: np.ndarray, name: str, shape: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name}: got shape {values.shape}, wanted ({shape})")
    return values


def _draw_distances(axis: Any, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    _finish(axis, "Distance of the two paths", "difference [sd]", "draw")
    if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
        axis.text(0.5, 0.5, "runs of different shapes:\nno steps to compare", ha="center")
        return
    distance = np.max([abs(ours[name] - b) / (b.std() or 1.0) for name, b in theirs.items()], 0)
    for chain, values in enumerate(distance):
        steps, values = _block_maxima(values, 600)
        colour = _CHAINS[chain % len(_CHAINS)]
        axis.plot(steps, np.maximum(values, _FLOOR), color=colour, linewidth=0.9, alpha=0.85)
    axis.axhline(1.0, color=_RED, linewidth=1.2, linestyle="--")
    axis.set_yscale("log")
    top = float(np.nanmax(distance, initial=0.0, where=np.isfinite(distance)))
    axis.set_ylim(_FLOOR / 3, max(30.0, 10 * top))


def _draw_residuals(drawn: Any, axis: Any, residuals: np.ndarray, first: int) -> None:
    """Residuals `(P, T)` as colours, the first row being pass `first`; red where they are not finite."""
    blocks = np.stack([_block_maxima(one, 300)[1] for one in residuals])
    shown = np.log10(np.maximum(np.ma.masked_invalid(blocks), _FLOOR))
    place = (0.5, residuals.shape[1] + 0.5, first + len(residuals) - 0.5, first - 0.5)
    image = axis.imshow(shown, aspect="auto", interpolation="nearest", extent=place, cmap="viridis")
    drawn.colorbar(image, ax=axis, label="log10 residual")
    axis.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.set_facecolor(_RED)


def _block_maxima(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Maxima over at most `most` blocks: (step numbers, maxima)."""
    starts = np.arange(0, values.size, max(1, -(-values.size // most)))
    return starts + 1, np.maximum.reduceat(values, starts) if values.size else values


def _finish(axis: Any, title: str, ylabel: str = "", xlabel: str = "") -> None:
    """The titles and the look of all axes; an empty text leaves what is there."""
    axis.set_title(title or axis.get_title(loc="left"), fontsize=11, loc="left")
    axis.set_ylabel(ylabel or axis.get_ylabel(), fontsize=10)
    axis.set_xlabel(xlabel or axis.get_xlabel(), fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color=_GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.margins(x=0.01)
