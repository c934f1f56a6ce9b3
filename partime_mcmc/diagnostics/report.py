"""What a comparison of two runs found: levels of agreement, the report, its text, its HTML and its JSON.

Levels, from worst to best (a report has one of them, and the reasons why it is not a better one):

* ``FAIL``: the runs disagree, or one of them is broken (not finite, frozen).
* ``INCONCLUSIVE``: too few chains or effective draws to say anything; never to be read as a pass.
* ``STATISTICAL``: only distributional tests pass.
* ``CERTIFIED_PATH``: the parallel path obeys the recurrence, and is the path of the sequential run with the same
  random numbers.
* ``BITWISE``: the two runs hold the same bits.

Left out: how a level is reached; :mod:`partime_mcmc.diagnostics.compare` has that.
"""

import dataclasses
import enum
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from partime_mcmc.diagnostics import describe
from partime_mcmc.diagnostics.describe import WIDTH, text_table
from partime_mcmc.diagnostics.values import plain

_MAX_ROWS, _MAX_REASONS = 30, 8
_COLUMNS = {
    "coordinate": "name",
    "mean par": "mean_parallel",
    "mean seq": "mean_sequential",
    "sd par": "sd_parallel",
    "sd seq": "sd_sequential",
    "ESS par": "ess_bulk_parallel",
    "ESS seq": "ess_bulk_sequential",
    "R-hat": "r_hat",
    "max |z|": "worst_z",
    "KS": "ks",
}


class Level(enum.IntEnum):
    """How well two runs agree; levels are ordered, as in ``level >= Level.STATISTICAL``."""

    FAIL = 0
    INCONCLUSIVE = 1
    STATISTICAL = 2
    CERTIFIED_PATH = 3
    BITWISE = 4


class Disagreement(RuntimeError):
    """Two runs agree less well than was asked for; ``report`` is the whole finding."""

    def __init__(self, report: "Report"):
        super().__init__("\n".join([report.verdict, *(f"- {reason}" for reason in report.reasons)]))
        self.report = report


