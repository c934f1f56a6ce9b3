"""The gradient of a target's log density at draws, for the verdict's test by Stein's identity."""

from typing import Callable

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.compile_cache import Timings, run_explicit
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Array, PyTree

# At a time, and the last few filled up with copies: one program for any number of draws.
_BATCH = 128


def scores_at(
    logdensity: Callable[[PyTree], Array], positions: PyTree
) -> tuple[np.ndarray, np.ndarray]:
    """Positions as rows, and the gradient of the log density there.

    Args:
        logdensity: Of one position.
        positions: Leaves `(N, ...)`.

    Returns:
        Both of shape `(N, D)`.
    """
    count, found = len(jax.tree.leaves(positions)[0]), []
    for start in range(0, count, _BATCH):
        rows = np.resize(np.arange(start, min(start + _BATCH, count)), _BATCH)
        batch = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], positions)
        found.append(run_explicit(_Scores(logdensity), None, batch, timings=Timings()))
    x, gradient = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*found))
    return x[:count], gradient[:count]


class _Scores(HashableFunction):
    """Flat positions and gradients of positions `(N, ...)`; the part is the log density."""

    def __call__(self, nothing, positions):
        flatten = jax.vmap(lambda tree: ravel_pytree(tree)[0])
        return flatten(positions), flatten(jax.vmap(jax.grad(self.parts[0]))(positions))
