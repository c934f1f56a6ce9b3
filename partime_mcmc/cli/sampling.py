"""`python -m partime_mcmc sample FILE.py:MODEL`: draws, in memory or to a store, with a summary and a certificate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from partime_mcmc import recipes
from partime_mcmc.cli import telling
from partime_mcmc.cli.choices import KERNELS, SOLVERS
from partime_mcmc.cli.codes import CERTIFIED, INTERRUPTED, NOT_CERTIFIED
from partime_mcmc.cli.machines import add_machines, machines
from partime_mcmc.cli.options import Problem, add_model, check_file, precision, problem
from partime_mcmc.cli.runs import Run, check_loading, of_store
from partime_mcmc.diagnostics import page
from partime_mcmc.diagnostics.arviz import save_netcdf
from partime_mcmc.diagnostics.checks import check_count
from partime_mcmc.diagnostics.compare import compare
from partime_mcmc.diagnostics.report import Report
from partime_mcmc.kernels import Independent, Recorded
from partime_mcmc.sampling.memory import bytes_beside
from partime_mcmc.sampling.chains import default_solver
from partime_mcmc.sampling.draws import Draws
from partime_mcmc.sampling.pilots import coupled_distances, solve_by_pass
from partime_mcmc.sampling.sample import sample
from partime_mcmc.storage.fingerprint import example_of
from partime_mcmc.storage.layout import Folder


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to a parser's commands."""
    command = commands.add_parser(
        "sample", help="sample a model of your own", description=__doc__.split(": ", 1)[1]
    )
    add_model(command)
    command.add_argument(
        "--solver", choices=list(SOLVERS), default="default", help="what solves for the chains"
    )
    command.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="write draws to this folder as they come; memory stays bounded",
    )
    command.add_argument(
        "--thinning", type=int, default=1, metavar="K", help="keep every K-th draw in the store"
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that is in the store, if there is one; "
        "the other arguments are those it was begun with",
    )
    command.add_argument(
        "--independent",
        action="store_true",
        help="for the certificate, evaluate every step once more, apart "
        "from the solver, instead of recording it while it is made",
    )
    command.add_argument(
        "--compare",
        action="store_true",
        help="also run the chains one step after another, and compare",
    )
    command.add_argument(
        "--out", type=Path, metavar="FILE.nc", help="write the draws to a NetCDF file, for ArviZ"
    )
    command.add_argument(
        "--report", type=Path, metavar="FILE.html", help="write a page with pictures and tables"
    )
    command.add_argument("--quiet", action="store_true", help="no progress")
    add_machines(command)
    command.set_defaults(run=_sample)
    return command


def _sample(arguments: argparse.Namespace) -> int:
    _check(arguments)
    with machines(arguments) as mesh, telling.plain_warnings():
        what = problem(arguments)
        if arguments.store is not None and (arguments.compare or arguments.out is not None):
            check_loading("--store", _kept_bytes(what, arguments))
        print(
            f"{what.title}: {arguments.num_chains} chains of {arguments.num_samples} draws with {arguments.kernel}, "
            f"{precision()}, on {1 if mesh is None else mesh.size} {jax.devices()[0].platform} device(s)",
            flush=True,
        )
        draws = _draw(what, arguments, arguments.store, mesh=mesh)
        interrupted = not draws.finished if arguments.store else draws.report.interrupted
        if interrupted:
            print(
                f"interrupted{f'; --resume goes on with {arguments.store}' if arguments.store else ''}",
                file=sys.stderr,
            )
            if not draws.plan["num_samples"]:
                return INTERRUPTED
        sequential = (
            _sequentially(what, draws, arguments, mesh)
            if arguments.compare and not interrupted
            else None
        )
        interrupted |= arguments.compare and sequential is None
        run = of_store(draws) if arguments.store else None
        draws = draws if run is None or not (sequential or arguments.out) else run.load()
        comparison = None if sequential is None else compare(draws, sequential)
        if run is None:
            telling.run(draws)
        else:
            telling.stored(run)
        _tell_times(draws, sequential, comparison)
        _write(arguments, what, draws, run, sequential, comparison)
    certified = bool(np.all(draws.certificate.certified)) and (comparison is None or comparison.ok)
    return INTERRUPTED if interrupted else CERTIFIED if certified else NOT_CERTIFIED


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    check_count(arguments.thinning, "--thinning", 1)
    if arguments.store is None and (arguments.resume or arguments.thinning != 1):
        raise ValueError(
            f"--{'resume' if arguments.resume else 'thinning'}: wanted --store DIR with it"
        )
    if arguments.store is not None and Folder(arguments.store).holds_run and not arguments.resume:
        raise ValueError(f"--store: {arguments.store} holds a run; --resume goes on with it")
    check_file("--out", arguments.out, ".nc")
    check_file("--report", arguments.report, ".html")


