"""`python -m partime_mcmc advise FILE.py:MODEL`: would it pay to solve these chains in parallel? Warm-up and pilot
chains only."""

from __future__ import annotations

import argparse
from typing import Any

from partime_mcmc.cli import telling
from partime_mcmc.cli.choices import KERNELS
from partime_mcmc.cli.codes import CERTIFIED, NOT_PARALLEL
from partime_mcmc.cli.options import add_model, problem
from partime_mcmc.sampling.pilots import advice_for


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to a parser's commands."""
    command = commands.add_parser(
        "advise",
        help="would it pay to sample a model in parallel time?",
        description=__doc__.split(": ", 1)[1],
    )
    add_model(command)
    command.add_argument("--quiet", action="store_true", help="no progress")
    command.set_defaults(run=_advise)
    return command


def _advise(arguments: argparse.Namespace) -> int:
    with telling.plain_warnings():
        what = problem(arguments)
        warmup, advice = advice_for(
            what.key,
            what.target,
            KERNELS[arguments.kernel],
            num_samples=arguments.num_samples,
            num_chains=arguments.num_chains,
            num_warmup=arguments.num_warmup,
            progress=not arguments.quiet,
        )
    telling.line("warm-up", str(warmup))
    telling.line("advice", str(advice))
    if advice.parallel:
        telling.line("solver", f"{advice.solver}, {advice.schedule}")
    return CERTIFIED if advice.parallel else NOT_PARALLEL
