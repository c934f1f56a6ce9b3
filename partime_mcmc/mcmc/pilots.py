"""Pilot chains without a run: advice from a warm-up alone, and how fast pairs of chains with the same dice meet.

A pair starts from two draws of the warm-up's pool, far apart in the posterior, and both chains get the same dice. Where
such pairs meet, chains can be solved in parallel over time; where they stay apart, they cannot.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.diagnostics.checks import check_count, check_key
from partime_mcmc.diagnostics.passes import residuals_by_pass
from partime_mcmc.forgetting.advise import Advice
from partime_mcmc.forgetting.coalescence import distances
from partime_mcmc.mcmc.arguments import check_strategies, chosen_progress
from partime_mcmc.mcmc.chains import default_tolerance, pilot_advice
from partime_mcmc.mcmc.family import Builder
from partime_mcmc.mcmc.pooled import PooledAdaptation
from partime_mcmc.mcmc.progress import Progress
from partime_mcmc.mcmc.ready import prepare
from partime_mcmc.mcmc.tapes import throw
from partime_mcmc.mcmc.target import Target
from partime_mcmc.mcmc.warmup import Warmup
from partime_mcmc.solvers import Rollout, Solver
from partime_mcmc.types import Key

# Longer runs are cut into chunks, which are solved one after another.
_LONGEST = 65_536


def advice_for(
    key: Key,
    target: Target,
    kernel: Builder,
    *,
    num_samples: int,
    num_chains: int = 4,
    num_warmup: int = 1000,
    progress: Progress | bool = True,
) -> tuple[Warmup, Advice]:
    """What `sample` would be advised to do, without sampling.

    Args:
        key: As for `sample`, whose warm-up this is.
        target: What to sample.
        kernel: A builder such as `hmc`.
        num_samples: T, draws per chain that are planned; of long runs the first 65,536, a chunk of them.
        num_chains: C.
        num_warmup: Warm-up steps per chain at most.
        progress: As for `sample`.

    Returns:
        The warm-up and the advice.

    Raises:
        TypeError, ValueError: As `sample`.
    """
    key, progress = check_key(key), chosen_progress(progress)
    check_strategies(target, kernel, None, None, None, None)
    num_samples, num_chains = (
        check_count(num_samples, "num_samples", 1),
        check_count(num_chains, "num_chains", 1),
    )
    start_key, warmup_key, chains_key = jax.random.split(key, 3)
    tuned, warmup, _ = prepare(
        start_key, warmup_key, target, kernel, num_chains, num_warmup, PooledAdaptation(), progress
    )
    return warmup, pilot_advice(
        tuned, warmup.pool, jax.random.split(chains_key, num_chains), min(num_samples, _LONGEST)
    )


def coupled_distances(
    warmup: Warmup | None, key: Key, *, num_pairs: int = 16, num_steps: int = 400
) -> np.ndarray | None:
    """How far apart pairs of chains with the same dice are, step by step.

    Args:
        warmup: A warm-up: its kernel, and the pool from which pairs start.
        key: The dice of the pairs.
        num_pairs: K.
        num_steps: T.

    Returns:
        Largest difference over coordinates in standard deviations of the pool, shape `(K, T)`; None without a warm-up,
        or with a pool of one draw.
    """
    count = 0 if warmup is None else jax.tree.leaves(warmup.pool)[0].shape[0]
    if count < 2:
        return None
    first = np.arange(num_pairs) % count
    second = (first + 1 + np.arange(num_pairs) // count) % count
    one, other = (
        jax.tree.map(lambda leaf, index=index: leaf[index], warmup.pool)
        for index in (first, second)
    )
    keys = jax.random.split(key, num_pairs)
    (dynamics, starts, tape, _), (_, others, _, _) = (
        throw(warmup.kernel, start, keys, num_steps) for start in (one, other)
    )
    pool = jax.vmap(
        lambda position: ravel_pytree(warmup.kernel.carry(warmup.kernel.init(position)))[0]
    )(warmup.pool)
    scale = jnp.std(pool, axis=0)
    return np.asarray(
        distances(dynamics, starts, others, tape, scale=jnp.where(scale > 0, scale, 1))
    )


def solve_by_pass(
    warmup: Warmup | None, key: Key, solver: Solver, *, num_steps: int = 512
) -> np.ndarray | None:
    """How a solver finds a stretch of a chain: residuals by pass and step.

    Args:
        warmup: A warm-up: its kernel, and where its first chain ended.
        key: The dice.
        solver: A recipe.
        num_steps: T.

    Returns:
        Shape `(P, T)`; None without a warm-up, or for the sequential solver, which has nothing to find.
    """
    if warmup is None or isinstance(solver, Rollout):
        return None
    position = jax.tree.map(lambda leaf: leaf[:1], warmup.positions)
    dynamics, initial, tape, _ = throw(warmup.kernel, position, jax.random.split(key, 1), num_steps)
    initial, tape = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (initial, tape))
    tolerance = default_tolerance(warmup.kernel, jax.tree.leaves(initial)[0].dtype)
    return residuals_by_pass(dynamics, initial, tape, solver=solver, tolerance=tolerance)
