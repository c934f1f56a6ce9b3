"""The gradient of a target's log density at draws, for the verdict's test by Stein's identity.

After a warm-up nothing is compiled for it: a batch of warm-up's program with fresh starts and no leapfrog step returns its
starts with their gradients. For a kernel that came tuned there is a small program.
"""

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.compile_cache import Timings, run_explicit
from partime_mcmc.kernels.kernel_program import density_of
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import PyTree
from partime_mcmc.warmup.hmc_batch import STEPS, HMCBatch, SeedTree
from partime_mcmc.warmup.metric import diagonal_like
from partime_mcmc.warmup.pooled import PooledAdaptation
from partime_mcmc.warmup.triangular_fit import first_maps

# Positions that the small program takes at a time.
_BATCH = 128


def scores_at(plan: Plan, positions: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """Positions as rows, and the gradient of the log density there.

    Args:
        plan: Of the run.
        positions: Leaves `(N, ...)`.

    Returns:
        Both of shape `(N, D)`.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(positions)]
    rows = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
    positions = jax.tree.unflatten(jax.tree.structure(positions), leaves)
    if plan.warmup is None:
        evaluate, size = _by_small_program(plan, positions), _BATCH
    else:
        evaluate, size = _by_warmup(plan, positions, rows)
    found = []
    for start in range(0, len(rows), size):
        # The last batch is filled up with copies: one program for any number of draws.
        index = np.resize(np.arange(start, min(start + size, len(rows))), size)
        found.append(evaluate(index))
    return rows, np.concatenate(found)[: len(rows)]


def _by_warmup(plan: Plan, positions: PyTree, rows: np.ndarray):
    """Gradients at some positions by the program of warm-up, and how many it takes at a time."""
    assert plan.warmup is not None
    example = jax.device_put(jax.tree.map(lambda leaf: leaf[0], positions))
    density, data = density_of(plan.target.logdensity, example)
    num_chains, dimension = max(plan.num_chains, PooledAdaptation.num_chains), rows.shape[1]
    walker = HMCBatch(
        density, data, example, num_chains, first_maps(density, example, plan.target.centring)
    )
    root = diagonal_like(plan.warmup.whitening.scale, np.ones(dimension))
    seed = SeedTree((0,))

    def evaluate(index):
        starts = rows[index].reshape(STEPS, num_chains, dimension)
        return walker.walk(seed, starts, root, 1.0, 0).gradients.reshape(len(index), dimension)

    return evaluate, STEPS * num_chains


def _by_small_program(plan: Plan, positions: PyTree):
    """Gradients at 128 positions by a program of its own."""
    function = _Scores(plan.target.logdensity)

    def evaluate(index):
        batch = jax.tree.map(lambda leaf: leaf[index], positions)
        return np.asarray(run_explicit(function, None, batch, timings=Timings()))

    return evaluate


class _Scores(HashableFunction):
    """Flat gradients at positions `(N, ...)`; the part is the log density."""

    def __call__(self, nothing, positions):
        gradients = jax.vmap(jax.grad(self.parts[0]))(positions)
        return jax.vmap(lambda tree: ravel_pytree(tree)[0])(gradients)
