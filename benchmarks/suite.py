"""All benchmarks by one command: `python -m benchmarks run --suite cpu --out DIR`, and `python -m benchmarks report DIR`.

A suite is a list of benchmarks with the options that make them fit its time; each runs in a process of its own, one after
another, and leaves its JSON and Markdown in DIR. `suite.json` keeps what ran, for how long, with how much memory, on which
device, with which versions and commit. A benchmark that fails or runs out of its time does not stop the others; it is listed,
and the exit code says so.
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
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark: a module of this package, its options, and the seconds it may take."""

    module: str
    options: tuple[str, ...] = ()
    limit: float = 600

    @property
    def name(self) -> str:
        """Module and options, as typed."""
        return " ".join((self.module, *self.options))


SUITES = {
    "cpu": (
        Task("scans"), Task("memory"),
        *(Task("shooting", ("--repeats", "5", "--only", name)) for name in ("eight schools", "banana, HMC 8×0.5", "mixture", "logistic")),
        Task("advised", ("--only", "eight schools, MALA", "--repeats", "3")),
        Task("advised", ("--only", "random walk", "--repeats", "3")),
        Task("dice_shooting", ("--dtypes", "float32", "--num-numbers", "10000000", "--repeats", "3")),
        Task("chains_or_time"),
        Task("gru", ("--lengths", "32768", "--widths", "32", "64", "--batches", "1")),
        Task("iterations"), Task("devices"),
        Task("running", ("--num-draws", "200000")),
    ),
    "gpu": (
        Task("gpu", ("--budget", "130"), 210),
        Task("scans", ("--dtype", "float32", "float64", "bfloat16", "--repeats", "5"), 70),
        Task("gru", ("--lengths", "10000", "100000", "1000000", "--widths", "32", "--batches", "1", "--repeats", "3"), 60),
    ),
    "smoke": (
        Task("scans", ("--longest", "1000", "--repeats", "1")),
        Task("shooting", ("--only", "banana, HMC 8×0.5", "--scale", "0.02", "--num-warmup", "100", "--repeats", "1")),
    ),
}


def run(suite: str, out: Path) -> int:
    """Run a suite; 1 if anything failed."""
    out.mkdir(parents=True, exist_ok=True)
    begin, done = time.monotonic(), []
    for number, task in enumerate(SUITES[suite], 1):
        print(f"[{number}/{len(SUITES[suite])}, {time.monotonic() - begin:.0f} s] {task.name}", flush=True)
        done.append(one(task, out))
        print(f"    {done[-1]['outcome']} after {done[-1]['seconds']:.0f} s", flush=True)
        record = {"suite": suite, "seconds": time.monotonic() - begin, "tasks": done, "commit": commit(), "machine": machine()}
        (out / "suite.json").write_text(json.dumps(record, indent=1))
    failed = [task["name"] for task in done if task["outcome"] != "done"]
    print(f"{len(done) - len(failed)} of {len(done)} benchmarks done in {time.monotonic() - begin:.0f} s; results in {out}"
          + "".join(f"\nnot done: {name}" for name in failed))
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
            code = subprocess.run(command, stdout=stream, stderr=stream, timeout=task.limit).returncode
            outcome = "done" if code == 0 else f"failed with exit code {code}, see {log.name}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped: more than {task.limit:.0f} s"
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"name": task.name, "outcome": outcome, "seconds": time.monotonic() - begin, "largest_resident_bytes_so_far": peak}


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def machine() -> dict:
    """Device and versions, as a process of its own sees them: this one must not hold the device."""
    script = ("import jax, json; from partime_mcmc.mcmc.finish import versions; print(json.dumps({'platform': jax.default_backend(),"
              "'device': jax.devices()[0].device_kind, 'versions': versions()}))")
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return {"cores": os.cpu_count(), **(json.loads(found.stdout.splitlines()[-1]) if found.returncode == 0 else {})}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    running = commands.add_parser("run", help="measure")
    running.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    running.add_argument("--out", type=Path, default=OUT, help="where results go")
    running.set_defaults(act=lambda arguments: run(arguments.suite, arguments.out))
    reporting = commands.add_parser("report", help="one page with all tables and pictures of a folder of results")
    reporting.add_argument("folder", type=Path)
    reporting.set_defaults(act=report)
    arguments = parser.parse_args(argv)
    return arguments.act(arguments)


def report(arguments: argparse.Namespace) -> int:
    """Write the page."""
    from benchmarks.page import write_page

    if not arguments.folder.is_dir():
        print(f"benchmarks report: {arguments.folder} is not a folder of results", file=sys.stderr)
        return 2
    print(f"written {write_page(arguments.folder)}")
    return 0
