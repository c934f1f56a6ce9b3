"""Running chains: one compiled solve for all of them, stretch after stretch, with an exact sequential fallback.

Stretch s of every chain is the recurrence x_t = f(x_{t-1}, u_t) for its part of the tape, from where the chain ended
before. A chain whose solve does not converge keeps the steps that are exact, from the front, and goes on from there one
step after another, with the same dice. When every chain has needed that in two stretches running, the rest of the run is
sequential at once: these chains do not forget. One bad chain never changes how the others are run, so that their draws
stay the same bits. From the step on where a chain leaves the finite numbers its draws are NaN.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.dynamics import Dynamics, without_captures
from partime_mcmc.kernels import Kernel, Tape
from partime_mcmc.mcmc.family import family_of
from partime_mcmc.mcmc.programs import Clock, Named, run_explicit, run_program
from partime_mcmc.mcmc.progress import Progress
from partime_mcmc.predict.advise import Advice
from partime_mcmc.recipes import sequential
from partime_mcmc.schedule import Schedule, Stretches, Whole
from partime_mcmc.solution import Solution, Status, Tolerance
from partime_mcmc.solve import solve
from partime_mcmc.solvers import Rollout, Solver
from partime_mcmc.solvers.rollout import roll_on
from partime_mcmc.types import Key, PyTree

_GIVE_UP_AFTER = 2
# Steps fold the numbers from 0 on into a chain's key.
_INIT_STREAM = 2**31 - 3

# (dynamics, initial carries (C, ...), tapes (C, T, ...)) -> solver, schedule, and the advice behind them if any.
Choice = Callable[[Dynamics, PyTree, Tape], tuple[Solver, Schedule, Advice | None]]


@dataclasses.dataclass
class Chains:
    """Solved chains: `initial` leaves `(C, ...)`, `carries` and `tape` leaves `(C, T, ...)`, the discrete leaves after
    the last step `(C, ...)`, and the books."""

    initial: PyTree
    carries: PyTree
    tape: Tape
    discrete: dict
    status: list[Status]
    iterations: np.ndarray
    evaluations_per_sample: float
    jvps_per_sample: float
    depth: int
    fallbacks: list[str]
    num_sequential: np.ndarray
    residual_history: np.ndarray
    clock: Clock
    solver: Solver
    schedule: Schedule
    advice: Advice | None


def run_chains(kernel: Kernel, positions: PyTree, keys: Key, num_samples: int, *, choose: Choice, tolerance: Tolerance,
               max_iterations: int | None, progress: Progress, skip: int = 0,
               carries: PyTree = None) -> Chains:
    """Solve all chains.

    Args:
        kernel: The tuned kernel.
        positions: One start per chain, leaves `(C, ...)`.
        keys: One key per chain, shape `(C,)`.
        num_samples: T.
        choose: What picks the solver and the schedule once dynamics, starts and tapes are known. `Stretches` are run
            from here, with progress after each; other schedules within one solve.
        tolerance: How small residuals must be.
        max_iterations: Passes per stretch.
        progress: What to tell.
        skip: Steps that these keys have been used for already: the chains go on with the dice after them.
        carries: Where they go on from, to the last bit; None is where `positions` are.

    Returns:
        The chains. Every chain with status CONVERGED is exact.
    """
    clock = Clock()
    dynamics, initial, tape, discrete = throw(kernel, positions, keys, num_samples, skip, carries, clock)
    with clock.measure("advise"):
        solver, schedule, advice = choose(dynamics, initial, tape)
    size = _stretch_size(solver, schedule, num_samples)
    inside = Whole() if isinstance(schedule, Stretches) else schedule
    solve_stretch = _solving(solver, inside, tolerance, max_iterations, clock)
    roll_stretch = _solving(sequential(), Whole(), tolerance, None, clock)
    finish_stretch = functools.partial(run_program, _finish, clock=clock)
    books = _Books(jax.tree.leaves(initial)[0].shape[0], num_samples)
    current, pieces = initial, []
    label = "sequential" if isinstance(solver, Rollout) else "parallel in time"
    with progress.stage(label, num_samples) as advance:
        for start in range(0, num_samples, size):
            stop = min(start + size, num_samples)
            stretch = jax.tree.map(lambda leaf: leaf[:, start:stop], tape)
            chosen = roll_stretch if books.hopeless else solve_stretch
            found = chosen(dynamics, current, stretch)
            states = books.enter(found, start, stop, chosen is roll_stretch,
                                 functools.partial(finish_stretch, dynamics, current, stretch))
            pieces.append(states)
            current = jax.tree.map(lambda leaf: leaf[:, -1], states)
            advance(stop - start, **books.shown())
    carries = jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], 0, *leaf.shape[1:]), leaf.dtype), initial)
    if pieces:
        carries = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *pieces)
    return books.close(initial, carries, tape, discrete, clock, solver, schedule, advice)


def _stretch_size(solver: Solver, schedule: Schedule, num_samples: int) -> int:
    # A sequential run gains nothing from stretches, and neither does an empty one.
    if isinstance(schedule, Stretches) and not isinstance(solver, Rollout):
        return schedule.size
    return max(num_samples, 1)


def throw(kernel: Kernel, positions: PyTree, keys: Key, num_samples: int, skip: int = 0, carries: PyTree = None,
          clock: Clock | None = None) -> tuple[Dynamics, PyTree, Tape, dict]:
    """Dynamics, starting carries `(C, ...)`, tapes `(C, T, ...)`, and the discrete leaves after the last step `(C,
    ...)`.

    Args:
        kernel: The kernel.
        positions: One start per chain, leaves `(C, ...)`.
        keys: One key per chain, shape `(C,)`.
        num_samples: T.
        skip: Steps that the keys have been used for already.
        carries: Where chains go on from; None is where `positions` are.
        clock: Where seconds are booked.
    """
    clock = Clock() if clock is None else clock
    family, numbers = family_of(kernel)
    initial, tape, discrete = run_explicit(_Throw(family, num_samples, skip), numbers, positions, carries, keys, clock=clock)
    with clock.measure("compile"):
        first = jax.tree.map(lambda leaf: leaf[0], initial)
        drive = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), tape)
        return without_captures(kernel.dynamics(), first, drive), initial, tape, discrete


class _Throw(Named):
    """Carries, tapes and last discrete leaves of all chains; parts are the kernel's family, T, and the steps to skip."""

    def __call__(self, numbers, positions, carries, keys):
        family, num_samples, skip = self.parts
        kernel = family.kernel(numbers)

        def one(position, carry, key):
            state = kernel.init(position, jax.random.fold_in(key, _INIT_STREAM))
            # One step more where there are counters: they are on the tape before each step, and wanted after the last one.
            extra = int(bool(kernel.discrete(state)))
            tape = kernel.tape(key, skip + num_samples + extra, state)
            after = jax.tree.map(lambda leaf: leaf[-1], tape.discrete)
            kept = jax.tree.map(lambda leaf: leaf[skip:skip + num_samples], tape)
            return kernel.carry(state) if carry is None else carry, kept, after

        return jax.vmap(one)(positions, carries, keys)


