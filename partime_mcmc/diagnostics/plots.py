"""Figures that ArviZ does not have: two runs step by step, how coupled chains meet, how a solve converges.

    distance of two runs    max_j |a_tj - b_tj| / s_j at draw t, with s_j the sequential run's standard deviation
    distance of a pair      max_j |x_tj - y_tj| / s_j after t steps with the same random numbers

On logarithmic axes an exact 0 is drawn on the floor of the axis. Along time the largest value of every block of steps
is drawn, so that no peak is lost. Figures are `matplotlib.figure.Figure` objects made without pyplot, so that no global
state, window or backend is touched; this is the one module that imports matplotlib.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from partime_mcmc.diagnostics.values import coordinates, named_draws

_INK, _GRID, _BLUE, _RED = "#1b2a41", "#e6e6e6", "#4c9be8", "#c8553d"
_CHAINS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#a6761d")
_FLOOR = 1e-17


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


def path_overlay(
    parallel: Any,
    sequential: Any,
    names: Sequence[str] | None = None,
    *,
    chain: int = 0,
    num_draws: int = 300,
) -> Any:
    """The first draws of one chain, the sequential run upon the parallel one, and the distance of all chains.

    Args:
        parallel: Draws with `constrained` or `positions`, `(C, T, ...)`.
        sequential: Likewise; without the same shapes no distances are drawn.
        names: Variables (`"theta"`, shown coordinate by coordinate) or coordinates (`"theta[3]"`); three coordinates
            if None.
        chain: Which chain to show.
        num_draws: How many draws to show.

    Returns:
        `matplotlib.figure.Figure`, a panel per coordinate and one with the distances.

    Raises:
        NoPlots: If matplotlib is missing, here and in all that draws.
        ValueError: If a name, or all of them, is not in both runs, or there is no such chain.
    """
    ours, theirs = (dict(coordinates(named_draws(draws))) for draws in (parallel, sequential))
    labels = _labels([label for label in ours if label in theirs], names)
    num_chains = min(len(x) for x in (*ours.values(), *theirs.values()))
    if not 0 <= chain < num_chains:
        raise ValueError(f"chain: got {chain}, wanted a number below {num_chains}")
    drawn = figure(11, 2.4 + 1.5 * len(labels))
    *axes, last = drawn.subplots(len(labels) + 1, 1, height_ratios=[1] * len(labels) + [1.6])
    for axis, label in zip(axes, labels, strict=True):
        a, b = ours[label][chain, :num_draws], theirs[label][chain, :num_draws]
        for values, width, colour in ((a, 3.2, _BLUE), (b, 0.9, _INK)):
            axis.plot(np.arange(1, values.size + 1), values, color=colour, linewidth=width)
        _finish(axis, "", label.replace("$", r"\$"))  # a user's name is no formula
    _finish(axes[0], f"First draws of chain {chain}: parallel (thick), sequential (thin)")
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
    blocks = np.stack([_block_maxima(one, 300)[1] for one in residuals])
    shown = np.log10(np.maximum(np.ma.masked_invalid(blocks), _FLOOR))
    place = (0.5, residuals.shape[1] + 0.5, len(residuals) + 0.5, 0.5)
    image = axis.imshow(shown, aspect="auto", interpolation="nearest", extent=place, cmap="viridis")
    drawn.colorbar(image, ax=axis, label="log10 residual")
    axis.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _finish(axis, "Residual by pass and step", "pass", "step")
    axis.set_facecolor(_RED)
    axis.grid(False)
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
    outside = ~(distances <= tolerance)
    later_apart = np.logical_or.accumulate(outside[:, ::-1], axis=1)[:, ::-1]
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


def _labels(both: list[str], names: Sequence[str] | None) -> list[str]:
    """The coordinates that `names` mean, among those of both runs."""
    if not both:
        raise ValueError("the runs share no coordinate")
    if names is None:
        return first_coordinates(both, 3)
    found = {
        name: [label for label in both if name in (label, label.split("[")[0])] for name in names
    }
    missing = [name for name, labels in found.items() if not labels]
    if missing:
        raise ValueError(f"names: {missing} not in both runs, which share {both[:12]}")
    return [label for labels in found.values() for label in labels]


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


def _block_maxima(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Maxima over at most `most` blocks: (step numbers, maxima)."""
    starts = np.arange(0, values.size, max(1, -(-values.size // most)))
    return starts + 1, np.maximum.reduceat(values, starts) if values.size else values


def _finish(axis: Any, title: str, ylabel: str = "", xlabel: str = "") -> None:
    """The titles and the look of all axes; an empty text leaves what is there."""
    for text, set_text in ((ylabel, axis.set_ylabel), (xlabel, axis.set_xlabel)):
        if text:
            set_text(text, fontsize=10)
    if title:
        axis.set_title(title, fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color=_GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.margins(x=0.01)
