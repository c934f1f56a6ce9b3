"""NumPyro's own tests with `MCMC` replaced by `ParallelMCMC`: `python -m benchmarks.numpyro_suite CHECKOUT --out DIR`.

CHECKOUT is a copy of NumPyro's repository, of the version that is installed. Tests that make an `MCMC`, themselves or by a
function of their file, are run twice by pytest, each file in a process of its own: with NumPyro's class, which also shows over
which kernel, and then those over HMC, NUTS or a kernel that wraps them with ours. A test that fails with NumPyro's class too,
or is skipped, does not count. Nothing else of a test is changed, so a test of NumPyro's inner workings may fail for that
alone: failures are listed with what they said.

Both runs are this file loaded as a plugin of pytest; rows are written as tests end, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import OUT, keep

# How the two processes are told what to do.
_CLASS, _ROWS, _LIMIT = "PARTIME_SUITE_CLASS", "PARTIME_SUITE_ROWS", "PARTIME_SUITE_LIMIT"
# Kernels whose steps are of no interest here.
_NO_GRADIENTS = ("SA", "AIES", "ESS", "BarkerMH")
_SEEN: set[str] = set()
# The outcome in the row of a file whose tests have all been run.
_ENDED = "ended"


# --- the plugin


def pytest_configure(config: Any) -> None:
    """Put the class in the place of NumPyro's, before a test module imports it."""
    if _CLASS not in os.environ:
        return
    import numpyro.infer
    import numpyro.infer.mcmc

    theirs = numpyro.infer.MCMC
    made = theirs.__init__

    def noted(self: Any, sampler: Any, *args: Any, **options: Any) -> None:
        _SEEN.add(type(sampler).__name__)
        made(self, sampler, *args, **options)

    theirs.__init__ = noted
    if os.environ[_CLASS] == "ours":
        from partime_mcmc.numpyro import ParallelMCMC

        numpyro.infer.MCMC = numpyro.infer.mcmc.MCMC = ParallelMCMC


def pytest_runtest_setup(item: Any) -> None:
    """Nothing is seen yet; a test that takes too long is stopped."""
    _SEEN.clear()
    if _LIMIT in os.environ:
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(int(os.environ[_LIMIT]))


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"stopped after {os.environ[_LIMIT]} s")


def pytest_runtest_logreport(report: Any) -> None:
    """One line for each test that was called, or could not be."""
    if _ROWS not in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    if report.when == "teardown":
        return
    signal.alarm(0)
    crash = getattr(report.longrepr, "reprcrash", None)
    row = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "kernels": sorted(_SEEN),
        "seconds": report.duration,
        "said": "" if crash is None else crash.message.strip().splitlines()[0][:200],
    }
    with open(os.environ[_ROWS], "a") as file:
        file.write(json.dumps(row) + "\n")


# --- the two runs


def tests_with_mcmc(checkout: Path) -> list[str]:
    """Test functions by which an MCMC is made, `file::name`, files relative to the checkout.

    Raises:
        ValueError: If there are none.
    """
    found = sorted((checkout / "test").rglob("test_*.py"))
    tests = [
        f"{file.relative_to(checkout)}::{name}"
        for file in found
        for name in _making_mcmc(file.read_text())
    ]
    if not tests:
        raise ValueError(
            f"CHECKOUT: got {checkout}, wanted a copy of NumPyro's repository, with its folder test/"
        )
    return tests


def _making_mcmc(source: str) -> list[str]:
    """Names of the tests in a file that name `MCMC`, or a function or class of the file that does, and so on."""
    if "MCMC(" not in source:
        return []
    written = {
        one.name: set(map(_name, ast.walk(one)))
        for one in ast.parse(source).body
        if isinstance(one, ast.FunctionDef | ast.ClassDef)
    }
    making, before = {"MCMC"}, set()
    while making != before:
        before = set(making)
        making |= {name for name, names in written.items() if names & making}
    return [name for name in written if name in making and name.lower().startswith("test")]


def _name(node: ast.AST) -> str:
    """What a node names: a variable, an attribute, or an argument, which may be a fixture."""
    return next((getattr(node, kind) for kind in ("id", "attr", "arg") if hasattr(node, kind)), "")


