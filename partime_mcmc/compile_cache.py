"""Compiled programs, found again by what they compute and the shapes they compute it for.

`jax.jit` forgets a program with the function object it was made from, and every sampling run makes new ones. Here a
program belongs to its function, compared by equality, to the structure of its arguments and to their shapes and types,
so that a second run with other seeds, step sizes or data of the same shapes compiles nothing. Functions whose results
hang on captured arrays are made explicit first. Compilation and execution can be timed apart, because programs are
compiled ahead.

No argument is donated: the certificate and the sequential finish of a chain that did not converge read starts and random
numbers of a solve again, and parameters serve every window.
"""

import collections
import contextlib
import functools
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.tracing import explicit
from partime_mcmc.types import PyTree, jax_config

_MOST_PROGRAMS = 128
_PROGRAMS: collections.OrderedDict = collections.OrderedDict()
_LOCK = threading.Lock()


class Timings:
    """Seconds by what they were spent on."""

    def __init__(self):
        self.seconds = {"compile": 0.0, "advise": 0.0, "run": 0.0, "certify": 0.0}

    @contextlib.contextmanager
    def measure(self, what: str):
        """Add the seconds inside to `what`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - begin


# XLA's highest level for CPUs, the default, takes 3.5 times as long as the one below for programs that draw random numbers
# and gains nothing anywhere; a mixture's density ran half as fast with it (JAX 0.10.1).
CPU_OPTIONS: dict[str, int] = {"xla_backend_optimization_level": 2}


def compiler_options() -> dict[str, Any] | None:
    """How hard the compiler should try, for programs of this package; None leaves it to the compiler."""
    return CPU_OPTIONS if CPU_OPTIONS and jax.default_backend() == "cpu" else None


def compiled(function: Callable, *args: PyTree, timings: Timings) -> jax.stages.Compiled:
    """The program of `function(*args)`, compiled now or found again.

    Args:
        function: Pure, hashable; captures no array.
        *args: Pytrees of arrays.
        timings: Where the seconds of compilation are counted.
    """
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple(
        (
            jnp.shape(leaf),
            jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype,
            getattr(leaf, "weak_type", True),
        )
        for leaf in leaves
    )
    entry = (
        function,
        structure,
        shapes,
        jax_config.jax_enable_x64,
        jax_config.jax_default_matmul_precision,
    )
    with _LOCK:
        program = _PROGRAMS.get(entry)
        if program is not None:
            _PROGRAMS.move_to_end(entry)
    if program is None:
        with timings.measure("compile"):
            program = jax.jit(function).lower(*args).compile(compiler_options())
        with _LOCK:
            _PROGRAMS[entry] = program
            while len(_PROGRAMS) > _MOST_PROGRAMS:
                _PROGRAMS.popitem(last=False)
    return program


def run_program(function: Callable, *args: PyTree, timings: Timings, what: str = "run") -> PyTree:
    """`function(*args)`, compiled ahead and kept.

    Args:
        function: As for `compiled`.
        *args: As for `compiled`.
        timings: Where seconds are counted: compilation under "compile".
        what: Under what execution is booked.

    Returns:
        The result, ready.
    """
    program = compiled(function, *args, timings=timings)
    with timings.measure(what):
        return jax.block_until_ready(program(*args))


def run_explicit(
    function: Callable, params: PyTree, *args: PyTree, timings: Timings, what: str = "run"
) -> PyTree:
    """`function(params, *args)` as `run_program`, for functions that capture arrays: these become arguments."""
    with timings.measure("compile"):
        function, params = explicit(function, params, *args)
    return run_program(function, params, *args, timings=timings, what=what)


def as_committed_array(value: Any) -> jax.Array:
    """A JAX array that keeps nothing but its numbers: restored and computed ones run the same programs."""
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return value if is_key else jax.device_put(np.asarray(value))


@functools.cache
def device() -> str:
    """The default device, in words."""
    first = jax.devices()[0]
    return f"{first.platform}: {first.device_kind}"


def versions() -> dict[str, str]:
    """Versions of what decides about bits, by package."""
    return {
        name: _version(name)
        for name in ("partime_mcmc", "jax", "jaxlib", "blackjax", "numpyro", "numpy")
    }


@functools.cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
