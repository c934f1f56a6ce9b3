"""What the figures are wanted to be, checked against a folder of results by `python -m benchmarks report DIR`.

A target reads its number from the JSON of one benchmark. Without that file, or without the row, it is "not measured":
never met.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import statistics
from pathlib import Path
from typing import Any, Callable


@dataclasses.dataclass(frozen=True)
class Bound:
    """Which side of a value is good."""

    sign: str
    holds: Callable[[float, float], bool]


AT_LEAST, AT_MOST = Bound("≥", operator.ge), Bound("≤", operator.le)


@dataclasses.dataclass(frozen=True)
class Target:
    """One figure.

    Attributes:
        name: What is measured.
        file: The record that has it, without `.json`.
        read: The figure from the record; IndexError, KeyError or ValueError where it is not in there.
        bound: Which side is good.
        wanted: The value.
    """

    name: str
    file: str
    read: Callable[[Any], float]
    bound: Bound
    wanted: float

    def found(self, folder: Path) -> float | None:
        """The figure, None if it was not measured."""
        stored = folder / f"{self.file}.json"
        if not stored.exists():
            return None
        try:
            return float(self.read(json.loads(stored.read_text(encoding="utf-8"))))
        except (IndexError, KeyError, ValueError):
            return None

    def line(self, folder: Path) -> str:
        """One line of the Markdown table."""
        found = self.found(folder)
        verdict = (
            "not measured"
            if found is None
            else "met"
            if self.bound.holds(found, self.wanted)
            else "**not met**"
        )
        figure = "—" if found is None else f"{found:.3g}"
        return f"| {self.name} | {self.bound.sign} {self.wanted:g} | {figure} | {verdict} |"


def _rows(start: str, record: dict) -> list[dict]:
    return [
        row
        for row in record["rows"]
        if row["name"].startswith(start) and row["best"]["status"] == "CONVERGED"
    ]


def shooting(
    start: str,
    wanted: float,
    figure: str = "one chain, loop / shooting",
    file: str = "shooting-cpu",
) -> Target:
    """The worst ratio of all rows whose name starts so."""
    return Target(
        f"{start}: {figure}",
        file,
        lambda record: min(row["best"]["ratio"] for row in _rows(start, record)),
        AT_LEAST,
        wanted,
    )


def _evaluations(record: dict) -> float:
    """The most evaluations per draw among chains that are advised to run in parallel."""
    return max(
        row["best"]["evaluations"]
        for row in record["rows"]
        if row.get("advice", {}).get("segments", 1) > 1
    )


def _advised(record: dict) -> float:
    return min(row["ratio"] for part in ("chains", "forgetless") for row in record[part])


def _loss(record: dict) -> float:
    """The most that the rule for the number of segments loses, as a ratio of times."""
    return max(1 + row["loss"] for row in record["chains"])


def _scan(record: dict) -> float:
    """The scan in use against the fastest of all, the worst size."""
    return max(
        row["scans"][row["in_use"]]["seconds"]
        / min(one["seconds"] for one in row["scans"].values())
        for row in record["rows"]
    )


def _associative(record: dict) -> float:
    row = [
        row
        for row in record["rows"]
        if (row["kind"], row["num_steps"], row["width"]) == ("diagonal", 1_000_000, 8)
    ][0]
    return row["scans"]["associative"]["seconds"] / row["scans"][row["in_use"]]["seconds"]


def _bandwidth(record: dict) -> float:
    return max(
        row["scans"][row["in_use"]]["bytes_per_second"] / row["copy_bytes_per_second"]
        for row in record["rows"]
        if row["kind"] == "diagonal"
    )


def gru(width: int, length: int) -> Callable[[dict], float]:
    """Forward, one sequence, no solver given."""

    def read(record: dict) -> float:
        return [
            row["forward"]["ratio"]
            for row in record["rows"]
            if (row["T"], row["D"], row["batch"], row["solver"]) == (length, width, 1, "chosen")
        ][0]

    return read


def _gru_worst(record: dict) -> float:
    return min(
        row[kind]["ratio"]
        for row in record["rows"]
        if row["solver"] == "chosen"
        for kind in ("forward", "gradient")
    )


def _multishift(record: dict) -> float:
    return min(
        kernel["best"]["ratio"]
        for name, kernel in record["kernels"].items()
        if name.startswith("MALA")
    )


def _multishift_evaluations(record: dict) -> float:
    return max(
        row["evaluations"]
        for name, kernel in record["kernels"].items()
        if name.startswith("MALA")
        for row in kernel["segments"]
        if row["segments"] == 1024
    )


def _against_nuts(record: dict) -> list[float]:
    """Time to the wanted ESS, NUTS at its fastest / ours, of each posterior."""
    return [
        min(
            one["seconds_to_target"]
            for method, one in row.items()
            if method != "ours" and "seconds_to_target" in one
        )
        / row["ours"]["seconds_to_target"]
        for row in record["rows"].values()
    ]


def chain(start: str, num_steps: int) -> Callable[[dict], float]:
    """One chain on an accelerator."""

    def read(record: dict) -> float:
        return [
            row["best"]["ratio"]
            for row in record["rows"]
            if row["name"].startswith(start)
            and row["chains"] == 1
            and row["num_steps"] == num_steps
            and row["best"]["status"] == "CONVERGED"
        ][0]

    return read


TARGETS = {
    "cpu": (
        shooting("eight schools, MALA", 3.5),
        shooting("eight schools, HMC", 4),
        shooting("banana, HMC 8×0.5", 9),
        shooting("mixture of two normals, MALA", 6),
        shooting("logistic regression", 1.5),
        shooting("eight schools, NUTS", 1.7),
        Target("most evaluations per draw of these", "shooting-cpu", _evaluations, AT_MOST, 2),
        Target("scan in use / fastest, worst size", "scans-cpu", _scan, AT_MOST, 1.05),
        Target(
            "associative scan / scan in use, T = 10⁶, D = 8", "scans-cpu", _associative, AT_LEAST, 5
        ),
        Target(
            "time of the rule's segments / of the best, worst chains",
            "shooting-advised-cpu",
            _loss,
            AT_MOST,
            1.1,
        ),
        Target(
            "loop / `solver=None`, worst chains", "shooting-advised-cpu", _advised, AT_LEAST, 0.8
        ),
        Target(
            "`lax.scan` / `unroll` with no solver given, worst network",
            "gru-cpu",
            _gru_worst,
            AT_LEAST,
            0.8,
        ),
        Target(
            "GRU D = 64, T = 32,768: `lax.scan` / `unroll`, forward",
            "gru-cpu",
            gru(64, 32_768),
            AT_LEAST,
            2,
        ),
        Target(
            "MALA, multishift coupling: BlackJAX's loop / shooting, random numbers included",
            "dice-shooting",
            _multishift,
            AT_LEAST,
            5,
        ),
        Target(
            "the same, evaluations per draw at 1,024 segments",
            "dice-shooting",
            _multishift_evaluations,
            AT_MOST,
            1.6,
        ),
        Target(
            "posteriors on which ours reaches the ESS before NUTS, share",
            "posteriors-cpu",
            lambda record: statistics.mean(ratio > 1 for ratio in _against_nuts(record)),
            AT_LEAST,
            7 / 9,
        ),
        Target(
            "seconds to the ESS, NUTS / ours, median of posteriors",
            "posteriors-cpu",
            lambda record: statistics.median(_against_nuts(record)),
            AT_LEAST,
            4,
        ),
    ),
    "gpu": (
        Target(
            "eight schools HMC, one chain, T = 10⁶",
            "chains-gpu",
            chain("eight schools, HMC", 1_000_000),
            AT_LEAST,
            100,
        ),
        Target(
            "logistic regression MALA, one chain, T = 10⁵",
            "chains-gpu",
            chain("logistic regression, MALA", 100_000),
            AT_LEAST,
            50,
        ),
        Target(
            "logistic regression HMC, one chain, T = 10⁵",
            "chains-gpu",
            chain("logistic regression, HMC", 100_000),
            AT_LEAST,
            50,
        ),
        Target("GRU D = 32, T = 10⁵, forward", "gru-gpu", gru(32, 100_000), AT_LEAST, 50),
        Target("diagonal scan in use, bandwidth / copy", "scans-gpu", _bandwidth, AT_LEAST, 0.6),
    ),
}


def check(folder: Path) -> str:
    """The Markdown table of all targets of the platforms that a folder has records of."""
    lines = ["| figure | wanted | found | |", "|---|---|---|---|"]
    for targets in TARGETS.values():
        if any((folder / f"{target.file}.json").exists() for target in targets):
            lines += [target.line(folder) for target in targets]
    return "\n".join(lines) + "\n"
