"""Compiled programs, found again by what they compute and the shapes they compute it for.

`jax.jit` forgets a program with the function object it was made from, and every sampling run makes new ones. Here a
program belongs to its function, compared by equality, to the structure of its arguments and to their shapes and types,
so that a second run with other seeds, step sizes or data of the same shapes compiles nothing. Functions whose results
hang on captured arrays are made explicit first. Compilation and execution can be timed apart, because programs are
compiled ahead.

Between processes a folder keeps what was compiled (`keep_on_disk`): programs that have a name in every process
(`kept_programs`) are not even traced again, others are found by JAX's own cache once they are lowered.

No argument is donated: the certificate and the sequential finish of a chain that did not converge read starts and random
numbers of a solve again, and parameters serve every window.
"""

import atexit
import contextlib
import functools
import math
import os
import pathlib
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Callable

import jax
import jax.numpy as jnp
import jaxlib.utils
import numpy as np
import platformdirs
from jax.experimental.compilation_cache import compilation_cache

from partime_mcmc import kept_programs
from partime_mcmc.captured_data import VERSIONED
from partime_mcmc.executions import executing, overlaps
from partime_mcmc.tracing import OnceCache, explicit
from partime_mcmc.types import PyTree, is_key, jax_config, nan_is_a_value, settings


def num_cores() -> int:
    """Cores that this process may run on; a quota of their time, as containers may have, is not looked at."""
    # macOS and Windows do not say.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_PROGRAMS = OnceCache(128)
# What is traced in a thread while another one comes to want it is not traced there again; few are on their way at a time.
_LOWERED = OnceCache(8)
# Programs that nobody waits for leave a core to the one that somebody does.
_SPARE_CORES = threading.Semaphore(max(1, num_cores() - 1))


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


# To optimise the programs of a run of `CoalescingHMC` takes some 12 seconds of a core instead of 2 (JAX 0.10.1). Where a run that is
# not optimised takes an estimated second at most the first answer comes 2 s sooner without, and later runs take 0.3 to 1 s longer;
# at 2.5 s there is no difference.
_WORTH_OPTIMISING = 1.5


def compiler_options(seconds: float = math.inf) -> dict[str, Any] | None:
    """How hard the compiler should try, for programs of this package; None leaves it to the compiler.

    Args:
        seconds: How long all that is compiled would run without being optimised, by an estimate that hangs on shapes and counts
            alone: bits must not depend on how fast a machine was.
    """
    if not CPU_OPTIONS or jax.default_backend() != "cpu":
        return None
    return CPU_OPTIONS if worth_optimising(seconds) else _quick_options()


def worth_optimising(seconds: float) -> bool:
    """Whether what would run so long without being optimised should be."""
    return seconds > _WORTH_OPTIMISING


@functools.cache
def _quick_options() -> dict[str, Any]:
    # Small programs are not worth cutting up for several threads of the compiler, which costs a quarter of its time.
    quick: dict[str, Any] = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    # The older way to make kernels, of which JAX 0.10 is the last to know, compiles twice as fast.
    return quick | ({"xla_cpu_use_fusion_emitters": False} if _jax_version() < (0, 11) else {})


def _jax_version() -> tuple[int, ...]:
    return tuple(map(int, jax.__version__.split(".")[:2]))


# Of absl's levels of messages the highest.
_FATAL = 3


@functools.cache
def keep_on_disk() -> pathlib.Path | None:
    """Have JAX keep compiled programs in the user's cache folder, so that the next process does not compile them again.

    What the user has chosen stays: JAX's own setting `jax_compilation_cache_dir`, or the environment variable
    `PARTIME_CACHE`, which is another folder, 0 for none, or 1 for the usual one. Programs in the folder are executed: only
    those whose code one would run should be able to write there.

    Returns:
        The folder; None where programs are not kept, or not by this package.
    """
    wanted = os.environ.get("PARTIME_CACHE", "")
    if wanted == "0" or jax_config.jax_compilation_cache_dir:
        return None
    usual = platformdirs.user_cache_path("partime_mcmc")
    # Also where the process changes its working folder.
    folder = (usual if wanted in ("", "1") else pathlib.Path(wanted)).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    # Small programs too: there are many of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX would look at every file of the folder whenever it writes one.
    jax.config.update("jax_compilation_cache_max_size", -1)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    atexit.register(kept_programs.make_room, folder)
    # JAX decides at its first compilation whether there is a cache.
    compilation_cache.reset_cache()
    _hush_the_loader()
    return folder


def _hush_the_loader() -> None:
    """Keep XLA before JAX 0.12 from printing 1,500 letters for every program that it takes from the cache on many Intel processors.

    It counts preferences of the compiler (`prefer-no-gather`) among the instructions that the processor must have
    (github.com/openxla/xla/issues/44565). Errors of XLA come as exceptions besides.
    """
    old = _jax_version() < (0, 12)
    # JAX sets 1 where the user has set nothing.
    unset = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1"
    if old and unset and jax.default_backend() == "cpu":
        set_level = getattr(jaxlib.utils, "absl_set_min_log_level", None)
        if set_level is not None:
            set_level(_FATAL)


