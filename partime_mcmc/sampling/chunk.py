"""What passes from one part of a run to the next: where chains stand, and the draws of a chunk.

    state_k  --executor-->  chunk_k (draws, certificate, report, state_{k+1})  --sink-->  memory or a store

A `ChainState` holds carries and counters to the last bit, so that a run that is taken up again from one is the run that
never stopped: step t of a chain always has the random numbers of its number t (`randomness`).
"""

from __future__ import annotations

import dataclasses

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.sampling.report import RunReport
from partime_mcmc.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class ChainState:
    """What it takes to go on from the last draw to the last bit, leaves `(C, ...)`.

    Attributes:
        carries: Of all chains.
        discrete: Counters and other leaves of the kernel's state that are not floating point, by name.
        num_steps: Steps that the chains have behind them; the next one has the random numbers of this number.
        num_failed_windows: Windows in a row, just before, in which no chain converged; two of them make the rest
            sequential.
        max_window: Most steps that fit the device at once, once it has run out of memory; None: not known to be limited.
    """

    carries: PyTree
    discrete: dict
    num_steps: int = 0
    num_failed_windows: int = 0
    max_window: int | None = None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Certified draws of n consecutive steps of all C chains.

    Attributes:
        positions: Unconstrained, leaves `(C, n, ...)`; None on a host that keeps no draws.
        constrained: Named values in the model's space, `(C, n, ...)`.
        info: What the kernel reports of each step, and its residual, by name, `(C, n)`.
        certificate: One entry per chain, with `accepted` and `residual` of every step.
        report: How the chunk went.
        state: Where the chains stand after it.
    """

    positions: PyTree
    constrained: dict[str, Array]
    info: dict[str, Array]
    certificate: Certificate
    report: RunReport
    state: ChainState
