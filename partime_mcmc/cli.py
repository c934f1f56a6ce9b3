"""The command line: `python -m partime_mcmc demo`.

The demo samples a built-in model twice with the same dice, in parallel time and one step after another, proves that
the two chains are one, and prints both times. Exit codes: 0 if the parallel chain is certified and equals the sequential
one, 1 if not, 2 if the arguments make no sense, 130 if interrupted.

The command line is the only part of the package that may switch JAX to float64, and does so for models that need it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import numpy as np

from partime_mcmc import kernels, recipes
from partime_mcmc.diagnostics import plots
from partime_mcmc.diagnostics.arviz import save_netcdf, summary_table
from partime_mcmc.diagnostics.checks import check_count
from partime_mcmc.diagnostics.compare import compare
from partime_mcmc.diagnostics.report import Report, text_table
from partime_mcmc.mcmc.draws import Draws
from partime_mcmc.mcmc.progress import progress_line
from partime_mcmc.mcmc.sample import sample
from partime_mcmc.models import MODELS

KERNELS = {"hmc": kernels.hmc, "mala": kernels.mala, "nuts": kernels.nuts, "random_walk": kernels.random_walk}
SOLVERS = {
    "default": lambda: None, "sequential": recipes.sequential, "shooting": recipes.shooting, "deer": recipes.deer,
    "quasi_deer": recipes.quasi_deer, "elk": recipes.elk, "quasi_elk": recipes.quasi_elk, "picard": recipes.picard,
    "jacobi": recipes.jacobi,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError) as error:
        if arguments.traceback:
            raise
        print(f"partime_mcmc: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m partime_mcmc", description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="sample a built-in model in parallel time and prove that the chain is exact",
                               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    demo.add_argument("--model", choices=sorted(MODELS), default="eight_schools", help="what to sample")
    demo.add_argument("--kernel", choices=sorted(KERNELS), default="hmc", help="how")
    demo.add_argument("--num-samples", type=int, default=4096, metavar="T", help="draws per chain")
    demo.add_argument("--num-chains", type=int, default=4, metavar="C", help="chains")
    demo.add_argument("--num-warmup", type=int, default=1000, metavar="N", help="warm-up steps per chain")
    demo.add_argument("--solver", choices=list(SOLVERS), default="default", help="what solves for the chains")
    demo.add_argument("--seed", type=int, default=0, help="the dice")
    demo.add_argument("--out", type=Path, default=Path("partime_demo"), metavar="DIR", help="where files go")
    demo.add_argument("--traceback", action="store_true", help="show where an error came from")
    demo.set_defaults(run=_demo)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    for name in ("num_samples", "num_chains"):
        check_count(getattr(arguments, name), "--" + name.replace("_", "-"), 1)
    built_in = MODELS[arguments.model]()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if built_in.needs_float64:
        jax.config.update("jax_enable_x64", True)
    key = jax.random.key(arguments.seed)
    print(f"{built_in.description}\n{arguments.num_chains} chains of {arguments.num_samples} draws with "
          f"{arguments.kernel}, {'float64' if built_in.needs_float64 else 'float32'}, on {jax.devices()[0].platform}")
    with _plain_warnings():
        target = built_in.make_target(jax.random.fold_in(key, 0))
        common = dict(num_samples=arguments.num_samples, num_chains=arguments.num_chains, progress=progress_line)
        parallel = sample(key, target, KERNELS[arguments.kernel], num_warmup=arguments.num_warmup,
                          solver=SOLVERS[arguments.solver](), **common)
        sequential = sample(key, target, parallel.warmup, solver=recipes.sequential(), **common)
        report = compare(parallel, sequential)
    _tell(parallel, sequential, report)
    _write(arguments.out, parallel, sequential, report)
    return 0 if report.ok else 1


@contextlib.contextmanager
def _plain_warnings():
    """Warnings as one line each, without the source line that raised them."""
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *rest: print(f"warning: {message}", file=sys.stderr)
    try:
        yield
    finally:
        warnings.showwarning = shown


def _tell(parallel: Draws, sequential: Draws, report: Report) -> None:
    rows = summary_table(parallel)
    if parallel.names:
        rows = [row for row in rows if row["name"].split("[")[0] in parallel.names]
    print("\n" + "\n".join(text_table(rows)))
    run, warmup = parallel.report, parallel.warmup
    certificate = parallel.certificate
    print(f"\nwarm-up     {warmup.settings}, acceptance {warmup.acceptance:.2f}, {warmup.num_gradients} gradients, "
          f"{warmup.seconds:.1f} s with compilation")
    if parallel.advice is not None:
        print(textwrap.fill(str(parallel.advice), 110, initial_indent="advice      ", subsequent_indent=" " * 12))
    print(f"certificate {_certified(certificate)}")
    print(f"work        {int(run.iterations.max())} iterations over all stretches, "
          f"{run.evaluations_per_sample:.2f} evaluations of f and {run.jvps_per_sample:.2f} JVPs per draw, depth "
          f"{run.depth} of {parallel.plan['num_samples']} steps")
    for sentence in run.fallbacks[:5]:
        print(f"fallback    {sentence}")
    if len(run.fallbacks) > 5:
        print(f"fallback    ... and {len(run.fallbacks) - 5} more")
    print(f"time        parallel {run.seconds_run:.3f} s, sequential {sequential.report.seconds_run:.3f} s "
          f"(ratio {sequential.report.seconds_run / max(run.seconds_run, 1e-9):.2f}; compilation "
          f"{run.seconds_compile:.1f} s and {sequential.report.seconds_compile:.1f} s, certificate "
          f"{run.seconds_certify:.1f} s, advice {run.seconds_advise:.1f} s, not included)")
    print(f"comparison  {str(report).splitlines()[0]}")


def _certified(certificate) -> str:
    residual, tolerance = np.max(np.asarray(certificate.max_residual)), np.max(np.asarray(certificate.tolerance))
    rejected = np.asarray(certificate.num_rejected)
    count = f"{int(rejected.sum())} rejections" if (rejected >= 0).all() else "no accept decisions"
    chains = np.asarray(certificate.certified)
    return (f"{int(chains.sum())} of {chains.size} chains certified, largest residual {residual:.1e} noise units "
            f"(allowed {tolerance:.0e}), {count}, {int(np.sum(np.asarray(certificate.num_nonfinite_proposals)))} "
            "proposals out of range")


def _write(out: Path, parallel: Draws, sequential: Draws, report: Report) -> None:
    draws = save_netcdf(parallel, out / "draws.nc")
    figure = plots.save(plots.demo_figure(parallel, sequential), out / "demo.png")
    (out / "report.json").write_text(report.to_json())
    print(f"written     {draws}, {figure}, {out / 'report.json'}")
