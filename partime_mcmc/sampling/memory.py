"""What `sample` refuses before anything is compiled, naming the argument, what it got and what it wanted."""

from __future__ import annotations

import os
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from partime_mcmc.contracts import check_has, kind
from partime_mcmc.diagnostics.checks import TooLarge, check_bytes, check_count
from partime_mcmc.kernels import Evidence, Kernel, Recorded
from partime_mcmc.sampling.progress import Progress, progress_line, quiet
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.warmup import Warmup
from partime_mcmc.schedule import Schedule, Stretches
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers import Solver
from partime_mcmc.types import PyTree

# Of the memory of the device; the rest is for the compiler, the host and everybody else.
_SHARE = 0.6
# Steps and bytes of a chunk of a stored run, when nothing else limits it.
_CHUNK, _CHUNK_BYTES = 65536, 2**29
# KernelParams that a step says of itself: decision, probability, energy, margins and the like.
_SAID = 9
# Bytes of its draws, where many devices share it.
_WRITTEN_BYTES = 2**31


def check_strategies(
    target: Any, kernel: Any, solver: Any, schedule: Any, tolerance: Any, max_iterations: Any
) -> None:
    """Refuse arguments of the wrong kind.

    Raises:
        TypeError: Naming the argument.
        ValueError: If `max_iterations` is not a positive integer.
    """
    if not isinstance(target, Target):
        raise TypeError(
            f"target: got {kind(target)}, wanted a Target, e.g. from_numpyro(model, ..., key=key) or "
            "Target(logdensity, initial)"
        )
    if not callable(kernel) and not isinstance(kernel, (Kernel, Warmup)):
        raise TypeError(
            f"kernel: got {kind(kernel)}, wanted a Kernel (from_blackjax(...)), a builder such as hmc, or the "
            "warm-up of another run"
        )
    if solver is not None:
        check_has(
            solver,
            "solver",
            ("init", "step", "map_size"),
            "a recipe such as shooting() or quasi_deer(), or None",
        )
    if schedule is not None:
        check_has(
            schedule,
            "schedule",
            ("window", "advance"),
            "Whole(), Stretches(size), Sliding(size), or None",
        )
    if tolerance is not None and not isinstance(tolerance, Tolerance):
        raise TypeError(
            f"tolerance: got {kind(tolerance)}, wanted Tolerance(relative, absolute) or None"
        )
    if max_iterations is not None:
        check_count(max_iterations, "max_iterations", 1)


def check_memory(
    solver: Solver,
    stretch: int,
    num_samples: int,
    num_chains: int,
    dimension: int,
    itemsize: int,
    max_bytes: int | None,
    more: int = 0,
) -> None:
    """Refuse a run that cannot fit, before allocating.

    Args:
        solver: What will solve it, or the sequential one.
        stretch: Steps solved at once.
        num_samples: T.
        num_chains: C.
        dimension: D.
        itemsize: Bytes of a number.
        max_bytes: The limit; None is most of the device's memory.
        more: Bytes per draw of what is kept besides positions.

    Raises:
        TooLarge: Naming the setting to change.
    """
    limit = default_max_bytes() if max_bytes is None else check_count(max_bytes, "max_bytes", 1)
    check_bytes(
        min(stretch, num_samples),
        dimension,
        itemsize,
        limit,
        per_step=solver.map_size(dimension),
        num_chains=num_chains,
    )
    try:
        check_bytes(
            num_samples, dimension, itemsize, limit, per_step=0, num_chains=num_chains, more=more
        )
    except TooLarge as error:
        # However it is cut, what is returned would not fit.
        raise TooLarge(
            f"{str(error).split(': solve in stretches')[0]}: keep the draws on disk with store= (and "
            "thinning=), or raise max_bytes"
        ) from error


