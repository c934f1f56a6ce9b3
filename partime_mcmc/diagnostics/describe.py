"""A run in a few labelled sentences and one table, as text, as JSON and for HTML.

A run is `Draws`, `StoredDraws`, or what `read_draws` gives; what it does not have is left out.
"""

import json
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from partime_mcmc.certify.certificate import describe_certification
from partime_mcmc.diagnostics.arviz import summary_table
from partime_mcmc.diagnostics.formatting import plain, text_table

_MOST_FALLBACKS, _MOST_ROWS = 5, 40


def summary_rows(draws: Any) -> list[dict[str, Any]]:
    """The summary of every coordinate: of all draws if the run kept streaming statistics, else of those that it has."""
    statistics = getattr(draws, "statistics", None)
    return summary_table(draws) if statistics is None else statistics.summary()


def shown_rows(draws: Any, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows and columns worth showing: values in `draws.names`, and `frozen` only if a chain is."""
    names = getattr(draws, "names", None)
    rows = [row for row in rows if not names or row["name"].split("[")[0] in names]
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
    facts = [("draws", _counts(draws, plan))]
    if getattr(draws, "warmup_notes", ""):
        facts.append(("warmup", draws.warmup_notes))
    facts.append(("certificate", _certificate_text(getattr(draws, "certificate", None))))
    divergences = getattr(draws, "info", None) and draws.info.get("diverging")
    if divergences is not None:
        facts.append(("divergences", f"{np.sum(np.asarray(divergences)):,}"))
    if hasattr(report, "seconds_run"):
        facts.append(("work", str(report)))
    facts += [(name, str(plan[name])) for name in ("kernel", "solver", "schedule") if name in plan]
    fallbacks = list(getattr(report, "fallbacks", None) or [])
    facts += [("fallback", text) for text in fallbacks[:_MOST_FALLBACKS]]
    if len(fallbacks) > _MOST_FALLBACKS:
        facts.append(("fallback", f"and {len(fallbacks) - _MOST_FALLBACKS} more"))
    return facts


def _counts(draws: Any, plan: dict[str, Any]) -> str:
    text = f"{plan.get('num_samples', '?')} draws of {plan.get('num_chains', '?')} chains"
    if plan.get("thinning", 1) != 1:
        text += f", every {plan['thinning']}th kept"
    return text if getattr(draws, "finished", True) else f"{text}; the run is not finished"


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
    rows = shown_rows(draws, summary_rows(draws))
    lines = text_table(rows[:_MOST_ROWS])
    if len(rows) > _MOST_ROWS:
        lines.append(f"... and {len(rows) - _MOST_ROWS} more")
    indent = " " * 13
    for label, text in run_facts(draws):
        lines += textwrap.wrap(
            f"{label:<13}{text}", 110, subsequent_indent=indent, break_on_hyphens=False
        )
    return "\n".join(lines)


def run_json(draws: Any) -> str:
    """A run as JSON: the summary, whether it is certified and finished, its plan, and totals over all draws."""
    statistics = getattr(draws, "statistics", None)
    found = {
        "summary": summary_rows(draws),
        "certified": is_certified(draws),
        "finished": getattr(draws, "finished", True),
        "plan": draws.plan,
        "totals": {} if statistics is None else statistics.totals(),
    }
    return json.dumps(plain(found), indent=2, allow_nan=False)
