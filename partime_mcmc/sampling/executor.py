"""A run as a stream of certified chunks, what happened in it, and the fallback where a solve did not converge.

    state_k  --draw random numbers, solve, certify-->  chunk_k, state_{k+1}

A chunk is certified and handed on before the next one begins, so that memory does not grow with the run. A device that
runs out of memory gets half as many steps at once, three times at most; the report says so.

A chain whose solve does not converge keeps the steps that are exact, from the front, and goes on from there one step after
another, with the same random numbers. When every chain has needed that in two windows in a row, the rest of the run is
sequential at once: these chains do not forget. From the step on where a chain leaves the finite numbers its draws are NaN.
"""

import dataclasses
import functools
import time
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.compile_cache import Timings, as_committed_array, versions
from partime_mcmc.engine import Solution, Status
from partime_mcmc.sampling.chunk import (
    ChainState,
    Chunk,
    RunReport,
    interrupted,
    longest_memory,
    with_frozen,
)
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.solvers import Shooting
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
        self._solver = plan.solver
        self._memories: list[int | None] = []

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
        finish: Callable[[jax.Array], tuple[Solution, jax.Array]],
    ) -> tuple[Solution, np.ndarray]:
        """Record one window; chains that did not converge go on sequentially from where they are exact.

        Args:
            found: The solved window of all chains.
            start: Where it starts, counted from the first step of this recorder.
            stop: Where it ends.
            rolled: Whether it was sequential from the outset.
            finish: `(num_exact (C,)) -> (the window finished, steps that are then finite (C,))`.

        Returns:
            The window, finished where need be, and how many steps of each chain are finite, `(C,)`.
        """
        steps, verdicts = stop - start, [Status(int(code)) for code in np.asarray(found.status)]
        if not self.num_steps:
            self.history = np.asarray(found.stats.residual_history)
        self.num_steps += steps
        self.iterations += np.asarray(found.iterations)
        self.evaluations += np.asarray(found.stats.evaluations, float) * steps
        self.jvps += np.asarray(found.stats.jvps, float) * steps
        self.depth += np.asarray(found.stats.depth)
        bad = np.array([verdict != Status.CONVERGED for verdict in verdicts])
        self._memories.append(None if rolled or bad.any() else self._memory(found, steps))
        num_finite = found.num_exact
        if rolled:
            self.num_sequential += steps
        else:
            if bad.any():
                found, verdicts, num_finite = self._fall_back(
                    found, verdicts, bad, start, stop, finish
                )
            self.num_failed_windows = self.num_failed_windows + 1 if bad.all() else 0
            if self.gives_up and self.first + stop < self.total:
                self.fallbacks.append(
                    f"from step {self.first + stop} on all chains ran sequentially: none converged in "
                    f"{_MAX_FAILED_WINDOWS} windows in a row"
                )
        self.status = [
            now if before == Status.CONVERGED else before
            for before, now in zip(self.status, verdicts)
        ]
        residual = np.where(bad, 0, np.asarray(found.residual))
        self.max_residual = float(np.nanmax(residual, initial=self.max_residual))
        lost = np.array([verdict == Status.NONFINITE for verdict in verdicts])
        return found, np.where(lost, np.asarray(num_finite), steps)

    def _memory(self, found: Solution, steps: int) -> int | None:
        """Steps that segments of a solved window took to meet the chain: they were rolled once, then until they met."""
        num_parts = np.size(found.stats.evaluations_by_part) // len(self.status)
        if not isinstance(self._solver, Shooting) or num_parts > 1:
            return None
        length = self._solver.segment_steps(steps)
        return None if length >= steps else int(np.max(found.stats.depth)) - length

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
        found, finite = finish(jnp.asarray(exact, jnp.int32))
        finite = np.asarray(finite)
        for chain in np.flatnonzero(bad):
            verdicts[chain] = Status.CONVERGED if finite[chain] == steps else Status.NONFINITE
        return found, verdicts, finite

    def interrupt(self, done: int) -> None:
        """Mark every converged chain as INTERRUPTED after `done` steps.

        Args:
            done: Steps whose windows were kept; an interrupt between recording a window and keeping it leaves fewer
                than counted.
        """
        self.num_steps, self.interrupted = done, True
        self.status = [*interrupted(self.status)]

    def progress(self) -> dict[str, Any]:
        """What a progress line shows."""
        return {
            "evals": f"{self.evaluations_per_sample:.2f}",
            "residual": f"{self.max_residual:.0e}",
            **({"fallbacks": len(self.fallbacks)} if self.fallbacks else {}),
        }

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
        return RunReport(
            status=tuple(self.status)
            if certificate is None
            else with_frozen(self.status, certificate),
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
            memory=longest_memory(self._memories),
        )


