"""Whether segments make a network faster, from what is known before anything runs.

On a CPU segments save the overhead of a step, and the slowness of a product of a matrix with one vector, which runs at less
than half the speed of a product with many. A batch has neither to save: it is left to `lax.scan`. On an accelerator the number of dependent steps is what costs, and segments are always faster. A sequence too short for the
probe of the segmented scan to be cheap is left to `lax.scan` everywhere (`solvers.segmented_scan`), and so are types below float32: the
tolerance at a meeting would be a sizeable part of the state itself.

The products of inputs with input weights stay inside the step: taken out, as one large product before the loop, they make a
path of 3 D numbers per step that has to be written and read again, which on the CPU it was measured on cost more than the
product in the segmented scan (55 against 23 ms for 64 units, 64 inputs, 32,768 steps) and in `lax.scan` alike (64 against 40 ms).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.solvers.segmented_scan import LEAN_LOOPS, SegmentedScanConfig
from partime_mcmc.types import PyTree

# Residual allowed per step, in units in the last place: a network's step rounds a few times, and its states are of size 1.
_ULPS = 32
# Where 32 of them are a quarter of the state, as in bfloat16, only what rounding itself leaves is let pass.
_COARSE_ULPS = 4
# KernelParams of state per step that all lanes together should have, and how many lanes at least and at most. On a CPU more
# lanes read time at more places at once, which costs more than they save; a state of one number fills one vector register
# with 16 lanes, and its products stay inside the loop (0.20 ms, against 0.73 ms with 256 lanes, 32,768 steps).
_NUMBERS = {"cpu": (1024, 64, 256)}
_NUMBERS_ELSEWHERE = 262_144, 16, 1024
_SINGLE = 16
# A CPU leaves larger batches to `lax.scan`: products of matrices already run at full speed there, and narrow batches fill
# vectors (one unit, 16 sequences: the relay took four times as long; see benchmarks/gru.py). A single chain gains, however
# wide: a product with one vector runs at half the speed of one with many.
_MOST_CHAINS_ON_CPU = 1
# Bytes of a state that lean loops keep in one or two registers (16 or 32 units of float32): it is rolled as fast alone as in
# lanes, and its gradient faster (0.7 times the time).
_IN_REGISTERS = (64, 128) if LEAN_LOOPS else ()


def is_coarse(carry: PyTree) -> bool:
    """Whether a carry is of a type below float32, in which a residual within some units in the last place proves nothing."""
    return jnp.finfo(jax.tree.leaves(carry)[0].dtype).bits < 32


def network_tolerance(dtype: jnp.dtype) -> Tolerance:
    """The tolerance of a network's path."""
    found = jnp.finfo(dtype)
    unit = (_ULPS if found.bits >= 32 else _COARSE_ULPS) * float(found.eps)
    return Tolerance(unit, unit)


def plan_for(carry: PyTree) -> SegmentedScanConfig:
    """How many segments the sequences of a cell with such a carry are cut into.

    Args:
        carry: One carry.
    """
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(carry))
    backend = jax.default_backend()
    numbers, fewest, most = _NUMBERS.get(backend, _NUMBERS_ELSEWHERE)
    lanes = max(fewest, min(most, numbers // max(size, 1)))
    if backend == "cpu" and size == 1:
        lanes = _SINGLE
    if backend == "cpu" and _fits_registers(carry):
        lanes = 1
    return SegmentedScanConfig(lanes, _MOST_CHAINS_ON_CPU if backend == "cpu" else None)


def _fits_registers(carry: PyTree) -> bool:
    """Whether every leaf of a carry is so wide that `lax.scan` alone is best."""
    return all(
        jnp.size(leaf) * leaf.dtype.itemsize in _IN_REGISTERS for leaf in jax.tree.leaves(carry)
    )
