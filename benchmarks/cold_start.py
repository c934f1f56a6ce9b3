"""The first answer: seconds from a fresh process to draws, `python -m benchmarks.cold_start [NAME...] --out DIR`.

The models of `benchmarks.hard_posteriors`, or of a file as there (`--models FILE`), or reference posteriors of `benchmarks.posteriors`
by their names; 4 chains, 1,000 steps of warm-up allowed and 1,000 draws each, on all cores or so many (`--cores 1`). Every run is a
process of its own, from the start of Python to the draws, imports and compilation included; methods take turns, and medians are
shown:

    ours            `CoalescingHMC` through `ParallelMCMC`, nothing compiled before; programs are written to an empty folder
    ours, parallel  the same solved in parallel where the library's own choice is the loop
    ours, again     the same where another process has run the same model before: programs come from the cache on disk
    ours, optimised the same with programs that are optimised however short the run is: whether the rule for that is right
    NUTS            NumPyro's, chains vectorized
    NUTS, parallel  chains on four devices that are made of the processor

Beside them: programs that XLA compiled, seconds of a second run of the same object with another key and how many programs that
compiled, and for ours the largest residual, in noise units, and the verdict. How good the draws are is for
`benchmarks.hard_posteriors`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import OUT, keep

METHODS = ("ours", "ours, parallel", "ours, again", "ours, optimised", "NUTS", "NUTS, parallel")


def model_and_data(name: str, models: Path | None) -> tuple:
    """A model and its keyword arguments."""
    from benchmarks import hard_posteriors, posteriors

    folder = os.environ.get(posteriors.VARIABLE)
    if folder and (Path(folder) / f"{name}.json").exists():
        return posteriors.load(name)[:2]
    return hard_posteriors.model_and_data(name, None if name in hard_posteriors.MODELS else models)


def one(name: str, method: str, models: Path | None) -> dict:
    """One run in this process."""
    import jax
    import numpy as np
    import numpyro
    from numpyro.infer import MCMC, NUTS

    if method == "NUTS, parallel":
        numpyro.set_host_device_count(4)
    from benchmarks.hard_posteriors import CHAINS, STEPS
    from partime_mcmc import CoalescingHMC, ParallelMCMC, Windows, compile_cache
    from partime_mcmc.sampling.memory import DEFAULT_WINDOW

    if method == "ours, optimised":
        compile_cache._WORTH_OPTIMISING = 0.0
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compiled.append(seconds) if event.endswith("backend_compile_duration") else None
        )
    )
    settings = {
        "num_warmup": STEPS,
        "num_samples": STEPS,
        "num_chains": CHAINS,
        "progress_bar": False,
    }
    model, data = model_and_data(name, models)
    if method.startswith("ours"):
        # Who says how time is cut wants it solved in parallel.
        schedule = Windows(DEFAULT_WINDOW) if method == "ours, parallel" else None
        mcmc = ParallelMCMC(CoalescingHMC(model), schedule=schedule, **settings)
    else:
        chain_method = "parallel" if method == "NUTS, parallel" else "vectorized"
        mcmc = MCMC(NUTS(model), chain_method=chain_method, **settings)
    seconds, programs = [], []
    for seed in (0, 1):
        begin, before = time.perf_counter(), len(compiled)
        mcmc.run(jax.random.key(seed), **data)
        jax.block_until_ready(mcmc.get_samples())
        seconds.append(time.perf_counter() - begin)
        programs.append(len(compiled) - before)
    said = ""
    if isinstance(mcmc, ParallelMCMC):
        residual = float(np.max(np.asarray(mcmc.draws.certificate.max_residual)))
        said = f"{mcmc.draws.verdict.outcome.value}, residual {residual:.0e}"
    return {"run": seconds[0], "second_run": seconds[1], "programs": programs, "said": said}


def in_a_process(name: str, method: str, models: Path | None, cores: int, cache: str) -> dict:
    """`one` in a process of its own on so many cores, and the seconds from its start to its first draws."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.cold_start",
        "--one",
        name,
        method,
        "--cores",
        str(cores),
    ]
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "PARTIME_CACHE": cache if method == "ours, again" else empty}
        begin = time.perf_counter()
        done = subprocess.run(
            command if models is None else [*command, "--models", str(models)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        whole = time.perf_counter() - begin
    row = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": whole - row["second_run"], **row}


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    lines = [
        "| posterior | method | seconds to the first draws | of which `run` | programs compiled | second run, seconds | "
        "compiled there | says |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['posterior']} | {row['method']} | {row['seconds']:.1f} | {row['run']:.1f} | {row['programs'][0]} | "
            f"{row['second_run']:.2f} | {row['programs'][1]} | {row['said']} |"
        )
    return "\n".join(lines) + "\n" + summary(rows)


def summary(rows: list[dict]) -> str:
    """On how many posteriors ours comes first, in words; empty where NUTS did not run on all."""
    seconds: dict[str, dict[str, float]] = {}
    for row in rows:
        seconds.setdefault(row["posterior"], {})[row["method"]] = row["seconds"]
    if any("ours" not in found or "NUTS, parallel" not in found for found in seconds.values()):
        return ""
    ratios = [
        found["ours"] / min(took for method, took in found.items() if method.startswith("NUTS"))
        for found in seconds.values()
    ]
    return (
        f"\nOurs at most as long as NUTS' fastest: {sum(ratio <= 1 for ratio in ratios)} of {len(ratios)}; ratios "
        f"{min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}.\n"
    )


def median_of(runs: list[dict]) -> dict:
    """The run whose seconds are the median."""
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=["eight_schools", "crossed"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default=";".join(METHODS), help="with semicolons between")
    parser.add_argument("--models", type=Path, help="a file as of `benchmarks.hard_posteriors`")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--record", default="cold-start-cpu", help="name of the table")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        if hasattr(os, "sched_setaffinity"):  # not on a Mac
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        print(json.dumps(one(*arguments.one, arguments.models)))
        return 0
    rows, methods = [], arguments.methods.split(";")
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as cache:
            process = functools.partial(
                in_a_process, name, models=arguments.models, cores=arguments.cores, cache=cache
            )
            if "ours, again" in methods:
                process("ours, again")
            runs: dict[str, list[dict]] = {method: [] for method in methods}
            for _ in range(arguments.repeats):
                for method in methods:
                    runs[method].append(process(method))
        rows += [
            {"posterior": name, "method": method, **median_of(found)}
            for method, found in runs.items()
        ]
        print(table(rows[-len(methods) :]), flush=True)
        record = {"cores": arguments.cores, "rows": rows}
        keep(arguments.out / f"{arguments.record}.json", record, table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
