"""A run as a stream of certified chunks: time advances chunk by chunk, and nothing but a `ChainState` is carried on.

    state_k  --draw random numbers, solve, certify-->  chunk_k, state_{k+1}

A chunk is certified and handed on before the next one begins, so that memory does not grow with the run. A device that
runs out of memory gets half as many steps at once, three times at most; the report says so.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Callable, Iterator, Protocol

import jax
import numpy as np

from partime_mcmc.compile_cache import as_committed_array
from partime_mcmc.sampling.chunk import ChainState, Chunk
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.sampling.progress import Progress

MAX_HALVINGS = 3


class Executor(Protocol):
    """Makes the chunks of a plan."""

    def chunks(self, state: ChainState) -> Iterator[Chunk]:
        """The chunks from a state to the end of the run; a run of no steps has one, which is empty.

        After an interrupt from the keyboard the last one is shorter, with the verdict INTERRUPTED.
        """
        ...


# (where the chains stand, steps of the chunk, what is told of its progress) -> the chunk
SolveChunk = Callable[[ChainState, int, "ProgressReporter"], Chunk]


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
        reporter = ProgressReporter(advance, plan.num_chains)
        reporter.skip(state.num_steps - plan.first_step)
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
    plan: Plan,
    state: ChainState,
    solve: SolveChunk,
    reporter: ProgressReporter,
    max_halvings: int,
) -> Chunk:
    """The next chunk, in as many steps at once as the device can hold."""
    notes: tuple[str, ...] = ()
    while True:
        steps = min(plan.chunk, plan.last_step - state.num_steps, state.max_window or plan.chunk)
        try:
            chunk = solve(state, steps, reporter)
            break
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error) or len(notes) == max_halvings or steps < 2:
                raise
        # Outside the handler, so that what the failed attempt held is let go.
        reporter.undo()
        state = dataclasses.replace(state, max_window=steps // 2)
        first = state.num_steps
        notes += (
            f"steps {first} to {first + steps}: the device ran out of memory; from there on at most {steps // 2} "
            "steps at once",
        )
    report = dataclasses.replace(chunk.report, fallbacks=(*notes, *chunk.report.fallbacks))
    after = dataclasses.replace(chunk.state, max_window=state.max_window)
    return dataclasses.replace(chunk, report=report, state=after)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of the compiler's runtime means that the device's memory is full."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


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
            # The first window was compiled as well: speed is that of the others.
            self._begin = now
        self._chunk += steps
        self._shown |= shown
        self._advance(steps, **self._shown)

    def add_chunk(self, chunk: Chunk) -> None:
        """Take in what a certified chunk reports of its steps; a host that keeps no draws has nothing to report."""
        self._chunk = 0
        if chunk.positions is None:
            return
        accepted = chunk.info.get(
            "acceptance_rate", chunk.info.get("accepted", chunk.certificate.accepted)
        )
        accepted = np.asarray(accepted, float)
        self._accepted, self._draws = (
            self._accepted + accepted.sum(),
            self._draws + accepted.size,
        )
        self._shown["accept"] = f"{self._accepted / max(self._draws, 1):.2f}"
        if "diverging" in chunk.info:
            self._diverging += int(np.asarray(chunk.info["diverging"]).sum())
            self._shown["diverging"] = self._diverging
        self._advance(0, **self._shown)

    def skip(self, steps: int) -> None:
        """Show steps that a run before this one has done."""
        self._advance(steps)

    def undo(self) -> None:
        """Take back the steps of a chunk that has to be done again."""
        self._advance(-self._chunk, **self._shown)
        self._steps, self._chunk = max(self._steps - self._chunk, 0), 0
