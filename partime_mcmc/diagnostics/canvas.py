"""What all figures share: colours, axes, files, and the one place that imports matplotlib.

Figures are ``matplotlib.figure.Figure`` objects made without pyplot, so that no global state, window or backend is
touched. As SVG for a page they take the page's own colours: ink and grid become ``currentColor`` and ``var(--grid)``.
"""

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

INK, GRID, PARALLEL, LIMIT = "#1b2a41", "#e6e6e6", "#4c9be8", "#c8553d"
CHAINS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#a6761d")
FLOOR = 1e-17  # where a distance or residual of exactly 0 is drawn on a logarithmic axis


class NoPlots(ImportError):
    """There is nothing to draw with."""


def figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches.

    Raises:
        NoPlots: If matplotlib is missing, which the extra ``plots`` brings.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoPlots('pictures need matplotlib: pip install "partime_mcmc[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, path: str | os.PathLike) -> Path:
    """Write a figure to a file of the type its suffix names (PNG, PDF, SVG).

    Returns:
        The path written.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there is no such type.
    """
    path = Path(path)
    drawn.savefig(path, dpi=150)
    return path


def taken(drawn: Any) -> Any:
    """A figure that somebody else made with pyplot, which forgets it."""
    from matplotlib import pyplot

    pyplot.close(drawn)
    drawn.set_layout_engine("constrained")
    return drawn


def svg(drawn: Any, salt: str) -> str:
    """A figure as SVG to put into a page: text stays text, colours follow the page.

    Args:
        drawn: The figure.
        salt: Different for all figures of a page, so that their inner names do not meet.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        drawn.savefig(
            text, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    found = text.getvalue()
    found = found[found.index("<svg") :]
    for colour, variable in (
        (INK, "currentColor"),
        ("#000000", "currentColor"),
        (GRID, "var(--grid)"),
    ):
        found = re.sub(rf"(fill|stroke): {colour}", rf"\1: {variable}", found)
    # Text without a colour of its own is black by SVG's rule.
    found = re.sub(r"<svg ", '<svg fill="currentColor" ', found, count=1)
    # Groups are numbered alike in every figure; only names that are referred to are needed.
    return re.sub(r'<g id="[^"]*"', "<g", found)


def tidy(axis: Any) -> None:
    """The look of all axes."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9)


def title(axis: Any, text: str) -> None:
    """A title on the left."""
    axis.set_title(text, fontsize=11, loc="left")


def label(text: str) -> str:
    """A name of the user's, never to be read as a formula."""
    return text.replace("$", r"\$")


def level(axis: Any, height: float, text: str) -> None:
    """A dashed horizontal line with a word on it."""
    axis.axhline(height, color=LIMIT, linewidth=1.2, linestyle="--")
    axis.text(
        0.01,
        height,
        text,
        color=LIMIT,
        fontsize=9,
        va="bottom",
        transform=axis.get_yaxis_transform(),
    )


def say(axis: Any, text: str) -> None:
    """A sentence in place of a picture."""
    axis.text(0.5, 0.5, text, ha="center", va="center", color="#777777", transform=axis.transAxes)
    axis.set_axis_off()


def envelope(values: np.ndarray, most: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Maxima over blocks, so that a long run stays readable and no peak is lost: (draw numbers, maxima)."""
    size = max(1, -(-values.size // most))
    starts = np.arange(0, values.size, size)
    return starts + 1, np.maximum.reduceat(values, starts) if values.size else values


def block_means(values: np.ndarray, most: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Means over blocks: (draw numbers, means)."""
    size = max(1, values.size // most)
    starts = np.arange(0, values.size - size + 1, size)  # the last block takes what is left over
    return starts + 1, np.asarray([block.mean() for block in np.split(values, starts[1:])])


def colours(count: int) -> Iterable[str]:
    """A colour per chain."""
    return (CHAINS[chain % len(CHAINS)] for chain in range(count))
