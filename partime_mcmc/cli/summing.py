"""`python -m partime_mcmc summary RUN`: what a store or a NetCDF file holds, without the model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from partime_mcmc.cli import telling
from partime_mcmc.cli.codes import CERTIFIED, NOT_CERTIFIED
from partime_mcmc.cli.options import check_file
from partime_mcmc.cli.runs import open_run
from partime_mcmc.diagnostics import page
from partime_mcmc.diagnostics.report import plain


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to a parser's commands."""
    command = commands.add_parser(
        "summary",
        help="what a store or a file of draws holds",
        description=__doc__.split(": ", 1)[1],
    )
    command.add_argument("where", type=Path, metavar="RUN", help="a store, or a NetCDF file")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--report", type=Path, metavar="FILE.html", help="write a page with pictures and tables"
    )
    command.set_defaults(run=_summary)
    return command


def _summary(arguments: argparse.Namespace) -> int:
    check_file("--report", arguments.report, ".html")
    run = open_run(arguments.where)
    if arguments.json:
        found = {
            "summary": run.rows,
            "certified": run.certified,
            "finished": run.finished,
            "plan": run.plan,
            "totals": run.totals,
        }
        print(json.dumps(plain(found), indent=2, allow_nan=False))
    else:
        telling.stored(run)
    if arguments.report is not None:
        draws, notes = run.view()
        text = page.page(
            draws, title=str(arguments.where), rows=run.rows, totals=run.totals, notes=notes
        )
        page.write(text, arguments.report)
    return CERTIFIED if run.certified else NOT_CERTIFIED
