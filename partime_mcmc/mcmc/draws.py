"""What sampling returns: draws, their certificate, and how they came about.

Arrays have chains first and time second, `(C, T, ...)`, as ArviZ wants them. A `Draws` holds the chain in unconstrained
space (`positions`) and in the model's (`constrained`), what the kernel said of each step (`info`), the certificate of
every chain, the solver's report, the plan that reproduces the very same draws, and the warm-up before them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from partime_mcmc.forgetting.advise import Advice
from partime_mcmc.kernels import Certificate
from partime_mcmc.mcmc.warmup import Warmup
from partime_mcmc.solution import SolveError, Status
from partime_mcmc.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class RunReport:
    """How a run went.

    Attributes:
        status: One verdict per chain. A chain that was finished sequentially is CONVERGED: it is exact.
        iterations: Passes per chain, over all stretches, shape `(C,)`.
        evaluations_per_sample: Evaluations of the kernel's step per draw, averaged over chains, fallbacks included.
        jvps_per_sample: Jacobian-vector products of the step per draw.
        depth: Longest run of dependent steps over all stretches, the worst chain.
        fallbacks: One sentence per stretch and chain that was finished sequentially, and why.
        num_sequential: Draws per chain that came from the sequential fallback, shape `(C,)`.
        residual_history: Largest residual by iteration in the first stretch, shape `(C, H)`, NaN beyond the last.
        seconds_advise: Asking for advice: pilot chains and a cost model, compilation included.
        seconds_compile: Tracing and compilation of the solve.
        seconds_run: The solve itself, the tape included, the certificate not.
        seconds_certify: The certifying pass, its compilation included.
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
    seconds_advise: float
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
            f"{self.depth}, {int(self.iterations.max())} iterations over all stretches, {len(self.fallbacks)} fallbacks"
        )


@dataclasses.dataclass(frozen=True)
class End:
    """What it takes to go on from the last draw to the last bit, leaves `(C, ...)`.

    Attributes:
        carries: Of all chains.
        discrete: Counters and other discrete leaves of the kernel's state, by name.
        num_steps: Steps that the chains have behind them: the next one throws the dice of this number.
        failed_running: Stretches just before in which no chain converged; two of them make the rest sequential.
        stretch: Most steps that fit the device at once, once it has run out of memory; None: not known to be limited.
    """

    carries: PyTree
    discrete: dict
    num_steps: int = 0
    failed_running: int = 0
    stretch: int | None = None


@dataclasses.dataclass(frozen=True)
class Draws:
    """The draws of some chains.

    Attributes:
        positions: Unconstrained, leaves `(C, T, ...)`.
        constrained: Named values in the model's space, `(C, T, ...)`.
        info: What the kernel said of each step, `(C, T)`: of `accepted`, `acceptance_rate`, `diverging`, `energy`,
            `num_steps`, `logdensity`, `residual` those that it says.
        certificate: One entry per chain.
        report: How the run went.
        plan: Plain values that, with the same target and versions, give the same draws again.
        warmup: The warm-up, None if the kernel came tuned.
        dims: Axis names of constrained values.
        names: The constrained values worth showing; None: all.
        advice: Why this solver, if `sample` chose it. To run again with the very same plan give `advice.solver` and
            `advice.schedule`.
        end: Where the chains stand after the last draw.
    """

    positions: PyTree
    constrained: dict[str, Array]
    info: dict[str, Array]
    certificate: Certificate
    report: RunReport
    plan: dict[str, Any]
    warmup: Warmup | None
    dims: dict[str, tuple[str, ...]] | None = None
    names: tuple[str, ...] | None = None
    advice: Advice | None = None
    end: End | None = None

    def or_raise(self) -> Draws:
        """These draws, if every chain is certified, finite and moving.

        Raises:
            SolveError: Naming the first chain that is not, and why.
        """
        for chain, status in enumerate(self.report.status):
            if status != Status.CONVERGED:
                raise SolveError(f"{status.name}: chain {chain}: {status.message}")
            if not bool(np.asarray(self.certificate.certified)[chain]):
                raise SolveError(
                    f"NOT CERTIFIED: chain {chain}: the largest residual is "
                    f"{float(np.asarray(self.certificate.max_residual)[chain]):.3g} noise units at step "
                    f"{int(np.asarray(self.certificate.worst_step)[chain])}, wanted at most "
                    f"{float(np.asarray(self.certificate.tolerance)[chain]):.1g}; use float64 or a smaller tolerance"
                )
        return self
