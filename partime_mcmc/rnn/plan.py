"""Whether lanes pay for a network, from what is known before anything runs.

A step of `w` multiply-adds on a CPU costs some 2·10⁻¹¹ w seconds however it is arranged, once matrices are wide enough to
be multiplied at full speed; what lanes save is the overhead of a step (2·10⁻⁷ seconds) and the slowness of a product of a
matrix with one vector (twice that of a product with many). So narrow cells gain most, and batches that fill a core gain
nothing. On an accelerator the number of dependent steps is what costs, and lanes always pay.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp

from partime_mcmc.predict.cost import lane_work
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers.relay_plan import RelayPlan
from partime_mcmc.types import PyTree

# Residual allowed per step, in units in the last place: a network's step rounds a few times, and its states are of size 1.
_ULPS = 32
# Numbers of state per step that all lanes together should have.
_NUMBERS = {"cpu": 2048}
_NUMBERS_ELSEWHERE = 262_144
_FEWEST, _MOST = 16, 1024


def network_tolerance(dtype: jnp.dtype) -> Tolerance:
    """The tolerance of a network's path."""
    unit = _ULPS * float(jnp.finfo(dtype).eps)
    return Tolerance(unit, unit)


def plan_for(cell: Callable, params: PyTree, carry: PyTree, x: PyTree) -> RelayPlan:
    """How a relay of a cell is run.

    Args:
        cell: `(params, carry, x) -> (carry, y)`.
        params: Its parameters, or their shapes and types.
        carry: One carry.
        x: One step's inputs, or their shapes and types.
    """
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(carry))
    numbers = _NUMBERS.get(jax.default_backend(), _NUMBERS_ELSEWHERE)
    lanes = max(_FEWEST, min(_MOST, numbers // max(size, 1)))
    return RelayPlan(lanes, lane_work(cell, params, carry, x))
