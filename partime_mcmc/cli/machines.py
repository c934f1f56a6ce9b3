"""Options that say on which machines: the default device, all devices of this one, or several hosts with one command."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from typing import Iterator

import jax
from jax.sharding import Mesh

from partime_mcmc.cli.codes import BAD_ARGUMENTS
from partime_mcmc.cli.telling import sentence
from partime_mcmc.distributed import hosts, time_mesh
from partime_mcmc.distributed.launch import is_lost


def add_machines(command: argparse.ArgumentParser) -> None:
    """Options for many devices and hosts."""
    group = command.add_argument_group(
        "many devices", "Chains are cut into pieces of time, one per device. On several hosts run the same command on each; "
        "the first one prints and writes.")
    group.add_argument("--all-devices", action="store_true", help="spread the chains over all devices of this machine")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of host 0, reachable from all hosts")
    group.add_argument("--num-hosts", type=int, metavar="N", help="how many processes")
    group.add_argument("--host-id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument("--cluster", action="store_true",
                       help="hosts as Slurm, Open MPI, Kubernetes or a TPU pod started them")


@contextlib.contextmanager
def machines(arguments: argparse.Namespace) -> Iterator[Mesh | None]:
    """The devices that the options mean, as a mesh; None is the default device alone. Hosts are joined inside.

    Raises:
        ValueError, RuntimeError: As `hosts`.
    """
    given = arguments.coordinator, arguments.num_hosts, arguments.host_id
    if not arguments.cluster and given == (None, None, None):
        yield time_mesh() if arguments.all_devices else None
        return
    if arguments.cluster and given != (None, None, None):
        raise ValueError("--cluster: wanted it alone, or --coordinator, --num-hosts and --host-id without it")
    with hosts(*given), contextlib.ExitStack() as silence:
        if jax.process_index():
            silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            yield time_mesh()
        except Exception as error:  # `main` would tell it, but this process ends before
            if arguments.traceback or is_lost(error):
                raise
            print(f"partime_mcmc: {sentence(error)}", file=sys.stderr)
            raise SystemExit(BAD_ARGUMENTS) from error
