"""The constants of this machine, measured: what a kernel costs to start, what a unit of work costs, what further cores add.

A small network of tanh units is all starts of kernels, a large one all work, so that with L and 2 L lanes

    o ~ (2 t(L) − t(2 L)) / kernels    from the small one,    w ~ (t(L) − o · kernels) / (L · work)    from the large.

The only place where a machine is timed, and only when somebody asks.
"""

from __future__ import annotations

import dataclasses
import os
import time

import jax
import jax.numpy as jnp

from partime_mcmc.dynamics import Dynamics
from partime_mcmc.predict.cost import sequential_loop, step_cost
from partime_mcmc.predict.machine import Machine, default_machine


def calibrate(name: str = "calibrated") -> Machine:
    """Measure this machine: a few seconds of a small network (kernel starts) and a large one (work).

    Nothing calls this for you. Keep the result with your seeds: another machine may give another plan, and another plan
    other rounding.

    Args:
        name: For reports.

    Returns:
        The default machine of the backend with `seconds_per_kernel`, `seconds_per_work` and `efficiency` measured.
    """
    base = default_machine(jax.default_backend())
    small, large = (_Network(size) for size in (8, 64))
    # Two lane counts each: with L lanes and 2 L the difference is work, the rest is kernels.
    per_kernel = (
        max(2 * small.seconds(16) - small.seconds(32), 0.1 * small.seconds(16)) / small.kernels
    )
    alone = max(large.seconds(1) - per_kernel * large.kernels, 0.0) / large.work
    crowd = max(large.seconds(512) - per_kernel * large.kernels, 0.0) / (512 * large.work)
    alone, crowd = max(alone, crowd, 1e-15), max(crowd, 1e-15)
    cores = base.num_cores if jax.default_backend() != "cpu" else os.cpu_count() or 1
    efficiency = min(1.0, (alone / crowd - 1) / (cores - 1)) if cores > 1 else base.efficiency
    return dataclasses.replace(
        base,
        name=name,
        seconds_per_kernel=per_kernel,
        seconds_per_work=alone,
        num_cores=cores,
        efficiency=efficiency,
    )


class _Network:
    """A tanh network of D units, timed."""

    def __init__(self, size: int, num_steps: int = 256):
        self.num_steps, self.size = num_steps, size
        self.dynamics = Dynamics(_network_step, jnp.eye(size) * 0.5)
        cost = step_cost(
            self.dynamics,
            jnp.zeros(size),
            jax.ShapeDtypeStruct((size,), jnp.zeros(0).dtype),
            num_steps,
            8,
            default_machine(jax.default_backend()),
        )
        self.kernels, self.work = cost.kernels_wide, cost.work

    def seconds(self, lanes: int) -> float:
        """Seconds per step: the fastest of many runs, because others may use the machine."""
        initial, drives = (
            jnp.zeros((lanes, self.size)),
            jnp.ones((lanes, self.num_steps, self.size)) * 0.1,
        )
        times = []
        for _ in range(21):
            begin = time.perf_counter()
            jax.block_until_ready(sequential_loop(self.dynamics, initial, drives))
            times.append(time.perf_counter() - begin)
        return min(times[1:]) / self.num_steps


def _network_step(params, state, drive):
    return jnp.tanh(params @ state) + drive
