"""Runs and comparisons as HTML: for notebooks, and as one file with figures inside that needs nothing else.

Whatever comes from a run or a model (names of values above all) is escaped. Figures are PNG images within the page:
traces and ranks by ArviZ, and the two that it does not have. Without matplotlib the page has no figures.
"""

import base64
import contextlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from partime_mcmc.diagnostics import describe, plots
from partime_mcmc.diagnostics.arviz import rank_plot, trace_plot
from partime_mcmc.diagnostics.formatting import cell
from partime_mcmc.diagnostics.values import thinned_draws

_MOST_ROWS, _MOST_DRAWS, _MOST_SERIES = 500, 10_000, 4
Rows = Sequence[Mapping[str, Any]]


def table_html(rows: Rows, title: str = "") -> str:
    """A table; `rows` are dicts with the same keys, which become the titles of columns."""
    if not rows:
        return ""
    lines = [rows[0], *([cell(value) for value in row.values()] for row in rows[:_MOST_ROWS])]
    cells = ("".join(f"<td>{escape(text)}</td>" for text in line) for line in lines)
    body = "\n".join(f"<tr>{line}</tr>" for line in cells)
    more = f"<p>and {len(rows) - _MOST_ROWS} more rows</p>" if len(rows) > _MOST_ROWS else ""
    return f'<table border="1"><caption>{escape(title)}</caption>\n{body}\n</table>{more}\n'


def report_html(title: str, facts: Iterable[tuple[str, str]], rows: Rows) -> str:
    """A heading, labelled sentences, and a table."""
    lines = (f"<p><b>{escape(label)}</b> {escape(text)}</p>\n" for label, text in facts)
    return f"<h3>{escape(title)}</h3>\n{''.join(lines)}{table_html(rows)}"


def draws_html(draws: Any, title: str = "Posterior") -> str:
    """A run, in memory or on disk, as its `_repr_html_` shows it."""
    rows = describe.shown_rows(draws, describe.summary_rows(draws))
    return report_html(title, describe.run_facts(draws), rows)


def save(path: str | os.PathLike, body: str, figures: Iterable[Any] = ()) -> Path:
    """Write HTML text, followed by figures of matplotlib, to one file; returns its path.

    Raises:
        OSError: If the file cannot be written.
    """
    images = []
    for figure in figures:
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=100)
        source = base64.b64encode(image.getvalue()).decode()
        images.append(f'<p><img alt="figure" src="data:image/png;base64,{source}"></p>\n')
    head = '<!doctype html>\n<meta charset="utf-8"><title>partime_mcmc</title>\n'
    Path(path).write_text(head + body + "".join(images), encoding="utf-8")
    return Path(path)


def save_page(
    path: str | os.PathLike,
    draws: Any,
    title: str = "Posterior",
    *,
    distances: np.ndarray | None = None,
    passes: np.ndarray | None = None,
) -> Path:
    """Write a run, in memory or on disk, with its figures to one HTML file; returns its path.

    Args:
        path: The file.
        draws: The run.
        title: What was sampled.
        distances: Of coupled pairs of chains by step, `(K, T)`, for `plots.coalescence`.
        passes: Residuals of a solve by pass and step, `(P, T)`, for `plots.residual_map`.
    """
    series = plots.drawable_coordinates(thinned_draws(draws, _MOST_DRAWS), _MOST_SERIES)
    figures = []
    with contextlib.suppress(plots.NoPlots):
        figures += [trace_plot(series), rank_plot(series)] if series else []
        figures += [] if distances is None else [plots.coalescence(distances)]
        figures += [] if passes is None else [plots.residual_map(passes)]
    return save(path, draws_html(draws, title), figures)
