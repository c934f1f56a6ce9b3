"""A run in a few labelled sentences and one table: as text, as JSON, and as HTML with figures.

A run is `Draws`, `StoredDraws`, or what `read_draws` gives; what it does not have is left out. HTML is for notebooks, and
for one file with figures inside that needs nothing else. Whatever comes from a run or a model (names of values above all)
is escaped there. Figures are PNG images within the page: traces and ranks by ArviZ, and the two that it does not have.
Without matplotlib the page has no figures.
"""

import base64
import contextlib
import io
import json
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from partime_mcmc.certify.certificate import describe_certification
from partime_mcmc.diagnostics import plots
from partime_mcmc.diagnostics.arviz import rank_plot, summary_table, trace_plot
from partime_mcmc.diagnostics.values import plain, thinned_draws

WIDTH = 100
_MOST_FALLBACKS, _MOST_TEXT_ROWS, _MOST_ROWS = 5, 40, 500
_MOST_DRAWS, _MOST_SERIES = 10_000, 4
Rows = Sequence[Mapping[str, Any]]


def summary_rows(draws: Any) -> list[dict[str, Any]]:
    """The summary of every coordinate: of all draws if the run kept streaming statistics, else of those that it has."""
    statistics = getattr(draws, "statistics", None)
    return summary_table(draws) if statistics is None else statistics.summary()


def shown_rows(draws: Any) -> list[dict[str, Any]]:
    """The rows and columns of the summary worth showing: values in `draws.names`, and `frozen` only if a chain is."""
    names = getattr(draws, "names", None)
    rows = [row for row in summary_rows(draws) if not names or row["name"].split("[")[0] in names]
    hidden = {"mcse_sd", "rank_error"} | (
        set() if any(row["frozen"] for row in rows) else {"frozen"}
    )
    return [{name: value for name, value in row.items() if name not in hidden} for row in rows]


def is_certified(draws: Any) -> bool:
    """Whether there is a certificate, and it holds for every chain."""
    certificate = getattr(draws, "certificate", None)
    return certificate is not None and bool(np.all(np.asarray(certificate.certified)))


def run_facts(draws: Any) -> list[tuple[str, str]]:
    """Labels and sentences: how many draws, warm-up, certificate, work, kernel, what ran sequentially."""
    plan, report = getattr(draws, "plan", None) or {}, getattr(draws, "report", None)
    every = f", every {plan['thinning']}th kept" if plan.get("thinning", 1) != 1 else ""
    unfinished = "" if getattr(draws, "finished", True) else "; the run is not finished"
    divergences = (getattr(draws, "info", None) or {}).get("diverging")
    fallbacks = list(getattr(report, "fallbacks", None) or [])
    more = len(fallbacks) - _MOST_FALLBACKS
    facts = [
        (
            "draws",
            f"{plan.get('num_samples', '?')} draws of {plan.get('num_chains', '?')} chains{every}{unfinished}",
        ),
        ("warmup", getattr(draws, "warmup_notes", "")),
        ("certificate", _certificate_text(getattr(draws, "certificate", None))),
        ("divergences", "" if divergences is None else f"{np.sum(np.asarray(divergences)):,}"),
        ("work", str(report) if hasattr(report, "seconds_run") else ""),
        *((name, str(plan.get(name, ""))) for name in ("kernel", "solver", "schedule")),
        *(("fallback", text) for text in fallbacks[:_MOST_FALLBACKS]),
        ("fallback", f"and {more} more" if more > 0 else ""),
    ]
    return [(label, text) for label, text in facts if text]


def _certificate_text(certificate: Any) -> str:
    if certificate is None:
        return "there is none"
    chains = np.atleast_1d(np.asarray(certificate.certified))
    rejected = np.asarray(certificate.num_rejected)
    return (
        f"{int(chains.sum())} of {chains.size} chains certified, largest residual "
        f"{np.max(np.asarray(certificate.max_residual)):.1e} noise units (allowed "
        f"{np.max(np.asarray(certificate.tolerance)):.0e}), "
        + (
            f"{int(rejected.sum())} rejections, "
            if (rejected >= 0).all()
            else "no accept decisions, "
        )
        + f"{int(np.sum(np.asarray(certificate.num_nonfinite_proposals)))} proposals out of range; "
        + describe_certification(getattr(certificate, "independent", True))
    )


def run_text(draws: Any) -> str:
    """A run as text: its table, and the facts below it."""
    rows, verdict = shown_rows(draws), getattr(draws, "verdict", None)
    lines = [] if verdict is None else textwrap.wrap(str(verdict), 110, subsequent_indent="    ")
    lines += text_table(rows[:_MOST_TEXT_ROWS])
    if len(rows) > _MOST_TEXT_ROWS:
        lines.append(f"... and {len(rows) - _MOST_TEXT_ROWS} more")
    for label, text in run_facts(draws):
        lines += textwrap.wrap(
            f"{label:<13}{text}", 110, subsequent_indent=" " * 13, break_on_hyphens=False
        )
    return "\n".join(lines)


def run_json(draws: Any) -> str:
    """A run as JSON: the summary, whether it is certified and finished, its plan, and totals over all draws."""
    statistics, verdict = getattr(draws, "statistics", None), getattr(draws, "verdict", None)
    found = {
        "summary": summary_rows(draws),
        "verdict": None if verdict is None else verdict.outcome.value,
        "grounds": [] if verdict is None else list(verdict.grounds),
        "certified": is_certified(draws),
        "finished": getattr(draws, "finished", True),
        "plan": draws.plan,
        "totals": {} if statistics is None else statistics.totals(),
    }
    return json.dumps(plain(found), indent=2, allow_nan=False)


def text_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table within 100 columns: the first column left-aligned, numbers in four digits, right-aligned.

    Args:
        rows: Dicts with the same keys, which become the titles.
    """
    if not rows:
        return []
    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] = max(10, min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for first, *rest in cells:
        first = first if len(first) <= widths[0] else first[: widths[0] - 1] + "…"
        numbers = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return lines


def cell(value: Any) -> str:
    """A value in a table: text as it is, yes and no, numbers in four digits, `-` for NaN."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    value = float(value)
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    if value == round(value) and abs(value) < 1e6:
        return str(round(value))
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:#.4g}"


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
    verdict = getattr(draws, "verdict", None)
    judged = [] if verdict is None else [("verdict", str(verdict))]
    return report_html(title, judged + run_facts(draws), shown_rows(draws))


def save(path: str | os.PathLike, body: str, figures: Iterable[Any] = ()) -> Path:
    """Write HTML text, followed by figures of matplotlib, to one file; returns its path.

    Raises:
        OSError: If the file cannot be written.
    """
    for figure in figures:
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=100)
        source = base64.b64encode(image.getvalue()).decode()
        body += f'<p><img alt="figure" src="data:image/png;base64,{source}"></p>\n'
    head = '<!doctype html>\n<meta charset="utf-8"><title>partime_mcmc</title>\n'
    Path(path).write_text(head + body, encoding="utf-8")
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
