"""Stored runs on several hosts: what the first host says to the others before and after, and what they do meanwhile.

    first host    reads or begins the store, warms up, says where the chains stand
    others        are told the start and where the chains stand
    all           compute their parts of the same chunks; who writes what is for `writers` to say

A store is resumed by any number of hosts, however many worked on it. If a host is lost the run ends on all of them
(`distributed.hosts`), and what was written stays.

Left out: runs that go on by themselves with the hosts that are left; a store whose hosts share no folder.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from partime_mcmc.kernels import Kernel
from partime_mcmc.mcmc.draws import End
from partime_mcmc.mcmc.family import Builder
from partime_mcmc.mcmc.keeper import Shelf
from partime_mcmc.mcmc.programs import Clock
from partime_mcmc.mcmc.store.fingerprint import example_of, program_of, require_same
from partime_mcmc.mcmc.store.layout import Folder
from partime_mcmc.mcmc.store.plan import Start
from partime_mcmc.mcmc.stream import Course
from partime_mcmc.mcmc.tapes import recurrence
from partime_mcmc.mcmc.target import Target
from partime_mcmc.mcmc.warmup import Warmup
from partime_mcmc.types import PyTree


def say(data: bytes, host: int = 0) -> bytes:
    """What one host says, on all hosts; what the others give is not looked at.

    Args:
        data: On the host that speaks.
        host: Which does.
    """
    source = jax.process_index() == host
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data)), source))
    if not size:
        return b""
    mine = np.zeros(size, np.uint8)
    mine[: min(size, len(data))] = np.frombuffer(data[:size], np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine, source), np.uint8).tobytes()


def say_end(end: End, first: int, last: int) -> tuple[End, int, int]:
    """Where the chains stand, at which step the store began and at which the run ends, as the first host knows it."""
    # A limit of 0 steps at once stands for none.
    counts = np.array([end.num_steps, end.failed_running, end.stretch or 0, first, last], np.int32)
    carries, discrete, counts = multihost_utils.broadcast_one_to_all(
        (end.carries, end.discrete, counts)
    )
    steps, failed, stretch, first, last = (int(count) for count in counts)
    return End(carries, discrete, steps, failed, stretch or None), first, last


def take_up(
    data: bytes, target: Target, given: Kernel | Builder | Warmup, example: PyTree, path: Any
) -> tuple[Start, Kernel, End]:
    """The start of a stored run, its kernel, and where its chains begin.

    Args:
        data: Of `pack_start`.
        target: What is sampled.
        given: The kernel as the user gives it.
        example: A position; only structure, shapes and types matter.
        path: The store, for messages.

    Raises:
        StoreMismatch: If the same model and the same name of a kernel are another program.
    """
    start = Start.read(data)
    kernel = start.kernel(target, given, example)
    end = start.end(kernel, example)
    require_same(
        start.settled.program,
        program_of(recurrence(kernel, None, start.keys(), end, Clock()), kernel),
        str(path),
    )
    return start, kernel, end


def course_of(
    start: Start,
    target: Target,
    kernel: Kernel,
    num_samples: int,
    max_iterations: int | None,
    key: list[int],
    mesh: Mesh | None,
) -> Course:
    """What is to be run, as the start has it; arguments as for `take_up` and `follow`."""
    settled = start.settled
    return Course(
        target,
        kernel,
        start.keys(),
        num_samples,
        settled.tolerance,
        max_iterations,
        lambda *_: (settled.solver, settled.schedule, None),
        None,
        {"key": key},
        mesh,
        settled.certificate,
        groups=settled.groups,
    )


def follow(
    store: Any,
    run: dict[str, Any],
    target: Target,
    given: Kernel | Builder | Warmup,
    max_iterations: int | None,
    mesh: Mesh,
) -> None:
    """Work on a stored run with the first host until it is done.

    Args:
        store: A `Store`.
        run: What is asked for.
        target: What is sampled.
        given: The kernel as the user gives it.
        max_iterations: Passes per stretch.
        mesh: The devices of all hosts.
    """
    writers = store.writers.among(mesh)
    writers.check(store, mesh)
    data = say(b"")
    if data:
        start, kernel, end = take_up(data, target, given, example_of(target), store.path)
        end, first, last = say_end(end, 0, 0)
        shelf = Shelf(Folder(store.path), store.format, store.folds, run, start.settled, first)
        course = course_of(
            start, target, kernel, run["num_samples"], max_iterations, run["key"], mesh
        )
        writers.follow(shelf, course, end, last)
    meet()


def meet() -> None:
    """Wait until all hosts are here."""
    multihost_utils.sync_global_devices("partime_mcmc: stored run")
