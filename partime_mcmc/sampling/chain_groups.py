"""Chains on the cores of a processor: groups of chains side by side, each in a thread of its own.

XLA runs small operations on one core, however many there are, and a step of some hundred lanes is made of small
operations. Chains do not wait for each other, so C of them are cut into g groups of C/g, which share one compiled program:

    seconds ~ ⌈g / cores⌉ · C/g,     g a divisor of C up to 8 per core that makes this least, the smallest of them

and are joined where a whole array is wanted; more groups would cost more than they fill. A draw hangs on how many chains
share its lanes by rounding only, as it does on the number of segments. Accelerators share the lanes of one program among all
chains: there g = 1.

Programs that call a library (LAPACK, a Fourier transform, Python) run one at a time (`executions`). By the operations of a step chains
are cut or left together; what may run side by side is read from the compiled program.
"""

import concurrent.futures
import functools
import math
from typing import Any, Callable

import jax
import numpy as np

from partime_mcmc.compile_cache import Timings, compile_in_thread, compiled, is_abstract, num_cores
from partime_mcmc.engine import Dynamics
from partime_mcmc.executions import calls_library, executing, overlaps
from partime_mcmc.tracing import explicit
from partime_mcmc.types import PyTree, is_key, nan_is_a_value

_MOST_PER_CORE = 8


def num_groups(num_chains: int, dynamics: Dynamics) -> int:
    """How many groups so many chains are cut into on the default device.

    Args:
        num_chains: C.
        dynamics: Their recurrence, without captured arrays.
    """
    cached = dynamics.cached
    parts = (dynamics.step, *(() if cached is None else (cached.init, cached.step, cached.state)))
    if (
        jax.default_backend() != "cpu"
        or num_chains == 1
        or any(calls_library(one.jaxpr) for one in parts)
    ):
        return 1
    cores = num_cores()
    most = min(num_chains, _MOST_PER_CORE * cores)
    divisors = [count for count in range(1, most + 1) if num_chains % count == 0]
    return min(divisors, key=lambda count: math.ceil(count / cores) * num_chains / count, default=1)


def split_chains(tree: PyTree, count: int) -> list[PyTree]:
    """Leaves `(C, ...)`, arrays or shapes, as `count` trees of leaves `(C / count, ...)`."""
    if count == 1:
        return [tree]

    def part(leaf, number):
        size = leaf.shape[0] // count
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)
        return _on_host(lambda one: one[number * size : (number + 1) * size], leaf)

    return [jax.tree.map(functools.partial(part, number=number), tree) for number in range(count)]


def concat_chains(groups: list[PyTree]) -> PyTree:
    """What `split_chains` has split, or what came of the groups: their leaves one after another along the first axis."""
    if len(groups) == 1:
        return groups[0]
    join = lambda *arrays: np.concatenate(arrays)
    return jax.tree.map(lambda *leaves: _on_host(join, *leaves), *groups)


def _on_host(function: Callable, *arrays: jax.Array) -> jax.Array:
    """A function of NumPy arrays, applied to arrays of a processor, keys included: groups are made on no other device, and
    every shape would be a program of its own."""
    if not is_key(arrays[0]):
        return jax.device_put(function(*map(np.asarray, arrays)))
    words = [np.asarray(jax.random.key_data(one)) for one in arrays]
    return jax.random.wrap_key_data(function(*words), impl=jax.random.key_impl(arrays[0]))


def run_groups(
    function: Callable,
    shared: tuple,
    chains: tuple,
    count: int,
    *,
    timings: Timings,
    what: str = "run",
    options: dict[str, Any] | None = None,
) -> PyTree:
    """`function(*shared, *chains)` of all chains, cut into groups that run side by side.

    Args:
        function: As for `run_program`.
        shared: What all groups get.
        chains: The other arguments, leaves `(C, ...)`.
        count: How many groups.
        timings: Where seconds are counted.
        what: Under what execution is booked.
        options: As for `compiled`.

    Returns:
        The result, ready, leaves `(C, ...)`. An error in one group is raised once all that have begun have ended. Of shapes
        (`jax.ShapeDtypeStruct`) the program is compiled only, in a thread, and shapes are returned.
    """
    # Threads do not inherit settings such as the width of numbers, so nothing may be left for them to convert.
    shared = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(np.asarray(leaf)),
        shared,
    )
    groups = split_chains(chains, count)
    if is_abstract(chains):
        found = compile_in_thread(function, *shared, *groups[0], options=options)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] * count, *leaf.shape[1:]), leaf.dtype),
            found,
        )
    program = compiled(function, *shared, *groups[0], timings=timings, options=options)

    @nan_is_a_value()
    def run(group):
        with executing(program):
            return jax.block_until_ready(program(*shared, *group))

    with timings.measure(what):
        if count == 1 or not overlaps(program):
            return concat_chains([run(group) for group in groups])
        with concurrent.futures.ThreadPoolExecutor(min(count, num_cores())) as threads:
            return concat_chains(list(threads.map(run, groups)))


def run_explicit_groups(
    function: Callable, params: PyTree, chains: tuple, count: int, *, timings: Timings, **options
) -> PyTree:
    """`function(params, *chains)` as `run_groups`, for functions that capture arrays: these become arguments."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), chains)
    with timings.measure("compile"):
        function, params = explicit(function, params, *split_chains(shapes, count)[0])
    return run_groups(function, (params,), chains, count, timings=timings, **options)
