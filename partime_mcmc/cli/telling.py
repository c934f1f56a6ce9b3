"""What the command line says of a run: tables, certificate, work and times."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from partime_mcmc.cli.runs import Run
from partime_mcmc.diagnostics.arviz import summary_table
from partime_mcmc.diagnostics.checks import TooLarge
from partime_mcmc.diagnostics.report import text_table
from partime_mcmc.kernels.certificate import evidence_in_words

_MOST_ROWS, _MOST_FALLBACKS = 40, 5


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the source line that raised them."""
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *rest: print(f"warning: {message}", file=sys.stderr)
    try:
        yield
    finally:
        warnings.showwarning = shown


def line(label: str, text: str) -> None:
    """One labelled entry, wrapped."""
    print(
        textwrap.fill(
            text,
            110,
            initial_indent=f"{label:<12}",
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def stored(run: Run) -> None:
    """All there is to say of a run on disk."""
    print(f"{run.title}\n")
    table(run.rows, run.names)
    print()
    error = max(
        (row["rank_error"] for row in run.rows if not np.isnan(row.get("rank_error", np.nan))),
        default=0.0,
    )
    if error:
        line(
            "quantiles",
            f"of all draws, wrong in rank by at most {error:.2%} of them; ESS and R-hat by batches",
        )
    line(
        "certificate",
        "there is none in this file" if run.certificate is None else certified(run.certificate),
    )
    if run.totals.get("divergences"):
        line("divergences", f"{run.totals['divergences']:,}")
    for name in ("kernel", "solver", "schedule"):
        if name in run.plan:
            line(name, str(run.plan[name]))
    fallbacks(getattr(run.report, "fallbacks", None) or [])


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> None:
    """A table of posterior summaries; `names` are the values worth showing, None all."""
    if names:
        rows = [row for row in rows if row["name"].split("[")[0] in names]
    left_out = {"mcse_sd", "rank_error"} | (
        set() if any(row["frozen"] for row in rows) else {"frozen"}
    )
    rows = [{name: value for name, value in row.items() if name not in left_out} for row in rows]
    print("\n".join(text_table(rows[:_MOST_ROWS])))
    if len(rows) > _MOST_ROWS:
        print(f"... and {len(rows) - _MOST_ROWS} more")


def run(draws: Any) -> None:
    """All there is to say of draws in memory: the posterior, warm-up, advice, certificate, work."""
    print()
    table(summary_table(draws), draws.names)
    print()
    report, warmup = draws.report, draws.warmup
    if warmup is not None:
        settings = ", ".join(f"{name} {value:.4g}" for name, value in warmup.settings.items())
        line(
            "warm-up",
            f"{settings or 'nothing to tune'}, acceptance {warmup.acceptance:.2f}, "
            f"{warmup.num_gradients} gradients, {warmup.seconds:.1f} s with compilation",
        )
    if draws.advice is not None:
        line("advice", str(draws.advice))
    line("certificate", certified(draws.certificate))
    line(
        "work",
        f"{int(report.iterations.max())} iterations over all stretches, {report.evaluations_per_sample:.2f} "
        f"evaluations of f and {report.jvps_per_sample:.2f} JVPs per draw, depth {report.depth} of "
        f"{draws.plan['num_samples']} steps",
    )
    fallbacks(report.fallbacks)


def fallbacks(sentences: Sequence[str]) -> None:
    """What had to be done sequentially, the first few."""
    for sentence in sentences[:_MOST_FALLBACKS]:
        line("fallback", sentence)
    if len(sentences) > _MOST_FALLBACKS:
        line("fallback", f"... and {len(sentences) - _MOST_FALLBACKS} more")


def certified(certificate: Any) -> str:
    """A certificate in one sentence."""
    residual, tolerance = (
        np.max(np.asarray(certificate.max_residual)),
        np.max(np.asarray(certificate.tolerance)),
    )
    rejected = np.asarray(certificate.num_rejected)
    count = f"{int(rejected.sum())} rejections" if (rejected >= 0).all() else "no accept decisions"
    chains = np.asarray(certificate.certified)
    # A file holds the fields alone; those written before there was a choice say nothing of it.
    evidence = evidence_in_words(getattr(certificate, "independent", True))
    return (
        f"{int(chains.sum())} of {chains.size} chains certified, largest residual {residual:.1e} noise units "
        f"(allowed {tolerance:.0e}), {count}, {int(np.sum(np.asarray(certificate.num_nonfinite_proposals)))} "
        f"proposals out of range; {evidence}"
    )


def sentence(error: Exception) -> str:
    """What went wrong, on one line."""
    kind = (
        ""
        if isinstance(error, (ValueError, TypeError, OSError, ImportError))
        else f"{type(error).__name__}: "
    )
    # JAX's note on what its traceback leaves out says nothing to those who see no traceback.
    notes = (
        note for note in getattr(error, "__notes__", ()) if "JAX_TRACEBACK_FILTERING" not in note
    )
    parts = [str(error).strip().split("\n\n")[0] or type(error).__name__, *notes]
    text = kind + " ".join(". ".join(part.rstrip().removesuffix(".") for part in parts).split())
    hints = {"--float64": "jax_enable_x64" in text, "--store DIR": isinstance(error, TooLarge)}
    return text + "".join(f" (here: {option})" for option, fits in hints.items() if fits)
