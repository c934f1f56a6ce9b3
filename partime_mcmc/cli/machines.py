"""Options that say on which machines: the default device, all devices of this one, or several hosts with one command.

Started by Slurm's `srun` or Open MPI's `mpirun` as several tasks, these are the hosts of one run without any option: they
would otherwise be as many independent runs of the same chains. `--alone` makes them that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh

from partime_mcmc.distributed import hosts, time_mesh

# How many processes one command of Slurm or Open MPI started.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def add_machines(command: argparse.ArgumentParser) -> None:
    """Options for many devices and hosts."""
    group = command.add_argument_group(
        "many devices",
        "Chains are cut into pieces of time, one per device. On several hosts run the same command on each; "
        "the first one prints and writes.",
    )
    group.add_argument(
        "--all-devices",
        action="store_true",
        help="spread the chains over all devices of this machine",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of host 0, reachable from all hosts"
    )
    group.add_argument("--num-hosts", type=int, metavar="N", help="how many processes")
    group.add_argument("--host-id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--cluster",
        action="store_true",
        help="hosts as Slurm, Open MPI, Kubernetes or a TPU pod started "
        "them; not needed for several tasks of srun or mpirun",
    )
    group.add_argument(
        "--alone",
        action="store_true",
        help="this process by itself, though srun or mpirun started several",
    )


def started_together(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks that `srun` or `mpirun` started with one command.

    Args:
        environment: Of the process. `SLURM_NTASKS` alone says nothing: a batch script has it, too, and is one process.
    """
    return any(
        environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1
        for name in _TASKS
    )


@contextlib.contextmanager
def machines(arguments: argparse.Namespace) -> Iterator[Mesh | None]:
    """The devices that the options mean, as a mesh; None is the default device alone. Hosts are joined inside.

    Raises:
        ValueError, RuntimeError: As `hosts`.
    """
    given = arguments.coordinator, arguments.num_hosts, arguments.host_id
    by_hand = given != (None, None, None)
    if arguments.alone + arguments.cluster + by_hand > 1:
        raise ValueError(
            "--alone, --cluster, --coordinator with --num-hosts and --host-id: got more than one of these three, "
            "wanted at most one"
        )
    if not (arguments.cluster or by_hand) and (arguments.alone or not started_together(os.environ)):
        yield time_mesh() if arguments.all_devices else None
        return
    with hosts(*given), contextlib.ExitStack() as silence:
        if jax.process_index():
            silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield time_mesh()
