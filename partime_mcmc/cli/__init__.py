"""The command line, `python -m partime_mcmc`: a module per command, `main` that runs them."""

from partime_mcmc.cli.main import main

__all__ = ["main"]
