"""What happened in a run, window by window, and the fallback where a solve did not converge.

A chain whose solve does not converge keeps the steps that are exact, from the front, and goes on from there one step
after another, with the same random numbers. When every chain has needed that in two windows in a row, the rest of the run
is sequential at once: these chains do not forget. From the step on where a chain leaves the finite numbers its draws are
NaN.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.compile_cache import Timings, versions
from partime_mcmc.engine.solution import Solution, Status
from partime_mcmc.sampling.chunk import ChainState, RunReport
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.types import PyTree

_MAX_FAILED_WINDOWS = 2


class RunRecorder:
    """What happened since a state.

    Args:
        plan: Of the run.
        state: Where the chains stood: sentences count steps from the very first one.
    """

    def __init__(self, plan: Plan, state: ChainState):
        num_chains = plan.num_chains
        self.first, self.total = state.num_steps, plan.last_step
        self.num_steps = 0
        self.status = [Status.CONVERGED] * num_chains
        self.iterations = np.zeros(num_chains, int)
        self.evaluations, self.jvps = np.zeros(num_chains), np.zeros(num_chains)
        self.depth = np.zeros(num_chains, int)
        self.num_sequential = np.zeros(num_chains, int)
        self.history: np.ndarray = np.full((num_chains, 0), np.nan)
        self.fallbacks: list[str] = []
        self.interrupted = False
        self.num_failed_windows = state.num_failed_windows
        self.max_residual = 0.0
        self.all_converged = True

    @property
    def gives_up(self) -> bool:
        """Whether the rest of the run is sequential."""
        return self.num_failed_windows >= _MAX_FAILED_WINDOWS

    @property
    def evaluations_per_sample(self) -> float:
        """Evaluations of the kernel's step per draw so far."""
        return float(self.evaluations.mean() / max(self.num_steps, 1))

    def record(
        self,
        found: Solution,
        start: int,
        stop: int,
        rolled: bool,
        finish: Callable[[PyTree, jax.Array], tuple[PyTree, jax.Array]],
    ) -> PyTree:
        """Record one window; chains that did not converge go on sequentially from where they are exact.

        Args:
            found: The solved window of all chains.
            start: Where it starts, counted from the first step of this recorder.
            stop: Where it ends.
            rolled: Whether it was sequential from the outset.
            finish: `(states, num_exact (C,)) -> (states, steps that are then finite (C,))`.

        Returns:
            Its carries, leaves `(C, stop - start, ...)`.
        """
        steps, verdicts = stop - start, [Status(int(code)) for code in np.asarray(found.status)]
        if not self.num_steps:
            self.history = np.asarray(found.stats.residual_history)
        self._count(found, steps)
        bad = np.array([verdict != Status.CONVERGED for verdict in verdicts])
        self.all_converged = not bad.any()
        states, num_finite = found.states, found.num_exact
        if rolled:
            self.num_sequential += steps
        else:
            if bad.any():
                verdicts, states, num_finite = self._fall_back(
                    found, verdicts, bad, start, stop, finish
                )
            self.num_failed_windows = self.num_failed_windows + 1 if bad.all() else 0
            if self.gives_up and self.first + stop < self.total:
                self.fallbacks.append(
                    f"from step {self.first + stop} on all chains ran sequentially: none converged in "
                    f"{_MAX_FAILED_WINDOWS} windows in a row"
                )
        for chain, verdict in enumerate(verdicts):
            if verdict != Status.CONVERGED and self.status[chain] == Status.CONVERGED:
                self.status[chain] = verdict
        residual = np.where(bad, 0, np.asarray(found.residual))
        self.max_residual = max(self.max_residual, float(np.nanmax(residual, initial=0.0)))
        lost = np.array([verdict == Status.NONFINITE for verdict in verdicts])
        if lost.any():
            states = without_nonfinite(states, np.where(lost, np.asarray(num_finite), steps))
        return states

    def _fall_back(self, found, verdicts, bad, start, stop, finish):
        steps = stop - start
        exact = np.where(bad, np.asarray(found.num_exact), steps)
        for chain in np.flatnonzero(bad):
            kept = (
                f"the first {exact[chain]} steps are exact and kept, the rest was"
                if exact[chain]
                else "all of it was"
            )
            self.fallbacks.append(
                f"chain {chain}, steps {self.first + start} to {self.first + stop}: {verdicts[chain].name} after "
                f"{int(np.asarray(found.iterations)[chain])} iterations; {kept} finished sequentially"
            )
        self.num_sequential += steps - exact
        self.evaluations += steps - exact
        self.depth += steps - exact
        states, finite = finish(found.states, jnp.asarray(exact, jnp.int32))
        finite = np.asarray(finite)
        rolled = np.where(finite == steps, Status.CONVERGED, Status.NONFINITE)
        verdicts = [
            Status(int(end)) if fell else verdict
            for fell, end, verdict in zip(bad, rolled, verdicts)
        ]
        return verdicts, states, finite

    def _count(self, found: Solution, steps: int) -> None:
        self.num_steps += steps
        self.iterations += np.asarray(found.iterations)
        self.evaluations += np.asarray(found.stats.evaluations, float) * steps
        self.jvps += np.asarray(found.stats.jvps, float) * steps
        self.depth += np.asarray(found.stats.depth)

    def interrupt(self, done: int) -> None:
        """Say of all chains that are well that they end after `done` steps because the user said so.

        Args:
            done: Steps whose windows were kept; an interrupt between recording a window and keeping it leaves fewer
                than counted.
        """
        self.num_steps, self.interrupted = done, True
        self.status = [
            Status.INTERRUPTED if one == Status.CONVERGED else one for one in self.status
        ]

    def progress(self) -> dict[str, Any]:
        """What a progress line shows."""
        shown = {
            "evals": f"{self.evaluations_per_sample:.2f}",
            "residual": f"{self.max_residual:.0e}",
        }
        return shown | ({"fallbacks": len(self.fallbacks)} if self.fallbacks else {})

    def report(
        self,
        certificate: Certificate | None,
        timings: Timings,
        dtype: Any,
        where: str,
        by_part: tuple[float, ...] = (),
    ) -> RunReport:
        """How the run went.

        Args:
            certificate: One entry per chain; None on a host that keeps no draws.
            timings: What time was spent on.
            dtype: Of the states.
            where: The devices, in words.
            by_part: Evaluations per draw of each device, where there are several.
        """
        # A path that is not certified is not known to stand still: its own verdict comes first.
        frozen = np.zeros(len(self.status), bool)
        if certificate is not None:
            frozen = np.asarray(certificate.frozen) & np.asarray(certificate.certified)
        status = tuple(
            Status.FROZEN if frozen[c] and one == Status.CONVERGED else one
            for c, one in enumerate(self.status)
        )
        return RunReport(
            status=status,
            iterations=self.iterations,
            evaluations_per_sample=self.evaluations_per_sample,
            jvps_per_sample=float(self.jvps.mean() / max(self.num_steps, 1)),
            depth=int(self.depth.max()),
            fallbacks=tuple(self.fallbacks),
            num_sequential=self.num_sequential,
            residual_history=self.history,
            seconds_compile=timings.seconds["compile"],
            seconds_run=timings.seconds["run"],
            seconds_certify=timings.seconds["certify"],
            dtype=str(dtype),
            device=where,
            versions=versions(),
            evaluations_by_part=by_part,
            interrupted=self.interrupted,
        )


def without_nonfinite(states: PyTree, num_finite: np.ndarray) -> PyTree:
    """Paths `(C, n, ...)` with NaN from the step on where each leaves the finite numbers: what is not finite is no draw.

    Args:
        states: The paths.
        num_finite: How many steps of each chain are finite, `(C,)`.
    """

    def masked(leaf):
        keep = np.arange(leaf.shape[1]) < num_finite[:, None]
        keep = keep.reshape(*keep.shape, *(1,) * (leaf.ndim - 2))
        if isinstance(leaf, np.ndarray):
            return np.where(keep, leaf, np.nan).astype(leaf.dtype)
        return jnp.where(jnp.asarray(keep), leaf, jnp.nan)

    return jax.tree.map(masked, states)
