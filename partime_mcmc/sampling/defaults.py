"""What a run takes where the user leaves a choice open: windows, solver, tolerance."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.engine import Tolerance, sequential, shooting
from partime_mcmc.kernels import Kernel
from partime_mcmc.kernels.kernel_program import ParametrisedKernel
from partime_mcmc.solvers import Solver
from partime_mcmc.solvers.segments import segment_length

DEFAULT_WINDOW = 16384
# Runs too short to be worth pilot chains.
SHORT_RUN = 1024
# Lanes that fill one core. From 32 to 128 times differ by a tenth, and the fewer, the less is evaluated twice.
_CORE_LANES = 64
# A parallel solver takes 0.6 to 1.7 s longer to compile than the loop, and on two cores gains a third of the time of a loop over
# four chains at most (JAX 0.10.1).
_SHORT_LOOP = 1.0


def is_short(loop_seconds: float) -> bool:
    """Whether a loop that takes so long ends before a parallel solver would be compiled."""
    return loop_seconds < _SHORT_LOOP and jax.default_backend() == "cpu"


def default_solver(
    num_chains: int = 1,
    num_samples: int = DEFAULT_WINDOW,
    groups: int = 1,
    loop_seconds: float = math.inf,
) -> Solver:
    """Shooting, the lanes of the device shared by all chains: near one evaluation per draw where chains forget.

    On a processor it is the loop over all steps where that ends before a parallel solver would be compiled.

    Args:
        num_chains: Chains that share them.
        num_samples: T.
        groups: How many groups of so many chains there are, each with a core of its own.
        loop_seconds: What the loop takes; infinite where that is not known.
    """
    if is_short(loop_seconds):
        return sequential()
    lanes = None if groups == 1 else _CORE_LANES
    return shooting(steps=segment_length(min(num_samples, DEFAULT_WINDOW), num_chains, lanes=lanes))


def default_tolerance(kernel: Kernel, dtype: Any) -> Tolerance:
    """A tenth (float32) to a thousandth (float64) of what the certificate allows, in the units of the kernel's noise.

    What is left to the certificate's bound is for conditioning: an error of one step reaches the next ones. The unit is 1 in the
    whitened coordinates that warm-up found; other kernels that do not know their noise are judged by the sizes of their states.
    """
    size = 1e-11 if jnp.dtype(dtype) == jnp.float64 else 1e-5
    noise = kernel.noise_scale
    if noise is None and not isinstance(kernel, ParametrisedKernel):
        return Tolerance(relative=0.25 * size)
    unit = np.minimum(1.0, np.min(np.asarray(1.0 if noise is None else noise)))
    return Tolerance(relative=0.25 * size, absolute=np.asarray(size * unit, dtype))
