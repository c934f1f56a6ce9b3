"""Pilot chains: pairs that start far apart and see the same random numbers.

Where such pairs meet, chains can be solved in parallel over time; where they stay apart, they cannot. They choose the coupling
as well. Plain and coalescing random numbers realise one law, so nothing but speed hangs on the choice (`kernels.coupling`):
in long runs pairs of the warm-up's draws are run under both, and the coupling with the smaller median meeting time is kept.
Seeds and programs decide, no clock, and the choice is part of the warm-up and of the plan: running again from `draws.warmup`
draws the same random numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.engine import Dynamics, Tolerance
from partime_mcmc.engine.iterates import iterates
from partime_mcmc.forgetting.advise import Advice, advise
from partime_mcmc.forgetting.coalescence import distances, meeting_times
from partime_mcmc.kernels import Kernel, MultishiftCoupling, Tape
from partime_mcmc.kernels.kernel_program import (
    ParametrisedKernel,
    parametrised_kernel,
    takes_coupling,
    with_coupling,
)
from partime_mcmc.sampling.plan import Plan, default_tolerance
from partime_mcmc.sampling.randomness import coupled_chains
from partime_mcmc.solvers import Sequential, Solver
from partime_mcmc.types import Key, PyTree
from partime_mcmc.warmup.warmup import Warmup

_NUM_PAIRS, _HORIZON = 16, 512


def choose_coupling_by_pilots(warmup: Warmup, key: Key) -> Warmup:
    """The warm-up with the coupling of its kernel chosen by pilot pairs, and a sentence that says so.

    Args:
        warmup: Its kernel draws plainly.
        key: For the pilots' random numbers.

    Returns:
        The warm-up, unchanged if its kernel's builder has no coupling to choose.
    """
    plain = warmup.kernel
    if not isinstance(plain, ParametrisedKernel) or not takes_coupling(plain.family.builder):
        return warmup
    builder = with_coupling(plain.family.builder, MultishiftCoupling())
    family = dataclasses.replace(plain.family, builder=builder)
    other = parametrised_kernel(family, plain.numbers.data, warmup.whitening, warmup.settings)
    tolerance = default_tolerance(plain, jax.tree.leaves(warmup.positions)[0].dtype)
    medians = [_median_meeting_time(one, warmup, tolerance, key) for one in (plain, other)]
    met = ["never" if np.isinf(median) else f"after {median:.0f} steps" for median in medians]
    kernel = plain
    note = f"Common random numbers: pilot pairs met {met[0]} in the median, with multishift coupling {met[1]}."
    if medians[1] < medians[0]:
        kernel = other
        note = f"Multishift coupling: pilot pairs met {met[1]} in the median, with common random numbers {met[0]}."
    return dataclasses.replace(warmup, kernel=kernel, notes=(*warmup.notes, note))


def _median_meeting_time(kernel: Kernel, warmup: Warmup, tolerance: Tolerance, key: Key) -> float:
    """Steps until pairs of the warm-up's draws meet, in the median; infinity if most do not."""
    keys, count = jax.random.split(key, _NUM_PAIRS), jax.tree.leaves(warmup.pool)[0].shape[0]
    first = np.arange(_NUM_PAIRS) % count
    dynamics, starts, others, tapes = _pairs(
        kernel, warmup.pool, first, (first + count // 2) % count, keys, _HORIZON
    )
    found = meeting_times(dynamics, starts, others, tapes, tolerance=tolerance)
    return float(np.median(np.where(np.asarray(found.met), np.asarray(found.steps), np.inf)))


def _pairs(
    kernel: Kernel, pool: PyTree, first: np.ndarray, second: np.ndarray, keys: Key, num_steps: int
) -> tuple[Dynamics, PyTree, PyTree, Tape]:
    """The recurrence, the carries of pairs of draws of a pool, by their places in it, and the random numbers that they share."""
    (dynamics, starts, tapes), (_, others, _) = (
        coupled_chains(kernel, jax.tree.map(lambda leaf: leaf[index], pool), keys, num_steps)
        for index in (first, second)
    )
    return dynamics, starts, others, tapes


# Steps of random numbers that pilots choose their own from.
_MAX_STEPS = 65_536


def advise_plan(plan: Plan, pool: PyTree) -> Advice:
    """What pilot chains say of the chains of a plan.

    Args:
        plan: The plan.
        pool: At least two far-apart draws, leaves `(K, ...)`.
    """
    kernel, first = plan.kernel, jax.tree.map(lambda leaf: leaf[:1], pool)
    num_steps = min(plan.num_samples, _MAX_STEPS)
    dynamics, carries, tape = coupled_chains(kernel, first, plan.keys[:1], num_steps)
    starts = jax.vmap(lambda position: kernel.carry(kernel.init(position)))(pool)
    initial, tape = jax.tree.map(lambda leaf: leaf[0], (carries, tape))
    return advise(
        dynamics,
        initial,
        tape,
        starts=starts,
        num_steps=plan.num_samples,
        num_chains=plan.num_chains,
        tolerance=default_tolerance(kernel, jax.tree.leaves(initial)[0].dtype),
    )


def coupled_distances(
    warmup: Warmup | None, key: Key, *, num_pairs: int = 16, num_steps: int = 400
) -> np.ndarray | None:
    """How far apart pairs of chains with the same random numbers are, step by step.

    Args:
        warmup: A warm-up: its kernel, and the pool from which pairs start.
        key: For the random numbers of the pairs.
        num_pairs: K.
        num_steps: T.

    Returns:
        Largest difference over coordinates in standard deviations of the pool, shape `(K, T)`; None without a warm-up,
        or with a pool of one draw.
    """
    if warmup is None or (count := jax.tree.leaves(warmup.pool)[0].shape[0]) < 2:
        return None
    kernel, first = warmup.kernel, np.arange(num_pairs) % count
    second = (first + 1 + np.arange(num_pairs) // count) % count
    keys = jax.random.split(key, num_pairs)
    dynamics, starts, others, tape = _pairs(kernel, warmup.pool, first, second, keys, num_steps)
    pool = jax.vmap(lambda position: ravel_pytree(kernel.carry(kernel.init(position)))[0])(
        warmup.pool
    )
    scale = jnp.std(pool, axis=0)
    return np.asarray(
        distances(dynamics, starts, others, tape, scale=jnp.where(scale > 0, scale, 1))
    )


def solve_by_pass(
    warmup: Warmup | None, key: Key, solver: Solver, *, num_steps: int = 512
) -> np.ndarray | None:
    """How a solver finds a window of a chain: residuals by iteration and step.

    Args:
        warmup: A warm-up: its kernel, and where its first chain ended.
        key: For the random numbers.
        solver: A recipe.
        num_steps: T.

    Returns:
        Shape `(P, T)`; None without a warm-up, or for the sequential solver, which has nothing to find.
    """
    if warmup is None or isinstance(solver, Sequential):
        return None
    position = jax.tree.map(lambda leaf: leaf[:1], warmup.positions)
    dynamics, carries, tape = coupled_chains(
        warmup.kernel, position, jax.random.split(key, 1), num_steps
    )
    initial, tape = jax.tree.map(lambda leaf: leaf[0], (carries, tape))
    tolerance = default_tolerance(warmup.kernel, jax.tree.leaves(initial)[0].dtype)
    found = iterates(dynamics, initial, tape, solver=solver, tolerance=tolerance)
    return np.asarray(found.residuals)[: int(found.iterations) + 1]