def rows_of(path: Path) -> dict[str, dict]:
    """What was written so far, by test."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["test"]: row for row in map(json.loads, lines)}


def run_tests(checkout: Path, tests: list[str], whose: str, path: Path, limit: int) -> None:
    """Run pytest file by file, so that a crash costs the rest of one file only.

    Args:
        checkout: NumPyro's repository.
        tests: Files or tests.
        whose: "theirs" or "ours".
        path: Where rows go.
        limit: Seconds for a test.
    """
    here = Path(__file__).resolve().parent.parent
    known = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        _CLASS: whose,
        _ROWS: str(path.resolve()),
        _LIMIT: str(limit),
        "PYTHONPATH": os.pathsep.join([str(here), *([known] if known else [])]),
        "CI": "1",  # as in NumPyro's own runs: no progress bars
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.numpyro_suite"]
    # What the copy's own settings make of warnings is NumPyro's affair; that runs have not converged, or that nothing was adapted,
    # is ours to say.
    command += ["-p", "no:cacheprovider", "-W", "ignore:NOT CONVERGED", "-W", "ignore:num_warmup"]
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.partition("::")[0], []).append(test)
    for file, inside in files.items():
        print(f"{whose}: {file}", flush=True)
        ended = subprocess.run(
            [*command, *inside], cwd=checkout, env=environment, stdout=subprocess.DEVNULL
        )
        if ended.returncode in (0, 1):
            with open(path, "a") as rows:
                rows.write(json.dumps({"test": file, "outcome": _ENDED, "kernels": []}) + "\n")


def counted(theirs: dict[str, dict]) -> list[str]:
    """Tests that pass with NumPyro's class and make one over HMC, NUTS or a kernel that wraps them."""
    return [
        test
        for test, row in theirs.items()
        if row["outcome"] == "passed" and set(row["kernels"]) - set(_NO_GRADIENTS)
    ]


def table(theirs: dict[str, dict], ours: dict[str, dict]) -> str:
    """The Markdown table: how many of each file pass, and what the others said."""
    tests = [test for test in counted(theirs) if test in ours]
    good = {test: ours[test]["outcome"] == "passed" for test in tests}
    lines = ["| file | tests with an `MCMC` over HMC or NUTS | pass with ours |", "|---|---|---|"]
    for file in sorted({test.partition("::")[0] for test in tests}):
        of_file = [test for test in tests if test.startswith(file + "::")]
        lines.append(f"| {file} | {len(of_file)} | {sum(good[test] for test in of_file)} |")
    share = 100 * sum(good.values()) / max(1, len(good))
    lines += [f"| **all** | {len(good)} | {sum(good.values())} ({share:.1f}%) |", ""]
    failing = [test for test in tests if not good[test]]
    if failing:
        lines += ["| fails with ours | it said |", "|---|---|"]
    for test in failing:
        said = ours[test]["said"].replace("|", "\\|")
        lines.append(f"| {test.removeprefix('test/')} | {said} |")
    left = [test for test in counted(theirs) if test not in ours]
    if left:
        lines += ["", f"Not run with ours: {len(left)}."]
    failed = [row for row in theirs.values() if row["outcome"] == "failed"]
    lines += ["", f"Fail with NumPyro's own class here, and do not count: {len(failed)}.", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if fewer than 95% of the tests pass."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "checkout", type=Path, metavar="CHECKOUT", help="a copy of NumPyro's repository"
    )
    parser.add_argument("--only", default="", help="files whose name has this in it")
    parser.add_argument(
        "--again", action="store_true", help="run those that failed with ours again"
    )
    parser.add_argument("--limit", type=int, default=300, help="seconds for a test")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = {whose: arguments.out / f"numpyro-suite-{whose}.jsonl" for whose in ("theirs", "ours")}
    checkout, limit = arguments.checkout, arguments.limit
    tests = [
        test for test in tests_with_mcmc(checkout) if arguments.only in test.partition("::")[0]
    ]
    files = {test.partition("::")[0] for test in tests}
    ran = {test for test, row in rows_of(paths["theirs"]).items() if row["outcome"] == _ENDED}
    missing = [test for test in tests if test.partition("::")[0] not in ran]
    run_tests(checkout, missing, "theirs", paths["theirs"], limit)
    theirs, ours = (rows_of(path) for path in paths.values())
    done = {test for test, row in ours.items() if not arguments.again or row["outcome"] == "passed"}
    wanted = [test for test in counted(theirs) if test.partition("::")[0] in files]
    left = [test for test in wanted if test not in done]
    run_tests(checkout, left, "ours", paths["ours"], limit)
    ours = rows_of(paths["ours"])
    text = table(theirs, ours)
    print(text)
    rows = [
        {name: ours[test][name] for name in ("test", "outcome", "kernels", "said")}
        for test in counted(theirs)
        if test in ours
    ]
    keep(arguments.out / "numpyro-suite-cpu.json", {"rows": rows}, text)
    good = sum(row["outcome"] == "passed" for row in rows)
    return int(good < 0.95 * len(rows))


if __name__ == "__main__":
    sys.exit(main())
