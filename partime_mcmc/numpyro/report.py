"""What is known of a run of `ParallelMCMC`, in one object."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import numpy as np

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.diagnostics.report import Level
from partime_mcmc.forgetting.advise import Advice
from partime_mcmc.sampling.draws import RunReport
from partime_mcmc.warmup.warmup import Warmup


@dataclasses.dataclass(frozen=True)
class ParallelReport:
    """What is known of a run.

    Attributes:
        run: Statuses, work and times.
        certificate: One entry per chain.
        warmup: What warm-up chose and why; None if there was none in this run.
        plan: Solver, schedule, counts and key.
        ask: Gives advice, and remembers it; None where nothing calls for advice.
    """

    run: RunReport
    certificate: Certificate
    warmup: Warmup | None
    plan: dict[str, Any]
    ask: Callable[[], Advice] | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def level(self) -> Level:
        """CERTIFIED_PATH if every chain is the chain of its kernel and moves, otherwise FAIL."""
        good = (
            np.asarray(self.certificate.certified).all()
            and not np.asarray(self.certificate.frozen).any()
        )
        return Level.CERTIFIED_PATH if good else Level.FAIL

    @property
    def parallel(self) -> bool:
        """Whether the solver did it, without a sequential fallback."""
        return not self.run.fallbacks and "Sequential" not in self.plan["solver"]

    @property
    def advice(self) -> Advice | None:
        """What pilot chains say, where the default solver had to give up; None elsewhere.

        Pilots are run when this is first looked at, or printed: they are compiled for seconds, which a run that needs no
        advice should not wait for.
        """
        return None if self.ask is None else self.ask()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"warmup": without_kernel(self.warmup), "ask": None}

    def __str__(self) -> str:
        residual = float(np.max(np.asarray(self.certificate.max_residual)))
        lines = [
            f"{self.level.name}: largest residual {residual:.1e} noise units, {self.certificate.evidence}; {self.run}",
            *self.run.fallbacks,
        ]
        if self.advice is not None:
            lines.append(f"Advice: {self.advice}")
        return "\n".join([*lines, *([str(self.warmup)] if self.warmup else [])])


@dataclasses.dataclass(frozen=True)
class KernelName:
    """What is left of a kernel that was pickled: its programs cannot be.

    Attributes:
        name: As the kernel's.
    """

    name: str


def without_kernel(warmup: Warmup | None) -> Warmup | None:
    """A warm-up that can be pickled: of its kernel only the name stays."""
    return (
        None
        if warmup is None
        else dataclasses.replace(warmup, kernel=KernelName(warmup.kernel.name))
    )
