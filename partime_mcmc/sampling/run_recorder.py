"""The books of a run: what happened, stretch by stretch, and the sequential fallback where a solve did not converge.

A chain whose solve does not converge keeps the steps that are exact, from the front, and goes on from there one step
after another, with the same dice. When every chain has needed that in two stretches running, the rest of the run is
sequential at once: these chains do not forget. From the step on where a chain leaves the finite numbers its draws are
NaN.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.solution import Solution, Status
from partime_mcmc.types import PyTree

_GIVE_UP_AFTER = 2


class RunRecorder:
    """What happened, stretch by stretch.

    Args:
        num_chains: C.
        first: Steps that these chains have behind them: sentences count from the very first one.
        total: Steps at which the run ends.
        failed_running: Stretches just before in which no chain converged.
    """

    def __init__(self, num_chains: int, first: int, total: int, failed_running: int):
        self.first, self.total = first, total
        self.num_steps = 0
        self.status = [Status.CONVERGED] * num_chains
        self.iterations = np.zeros(num_chains, int)
        self.evaluations, self.jvps = np.zeros(num_chains), np.zeros(num_chains)
        self.depth = np.zeros(num_chains, int)
        self.num_sequential = np.zeros(num_chains, int)
        self.history: np.ndarray = np.full((num_chains, 0), np.nan)
        self.fallbacks: list[str] = []
        self.interrupted = False
        self.failed_running = failed_running
        self.worst = 0.0
        self.as_found = True

    @property
    def hopeless(self) -> bool:
        """Whether to stop trying."""
        return self.failed_running >= _GIVE_UP_AFTER

    @property
    def evaluations_per_sample(self) -> float:
        """Evaluations of the kernel's step per draw so far."""
        return float(self.evaluations.mean() / max(self.num_steps, 1))

    @property
    def jvps_per_sample(self) -> float:
        """Jacobian-vector products of the step per draw so far."""
        return float(self.jvps.mean() / max(self.num_steps, 1))

    def enter(
        self,
        found: Solution,
        start: int,
        stop: int,
        rolled: bool,
        finish: Callable[[PyTree, jax.Array], tuple[PyTree, jax.Array]],
    ) -> PyTree:
        """Book one stretch; chains that did not converge go on sequentially from where they are exact.

        Args:
            found: The solved stretch of all chains.
            start: Where it starts, counted from the first step of these books.
            stop: Where it ends.
            rolled: Whether it was sequential from the outset.
            finish: `(states, num_exact (C,)) -> (states, steps that are then finite (C,))`.

        Returns:
            Its carries, leaves `(C, stop - start, ...)`.
        """
        verdicts = [Status(int(code)) for code in np.asarray(found.status)]
        if not self.num_steps:
            self.history = np.asarray(found.stats.residual_history)
        self._count(found, stop - start)
        bad = np.array([verdict != Status.CONVERGED for verdict in verdicts])
        # Whether the states returned are those that were found, of every chain.
        self.as_found = not bad.any()
        if rolled:
            self.num_sequential += stop - start
        states, rolled_exact = found.states, found.num_exact
        if bad.any() and not rolled:
            verdicts, states, rolled_exact = self._fall_back(
                found, verdicts, bad, start, stop, finish
            )
        if not rolled:
            self.failed_running = self.failed_running + 1 if bad.all() else 0
            if self.hopeless and self.first + stop < self.total:
                self.fallbacks.append(
                    f"from step {self.first + stop} on all chains ran sequentially: none converged in "
                    f"{_GIVE_UP_AFTER} stretches running"
                )
        for chain, verdict in enumerate(verdicts):
            if verdict != Status.CONVERGED and self.status[chain] == Status.CONVERGED:
                self.status[chain] = verdict
        # What is not finite is not a draw: say so in the draws themselves.
        lost = np.array([verdict == Status.NONFINITE for verdict in verdicts])
        if lost.any():
            exact = np.where(lost, np.asarray(rolled_exact), stop - start)
            keep = jnp.asarray(np.arange(stop - start) < exact[:, None])
            states = jax.tree.map(
                lambda leaf: jnp.where(
                    keep.reshape(*keep.shape, *(1,) * (leaf.ndim - 2)), leaf, jnp.nan
                ),
                states,
            )
        self.worst = max(
            self.worst, float(np.nanmax(np.where(bad, 0, np.asarray(found.residual)), initial=0.0))
        )
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
        verdicts = [
            verdict if not bad[chain] else Status.CONVERGED if count == steps else Status.NONFINITE
            for chain, (verdict, count) in enumerate(zip(verdicts, np.asarray(finite)))
        ]
        return verdicts, states, np.asarray(finite)

    def _count(self, found: Solution, steps: int) -> None:
        self.num_steps += steps
        self.iterations += np.asarray(found.iterations)
        self.evaluations += np.asarray(found.stats.evaluations, float) * steps
        self.jvps += np.asarray(found.stats.jvps, float) * steps
        self.depth += np.asarray(found.stats.depth)

    def interrupt(self, done: int) -> None:
        """Say of all chains that are well that they end after `done` steps of these books because the user said so.

        Args:
            done: Steps whose stretches were kept; an interrupt between booking a stretch and keeping it leaves fewer
                than counted.
        """
        self.num_steps, self.interrupted = done, True
        self.status = [
            Status.INTERRUPTED if one == Status.CONVERGED else one for one in self.status
        ]

    def shown(self) -> dict[str, Any]:
        """What a progress line shows."""
        shown = {"evals": f"{self.evaluations_per_sample:.2f}", "residual": f"{self.worst:.0e}"}
        return shown | ({"fallbacks": len(self.fallbacks)} if self.fallbacks else {})
