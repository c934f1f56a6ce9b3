"""Run the papers' experiments: `python -m benchmarks.papers NAME [--size small|paper] [--out DIR]`.

NAME is one of those that `--list` shows, or `all`. Each leaves a JSON, a Markdown table and an SVG figure in DIR, and prints
the table of claims. `--readme FILE` puts the claims of all records in DIR between the marks of that page afterwards; with
the name `none` nothing is run before. Small sizes take under two minutes each on two cores; paper sizes want a GPU
(`bash benchmarks/gpu.sh papers OUT`).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.papers.experiment import NAMES, SIZES, report, run_experiment, title_of
from benchmarks.record import OUT, put_between

BEGIN, END = "<!-- claims, from benchmarks/results/papers -->", "<!-- end of claims -->"


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if an experiment failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("name", nargs="?", choices=[*NAMES, "all", "none"])
    parser.add_argument("--list", action="store_true", help="show the experiments")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, default=OUT / "papers")
    parser.add_argument("--readme", type=Path, help="page to put the table of claims in")
    flags = parser.parse_args(argv)
    if flags.list:
        for name in NAMES:
            module = importlib.import_module(f"benchmarks.papers.{name}")
            print(f"{name:15} {title_of(module)}")
        return 0
    if flags.name is None:
        parser.error(f"name: wanted one of {', '.join(NAMES)}, all, none, or --list")
    failed = []
    for name in {"all": NAMES, "none": ()}.get(flags.name, (flags.name,)):
        try:
            run_experiment(name, flags.size, flags.out)
        except Exception as error:  # the others are still worth running
            if flags.name != "all":
                raise
            failed.append(name)
            print(f"{name}: failed, {type(error).__name__}: {error}", file=sys.stderr)
    if flags.readme:
        put_between(flags.readme, BEGIN, END, report(flags.out, size=flags.size))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