def finite_steps(states: PyTree) -> jax.Array:
    """Which steps of paths with leaves `(C, n, ...)` are finite in all leaves, shape `(C, n)`."""
    return functools.reduce(
        jnp.logical_and,
        (jnp.isfinite(x).reshape(*x.shape[:2], -1).all(2) for x in jax.tree.leaves(states)),
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


MAX_HALVINGS = 3


class ProgressReporter:
    """The progress line of a sampling run, updated from the host between compiled calls.

    It shows draws per second, evaluations per draw, the largest residual, sequential fallbacks if any, and of the chunks
    that are certified acceptance and divergences.

    Args:
        advance: Of a stage of `Progress`, called with steps and what to show.
        num_chains: C.
    """

    def __init__(self, advance: Callable[..., None], num_chains: int):
        self._advance, self._num_chains = advance, num_chains
        self._begin, self._steps, self._chunk = None, 0, 0
        self._shown: dict[str, Any] = {"draws/s": "?"}
        self._accepted, self._diverging, self._draws = 0.0, 0, 0

    def __call__(self, steps: int, **shown: Any) -> None:
        """Count steps of the chunk that is being solved."""
        now = time.perf_counter()
        if self._begin is not None:
            self._steps += steps
            rate = self._steps * self._num_chains / max(now - self._begin, 1e-9)
            self._shown["draws/s"] = f"{rate:,.0f}"
        else:
            # The time of the first window has its compilation in it, and is left out of draws/s.
            self._begin = now
        self._chunk += steps
        self._shown |= shown
        self._advance(steps, **self._shown)

    def add_chunk(self, chunk: Chunk) -> None:
        """Take in what a certified chunk reports of its steps; a host that keeps no draws has nothing to report."""
        self._chunk = 0
        if chunk.positions is None:
            return
        accepted = chunk.info.get("accepted", chunk.certificate.accepted)
        accepted = np.asarray(chunk.info.get("acceptance_rate", accepted), float)
        self._accepted += accepted.sum()
        self._draws += accepted.size
        self._shown["accept"] = f"{self._accepted / max(self._draws, 1):.2f}"
        if "diverging" in chunk.info:
            self._diverging += int(np.asarray(chunk.info["diverging"]).sum())
            self._shown["diverging"] = self._diverging
        self._advance(0, **self._shown)

    def undo(self) -> None:
        """Take back the steps of a chunk that has to be done again."""
        self._advance(-self._chunk, **self._shown)
        self._steps, self._chunk = max(self._steps - self._chunk, 0), 0


# (where the chains stand, steps of the chunk, what is told of its progress) -> the chunk
SolveChunk = Callable[[ChainState, int, ProgressReporter], Chunk]


def iterate_chunks(
    plan: Plan, state: ChainState, solve: SolveChunk, progress: Progress, max_halvings: int
) -> Iterator[Chunk]:
    """The chunks of a plan, one after another.

    Args:
        plan: The plan.
        state: Where the chains stand.
        solve: Makes one chunk.
        progress: Shown meanwhile.
        max_halvings: How often a chunk is tried again with half as many steps when the device runs out of memory.
    """
    if plan.num_samples and state.num_steps >= plan.last_step:
        return
    with progress.stage("sampling", plan.num_samples) as advance:
        # Steps that a run before this one has done.
        advance(state.num_steps - plan.first_step)
        reporter = ProgressReporter(advance, plan.num_chains)
        while True:
            chunk = _fitting_chunk(plan, state, solve, reporter, max_halvings)
            reporter.add_chunk(chunk)
            yield chunk
            state = chunk.state
            if state.num_steps >= plan.last_step or chunk.report.interrupted:
                return
            # States that were computed and states that were read from a store run the same programs.
            carries, discrete = jax.tree.map(as_committed_array, (state.carries, state.discrete))
            state = dataclasses.replace(state, carries=carries, discrete=discrete)


def _fitting_chunk(
    plan: Plan, state: ChainState, solve: SolveChunk, reporter: ProgressReporter, max_halvings: int
) -> Chunk:
    """The next chunk, in as many steps at once as the device can hold."""
    notes: list[str] = []
    while True:
        steps = min(plan.chunk, plan.last_step - state.num_steps, state.max_window or plan.chunk)
        try:
            chunk = solve(state, steps, reporter)
            break
        except jax.errors.JaxRuntimeError as error:
            full = "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
            if not full or len(notes) == max_halvings or steps < 2:
                raise
        # Outside the handler, so that what the failed attempt held is let go.
        reporter.undo()
        state = dataclasses.replace(state, max_window=steps // 2)
        notes.append(
            f"steps {state.num_steps} to {state.num_steps + steps}: the device ran out of memory; "
            f"from there on at most {steps // 2} steps at once"
        )
    report = dataclasses.replace(chunk.report, fallbacks=(*notes, *chunk.report.fallbacks))
    after = dataclasses.replace(chunk.state, max_window=state.max_window)
    return dataclasses.replace(chunk, report=report, state=after)
