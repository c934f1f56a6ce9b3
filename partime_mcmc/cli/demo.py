"""`python -m partime_mcmc demo`: a built-in model, both ways.

The demo samples a built-in model twice with the same dice, in parallel time and one step after another, proves that
the two chains are one, and prints both times. Exit codes: 0 if the parallel chain is certified and equals the
sequential one, 1 if not.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax

from partime_mcmc import recipes
from partime_mcmc.cli import telling
from partime_mcmc.cli.choices import KERNELS, SOLVERS
from partime_mcmc.cli.codes import CERTIFIED, NOT_CERTIFIED
from partime_mcmc.diagnostics import plots
from partime_mcmc.diagnostics.arviz import save_netcdf
from partime_mcmc.diagnostics.checks import check_count
from partime_mcmc.diagnostics.compare import compare
from partime_mcmc.diagnostics.report import Report
from partime_mcmc.kernels import Independent
from partime_mcmc.sampling.draws import Draws
from partime_mcmc.sampling.progress import progress_line
from partime_mcmc.sampling.sample import sample
from partime_mcmc.models import MODELS


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to a parser's commands."""
    demo = commands.add_parser(
        "demo",
        help="sample a built-in model in parallel time and prove that the chain is exact",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--model", choices=sorted(MODELS), default="eight_schools", help="what to sample"
    )
    demo.add_argument("--kernel", choices=sorted(KERNELS), default="hmc", help="how")
    demo.add_argument("--num-samples", type=int, default=4096, metavar="T", help="draws per chain")
    demo.add_argument("--num-chains", type=int, default=4, metavar="C", help="chains")
    demo.add_argument(
        "--num-warmup", type=int, default=1000, metavar="N", help="warm-up steps per chain"
    )
    demo.add_argument(
        "--solver", choices=list(SOLVERS), default="default", help="what solves for the chains"
    )
    demo.add_argument("--seed", type=int, default=0, help="the dice")
    demo.add_argument(
        "--out", type=Path, default=Path("partime_demo"), metavar="DIR", help="where files go"
    )
    demo.set_defaults(run=_demo)
    return demo


def _demo(arguments: argparse.Namespace) -> int:
    for name in ("num_samples", "num_chains"):
        check_count(getattr(arguments, name), "--" + name.replace("_", "-"), 1)
    built_in = MODELS[arguments.model]()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if built_in.needs_float64:
        jax.config.update("jax_enable_x64", True)
    key = jax.random.key(arguments.seed)
    print(
        f"{built_in.description}\n{arguments.num_chains} chains of {arguments.num_samples} draws with "
        f"{arguments.kernel}, {'float64' if built_in.needs_float64 else 'float32'}, on {jax.devices()[0].platform}"
    )
    with telling.plain_warnings():
        target = built_in.make_target(jax.random.fold_in(key, 0))
        common = dict(
            num_samples=arguments.num_samples,
            num_chains=arguments.num_chains,
            progress=progress_line,
            certificate=Independent(),
        )
        parallel = sample(
            key,
            target,
            KERNELS[arguments.kernel],
            num_warmup=arguments.num_warmup,
            solver=SOLVERS[arguments.solver](),
            **common,
        )
        if parallel.report.interrupted:
            raise KeyboardInterrupt
        sequential = sample(key, target, parallel.warmup, solver=recipes.sequential(), **common)
        if sequential.report.interrupted:
            raise KeyboardInterrupt
        report = compare(parallel, sequential)
    _tell(parallel, sequential, report)
    _write(arguments.out, parallel, sequential, report)
    return CERTIFIED if report.ok else NOT_CERTIFIED


def _tell(parallel: Draws, sequential: Draws, report: Report) -> None:
    telling.run(parallel)
    run = parallel.report
    print(
        f"time        parallel {run.seconds_run:.3f} s, sequential {sequential.report.seconds_run:.3f} s "
        f"(ratio {sequential.report.seconds_run / max(run.seconds_run, 1e-9):.2f}; compilation "
        f"{run.seconds_compile:.1f} s and {sequential.report.seconds_compile:.1f} s, certificate "
        f"{run.seconds_certify:.1f} s, advice {run.seconds_advise:.1f} s, not included)"
    )
    print(f"comparison  {str(report).splitlines()[0]}")


def _write(out: Path, parallel: Draws, sequential: Draws, report: Report) -> None:
    written = [save_netcdf(parallel, out / "draws.nc")]
    try:
        written.append(plots.save(plots.demo_figure(parallel, sequential), out / "demo.png"))
    except plots.NoPlots as error:
        print(f"no picture  {error}")
    (out / "report.json").write_text(report.to_json())
    print(f"written     {', '.join(map(str, [*written, out / 'report.json']))}")
