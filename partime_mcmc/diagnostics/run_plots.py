"""Figures of one run: how its solve converged, how its kind of chain forgets, and its certificate at a glance.

    residual of step t     |f(x_{t-1}, u_t) - x_t|, as certified, in units of the proposal's noise where they are known
    distance of a pair     max_j |x_tj - y_tj| / s_j after t steps with the same dice, from two draws of the warm-up

Along time the largest of every block of steps is drawn, so that no peak is lost; what is not finite is a mark at the
top.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partime_mcmc.diagnostics import canvas
from partime_mcmc.diagnostics.plots import draw_residuals

_SHOWN_CHAINS = 8


def convergence(draws: Any) -> Any:
    """Residuals of the solve: by iteration of the solver, and by time step of what was certified.

    Args:
        draws: a run with ``report.residual_history`` (C, max_iterations) and ``certificate.residual`` (C, T), as far as
            there are such things.

    Returns:
        ``matplotlib.figure.Figure`` of two panels.

    Raises:
        NoPlots: if matplotlib is missing, here and in all that draws.
    """
    figure = canvas.figure(11, 3.6)
    by_iteration, by_step = figure.subplots(1, 2)
    draw_residuals(by_iteration, draws)
    _draw_residual_by_step(by_step, draws)
    return figure


def residual_map(residuals: np.ndarray) -> Any:
    """How a solve converged: the residual of every time step after every pass, as colours.

    Args:
        residuals: shape (P, T), of passes in order; NaN, drawn in red, where the path was not finite.

    Returns:
        ``matplotlib.figure.Figure``.

    Raises:
        ValueError: if ``residuals`` is not of that shape, or empty.
    """
    residuals = np.asarray(residuals, np.float64)
    if residuals.ndim != 2 or not residuals.size:
        raise ValueError(
            f"residuals must have shape (num_passes, num_steps), got {residuals.shape}"
        )
    figure = canvas.figure(11, 1.8 + 0.06 * min(max(len(residuals), 10), 40))
    axis = figure.subplots()
    blocks = np.stack([canvas.envelope(one, 300)[1] for one in residuals])
    broken = ~np.isfinite(blocks)
    shown = np.ma.masked_array(
        np.log10(np.maximum(np.where(broken, 0, blocks), canvas.FLOOR)), broken
    )
    place = (0.5, residuals.shape[1] + 0.5, len(residuals) + 0.5, 0.5)
    axis.set_facecolor(canvas.LIMIT)
    image = axis.imshow(shown, aspect="auto", interpolation="nearest", extent=place, cmap="viridis")
    figure.colorbar(image, ax=axis, label="log10 residual")
    axis.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    canvas.title(axis, "Residual by pass and step")
    axis.set_xlabel("step", fontsize=10)
    axis.set_ylabel("pass", fontsize=10)
    return figure


def coalescence(distances: np.ndarray, tolerance: float = 1e-8) -> Any:
    """How fast pairs of chains with the same dice become one.

    Args:
        distances: of each pair after each step, in standard deviations, (K, T).
        tolerance: below which a pair counts as one, for the panel of how many still are two.

    Returns:
        ``matplotlib.figure.Figure`` of two panels: all distances and their median; the share of pairs that have not met
        yet.

    Raises:
        ValueError: if ``distances`` is not of that shape, or empty.
    """
    distances = np.asarray(distances, np.float64)
    if distances.ndim != 2 or not distances.size:
        raise ValueError(f"distances must have shape (num_pairs, num_steps), got {distances.shape}")
    figure = canvas.figure(11, 3.4)
    apart, open_pairs = figure.subplots(1, 2)
    steps = np.arange(1, distances.shape[1] + 1)
    for one in distances:
        apart.plot(
            steps, np.maximum(one, canvas.FLOOR), color=canvas.PARALLEL, linewidth=0.8, alpha=0.5
        )
    median = np.maximum(np.median(distances, axis=0), canvas.FLOOR)
    apart.plot(steps, median, color=canvas.INK, linewidth=1.8, label="median")
    apart.set_yscale("log")
    apart.legend(frameon=False, fontsize=9, loc="upper right")
    canvas.title(apart, "Distance of pairs with the same dice")
    apart.set_ylabel("largest difference [sd]", fontsize=10)
    # A pair that was within tolerance once, and left again, has not met. NaN is never within.
    later_apart = np.flip(
        np.logical_or.accumulate(np.flip(~(distances <= tolerance), axis=1), axis=1), axis=1
    )
    open_pairs.step(
        steps, later_apart.mean(axis=0), where="post", color=canvas.PARALLEL, linewidth=2
    )
    open_pairs.set_ylim(-0.03, 1.03)
    canvas.title(open_pairs, f"Pairs still apart by more than {tolerance:g} sd")
    open_pairs.set_ylabel("share of pairs", fontsize=10)
    last = np.flatnonzero(later_apart.any(axis=0)).max(initial=0) + 1
    for axis in (apart, open_pairs):
        axis.set_xlim(0, min(max(10, 1.3 * last), distances.shape[1]))
        axis.set_xlabel("step", fontsize=10)
        canvas.tidy(axis)
    return figure


def traces(coordinates: Mapping[str, np.ndarray], num_draws: int = 1000) -> Any:
    """The last draws of all chains of some coordinates, and their densities.

    Args:
        coordinates: by label, (C, T) each.
        num_draws: how many draws to show.

    Returns:
        ``matplotlib.figure.Figure``, a row per coordinate.
    """
    figure = canvas.figure(11, 0.6 + 1.4 * len(coordinates))
    grid = figure.subplots(len(coordinates), 2, squeeze=False, width_ratios=[3, 1])
    for (trace, density), (name, x) in zip(grid, coordinates.items(), strict=True):
        first = max(0, x.shape[1] - num_draws)
        finite = x[np.isfinite(x)]
        spread = finite.size > 0 and np.ptp(finite) > 0
        bins = np.linspace(*np.quantile(finite, [0.001, 0.999]), 40) if spread else 10
        for values, colour in zip(x[:_SHOWN_CHAINS], canvas.colours(len(x)), strict=False):
            trace.plot(
                np.arange(first, x.shape[1]) + 1,
                values[first:],
                color=colour,
                linewidth=0.6,
                alpha=0.8,
            )
            if finite.size:
                density.hist(
                    values[np.isfinite(values)],
                    bins=bins,
                    histtype="step",
                    color=colour,
                    density=spread,
                )
        trace.set_ylabel(canvas.label(name), fontsize=10)
        trace.margins(x=0.005)
        density.set_yticks([])
        for axis in (trace, density):
            canvas.tidy(axis)
    canvas.title(grid[0, 0], f"Last {min(num_draws, x.shape[1]):,} draws of every chain")
    canvas.title(grid[0, 1], "all draws")
    grid[-1, 0].set_xlabel("draw", fontsize=10)
    return figure


def along_time(draws: Any) -> Any:
    """Acceptance, and log density or energy, in means over blocks of steps, a line per chain.

    Args:
        draws: a run with ``info``.

    Returns:
        ``matplotlib.figure.Figure`` of two panels.
    """
    figure = canvas.figure(11, 3)
    left, right = figure.subplots(1, 2)
    _draw_along_time(left, draws, ("acceptance_rate", "accepted"), "Acceptance along time")
    _draw_along_time(right, draws, ("logdensity", "energy"), "Log density along time")
    return figure


def certificate_figure(draws: Any) -> Any:
    """A run's certificate on one page: residuals and acceptance along time, energies, and the verdict per chain.

    Args:
        draws: a run with a ``certificate`` and ``info``.

    Returns:
        ``matplotlib.figure.Figure`` of three panels and a table.

    Raises:
        ValueError: if there is no certificate.
    """
    certificate = getattr(draws, "certificate", None)
    if certificate is None:
        raise ValueError("draws: there is no certificate")
    figure = canvas.figure(11, 8)
    grid = figure.add_gridspec(
        3, 2, height_ratios=[1, 1, 0.25 + 0.22 * min(len(certificate_rows(certificate)), 12)]
    )
    _draw_residual_by_step(figure.add_subplot(grid[0, :]), draws)
    _draw_along_time(
        figure.add_subplot(grid[1, 0]),
        draws,
        ("acceptance_rate", "accepted"),
        "Acceptance along time",
    )
    _draw_along_time(
        figure.add_subplot(grid[1, 1]), draws, ("logdensity", "energy"), "Log density along time"
    )
    table_axis = figure.add_subplot(grid[2, :])
    table_axis.set_axis_off()
    rows = certificate_rows(certificate)[:12]
    table = table_axis.table(
        [[str(value) for value in row.values()] for row in rows],
        colLabels=list(rows[0]),
        loc="center",
        cellLoc="right",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    return figure


def certificate_rows(certificate: Any) -> list[dict[str, Any]]:
    """The certificate as a table, a row of printable values per chain."""
    fields = {
        "certified": "certified",
        "largest residual": "max_residual",
        "at step": "worst_step",
        "allowed": "tolerance",
        "rejected": "num_rejected",
        "in a row": "longest_rejection",
        "out of range": "num_nonfinite_proposals",
        "ambiguous": "num_ambiguous",
        "smallest margin": "min_margin",
        "never moved": "frozen",
    }
    columns = {
        title: np.atleast_1d(np.asarray(getattr(certificate, name)))
        for title, name in fields.items()
        if getattr(certificate, name, None) is not None
    }
    count = max((len(column) for column in columns.values()), default=0)
    return [
        {"chain": str(chain)}
        | {title: _shown(column[min(chain, len(column) - 1)]) for title, column in columns.items()}
        for chain in range(count)
    ]


def _shown(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}" if value >= 0 else "-"
    return "-" if np.isnan(value) else f"{value:.1e}"


def _draw_residual_by_step(axis: Any, draws: Any) -> None:
    canvas.title(axis, "Residual by time step")
    certificate = getattr(draws, "certificate", None)
    residual = getattr(certificate, "residual", None)
    residual = np.atleast_2d(np.asarray([] if residual is None else residual, np.float64))
    if not residual.size:
        canvas.say(axis, "no residuals recorded")
        return
    for values, colour in zip(
        residual[:_SHOWN_CHAINS], canvas.colours(len(residual)), strict=False
    ):
        steps, peaks = canvas.envelope(values)
        good = np.isfinite(peaks)
        axis.plot(
            steps,
            np.where(good, np.maximum(peaks, canvas.FLOOR), np.nan),
            color=colour,
            linewidth=0.9,
            alpha=0.85,
        )
        axis.plot(
            steps[~good],
            np.full((~good).sum(), 0.97),
            "x",
            color=colour,
            transform=axis.get_xaxis_transform(),
        )
    axis.set_yscale("log")
    if getattr(certificate, "tolerance", None) is not None:
        canvas.level(axis, float(np.max(np.asarray(certificate.tolerance))), "allowed")
    axis.set_ylim(bottom=canvas.FLOOR / 3)
    axis.margins(x=0.01)
    axis.set_xlabel("step", fontsize=10)
    axis.set_ylabel("residual [noise units]", fontsize=10)
    canvas.tidy(axis)


def _draw_along_time(axis: Any, draws: Any, names: Sequence[str], title: str) -> None:
    info = getattr(draws, "info", None) or {}
    found = next((name for name in names if info.get(name) is not None), None)
    canvas.title(
        axis,
        title if found in (None, names[0]) else title.replace("Log density", found.capitalize()),
    )
    if found is None:
        canvas.say(axis, "not recorded")
        return
    values = np.asarray(info[found], np.float64)
    for chain, colour in zip(values[:_SHOWN_CHAINS], canvas.colours(len(values)), strict=False):
        axis.plot(*canvas.block_means(chain), color=colour, linewidth=0.9, alpha=0.85)
    axis.margins(x=0.01)
    axis.set_xlabel("step", fontsize=10)
    canvas.tidy(axis)
