"""Devices and hosts: who joins a run, which device holds which chains and which part of time, and sums over data.

Devices stand in a grid `(chains, time)`, or `(chains, time, data)` where a log density sums over data that no device
could hold alone. Neighbours along `time` talk in every iteration and along `data` in every step, chains never: so the last
axis changes fastest, and devices of one host end up side by side.

    with hosts("10.0.0.1:9876", num_hosts=2, host_id=0):      # the same script on both hosts, with their own host_id
        draws = sample(key, target, hmc, num_samples=100_000, mesh=time_mesh())

All hosts run one program in step, so none can go on without the others, and the launcher must end all of them when one is
lost: `srun --kill-on-bad-exit=1 python run.py`, `mpirun python run.py` (Open MPI does so by default), or a Kubernetes job
whose failure policy ends all its pods. Without a launcher JAX's runtime ends the other processes once the lost one has
missed its heartbeats. What a store holds is durable: start the same run again, with any number of hosts.

    log p(x) = log prior(x) + Σ_q ℓ_q(x),     ∇ log p(x) = ∇ log prior(x) + Σ_q ∇ℓ_q(x)

Inside `jax.shard_map`, `summed(ℓ)` is the sum over the devices of one mesh axis, and so is its gradient.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any, Callable, Sequence

import jax
import jax.extend.backend
import numpy as np
from jax import lax
from jax.sharding import Mesh

from partime_mcmc.engine import Solution, Stats
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Array, PyTree
from partime_mcmc.validation import check_count

CHAINS, TIME, DATA = AXES = ("chains", "time", "data")


def time_mesh(
    num_time: int | None = None,
    num_chains: int = 1,
    num_data: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over chains, time and data.

    Args:
        num_time: Devices along time; None takes all that chains and data leave.
        num_chains: Devices along chains.
        num_data: Devices along data.
        devices: Which; None takes all of them, on all hosts.

    Returns:
        A mesh with the axes `chains`, `time` and `data`.

    Raises:
        ValueError: If a count is not positive, or does not fit the number of devices.

    Examples:
        >>> from partime_mcmc import time_mesh
        >>> dict(time_mesh(1).shape)
        {'chains': 1, 'time': 1, 'data': 1}
    """
    taken = np.asarray(jax.devices() if devices is None else devices)
    for name, count in (("num_time", num_time), ("num_chains", num_chains), ("num_data", num_data)):
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int) or count < 1
        ):
            raise ValueError(f"{name} must be a positive integer, got {count!r}")
    others = num_chains * num_data
    num_time = taken.size // others if num_time is None else num_time
    needed = num_time * others
    if not needed or needed > taken.size or (needed < taken.size and taken.size % others):
        raise ValueError(
            f"num_time, num_chains, num_data: got {num_time} x {num_chains} x {num_data}, wanted at most "
            f"{taken.size} devices, and num_chains x num_data to divide them"
        )
    return Mesh(taken[:needed].reshape(num_chains, num_time, num_data), AXES)


class OnDevices(HashableFunction):
    """A function of what each device holds, as a function of whole arrays; parts: the function, the mesh, how arguments and
    results lie on it, and what the function gets before its arguments."""

    def __call__(self, *args):
        function, mesh, given, found, *fixed = self.parts
        return jax.shard_map(
            functools.partial(function, *fixed),
            mesh=mesh,
            in_specs=given,
            out_specs=found,
            check_vma=False,
        )(*args)


def solution_specs(along: Any, same: Any) -> Solution:
    """How a solution lies on the mesh: its path `along` an axis, all else as `same`."""
    return Solution(along, same, same, same, same, Stats(*[same] * 7))


