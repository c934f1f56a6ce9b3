"""All benchmarks by one command: `python -m benchmarks run --suite cpu --out DIR`, and `python -m benchmarks report
DIR`.

A suite is a list of benchmarks with the options that make them fit its time; each runs in a process of its own, one
after another, and leaves its JSON and Markdown in DIR, a new folder by default, so that a run never
overwrites the tables that the documentation quotes. `suite.json` keeps what ran, for how long, with how much memory,
what was left out, on which device, with which versions and commit. A benchmark that fails or runs out of its time
does not stop the others; it is listed, and the exit code is 1. `report` checks the figures against
what is wanted (`benchmarks.targets`); `python -m benchmarks quote DIR` puts the tables of DIR where README and
documentation quote them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import posteriors, verdict
from benchmarks.record import OUT, put_between

ROOT = Path(__file__).resolve().parent.parent
POSTERIORS = "PARTIME_REFERENCE_POSTERIORS"


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        module: Of this package.
        options: As typed.
        estimate: Seconds that it is thought to take on two idle cores, or one GPU.
        limit: Seconds after which it is stopped. Those of a suite add up to less than the suite may take.
        needs: An environment variable without which there is nothing to measure.
    """

    module: str
    options: tuple[str, ...] = ()
    estimate: float = 30
    limit: float = 60
    needs: str | None = None

    @property
    def name(self) -> str:
        """Module and options, as typed."""
        return " ".join((self.module, *self.options))


def _shooting(name: str, estimate: float, limit: float) -> Task:
    # Every number of segments is a program of its own, and compiling them is most of the time.
    return Task(
        "shooting",
        ("--repeats", "5", "--segments", "32", "64", "128", "--only", name),
        estimate,
        limit,
    )


# Seconds that all tasks of a suite may take.
BOUNDS = {"cpu": 20 * 60, "gpu": 6 * 60, "smoke": 180}
SUITES = {
    "cpu": (
        Task("scans", (), 95, 120),
        Task("memory", (), 20, 35),
        _shooting("eight schools", 150, 200),
        _shooting("banana, HMC 8×0.5", 20, 45),
        _shooting("mixture", 20, 45),
        _shooting("logistic", 65, 90),
        Task(
            "advised", ("--only", "eight schools, MALA", "--chains", "1", "--repeats", "3"), 40, 70
        ),
        Task("advised", ("--only", "random walk", "--repeats", "3"), 20, 40),
        Task(
            "multishift_shooting",
            ("--dtypes", "float32", "--num-numbers", "10000000", "--repeats", "3"),
            85,
            115,
        ),
        Task("chains_or_time", ("--chains", "1", "16", "256"), 130, 180),
        Task("gru", ("--lengths", "32768", "--widths", "32", "64", "--batches", "1"), 25, 50),
        Task(
            "long_run",
            ("--num-draws", "1000000", "--num-samples", "62500", "--repeats", "3"),
            55,
            80,
        ),
        Task("posteriors", ("--only", "sblri-blr"), 100, 130, POSTERIORS),
    ),
    "gpu": (
        Task("gpu", ("--budget", "120"), 170, 190),
        Task(
            "scans",
            ("--dtype", "float32", "float64", "bfloat16", "--repeats", "5", "--loop-steps", "1000"),
            60,
            80,
        ),
        Task(
            "gru",
            (
                "--lengths",
                "10000",
                "100000",
                "1000000",
                "--widths",
                "8",
                "32",
                "128",
                "--batches",
                "1",
                "--repeats",
                "3",
                "--largest",
                str(2**27),
                "--loop-steps",
                "2000",
                "--budget",
                "55",
            ),
            75,
            90,
        ),
    ),
    "smoke": (
        Task("scans", ("--longest", "1000", "--widths", "8", "--repeats", "1"), 8, 90),
        Task(
            "shooting",
            (
                "--only",
                "banana, HMC 8×0.5",
                "--scale",
                "0.02",
                "--num-warmup",
                "100",
                "--repeats",
                "1",
                "--segments",
                "16",
            ),
            15,
            90,
        ),
    ),
}
# What does not fit, by suite: to be run on its own, `python -m benchmarks.MODULE`.
LEFT_OUT = {
    "cpu": (
        "gru_autoregressive",
        "iterations",
        "devices",
        "streaming",
        "meetings",
        "verdict",
        "blackjax_kernels",
        "numpyro_suite",
        "multishift_shooting in float64",
        "advised, all other rows",
        "posteriors, the other eight",
        "validation",
        "long_run of 10⁷ draws",
        "gru at all other sizes",
    ),
    "gpu": ("gru at batch 16", "memory"),
    "smoke": (),
}


@dataclasses.dataclass(frozen=True)
class Quote:
    """A table in a page of the documentation, written from a record.

    Attributes:
        page: The page, from the root of the checkout.
        name: The record's.
        table: From the record to Markdown; None quotes the table that lies beside the record.
    """

    page: str
    name: str
    table: Callable[[dict], str] | None = None

    @property
    def begin(self) -> str:
        """The mark before it."""
        return f"<!-- table: benchmarks/results/{self.name} -->"

    @property
    def end(self) -> str:
        """The mark behind it."""
        return f"<!-- end of {self.name} -->"