def chunk_steps(
    solver: Solver,
    schedule: Schedule | None,
    num_samples: int,
    num_chains: int,
    dimension: int,
    itemsize: int,
    max_bytes: int | None,
    wanted: int | None,
    more: int = 0,
    mesh: Mesh | None = None,
) -> int:
    """Steps of one chunk of a stored run: what fits, is worth its overhead, and divides the run evenly where it can.

    Args:
        solver: What will solve it, or the sequential one.
        schedule: `Stretches` make a chunk a whole number of them.
        num_samples: T.
        num_chains: C.
        dimension: D.
        itemsize: Bytes of a number.
        max_bytes: The limit; None is most of the device's memory.
        wanted: What the user asks for; None leaves it open.
        more: Bytes per step and chain of what is kept besides positions.
        mesh: Devices that share a chunk, each with memory of its own; None is the default device alone.

    Raises:
        TooLarge: Naming the setting to change, before anything is allocated.
    """
    limit = default_max_bytes(mesh) if max_bytes is None else check_count(max_bytes, "max_bytes", 1)
    rows, parts = (1, 1) if mesh is None else (mesh.shape["chains"], mesh.shape["time"])
    one = check_bytes(
        1,
        dimension,
        itemsize,
        2**63,
        per_step=solver.map_size(dimension),
        num_chains=num_chains // rows,
    )
    one += num_chains // rows * more
    unit = schedule.size if isinstance(schedule, Stretches) else 1
    # A chunk wants as much again for its dice and for what is said of its draws.
    fits, steps = parts * (limit // (2 * one)), wanted
    if wanted is not None:
        # Shorter than a stretch, it makes stretches shorter.
        unit = min(unit, check_count(wanted, "store.chunk", 1))
        steps = wanted // unit * unit
    if (steps or unit) > fits:
        name = "store.chunk" if wanted is not None else "schedule" if unit > 1 else "num_chains"
        instead = f"at most {fits} steps" if fits else "fewer chains"
        raise TooLarge(
            f"{name}: {steps or unit} steps of {num_chains} chains at once take about "
            f"{2 * one * (steps or unit):.3g} bytes; wanted at most max_bytes={limit}: take {instead}, or raise "
            "max_bytes"
        )
    if steps is None:
        steps = min(parts * _CHUNK, fits, parts * (_CHUNK_BYTES // one))
        if mesh is not None:
            # However many devices share it, one host writes it.
            steps = min(steps, _WRITTEN_BYTES // (num_chains * (dimension * itemsize + more)))
        steps = max(unit, steps // unit * unit)
    if steps >= num_samples:
        return max(num_samples, 1)
    # The last chunk is then no shorter than the others, and nothing is compiled for it alone.
    even = (size for size in range(steps, steps // 2, -unit) if num_samples % size == 0)
    return steps if wanted is not None else next(even, steps)


def bytes_beside(target: Target, example: PyTree, evidence: Evidence) -> int:
    """Bytes per draw of what is kept besides positions: the model's own values, and what each step says of itself.

    Args:
        target: What is sampled.
        example: A position; only structure, shapes and types matter.
        evidence: `Recorded()` keeps the defect of every step, too.
    """
    leaves = jax.tree.leaves(example)
    numbers = _SAID + (sum(leaf.size for leaf in leaves) if isinstance(evidence, Recorded) else 0)
    values = (
        []
        if target.constrain is None
        else jax.tree.leaves(jax.eval_shape(target.constrain, example))
    )
    return numbers * leaves[0].dtype.itemsize + sum(
        leaf.size * leaf.dtype.itemsize for leaf in values
    )


def default_max_bytes(mesh: Mesh | None = None) -> int:
    """Most of the memory of the default device, or of each device of a mesh."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(_SHARE * stats["bytes_limit"])
    # Devices that are made of processors share the memory of their host.
    sharing = 1 if mesh is None else max(1, len(mesh.local_devices))
    return int(_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // sharing


def chosen_progress(progress: Progress | bool) -> Progress:
    """The progress meant by `progress`: True is a line on a terminal and silence elsewhere, as users of NumPyro expect.

    Raises:
        TypeError: If it is neither a bool nor a Progress.
    """
    if isinstance(progress, bool):
        return progress_line if progress and sys.stderr.isatty() else quiet
    if progress is None:
        return quiet
    check_has(
        progress, "progress", ("stage", "note", "warn"), "True, False, quiet or progress_line"
    )
    return progress