def summed(function: Callable[..., Array], name: str = "data") -> Callable[..., Array]:
    """A function summed over the devices of a mesh axis, with the right derivative in its first argument.

    Args:
        function: `(x, *local) -> scalar`, where `x` is the same on all devices and `local` is this device's own.
        name: The mesh axis.

    Returns:
        `(x, *local) -> scalar`, for use inside `jax.shard_map`: the same on all devices. Reverse mode, and forward
        mode over it.
    """

    @jax.custom_vjp
    def total(x: PyTree, *local: PyTree) -> Array:
        return lax.psum(function(x, *local), name)

    def forward(x, *local):
        value, pull = jax.vjp(function, x, *local)
        return lax.psum(value, name), pull

    def backward(pull, cotangent):
        along, *rest = pull(cotangent)
        return lax.psum(along, name), *rest

    total.defvjp(forward, backward)
    return total


_PREEMPTION = "jax_enable_preemption_service"


@contextlib.contextmanager
def hosts(
    coordinator: str | None = None,
    num_hosts: int | None = None,
    host_id: int | None = None,
    *,
    heartbeat_seconds: int = 20,
    start_seconds: int = 300,
) -> Iterator[None]:
    """Join hosts into one run, for as long as the `with` block lasts.

    Enter it before any array is made. On the way out all hosts wait for each other. An exception is raised as usual; at
    its exit the process then waits for the other hosts to end, at most `start_seconds`.

    If a host is lost, the launcher's own kill switch ends the run: `srun --kill-on-bad-exit=1`, or `mpirun`, which has it
    on by default. Otherwise JAX's runtime ends the remaining processes after `heartbeat_seconds`.

    Args:
        coordinator: `HOST:PORT` of host 0, reachable from all; None looks for a cluster.
        num_hosts: The number of processes; None as above.
        host_id: The number of this process, from 0; None as above.
        heartbeat_seconds: How long a host may be silent before it counts as lost, at least 5.
        start_seconds: How long hosts wait for each other, at the start and at the end.

    Raises:
        ValueError: If only some of the first three arguments are given, one of them is invalid, or no cluster is found.
        RuntimeError: If arrays exist already, or the hosts do not come together in time.

    Examples:
        >>> import sys
        >>> from partime_mcmc import hosts, sample, time_mesh
        >>> with hosts("10.0.0.1:9876", num_hosts=2, host_id=int(sys.argv[1])):  # doctest: +SKIP
        ...     draws = sample(key, target, kernel, num_samples=100_000, mesh=time_mesh())
    """
    given = [value is not None for value in (coordinator, num_hosts, host_id)]
    if any(given) and not all(given):
        raise ValueError(
            f"coordinator, num_hosts, host_id: got {coordinator!r}, {num_hosts!r} and {host_id!r}, wanted all "
            "three, or none of them where the cluster says it (Slurm, Open MPI, Kubernetes)"
        )
    if num_hosts is not None and host_id is not None:
        check_count(num_hosts, "num_hosts", 1)
        check_count(host_id, "host_id", 0)
        if host_id >= num_hosts:
            raise ValueError(f"host_id must be below num_hosts = {num_hosts}, got {host_id}")
        if not re.fullmatch(r".+:\d+", str(coordinator)):
            raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    if not heartbeat_seconds >= 5:
        raise ValueError(f"heartbeat_seconds must be at least 5, got {heartbeat_seconds!r}")
    made = [array.shape for array in jax.live_arrays() if array.shape]
    if made:
        raise RuntimeError(
            f"hosts: {len(made)} arrays exist already (the first of shape {made[0]}); enter hosts(...) before any "
            "array or key is made"
        )
    # Importing a library may have started a backend, and JAX joins hosts only before that.
    jax.extend.backend.clear_backends()
    # JAX's preemption service would catch SIGTERM and leave it to the program to look for it.
    before = jax.config.values[_PREEMPTION]
    jax.config.update(_PREEMPTION, False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_hosts,
            host_id,
            heartbeat_timeout_seconds=heartbeat_seconds,
            initialization_timeout=start_seconds,
            shutdown_timeout_seconds=start_seconds,
        )
    except ValueError as error:
        raise ValueError(
            f"coordinator: got {coordinator!r} and found no cluster ({error}), wanted 'HOST:PORT' with num_hosts "
            "and host_id, or a start by Slurm, Open MPI or Kubernetes"
        ) from error
    finally:
        jax.config.update(_PREEMPTION, before)
    yield
    jax.distributed.shutdown()
