"""Chains of a tuned kernel, in memory: who solves them, how small residuals must be, and the draws as one piece."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from partime_mcmc.forgetting.advise import Advice, advise, path_bytes
from partime_mcmc.kernels import Evidence, Independent, Kernel, Recorded
from partime_mcmc.mcmc.arguments import bytes_beside, check_memory, default_max_bytes
from partime_mcmc.mcmc.cores import first_group
from partime_mcmc.mcmc.draws import Draws, End
from partime_mcmc.mcmc.joining import join_draws
from partime_mcmc.mcmc.progress import Progress, quiet
from partime_mcmc.mcmc.run import Choice
from partime_mcmc.mcmc.store.fingerprint import example_of
from partime_mcmc.mcmc.stream import Course, Tell, stream
from partime_mcmc.mcmc.tapes import throw
from partime_mcmc.mcmc.target import Target
from partime_mcmc.mcmc.warmup import Warmup
from partime_mcmc.recipes import sequential, shooting
from partime_mcmc.schedule import Schedule, Stretches
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers import Solver
from partime_mcmc.solvers.segment_rule import segment_length
from partime_mcmc.types import Key, PyTree

DEFAULT_STRETCH = 16384
# Runs too short to be worth pilots.
SHORT = 1024


def draw_chains(
    target: Target,
    kernel: Kernel,
    positions: PyTree,
    keys: Key,
    num_samples: int,
    *,
    warmup: Warmup | None,
    solver: Solver | None = None,
    schedule: Schedule | None = None,
    tolerance: Tolerance | None = None,
    max_iterations: int | None = None,
    choose: Choice | None = None,
    plan: dict[str, Any] | None = None,
    end: End | None = None,
    mesh: Mesh | None = None,
    certificate: Evidence = Recorded(),
    progress: Progress = quiet,
) -> Draws:
    """Chains of a tuned kernel, certified.

    Args:
        target: For the model's own space.
        kernel: The kernel.
        positions: One per chain, leaves `(C, ...)`.
        keys: One per chain, shape `(C,)`.
        num_samples: T.
        warmup: The warm-up before them, if any.
        solver: A recipe; None is shooting with as many segments as fill the device.
        schedule: How time is cut; None is stretches of 16,384 steps.
        tolerance: None is `default_tolerance(...)`.
        max_iterations: As for `sample`.
        choose: Picks solver and schedule once dynamics and tapes are known; None takes those given.
        plan: More plain values for `Draws.plan`.
        end: Where chains go on from, to the last bit; None is `positions`.
        mesh: Devices to spread chains and time over; None is the default device alone.
        certificate: What certificates rest on.
        progress: What to tell.
    """
    num_chains = keys.shape[0]
    dtype = jax.tree.leaves(positions)[0].dtype
    tolerance = default_tolerance(kernel, dtype) if tolerance is None else tolerance
    course = Course(
        target,
        kernel,
        keys,
        num_samples,
        tolerance,
        max_iterations,
        choose or given_choice(solver, schedule, num_chains, num_samples, mesh),
        warmup,
        plan or {},
        mesh,
        certificate,
    )
    with progress.stage("sampling", num_samples) as advance:
        pieces = list(
            stream(course, positions, max(num_samples, 1), Tell(advance, num_chains), end)
        )
    return join_draws(pieces)


def check_fits(
    target: Target,
    num_samples: int,
    num_chains: int,
    *,
    solver: Solver | None,
    schedule: Schedule | None,
    certificate: Evidence,
    mesh: Mesh | None = None,
    max_bytes: int | None = None,
) -> None:
    """Refuse draws that memory cannot hold, from shapes alone: before warm-up, and before anything is allocated.

    Args:
        target: What is sampled.
        num_samples: T.
        num_chains: C.
        solver: As for `draw_chains`.
        schedule: As for `draw_chains`.
        certificate: What certificates rest on.
        mesh: Devices that share the draws.
        max_bytes: Memory that the run may take on each; None is most of the device's.

    Raises:
        TooLarge: Naming the setting to change.
    """
    example = example_of(target)
    leaves = jax.tree.leaves(example)
    rows, parts = (1, 1) if mesh is None else (mesh.shape[name] for name in ("chains", "time"))
    more = bytes_beside(target, example, certificate if mesh is None else Independent())
    check_memory(
        solver or sequential(),
        getattr(schedule or Stretches(DEFAULT_STRETCH), "size", num_samples),
        -(-num_samples // parts),
        num_chains // rows,
        sum(leaf.size for leaf in leaves),
        leaves[0].dtype.itemsize,
        default_max_bytes(mesh) if max_bytes is None else max_bytes,
        more,
    )


def given_choice(
    solver: Solver | None,
    schedule: Schedule | None,
    num_chains: int,
    num_samples: int,
    mesh: Mesh | None = None,
) -> Choice:
    """Solver and schedule as given, with the default for what is not: for each device of a mesh, and each group of chains on
    the cores of one, what one device gets."""
    rows, parts = (1, 1) if mesh is None else (mesh.shape["chains"], mesh.shape["time"])
    stretches = Stretches(DEFAULT_STRETCH * parts) if schedule is None else schedule

    def choose(dynamics, initial, tape, groups):
        del dynamics, initial, tape
        fixed = (
            default_solver(num_chains // (rows * groups), -(-num_samples // parts), groups)
            if solver is None
            else solver
        )
        return fixed, stretches, None

    return choose


def advised(kernel: Kernel, pool: PyTree, schedule: Schedule | None) -> Choice:
    """The solver that advice finds best for chains like these, or for short runs the default one.

    Args:
        kernel: The kernel.
        pool: Far-apart draws, leaves `(K, ...)`.
        schedule: How time is cut; None follows the advice.
    """
    return functools.partial(_advised, kernel, pool, schedule)


def _advised(kernel, pool, schedule, dynamics, initial, tape, groups):
    num_chains, num_samples = jax.tree.leaves(tape)[0].shape[:2]
    # Pilots that start at the same place would meet at once and tell nothing.
    apart = any((np.asarray(leaf) != np.asarray(leaf[:1])).any() for leaf in jax.tree.leaves(pool))
    if num_samples < SHORT or not apart:
        stretches = Stretches(DEFAULT_STRETCH) if schedule is None else schedule
        return default_solver(num_chains, num_samples, groups), stretches, None
    advice = _advice(kernel, pool, dynamics(), initial, tape, groups)
    return advice.solver, advice.schedule if schedule is None else schedule, advice


def _advice(kernel, pool, dynamics, initial, tape, groups) -> Advice:
    num_chains, num_samples = jax.tree.leaves(tape)[0].shape[:2]
    starts = jax.vmap(lambda position: kernel.carry(kernel.init(position)))(pool)
    one = functools.partial(jax.tree.map, lambda leaf: leaf[0])
    tolerance = default_tolerance(kernel, jax.tree.leaves(initial)[0].dtype)
    return advise(
        dynamics,
        one(initial),
        one(tape),
        starts=starts,
        num_steps=num_samples,
        num_chains=num_chains,
        tolerance=tolerance,
        max_bytes=path_bytes() / groups,
    )


def pilot_advice(kernel: Kernel, pool: PyTree, keys: Key, num_samples: int) -> Advice:
    """What pilot chains from some draws, and the cost model, say of chains of a tuned kernel.

    Args:
        kernel: The kernel.
        pool: At least two far-apart draws, leaves `(K, ...)`.
        keys: One per chain, shape `(C,)`.
        num_samples: T.
    """
    dynamics, initial, tape, _ = throw(kernel, pool_starts(pool, keys.shape[0]), keys, num_samples)
    groups, (initial, tape) = first_group(keys.shape[0], dynamics, (initial, tape))
    return _advice(kernel, pool, dynamics, initial, tape, groups)


def pool_starts(pool: PyTree, num_chains: int) -> PyTree:
    """One of some draws per chain."""
    count = jax.tree.leaves(pool)[0].shape[0]
    return jax.tree.map(lambda leaf: leaf[np.arange(num_chains) % count], pool)


def default_solver(
    num_chains: int = 1, num_samples: int = DEFAULT_STRETCH, groups: int = 1
) -> Solver:
    """Shooting, the lanes of the device shared by all chains: near one evaluation per draw where chains forget.

    Args:
        num_chains: Chains that share them.
        num_samples: T.
        groups: Not used; every group of chains has lanes of its own.
    """
    del groups
    return shooting(steps=segment_length(min(num_samples, DEFAULT_STRETCH), num_chains))


def default_tolerance(kernel: Kernel, dtype: Any) -> Tolerance:
    """A tenth (float32) to a thousandth (float64) of what the certificate allows, in the units of the kernel's noise.

    What is left to the certificate's bound is for conditioning: an error of one step reaches the next ones.
    """
    unit = np.minimum(
        1.0, np.min(np.asarray(1.0 if kernel.noise_scale is None else kernel.noise_scale))
    )
    size = 1e-11 if jnp.dtype(dtype) == jnp.float64 else 1e-5
    return Tolerance(relative=0.25 * size, absolute=np.asarray(size * unit, dtype))
