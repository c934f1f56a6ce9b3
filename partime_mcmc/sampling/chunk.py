"""What passes from one part of a run to the next: where chains stand, the draws of a chunk, and how it went.

    state_k  --executor-->  chunk_k (draws, certificate, report, state_{k+1})  --sink-->  memory or a store

A `ChainState` holds carries and counters to the last bit, so that a run that is taken up again from one is the run that
never stopped: step t of a chain always has the random numbers of its number t (`randomness`).
"""

from __future__ import annotations

import dataclasses
from typing import Mapping

import numpy as np

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.engine.solution import Status
from partime_mcmc.types import AnyArray, PyTree


@dataclasses.dataclass(frozen=True)
class RunReport:
    """How a run went.

    Attributes:
        status: One verdict per chain. A chain that was finished sequentially is CONVERGED: it is exact.
        iterations: Iterations of the solver per chain, over all windows, shape `(C,)`.
        evaluations_per_sample: Evaluations of the kernel's step per draw, averaged over chains, fallbacks included.
        jvps_per_sample: Jacobian-vector products of the step per draw.
        depth: Longest run of dependent steps over all windows, the worst chain.
        fallbacks: One sentence per window and chain that was finished sequentially, and why.
        num_sequential: Draws per chain that came from the sequential fallback, shape `(C,)`.
        residual_history: Largest residual by iteration in the first window, shape `(C, H)`, NaN beyond the last.
        seconds_compile: Tracing and compilation.
        seconds_run: The solve itself, its random numbers included, the certificate not.
        seconds_certify: The certifying pass.
        dtype: Type of the states.
        device: Where it ran.
        versions: Of the libraries that decide about bits.
        evaluations_by_part: In a run over a mesh, evaluations per draw by the device along time that made them; else empty.
        interrupted: Whether the user ended it early, whatever the verdicts: a chain that was lost before stays lost.
    """

    status: tuple[Status, ...]
    iterations: np.ndarray
    evaluations_per_sample: float
    jvps_per_sample: float
    depth: int
    fallbacks: tuple[str, ...]
    num_sequential: np.ndarray
    residual_history: np.ndarray
    seconds_compile: float
    seconds_run: float
    seconds_certify: float
    dtype: str
    device: str
    versions: dict[str, str]
    evaluations_by_part: tuple[float, ...] = ()
    interrupted: bool = False

    def __str__(self) -> str:
        verdicts = ", ".join(sorted({status.name for status in self.status}))
        return (
            f"{verdicts}; {self.seconds_run:.3f} s ({self.seconds_compile:.1f} s compilation apart), "
            f"{self.evaluations_per_sample:.2f} evaluations and {self.jvps_per_sample:.2f} JVPs per draw, depth "
            f"{self.depth}, {int(self.iterations.max())} iterations over all windows, {len(self.fallbacks)} fallbacks"
        )


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
    discrete: PyTree
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
    constrained: Mapping[str, AnyArray]
    info: Mapping[str, AnyArray]
    certificate: Certificate
    report: RunReport
    state: ChainState
