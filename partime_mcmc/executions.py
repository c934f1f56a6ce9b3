"""Programs that call a library run one at a time, whichever thread of the user's wants them.

jaxlib spreads the call of a library (LAPACK, a Fourier transform, Python) over XLA's own threads and waits for them while it
occupies one: two programs that make such calls on a CPU can so wait for each other for ever (seen with a Cholesky factor's solve on
two cores, JAX 0.10.1). Programs without such calls run beside any other.

This holds for the programs of this package: of sampling, and of `solve`, `unroll` and `certify` where they are called with arrays. Inside
`jit`, `vmap` or `grad` they are part of the user's program, which JAX runs when it likes.
"""

import contextlib
import functools
import re
import threading
from collections.abc import Iterator
from typing import Any, Callable

import jax

from partime_mcmc.tracing import OnceCache, primitives_of
from partime_mcmc.types import PyTree, Tracer, jax_config

# Operations that become calls of a library on a CPU.
_LIBRARY = {
    "cholesky",
    "cholesky_update",
    "triangular_solve",
    "lu",
    "lu_pivots_to_permutation",
    "eig",
    "eigh",
    "svd",
    "qr",
    "geqrf",
    "geqp3",
    "householder_product",
    "schur",
    "hessenberg",
    "tridiagonal",
    "tridiagonal_solve",
    "fft",
    "conv_general_dilated",
    "ffi_call",
    "pure_callback",
    "io_callback",
    "debug_callback",
    "debug_print",
}


@functools.lru_cache(maxsize=128)
def calls_library(jaxpr: Any) -> bool:
    """Whether a traced function would call a library on a CPU, before it is compiled."""
    return bool(primitives_of(jaxpr) & _LIBRARY)


# Whether programs call a library, by what they are called with: to ask for their traces takes as long as to call them.
_KNOWN = OnceCache(256)


def _calls_library_with(program: Any, leaves: list, args: tuple, static: dict[str, Any]) -> bool:
    # Static ones are no arrays.
    shapes = tuple((leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf for leaf in leaves)
    settings = jax_config.jax_enable_x64, jax_config.jax_default_matmul_precision
    entry = (program, jax.tree.structure(args), shapes, frozenset(static.items()), settings)
    return _KNOWN.get(entry, lambda _: calls_library(program.trace(*args, **static).jaxpr.jaxpr))


_LIBRARY_COMPILED = re.compile(r"\b(custom-call|fft|convolution)\(")


@functools.lru_cache(maxsize=128)
def overlaps(program: jax.stages.Compiled) -> bool:
    """Whether a program may run beside others: what the compiler has made of it is what counts."""
    return _LIBRARY_COMPILED.search(program.as_text() or "") is None


# The programs that are being executed, each as whether it may run beside others, and a place to wait until one of them is done.
_CHANGED, _RUNNING = threading.Condition(), []


@contextlib.contextmanager
def _executing(overlaps: Callable[[], bool]) -> Iterator[None]:
    """Execute a program inside: beside others only if it or they call no library.

    Args:
        overlaps: Whether it calls none, a function of its own; nobody asks while it is alone.
    """
    with _CHANGED:
        _CHANGED.wait_for(lambda: not _RUNNING or overlaps() or all(other() for other in _RUNNING))
        _RUNNING.append(overlaps)
    try:
        yield
    finally:
        with _CHANGED:
            _RUNNING.remove(overlaps)
            _CHANGED.notify_all()


def executing(program: jax.stages.Compiled) -> contextlib.AbstractContextManager[None]:
    """Execute a compiled program inside."""
    return _executing(functools.partial(overlaps, program))


def run_jitted(program: Any, *args: PyTree, **static: Any) -> PyTree:
    """`program(*args, **static)`, alone if it calls a library and runs on a CPU.

    Args:
        program: A function made by `jax.jit`.
        *args: Its arguments.
        **static: Its static arguments.

    Returns:
        The result; ready where the program calls a library, as `jax.jit` returns it elsewhere.
    """
    leaves = jax.tree.leaves(args)
    if (
        jax.default_backend() != "cpu"
        or jax_config.jax_disable_jit
        or any(isinstance(leaf, Tracer) for leaf in leaves)
        or not _calls_library_with(program, leaves, args, static)
    ):
        return program(*args, **static)
    with _executing(lambda: False):
        return jax.block_until_ready(program(*args, **static))
