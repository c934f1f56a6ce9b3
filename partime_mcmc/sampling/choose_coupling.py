"""Which coupling: the one with which chains of the tuned kernel meet sooner.

Plain and coalescing random numbers realise one law, so nothing but speed hangs on the choice (`kernels.coupling`). It is made
where it matters, in long runs: pilot pairs of the warm-up's draws are run under both, and the coupling with the smaller
median meeting time is kept. Seeds and programs decide, no clock, and the choice is part of the warm-up and of the plan:
running again from `draws.warmup` draws the same random numbers.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.forgetting.coalescence import meeting_times
from partime_mcmc.kernels import Kernel, MultishiftCoupling
from partime_mcmc.kernels.kernel_program import (
    ParametrisedKernel,
    parametrised_kernel,
    takes_coupling,
    with_coupling,
)
from partime_mcmc.sampling.defaults import default_tolerance
from partime_mcmc.sampling.randomness import coupled_chains
from partime_mcmc.types import Key
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
    family = dataclasses.replace(plain.family, builder=builder, counts=())
    other = parametrised_kernel(family, plain.numbers.data, warmup.whitening, warmup.settings)
    dtype = jax.tree.leaves(warmup.positions)[0].dtype
    tolerance = default_tolerance(plain, dtype)
    medians = [_median_meeting_time(one, warmup, tolerance, key) for one in (plain, other)]
    met = ["never" if np.isinf(median) else f"after {median:.0f} steps" for median in medians]
    if medians[1] < medians[0]:
        note = f"Multishift coupling: pilot pairs met {met[1]} in the median, with common random numbers {met[0]}."
        return dataclasses.replace(warmup, kernel=other, notes=(*warmup.notes, note))
    note = f"Common random numbers: pilot pairs met {met[0]} in the median, with multishift coupling {met[1]}."
    return dataclasses.replace(warmup, notes=(*warmup.notes, note))


def _median_meeting_time(kernel: Kernel, warmup: Warmup, tolerance: Tolerance, key: Key) -> float:
    """Steps until pairs of the warm-up's draws meet, in the median; infinity if most do not."""
    keys, count = jax.random.split(key, _NUM_PAIRS), jax.tree.leaves(warmup.pool)[0].shape[0]
    first = np.arange(_NUM_PAIRS) % count
    (dynamics, starts, tapes), (_, others, _) = (
        coupled_chains(
            kernel, jax.tree.map(lambda leaf: leaf[index % count], warmup.pool), keys, _HORIZON
        )
        for index in (first, first + count // 2)
    )
    found = meeting_times(dynamics, starts, others, tapes, tolerance=tolerance)
    return float(np.median(np.where(np.asarray(found.met), np.asarray(found.steps), np.inf)))
