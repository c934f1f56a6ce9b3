"""The first answer: seconds from a fresh process to draws, `python -m benchmarks.cold_start [NAME...] --out DIR`.

The models of `benchmarks.hard_posteriors`, 4 chains, 1,000 steps of warm-up allowed and 1,000 draws each. Every run is a process
of its own, from the start of Python to the draws, imports and compilation included; methods take turns, and medians are shown:

    ours            `CoalescingHMC` through `ParallelMCMC`, nothing compiled before; programs are written to an empty folder
    our loop        the same with every chain computed one step after another (`sequential()`)
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
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import OUT, keep

METHODS = ("ours", "our loop", "ours, again", "ours, optimised", "NUTS", "NUTS, parallel")


def one(name: str, method: str) -> dict:
    """One run in this process."""
    import jax
    import numpy as np
    import numpyro
    from numpyro.infer import MCMC, NUTS

    if method == "NUTS, parallel":
        numpyro.set_host_device_count(4)
    from benchmarks.hard_posteriors import CHAINS, MODELS, STEPS
    from partime_mcmc import CoalescingHMC, ParallelMCMC, compile_cache, sequential

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
    if method.startswith("our"):
        solver = sequential() if method == "our loop" else None
        mcmc = ParallelMCMC(CoalescingHMC(MODELS[name]), solver=solver, **settings)
    else:
        chain_method = "parallel" if method == "NUTS, parallel" else "vectorized"
        mcmc = MCMC(NUTS(MODELS[name]), chain_method=chain_method, **settings)
    seconds, programs = [], []
    for seed in (0, 1):
        begin, before = time.perf_counter(), len(compiled)
        mcmc.run(jax.random.key(seed))
        jax.block_until_ready(mcmc.get_samples())
        seconds.append(time.perf_counter() - begin)
        programs.append(len(compiled) - before)
    said = ""
    if isinstance(mcmc, ParallelMCMC):
        residual = float(np.max(np.asarray(mcmc.draws.certificate.max_residual)))
        said = f"{mcmc.draws.verdict.outcome.value}, residual {residual:.0e}"
    return {"run": seconds[0], "second_run": seconds[1], "programs": programs, "said": said}


def in_a_process(name: str, method: str, cache: str) -> dict:
    """`one` in a process of its own, and the seconds from its start to its first draws."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "PARTIME_CACHE": cache if method == "ours, again" else empty}
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cold_start", "--one", name, method],
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
    return "\n".join(lines) + "\n"


def median_of(runs: list[dict]) -> dict:
    """The run whose seconds are the median."""
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=["eight_schools", "crossed"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
        return 0
    rows = []
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as cache:
            in_a_process(name, "ours, again", cache)
            runs: dict[str, list[dict]] = {method: [] for method in METHODS}
            for _ in range(arguments.repeats):
                for method in METHODS:
                    runs[method].append(in_a_process(name, method, cache))
        rows += [
            {"posterior": name, "method": method, **median_of(found)}
            for method, found in runs.items()
        ]
        print(table(rows[-len(METHODS) :]), flush=True)
        keep(arguments.out / "cold-start-cpu.json", {"rows": rows}, table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
