"""What is known of a run of `ParallelMCMC`, in one object."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from partime_mcmc.diagnostics.report import Level
from partime_mcmc.kernels import Certificate
from partime_mcmc.mcmc.draws import RunReport
from partime_mcmc.mcmc.warmup import Warmup


@dataclasses.dataclass(frozen=True)
class ParallelReport:
    """What is known of a run.

    Attributes:
        run: Statuses, work and times.
        certificate: One entry per chain.
        warmup: What warm-up chose and why; None if there was none in this run.
        plan: Solver, schedule, counts and key.
    """

    run: RunReport
    certificate: Certificate
    warmup: Warmup | None
    plan: dict[str, Any]

    @property
    def level(self) -> Level:
        """CERTIFIED_PATH if every chain is the chain of its kernel and moves, otherwise FAIL."""
        good = np.asarray(self.certificate.certified).all() and not np.asarray(self.certificate.frozen).any()
        return Level.CERTIFIED_PATH if good else Level.FAIL

    @property
    def parallel(self) -> bool:
        """Whether the solver did it, without a sequential fallback."""
        return not self.run.fallbacks and "Rollout" not in self.plan["solver"]

    def __str__(self) -> str:
        residual = float(np.max(np.asarray(self.certificate.max_residual)))
        lines = [f"{self.level.name}: largest residual {residual:.1e} noise units, {self.certificate.evidence}; {self.run}",
                 *self.run.fallbacks]
        return "\n".join([*lines, *([str(self.warmup)] if self.warmup else [])])