def _finish(dynamics, initial, tape, states, num_exact):
    """Chains finished sequentially after their exact steps; how many steps are then finite, shape `(C,)`."""
    states = roll_on(dynamics, initial, states, tape, num_exact)
    finite = [jnp.isfinite(leaf).reshape(*leaf.shape[:2], -1).all(axis=2) for leaf in jax.tree.leaves(states)]
    return states, jnp.cumprod(functools.reduce(jnp.logical_and, finite), axis=1).sum(axis=1)


class _Solve(Named):
    """One stretch of every chain; parts are `max_iterations` and strategies that are no pytrees."""

    def __call__(self, solver, schedule, tolerance, dynamics, initial, tape) -> Solution:
        max_iterations, *opaque = self.parts
        solver, schedule = (given if given is not None else fixed for given, fixed in zip((solver, schedule), opaque))
        return jax.vmap(lambda first, drives: solve(
            dynamics, first, drives, solver=solver, schedule=schedule, tolerance=tolerance,
            max_iterations=max_iterations))(initial, tape)


def _solving(solver: Solver, schedule: Schedule, tolerance: Tolerance, max_iterations: int | None, clock: Clock):
    """`(dynamics, initial, tape) -> Solution` of all chains, compiled once for all runs."""
    strategies = solver, schedule
    opaque = [None if jax.tree.structure(one) != _LEAF else one for one in strategies]
    given = [one if jax.tree.structure(one) != _LEAF else None for one in strategies]
    return lambda *args: run_program(_Solve(max_iterations, *opaque), *given, tolerance, *args, clock=clock)


_LEAF = jax.tree.structure(0)