def _kept_bytes(what: Problem, arguments: argparse.Namespace) -> int:
    """Bytes of the draws that a store will keep, from shapes alone."""
    example = example_of(what.target)
    values = (
        0
        if what.target.constrain
        else sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(example))
    )
    kept = arguments.num_samples // arguments.thinning * arguments.num_chains
    return kept * (values + bytes_beside(what.target, example, Independent()))


def _draw(
    what: Problem,
    arguments: argparse.Namespace,
    store: Path | None,
    kernel: Any = None,
    **options: Any,
) -> Any:
    kernel = KERNELS[arguments.kernel] if kernel is None else kernel
    given = {"solver": SOLVERS[arguments.solver]()} | options
    return sample(
        what.key,
        what.target,
        kernel,
        num_samples=arguments.num_samples,
        num_chains=arguments.num_chains,
        num_warmup=arguments.num_warmup,
        store=store,
        thinning=arguments.thinning,
        progress=not arguments.quiet,
        certificate=Independent() if arguments.independent else Recorded(),
        **given,
    )


def _sequentially(
    what: Problem, draws: Any, arguments: argparse.Namespace, mesh: Mesh | None
) -> Draws | None:
    """The same chains one step after another; those of a stored run go to a store beside it. None after an interrupt."""
    given = {"solver": recipes.sequential(), "mesh": mesh}
    try:
        if arguments.store is None:
            found = _draw(what, arguments, None, draws.warmup, **given)
            ended = not found.report.interrupted
        else:
            beside = arguments.store.with_name(f"{arguments.store.name}-sequential")
            found = _draw(what, arguments, beside, dice=draws.settled.dice, **given)
            ended = found.finished
    except KeyboardInterrupt:
        if jax.process_count() > 1:
            raise
        ended = False
    if not ended:
        print("interrupted: the comparison is left out", file=sys.stderr)
        return None
    return found if arguments.store is None else of_store(found).load()


def _tell_times(draws: Any, sequential: Draws | None, comparison: Report | None) -> None:
    run = draws.report
    also = f", sequential {sequential.report.seconds_run:.3f} s" if sequential else ""
    telling.line(
        "time",
        f"{run.seconds_run:.3f} s{also} (compilation {run.seconds_compile:.1f} s, certificate "
        f"{run.seconds_certify:.1f} s, advice {run.seconds_advise:.1f} s apart)",
    )
    if comparison is not None:
        telling.line("comparison", comparison.verdict)
        for reason in comparison.reasons:
            telling.line("", reason)


def _write(
    arguments: argparse.Namespace,
    what: Problem,
    draws: Any,
    run: Run | None,
    sequential: Draws | None,
    comparison: Report | None,
) -> None:
    if jax.process_index():
        return
    if arguments.out is not None:
        telling.line("written", str(save_netcdf(draws, arguments.out)))
    if arguments.report is not None:
        warmup = None if run is not None else draws.warmup
        shown, notes = (draws, []) if run is None else run.view()
        rows, totals = (None, None) if run is None else (run.rows, run.totals)
        if sequential is not None and _shapes(shown) != _shapes(sequential):
            sequential = (
                None  # pictures show some of the draws only, which cannot be laid upon all of them
            )
        solver = (
            draws.advice.solver
            if run is None and draws.advice
            else SOLVERS[arguments.solver]() or default_solver()
        )
        text = page.page(
            shown,
            title=what.title,
            rows=rows,
            totals=totals,
            comparison=comparison,
            notes=notes,
            sequential=sequential,
            distances=coupled_distances(warmup, jax.random.fold_in(what.key, 1)),
            passes=solve_by_pass(warmup, jax.random.fold_in(what.key, 2), solver),
        )
        telling.line("written", str(page.write(text, arguments.report)))


def _shapes(draws: Any) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in draws.constrained.items()}
