"""What a comparison of two runs found: levels of agreement, the report, its text and its JSON.

Levels, from worst to best (a report says one of them and why it is not a better one):

* ``FAIL``: the runs disagree, or one of them is broken (not finite, frozen).
* ``INCONCLUSIVE``: too few chains or effective draws to say anything; never to be read as a pass.
* ``STATISTICAL``: only distributional tests pass.
* ``CERTIFIED_PATH``: the parallel path obeys the recurrence, and is the path of the sequential run with the same dice.
* ``BITWISE``: the two runs hold the same bits.

Left out: how a level is reached, which is :mod:`partime_mcmc.diagnostics.compare`'s affair.
"""

import dataclasses
import enum
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WIDTH = 100
MAX_ROWS, MAX_REASONS = 30, 8


class Level(enum.IntEnum):
    """How well two runs agree; levels are ordered, so ``level >= Level.STATISTICAL`` reads as it says."""

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
    """Two runs with the same dice, step by step; lists hold one entry per chain.

    Distances are maxima over coordinates in posterior standard deviations. An *excursion* is a stretch of consecutive
    steps at which the paths are further apart than ``tolerance``.

    Attributes:
        tolerance: the distance up to which two states count as the same.
        first_difference: first step whose bits differ, -1 for none.
        fraction_equal: share of steps with equal bits.
        fraction_within: share of steps within ``tolerance``.
        max_distance: largest distance at any step.
        max_distance_merged: largest distance outside excursions.
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
    max_distance_merged: list[float]
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
        path: step-by-step comparison, or None for runs with different dice.
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
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(plain({**fields, "ok": self.ok}), indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = [self.verdict]
        for label, entries in (("reason", self.reasons), ("note", self.notes)):
            lines += [f"{label}: {entry}" for entry in entries[:MAX_REASONS]]
            if len(entries) > MAX_REASONS:
                lines.append(f"{label}s: {len(entries) - MAX_REASONS} more, in to_json()")
        lines += [f"{label}: {text}" for label, text in self._facts()]
        wrapped = [
            piece
            for line in lines
            for piece in textwrap.wrap(line, WIDTH, subsequent_indent="    ")
        ]
        return "\n".join([*wrapped, "", *self._table()])

    def _facts(self) -> list[tuple[str, str]]:
        """The lines between verdict and table."""
        facts = []
        if self.path is not None:
            path = self.path
            flips = "not recorded" if min(path.num_flips) < 0 else f"{sum(path.num_flips)}"
            facts.append(
                (
                    "path",
                    f"{np.mean(path.fraction_equal):.1%} of the steps equal bit for bit, "
                    f"{np.mean(path.fraction_within):.2%} within {path.tolerance:g} sd; "
                    f"largest distance {max(path.max_distance):.2g} sd; accept decisions that differ: {flips}; "
                    f"excursions: {sum(path.num_excursions)}; first difference per chain {path.first_difference}; "
                    f"means differ by {path.mean_shift:.2g} MCSE, sds by {path.sd_shift:.2g}",
                )
            )
        if math.isfinite(self.residual_tolerance):
            where = (
                f" at chain {self.worst_step[0]}, step {self.worst_step[1]}"
                if self.worst_step
                else ""
            )
            facts.append(
                (
                    "certificate",
                    f"residual {self.max_residual:.2g}{where}, allowed {self.residual_tolerance:.2g}",
                )
            )
        if self.tests:
            tests = self.tests
            facts.append(
                (
                    "distribution",
                    f"{tests['num_z']} z-scores, largest {abs(self.worst['z']) if self.worst else math.nan:.2f} of "
                    f"{tests['max_z']:.2f} allowed; R-hat up to {tests['r_hat']:.4f}; smallest KS p "
                    f"{tests['ks_p']:.2g}; joint test p {tests['joint_p']:.3g}; a shift of "
                    f"{self.min_detectable_shift:.2g} sd would be found",
                )
            )
        return facts

    def _table(self) -> list[str]:
        rows = self.table
        if len(rows) > MAX_ROWS:
            rows = sorted(rows, key=lambda row: -_or_zero(row["worst_z"]))
        columns = {
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
        lines = text_table(
            [{title: row[key] for title, key in columns.items()} for row in rows[:MAX_ROWS]]
        )
        if len(rows) > MAX_ROWS:
            lines.append(
                f"... and {len(rows) - MAX_ROWS} more with smaller |z|; to_json() has them all"
            )
        return lines


def text_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table within 100 columns: the first column left-aligned, numbers in four digits, right-aligned.

    Args:
        rows: dicts with the same keys, which become the titles.
    """
    if not rows:
        return []
    titles = list(rows[0])
    cells = [titles, *([cell(row[title]) for title in titles] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    widths[0] = max(10, min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for first, *rest in cells:
        first = first if len(first) <= widths[0] else first[: widths[0] - 1] + "…"
        lines.append(
            "  ".join(
                [
                    first.ljust(widths[0]),
                    *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)),
                ]
            )
        )
    return [line.rstrip() for line in lines]


def cell(value: Any) -> str:
    """A value as it stands in a table: text as it is, yes and no, numbers in four digits, `-` for NaN."""
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


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else abs(value)


def plain(value: Any) -> Any:
    """``value`` in Python's own types, fit for strict JSON: dicts by string, lists, NaN as "nan", enums by name."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (str, bool)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, (int, float)) or hasattr(value, "__array__"):
        value = np.asarray(value)
        if value.ndim:
            return [plain(entry) for entry in value.tolist()]
        value = value.item()
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return str(value)
