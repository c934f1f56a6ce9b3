"""How a run went: one verdict per chain, the work it took, and where its time went."""

from __future__ import annotations

import dataclasses

import numpy as np

from partime_mcmc.engine.solution import Status


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