def compiled(
    function: Callable, *args: PyTree, timings: Timings, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """The program of `function(*args)`, compiled now or found again.

    Args:
        function: Pure, hashable; captures no array.
        *args: Pytrees of arrays.
        timings: Where the seconds of compilation are counted.
        options: From `compiler_options`; None is the usual ones.
    """
    options = compiler_options() if options is None else options
    entry = _entry(function, args, options)

    def make(_):
        with timings.measure("compile"):
            kept = _KeptProgram(entry, args)
            found = kept.load()
            return kept.made(_lowered(entry, args), options) if found is None else found

    return _PROGRAMS.get(entry, make)


def compile_in_thread(
    function: Callable, *args: PyTree, options: dict[str, Any] | None = None
) -> PyTree:
    """Trace a program here, unless it is on disk, and compile it in a thread of its own; whoever wants it waits for that.

    Args:
        function: As for `compiled`.
        *args: Shapes and types suffice.
        options: As for `compiled`.

    Returns:
        Shapes and types of the result.
    """
    options = compiler_options() if options is None else options
    entry = _entry(function, args, options)
    kept = _KeptProgram(entry, args)
    found = kept.load()
    if found is not None:
        traced = _PROGRAMS.get(entry, lambda _: found)
    else:
        traced = lowered = _lowered(entry, args)

        def compile_it():
            # What fails here fails again where it is wanted.
            with _SPARE_CORES, contextlib.suppress(Exception):
                _PROGRAMS.get(entry, lambda _: kept.made(lowered, options))

        in_thread(compile_it)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), traced.out_info)


def _lowered(entry: tuple, args: tuple) -> jax.stages.Lowered:
    return _LOWERED.get(entry, lambda _: jax.jit(entry[0]).lower(*args))


class _KeptProgram:
    """The place of a program on disk, if it has one.

    Args:
        entry: From `_entry`.
        args: Of the program.
    """

    def __init__(self, entry: tuple, args: tuple):
        *parts, elsewhere = entry
        folder, self._args = keep_on_disk(), args
        self._path = (
            None
            if folder is None or elsewhere
            else kept_programs.path_of(folder, *parts, versions(), os.environ.get("XLA_FLAGS"))
        )

    def load(self) -> jax.stages.Compiled | None:
        """The program; None if it has to be compiled."""
        return None if self._path is None else kept_programs.load(self._path, self._args)

    def made(self, lowered: jax.stages.Lowered, options: Any) -> jax.stages.Compiled:
        """The program compiled, which is written in a thread of its own."""
        path = self._path
        if path is None:
            return lowered.compile(options)
        program, anew = kept_programs.compiled_anew(lowered, options)

        def save():
            # jaxlib registers what it calls of a library when a program is lowered: loaded in a process without that it would crash.
            if overlaps(program):
                kept_programs.save(path, program)

        if anew:
            in_thread(save)
        return program


def in_thread(step: Callable[[], None]) -> None:
    """Run a step that compiles in a thread of its own, with the settings that JAX has here: threads begin with the process's."""
    here = (
        jax.enable_x64(jax_config.jax_enable_x64),
        jax.default_matmul_precision(jax_config.jax_default_matmul_precision),
        jax.default_device(jax_config.jax_default_device),
        jax.threefry_partitionable(jax_config.jax_threefry_partitionable),
        jax.default_prng_impl(jax_config.jax_default_prng_impl),
        jax.numpy_dtype_promotion(jax_config.jax_numpy_dtype_promotion),
    )

    def run():
        with contextlib.ExitStack() as stack:
            for setting in here:
                stack.enter_context(setting)
            step()

    threading.Thread(target=run, name="partime_mcmc compiles").start()


def _entry(function: Callable, args: tuple, options: dict[str, Any] | None) -> tuple:
    """What a program belongs to."""
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple(
        (
            np.shape(leaf),
            str(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)),
            getattr(leaf, "weak_type", not hasattr(leaf, "dtype")),
        )
        for leaf in leaves
    )
    return (
        function,
        structure,
        shapes,
        settings(),
        frozenset((options or {}).items()),
        _elsewhere(leaves),
    )


def _elsewhere(leaves: list) -> tuple:
    """Where arguments lie that are not on the usual device, and another default device: a program is compiled for that."""
    default = jax_config.jax_default_device
    usual = {default or jax.local_devices()[0]}
    placed = tuple(
        (place, leaf.sharding)
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array) and leaf.committed and leaf.devices() != usual
    )
    return placed + ((default,) if default else ())


def run_program(
    function: Callable,
    *args: PyTree,
    timings: Timings,
    what: str = "run",
    options: dict[str, Any] | None = None,
) -> PyTree:
    """`function(*args)`, compiled ahead and kept.

    Args:
        function: As for `compiled`.
        *args: As for `compiled`.
        timings: Where seconds are counted: compilation under "compile".
        what: Under what execution is booked.
        options: As for `compiled`.

    Returns:
        The result, ready.
    """
    program = compiled(function, *args, timings=timings, options=options)
    with timings.measure(what), nan_is_a_value(), executing(program):
        return jax.block_until_ready(program(*args))


def is_abstract(tree: PyTree) -> bool:
    """Whether a leaf is a shape without an array."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def run_explicit(
    function: Callable,
    params: PyTree,
    *args: PyTree,
    timings: Timings,
    what: str = "run",
    options: dict[str, Any] | None = None,
) -> PyTree:
    """`function(params, *args)` as `run_program`, for functions that capture arrays: these become arguments."""
    with timings.measure("compile"):
        function, params = explicit(function, params, *args)
    return run_program(function, params, *args, timings=timings, what=what, options=options)


def as_committed_array(value: Any) -> jax.Array:
    """A JAX array that keeps nothing but its numbers: restored and computed ones run the same programs."""
    return value if is_key(value) else jax.device_put(np.asarray(value))


@functools.cache
def device() -> str:
    """The default device, in words."""
    first = jax.devices()[0]
    return f"{first.platform}: {first.device_kind}"


def versions() -> dict[str, str]:
    """Versions of what decides about bits, by package."""
    return {name: _version(name) for name in VERSIONED}


@functools.cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