QUOTED = (
    Quote("README.md", "posteriors-cpu", posteriors.short_table),
    Quote("README.md", "verdict-cpu", verdict.in_short),
    *(
        Quote("docs/benchmarks.md", name)
        for name in (
            "posteriors-cpu",
            "beside-nuts-cpu",
            "scripts-cpu",
            "scripts-newer-cpu",
            "numpyro-kernels-cpu",
            "cold-start-cpu",
            "cold-start-one-core-cpu",
            "shooting-cpu",
            "dice-meetings",
            "dice-shooting",
            "iterations-cpu",
            "memory-cpu",
            "scans-cpu",
            "gru-cpu",
            "faults-cpu",
            "mutations-cpu",
            "numpyro-suite-cpu",
            "blackjax-kernels-cpu",
        )
    ),
    Quote("docs/converged.md", "verdict-cpu"),
    Quote("docs/long-runs.md", "long-run-cpu"),
    Quote("docs/long-runs.md", "long-chain-cpu"),
)


def run(suite: str, out: Path) -> int:
    """Run a suite; 1 if anything failed."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    begin, done, described = time.monotonic(), [], device()
    tasks = [task for task in SUITES[suite] if task.needs is None or os.environ.get(task.needs)]
    left_out = [
        *LEFT_OUT[suite],
        *(f"{task.name} ({task.needs} is not set)" for task in SUITES[suite] if task not in tasks),
    ]
    for number, task in enumerate(tasks, 1):
        print(
            f"[{number}/{len(tasks)}, {time.monotonic() - begin:.0f} s] {task.name}: about {task.estimate:.0f} s",
            flush=True,
        )
        done.append(one(task, out))
        print(f"    {done[-1]['outcome']} after {done[-1]['seconds']:.0f} s", flush=True)
        record = {
            "suite": suite,
            "seconds": time.monotonic() - begin,
            "tasks": done,
            "left_out": left_out,
            "about": described,
        }
        (out / "suite.json").write_text(json.dumps(record, indent=1))
    failed = [task["name"] for task in done if task["outcome"] != "done"]
    print(
        f"{len(done) - len(failed)} of {len(done)} benchmarks done in {time.monotonic() - begin:.0f} s; results in {out}"
        + "".join(f"\nnot done: {name}" for name in failed)
        + f"\nnot part of this suite: {', '.join(left_out) or 'nothing'}"
    )
    return int(bool(failed))


def one(task: Task, out: Path) -> dict:
    """One benchmark in a process of its own."""
    begin = time.monotonic()
    log = out / "logs" / f"{task.module}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{task.module}", "--out", str(out), *task.options]
    with log.open("a") as stream:
        print(f"$ {' '.join(command)}", file=stream, flush=True)
        try:
            code = subprocess.run(
                command, stdout=stream, stderr=stream, timeout=task.limit, cwd=ROOT
            ).returncode
            outcome = "done" if code == 0 else f"failed with exit code {code}, see {log.name}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped: more than {task.limit:.0f} s"
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "name": task.name,
        "outcome": outcome,
        "seconds": time.monotonic() - begin,
        "largest_resident_bytes_so_far": peak,
    }


def device() -> dict:
    """What `record.about` finds in a process of its own: this one must not hold the device."""
    script = "import json; from benchmarks.record import about; print(json.dumps(about()))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    if found.returncode:
        raise RuntimeError(f"JAX does not start here: {found.stderr.strip().splitlines()[-1]}")
    return json.loads(found.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    running = commands.add_parser("run", help="measure")
    running.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    running.add_argument("--out", type=Path, default=OUT, help="where results go")
    running.set_defaults(act=lambda arguments: run(arguments.suite, arguments.out))
    reporting = commands.add_parser(
        "report", help="check the figures of a folder of results against their targets"
    )
    reporting.add_argument("folder", type=Path)
    reporting.set_defaults(act=report)
    quoting = commands.add_parser(
        "quote", help="put the tables of a folder of results into README and documentation"
    )
    quoting.add_argument("folder", type=Path)
    quoting.set_defaults(act=quote_here)
    arguments = parser.parse_args(argv)
    return arguments.act(arguments)


def report(arguments: argparse.Namespace) -> int:
    """Check the figures."""
    from benchmarks.targets import check

    if not arguments.folder.is_dir():
        print(f"benchmarks report: {arguments.folder} is not a folder of results", file=sys.stderr)
        return 2
    found = check(arguments.folder)
    (arguments.folder / "targets.md").write_text(found, encoding="utf-8")
    print(found)
    return 0


def quote_here(arguments: argparse.Namespace) -> int:
    """Put the tables of a folder into the pages of this checkout."""
    print(*quote(arguments.folder, ROOT), sep="\n")
    return 0


def quote(folder: Path, checkout: Path) -> list[str]:
    """Replace the tables of README and documentation by those of a folder; which ones it has, as `page: name`."""
    replaced = []
    for one in QUOTED:
        stored = folder / f"{one.name}.json"
        if not stored.exists():
            continue
        if one.table is None:
            text = stored.with_suffix(".md").read_text(encoding="utf-8")
        else:
            text = one.table(json.loads(stored.read_text(encoding="utf-8")))
        put_between(checkout / one.page, one.begin, one.end, text)
        replaced.append(f"{one.page}: {one.name}")
    return replaced