@dataclasses.dataclass(frozen=True)
class PathComparison:
    """Two runs with the same random numbers, step by step; lists hold one entry per chain.

    Distances are maxima over coordinates in posterior standard deviations. An *excursion* is a run of consecutive
    steps at which the paths are further apart than ``tolerance``.

    Attributes:
        tolerance: the distance up to which two states count as the same.
        first_difference: first step whose bits differ, -1 for none.
        fraction_equal: share of steps with equal bits.
        fraction_within: share of steps within ``tolerance``.
        max_distance: largest distance at any step.
        num_flips: accept decisions that differ, -1 where a side recorded none.
        num_excursions: excursions, re-merged or not.
        longest_excursion: steps of the longest one.
        num_unmerged: excursions still under way at the last step.
        num_knife_edges: excursions, and flips outside of them, over all chains.
        max_knife_edges: as many of them as rounding explains in this dtype.
        mean_shift: largest difference of means over coordinates, in MCSE of the sequential run.
        sd_shift: largest difference of standard deviations, likewise.
        paired_ok: whether both shifts are at most 0.1.
        ok: whether the paths are the same, knife-edge excursions allowed for.
    """

    tolerance: float
    first_difference: list[int]
    fraction_equal: list[float]
    fraction_within: list[float]
    max_distance: list[float]
    num_flips: list[int]
    num_excursions: list[int]
    longest_excursion: list[int]
    num_unmerged: list[int]
    num_knife_edges: int
    max_knife_edges: int
    mean_shift: float
    sd_shift: float
    paired_ok: bool
    ok: bool

    def __str__(self) -> str:
        flips = "not recorded" if min(self.num_flips) < 0 else f"{sum(self.num_flips)}"
        return (
            f"{np.mean(self.fraction_equal):.1%} of the steps equal bit for bit, {np.mean(self.fraction_within):.2%} "
            f"within {self.tolerance:g} sd; largest distance {max(self.max_distance):.2g} sd; accept decisions that "
            f"differ: {flips}; excursions: {sum(self.num_excursions)}; first difference per chain "
            f"{self.first_difference}; means differ by {self.mean_shift:.2g} MCSE, sds by {self.sd_shift:.2g}"
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """The finding of :func:`partime_mcmc.diagnostics.compare.compare`; ``str()`` of it is a table.

    Attributes:
        level: how well the runs agree.
        verdict: the level in one plain sentence.
        reasons: why the level is not a better one; empty for ``BITWISE``.
        notes: what a careful reader should know besides.
        status: the parallel run's status per chain.
        dtype, device, versions: what the parallel run ran on.
        num_samples, num_chains: draws per chain and chains, (parallel, sequential).
        iterations: solver iterations per chain of the parallel run.
        max_residual: largest residual of the certificate, in the certificate's own scale, NaN unknown.
        worst_step: (chain, step) of that residual.
        residual_tolerance: what the certificate allows.
        num_ambiguous: accept decisions within rounding of their threshold, -1 unknown.
        min_margin: smallest margin of an accept decision, NaN unknown.
        num_nonfinite_proposals: proposals that were not finite (and were rejected), -1 unknown.
        num_frozen: chains of either side that never moved.
        fallbacks: what the parallel run had to fall back on.
        path: step-by-step comparison, or None for runs with different random numbers.
        tests: outcome of the tests over all coordinates: counts, thresholds, the joint test, run statistics.
        table: one dict per scalar coordinate: name, mean, sd, mcse_mean, ess_bulk and ess_tail of either side, ``z`` by
            quantity, ``worst_z``, ``r_hat`` over both sides' chains, ``ks`` and ``ks_p``.
        worst: name, quantity and z of the largest z-score.
        min_detectable_shift: shift of a mean, in posterior sd, found with probability 0.99 at this many draws.
    """

    level: Level
    verdict: str
    reasons: list[str]
    notes: list[str]
    status: list[str]
    dtype: str | None
    device: str | None
    versions: dict[str, str]
    num_samples: tuple[int, int]
    num_chains: tuple[int, int]
    iterations: list[int]
    max_residual: float
    worst_step: tuple[int, int] | None
    residual_tolerance: float
    num_ambiguous: int
    min_margin: float
    num_nonfinite_proposals: int
    num_frozen: int
    fallbacks: list[str]
    path: PathComparison | None
    tests: dict[str, Any]
    table: list[dict[str, Any]]
    worst: dict[str, Any] | None
    min_detectable_shift: float

    @property
    def ok(self) -> bool:
        """Whether the path is certified, or better; agreement in distribution alone is not ``ok``."""
        return self.level >= Level.CERTIFIED_PATH

    def or_raise(self, at_least: Level = Level.CERTIFIED_PATH) -> "Report":
        """The report itself if its level is ``at_least`` that.

        Ask for ``Level.STATISTICAL`` when the two runs are independent: no better level can then be had.

        Raises:
            Disagreement: with the reasons, otherwise.
        """
        if self.level < at_least:
            raise Disagreement(self)
        return self

    def to_json(self) -> str:
        """Everything as JSON text; ``level`` by name, NaN and infinities as the strings "nan", "inf", "-inf"."""
        return json.dumps(plain({**vars(self), "ok": self.ok}), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write the report to one HTML file that needs nothing else.

        Returns:
            The path written.

        Raises:
            OSError: if the file cannot be written.
        """
        return describe.save(path, self._repr_html_())

    def __str__(self) -> str:
        lines = [self.verdict]
        for label, entries in (("reason", self.reasons), ("note", self.notes)):
            lines += [f"{label}: {entry}" for entry in entries[:_MAX_REASONS]]
            if len(entries) > _MAX_REASONS:
                lines.append(f"{label}s: {len(entries) - _MAX_REASONS} more, in to_json()")
        lines += [f"{label}: {text}" for label, text in self._facts()]
        wrapped = [
            part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="    ")
        ]
        rows = self._rows()
        table = text_table(rows[:_MAX_ROWS])
        if len(rows) > _MAX_ROWS:
            table.append(
                f"... and {len(rows) - _MAX_ROWS} more with smaller |z|; to_json() has them all"
            )
        return "\n".join([*wrapped, "", *table])

    def _repr_html_(self) -> str:
        entries = (("reason", self.reasons), ("note", self.notes))
        facts = [(label, entry) for label, listed in entries for entry in listed]
        return describe.report_html(self.verdict, facts + self._facts(), self._rows())

    def _facts(self) -> list[tuple[str, str]]:
        """The sentences between verdict and table, with their labels."""
        facts = [] if self.path is None else [("path", str(self.path))]
        if math.isfinite(self.residual_tolerance):
            where = " at chain {}, step {}".format(*self.worst_step) if self.worst_step else ""
            allowed = f"allowed {self.residual_tolerance:.2g}"
            facts.append(("certificate", f"residual {self.max_residual:.2g}{where}, {allowed}"))
        if self.tests:
            tests, largest = self.tests, abs(self.worst["z"]) if self.worst else math.nan
            text = (
                f"{tests['num_z']} z-scores, largest {largest:.2f} of {tests['max_z']:.2f} allowed; R-hat up to "
                f"{tests['r_hat']:.4f}; smallest KS p {tests['ks_p']:.2g}; joint test p {tests['joint_p']:.3g}; a "
                f"shift of {self.min_detectable_shift:.2g} sd would be found"
            )
            facts.append(("distribution", text))
        return facts

    def _rows(self) -> list[dict[str, Any]]:
        """The table of all coordinates; a long one begins with the largest z-scores."""
        rows = self.table
        if len(rows) > _MAX_ROWS:
            rows = sorted(rows, key=lambda row: -np.nan_to_num(row["worst_z"]))
        return [{title: row[key] for title, key in _COLUMNS.items()} for row in rows]
