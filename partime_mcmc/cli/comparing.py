"""`python -m partime_mcmc compare A B`: do two runs on disk agree, as paths if they share their dice, else in
distribution?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from partime_mcmc.cli.codes import CERTIFIED, NOT_CERTIFIED
from partime_mcmc.cli.runs import open_run
from partime_mcmc.diagnostics.compare import compare
from partime_mcmc.diagnostics.report import Level, Report

LEVELS = {
    "statistical": Level.STATISTICAL,
    "certified-path": Level.CERTIFIED_PATH,
    "bitwise": Level.BITWISE,
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to a parser's commands."""
    command = commands.add_parser(
        "compare", help="do two runs agree?", description=__doc__.split(": ", 1)[1]
    )
    command.add_argument(
        "first", type=Path, metavar="A", help="a store or a NetCDF file, the parallel run"
    )
    command.add_argument("second", type=Path, metavar="B", help="likewise, the sequential one")
    command.add_argument(
        "--at-least",
        choices=list(LEVELS),
        help="what counts as agreement; default: certified-path for "
        "runs with the same dice, statistical for others",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_compare)
    return command


def _compare(arguments: argparse.Namespace) -> int:
    report = compare(open_run(arguments.first).load(), open_run(arguments.second).load())
    print(report.to_json() if arguments.json else report)
    return CERTIFIED if report.level >= _wanted(arguments, report) else NOT_CERTIFIED


def _wanted(arguments: argparse.Namespace, report: Report) -> Level:
    if arguments.at_least is not None:
        return LEVELS[arguments.at_least]
    return Level.STATISTICAL if report.path is None else Level.CERTIFIED_PATH