class _Books:
    """What happened, stretch by stretch."""

    def __init__(self, num_chains: int, num_samples: int):
        self.num_samples = num_samples
        self.status = [Status.CONVERGED] * num_chains
        self.iterations = np.zeros(num_chains, int)
        self.evaluations, self.jvps = np.zeros(num_chains), np.zeros(num_chains)
        self.depth = np.zeros(num_chains, int)
        self.num_sequential = np.zeros(num_chains, int)
        self.history: np.ndarray | None = None
        self.fallbacks: list[str] = []
        self.failed_running = 0
        self.worst = 0.0

    @property
    def hopeless(self) -> bool:
        """Whether to stop trying."""
        return self.failed_running >= _GIVE_UP_AFTER

    def enter(self, found: Solution, start: int, stop: int, rolled: bool, finish) -> PyTree:
        """Book one stretch; chains that did not converge go on sequentially from where they are exact."""
        verdicts = [Status(int(code)) for code in np.asarray(found.status)]
        self._count(found, stop - start)
        if self.history is None:
            self.history = np.asarray(found.stats.residual_history)
        bad = np.array([verdict != Status.CONVERGED for verdict in verdicts])
        if rolled:
            self.num_sequential += stop - start
        states, rolled_exact = found.states, found.num_exact
        if bad.any() and not rolled:
            verdicts, states, rolled_exact = self._fall_back(found, verdicts, bad, start, stop, finish)
        if not rolled:
            self.failed_running = self.failed_running + 1 if bad.all() else 0
            if self.hopeless and stop < self.num_samples:
                self.fallbacks.append(f"from step {stop} on all chains ran sequentially: none converged in "
                                      f"{_GIVE_UP_AFTER} stretches running")
        for chain, verdict in enumerate(verdicts):
            if verdict != Status.CONVERGED and self.status[chain] == Status.CONVERGED:
                self.status[chain] = verdict
        # What is not finite is not a draw: say so in the draws themselves.
        lost = np.array([verdict == Status.NONFINITE for verdict in verdicts])
        if lost.any():
            exact = np.where(lost, np.asarray(rolled_exact), stop - start)
            keep = jnp.asarray(np.arange(stop - start) < exact[:, None])
            states = jax.tree.map(lambda leaf: jnp.where(
                keep.reshape(*keep.shape, *(1,) * (leaf.ndim - 2)), leaf, jnp.nan), states)
        self.worst = max(self.worst, float(np.nanmax(np.where(bad, 0, np.asarray(found.residual)), initial=0.0)))
        return states

    def _fall_back(self, found, verdicts, bad, start, stop, finish):
        steps = stop - start
        exact = np.where(bad, np.asarray(found.num_exact), steps)
        for chain in np.flatnonzero(bad):
            kept = f"the first {exact[chain]} steps are exact and kept, the rest was" if exact[chain] else "all of it was"
            self.fallbacks.append(
                f"chain {chain}, steps {start} to {stop}: {verdicts[chain].name} after "
                f"{int(np.asarray(found.iterations)[chain])} iterations; {kept} finished sequentially")
        self.num_sequential += steps - exact
        self.evaluations += steps - exact
        self.depth += steps - exact
        states, finite = finish(found.states, jnp.asarray(exact, jnp.int32))
        verdicts = [verdict if not bad[chain] else Status.CONVERGED if count == steps else Status.NONFINITE
                    for chain, (verdict, count) in enumerate(zip(verdicts, np.asarray(finite)))]
        return verdicts, states, np.asarray(finite)

    def _count(self, found: Solution, steps: int) -> None:
        self.iterations += np.asarray(found.iterations)
        self.evaluations += np.asarray(found.stats.evaluations, float) * steps
        self.jvps += np.asarray(found.stats.jvps, float) * steps
        self.depth += np.asarray(found.stats.depth)

    def shown(self) -> dict[str, Any]:
        """What a progress line shows."""
        return {"iterations": int(self.iterations.max()), "residual": f"{self.worst:.0e}",
                "fallbacks": len(self.fallbacks)}

    def close(self, initial: PyTree, carries: PyTree, tape: Tape, discrete: dict, clock: Clock, *choice) -> Chains:
        """The finished chains."""
        steps = max(self.num_samples, 1)
        history = np.full((len(self.status), 0), np.nan) if self.history is None else self.history
        return Chains(initial, carries, tape, discrete, self.status, self.iterations, float(self.evaluations.mean() / steps),
                      float(self.jvps.mean() / steps), int(self.depth.max()), self.fallbacks, self.num_sequential, history,
                      clock, *choice)
