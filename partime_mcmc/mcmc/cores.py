"""Chains on the cores of a processor: groups of chains side by side, each in a thread of its own.

XLA runs small operations on one core, however many there are, and a step of some hundred lanes is made of small
operations. Chains do not wait for each other, so C of them are cut into g groups of C/g, which share one compiled program:

    seconds ~ ⌈g / cores⌉ · C/g,     g a divisor of C that makes this least, the smallest of them

and are joined where a whole array is wanted. A draw hangs on how many chains share its lanes by rounding only, as it does
on the number of segments. Accelerators share the lanes of one program among all chains: there g = 1.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import os
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.mcmc.programs import Clock, compiled
from partime_mcmc.types import PyTree


def num_cores() -> int:
    """Cores that this process may use."""
    # macOS and Windows do not say.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_groups(num_chains: int) -> int:
    """How many groups so many chains are cut into on the default device."""
    if jax.default_backend() != "cpu":
        return 1
    cores = num_cores()
    divisors = [count for count in range(1, min(num_chains, 2 * cores) + 1) if num_chains % count == 0]
    return min(divisors, key=lambda count: math.ceil(count / cores) * num_chains / count, default=1)


def cut(tree: PyTree, count: int) -> list[PyTree]:
    """Leaves `(C, ...)` as `count` trees of leaves `(C / count, ...)`."""
    return [tree] if count == 1 else _cut(tree, count)


def joined(groups: list[PyTree]) -> PyTree:
    """What `cut` has cut, or what came of the groups: their leaves one after another along the first axis."""
    return groups[0] if len(groups) == 1 else _joined(groups)


@functools.partial(jax.jit, static_argnums=1)
def _cut(tree, count):
    def part(leaf, number):
        size = leaf.shape[0] // count
        return leaf[number * size:(number + 1) * size]

    return [jax.tree.map(functools.partial(part, number=number), tree) for number in range(count)]


@jax.jit
def _joined(groups):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups)


def run_groups(function: Callable, shared: tuple, groups: list[tuple], *, clock: Clock, what: str = "run") -> list[PyTree]:
    """`function(*shared, *group)` for every group, side by side.

    Args:
        function: As for `run_program`.
        shared: What all groups get.
        groups: The other arguments, of one structure, shapes and types.
        clock: Where seconds are booked.
        what: Under what execution is booked.

    Returns:
        The results, ready, in order. An error in one group is raised once all have ended.
    """
    # Threads do not inherit settings such as the width of numbers, so nothing may be left for them to convert.
    shared, groups = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(np.asarray(leaf)),
                                  (shared, groups))
    program = compiled(function, *shared, *groups[0], clock=clock)

    def run(group):
        return jax.block_until_ready(program(*shared, *group))

    with clock.measure(what):
        if len(groups) == 1:
            return [run(groups[0])]
        with concurrent.futures.ThreadPoolExecutor(min(len(groups), num_cores()) - 1 or 1) as threads:
            others = [threads.submit(run, group) for group in groups[1:]]
            return [run(groups[0]), *(other.result() for other in others)]
