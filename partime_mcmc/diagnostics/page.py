"""A run as one HTML page that needs nothing else: verdict, tables, pictures, advice, plan and versions.

Pictures are SVG within the page, in the page's own colours, light or dark as the reader's device asks. There is no
script, no font and no link to fetch, and a policy in the page forbids them. Whatever comes from a run or a model is
escaped. Without matplotlib the page has all but the pictures, and says so.
"""

import html
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partime_mcmc.diagnostics import canvas, plots, run_plots
from partime_mcmc.diagnostics.arviz import rank_plot, summary_table
from partime_mcmc.diagnostics.named import coordinates, named_draws
from partime_mcmc.diagnostics.page_style import HEAD
from partime_mcmc.diagnostics.report import Report, cell, plain

_MOST_ROWS, _MOST_SENTENCES, _SHOWN, _RANKED = 500, 20, 5, 4


def page(
    draws: Any,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]] | None = None,
    sequential: Any = None,
    totals: Mapping[str, Any] | None = None,
    comparison: Report | None = None,
    distances: np.ndarray | None = None,
    passes: np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        draws: a run with ``constrained`` or ``positions`` (C, T, ...), and ``certificate``, ``info``, ``plan``,
            ``report``, ``warmup`` and ``advice`` as far as there are any.
        title: what was sampled.
        rows: the table of posterior summaries, if not that of these draws (say, of draws that were not kept).
        totals: ``num_draws`` and ``divergences`` of all draws, if these are some of them.
        sequential: a run with the same dice, to be drawn upon this one.
        comparison: what ``compare`` said of the two.
        distances: of pairs of chains with the same dice, (K, T), for the picture of coalescence.
        passes: residuals of a solve by pass and step, (P, T), for its picture.
        notes: sentences worth reading first.

    Returns:
        HTML text.

    Raises:
        ValueError: as ``named_draws``.
    """
    rows = summary_table(draws) if rows is None else list(rows)
    certificate = getattr(draws, "certificate", None)
    parts = [
        f"<h1>{_text(title)}</h1>",
        _verdict(certificate, comparison),
        _sentences("", notes),
        _facts(draws, rows, totals or {}),
        _section("Posterior", _table(rows[:_MOST_ROWS]) + _more(len(rows) - _MOST_ROWS)),
        _pictures(draws, sequential, distances, passes),
    ]
    if certificate is not None:
        parts.append(
            _section(
                "Certificate", _table(run_plots.certificate_rows(certificate)) + _note(certificate)
            )
        )
    if comparison is not None:
        parts.append(_section("Against the sequential chain", _comparison(comparison)))
    parts.append(_section("How it came about", _story(draws)))
    parts.append(_section("Plan and versions", _pairs_table({**_plan(draws), **_versions(draws)})))
    body = "\n".join(part for part in parts if part)
    head = f"<head>\n<title>{_text(title)}</title>\n{HEAD}</head>"
    return f'<!doctype html>\n<html lang="en">\n{head}\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n'


def write(text: str, path: str | os.PathLike) -> Path:
    """Write a page to a file, which appears complete or not at all.

    Returns:
        The path written.

    Raises:
        OSError: if the file cannot be written; one already there stays as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _note(certificate: Any) -> str:
    """How to read a certificate."""
    if np.all(getattr(certificate, "independent", True)):
        evidence = (
            "The kernel was evaluated once more along the whole path, independently of the solver."
        )
    else:
        evidence = (
            "Every step was recorded while the solver rolled it: what the kernel made of the state before it, and by "
            "how much paths differed where they were joined."
        )
    return (
        f'<p class="note">{evidence} A residual is how far a step is from what the kernel says, in units of the '
        "proposal's noise where that is known. Ambiguous: accept decisions within rounding of their threshold.</p>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, inside: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{inside}\n</section>" if inside else ""


def _verdict(certificate: Any, comparison: Report | None) -> str:
    if certificate is None:
        return '<p class="verdict unknown">There is no certificate with these draws.</p>'
    chains = np.atleast_1d(np.asarray(certificate.certified, bool))
    good = chains.all() and (comparison is None or comparison.ok)
    sign = "\u2713" if good else "\u2717"
    said = f"{int(chains.sum())} of {chains.size} chains certified"
    also = f". {comparison.verdict}" if comparison is not None else ""
    return f'<p class="verdict {"good" if good else "bad"}"><span>{sign}</span> {_text(said + also)}</p>'


def _facts(draws: Any, rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> str:
    certificate = getattr(draws, "certificate", None)
    num_chains, num_draws = next(iter(named_draws(draws).values())).shape[:2]
    worst = [row["r_hat"] for row in rows if not np.isnan(row["r_hat"])]
    sizes = [
        row[name]
        for row in rows
        for name in ("ess_bulk", "ess_tail", "ess")
        if not np.isnan(row.get(name, np.nan))
    ]
    undefined = sum(bool(np.isnan(row["r_hat"])) for row in rows)
    facts = {
        "chains \u00d7 draws": f"{num_chains} \u00d7 {totals.get('num_draws', num_draws):,}",
        "worst R-hat": (f"{max(worst):.4f}" if worst else "-")
        + (f" ({undefined} undefined)" if undefined else ""),
        "smallest ESS": f"{min(sizes):,.0f}" if sizes else "-",
    }
    diverging = (getattr(draws, "info", None) or {}).get("diverging")
    if diverging is not None:
        facts["divergences"] = f"{totals.get('divergences', int(np.sum(np.asarray(diverging)))):,}"
    if certificate is not None:
        largest = float(np.max(np.asarray(certificate.max_residual)))
        facts["largest residual"] = (
            f"{largest:.1e} (allowed {float(np.max(np.asarray(certificate.tolerance))):.0e})"
        )
    report = getattr(draws, "report", None)
    for name, title, form in (
        ("evaluations_per_sample", "evaluations per draw", "{:.2f}"),
        ("depth", "depth", "{:,}"),
        ("seconds_run", "seconds, compiled", "{:.3g}"),
    ):
        if getattr(report, name, None) is not None:
            facts[title] = form.format(getattr(report, name))
    cards = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items()
    )
    return f'<dl class="facts">{cards}</dl>'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    if not any(row.get("frozen") for row in rows):
        rows = [{name: value for name, value in row.items() if name != "frozen"} for row in rows]
    head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in rows[0])
    lines = []
    for row in rows:
        first, *rest = (_text(cell(value)) for value in row.values())
        cells = "".join(f"<td>{value}</td>" for value in rest)
        lines.append(f"<tr{' class=bad' if row.get('frozen') else ''}><th>{first}</th>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _more(count: int) -> str:
    return f'<p class="note">... and {count:,} more.</p>' if count > 0 else ""


def _pairs_table(entries: Mapping[str, Any]) -> str:
    lines = "".join(
        f'<tr><th>{_text(name)}</th><td class="text">{_text(value)}</td></tr>'
        for name, value in entries.items()
    )
    return f'<div class="wide"><table><tbody>{lines}</tbody></table></div>' if entries else ""


def _sentences(title: str, sentences: Sequence[Any]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{_text(one)}</li>" for one in list(sentences)[:_MOST_SENTENCES])
    return (
        (f"<h3>{_text(title)}</h3>" if title else "")
        + f"<ul>{items}</ul>"
        + _more(len(sentences) - _MOST_SENTENCES)
    )


def _pictures(
    draws: Any, sequential: Any, distances: np.ndarray | None, passes: np.ndarray | None
) -> str:
    labels = plots.spread([label for label, _ in coordinates(named_draws(draws))], _SHOWN)
    shown = {label: x for label, x in coordinates(named_draws(draws)) if label in labels}
    ranked = {label: x for label, x in shown.items() if np.isfinite(x).all() and x.shape[1] > 1}
    ranked = dict(list(ranked.items())[:_RANKED])
    wanted: list[tuple[str, Callable[[], Any]]] = [("Traces", lambda: run_plots.traces(shown))]
    if ranked:
        wanted.append(("Ranks, by ArviZ", lambda: rank_plot(ranked)))
    wanted.append(("Convergence of the solve", lambda: run_plots.convergence(draws)))
    if passes is not None:
        wanted.append(
            (
                "A stretch of such a chain, solved pass by pass",
                lambda: run_plots.residual_map(passes),
            )
        )
    if sequential is not None:
        wanted.append(
            (
                "The sequential chain upon the parallel one",
                lambda: plots.paths_overlay(draws, sequential),
            )
        )
    if distances is not None:
        wanted.append(("How chains forget", lambda: run_plots.coalescence(distances)))
    if getattr(draws, "info", None):
        wanted.append(("Along time", lambda: run_plots.along_time(draws)))
    found = []
    for number, (title, draw) in enumerate(wanted):
        try:
            picture = canvas.svg(draw(), f"picture {number}")
        except canvas.NoPlots as error:
            return _section("Pictures", f'<p class="note">There are none here: {_text(error)}</p>')
        found.append(f'<figure role="img" aria-label="{_text(title)}">\n{picture}\n</figure>')
        found[-1] = _section(title, found[-1])
    return "\n".join(found)


def _comparison(report: Report) -> str:
    return (
        f"<p>{_text(report.verdict)}</p>"
        + _sentences("Why not better", report.reasons)
        + _sentences("Notes", report.notes)
        + f"<details><summary>The whole comparison</summary><pre>{_text(report)}</pre></details>"
    )


def _story(draws: Any) -> str:
    found = "".join(
        f"<h3>{title}</h3><p>{_text(getattr(draws, name))}</p>"
        for name, title in (("advice", "Advice"), ("warmup", "Warm-up"))
        if getattr(draws, name, None) is not None
    )
    report = getattr(draws, "report", None)
    if getattr(report, "seconds_compile", None) is not None:
        found += f"<h3>Work</h3><p>{_text(report)}</p>"
    return found + _sentences(
        "Finished sequentially", list(getattr(report, "fallbacks", None) or [])
    )


def _plan(draws: Any) -> dict[str, Any]:
    return {str(name): value for name, value in plain(getattr(draws, "plan", None) or {}).items()}


def _versions(draws: Any) -> dict[str, Any]:
    report = getattr(draws, "report", None)
    found = {
        name: getattr(report, name) for name in ("dtype", "device") if getattr(report, name, None)
    }
    return {**found, **(getattr(report, "versions", None) or {})}
