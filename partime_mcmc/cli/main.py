"""The command line: `python -m partime_mcmc COMMAND`.

Exit codes, the same for all commands: `CERTIFIED` 0, `NOT_CERTIFIED` 1 (also: chains differ), `BAD_ARGUMENTS` 2 (also:
what a file or a model is refused for), `NOT_PARALLEL` 3 (`advise` only), `INTERRUPTED` 130. What is wrong is said in
one sentence on standard error; `--traceback` shows where it came from.

The command line is the only part of the package that may switch JAX to float64, and does so when asked to, and for
models that need it.
"""

from __future__ import annotations

import argparse
import sys

from partime_mcmc.cli import advising, comparing, demo, sampling, summing
from partime_mcmc.cli.codes import BAD_ARGUMENTS, CODES, INTERRUPTED
from partime_mcmc.cli.telling import sentence

_DESCRIPTION = (
    "Markov chain Monte Carlo in parallel over time: the exact chain, with a certificate."
)
_EXAMPLES = """examples:
  python -m partime_mcmc demo
  python -m partime_mcmc sample model.py:model --data data.json --num-samples 10000 --store run --report run.html
  python -m partime_mcmc summary run

exit codes:
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help(sys.stderr)
        return BAD_ARGUMENTS
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has read enough
        sys.stderr.close()
        return BAD_ARGUMENTS
    except (
        Exception
    ) as error:  # a user's model may raise anything, and what it raises is what to tell
        if arguments.traceback:
            raise
        print(f"partime_mcmc: {sentence(error)}", file=sys.stderr)
        return BAD_ARGUMENTS


def _parser() -> argparse.ArgumentParser:
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in CODES.items())
    parser = argparse.ArgumentParser(
        prog="python -m partime_mcmc",
        description=_DESCRIPTION,
        epilog=_EXAMPLES + codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for module in (demo, sampling, summing, comparing, advising):
        command = module.add(commands)
        command.add_argument(
            "--traceback", action="store_true", help="show where an error came from"
        )
    return parser
