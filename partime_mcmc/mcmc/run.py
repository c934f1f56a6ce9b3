"""Running chains: one compiled solve for all of them, stretch after stretch.

Stretch s of every chain is the recurrence x_t = f(x_{t-1}, u_t) for its part of the tape, from where the chain ended before.
What steps note of themselves is kept where every chain was solved by rolling it.
A chain whose solve does not converge is finished sequentially (`books`). One bad chain never changes how the others are run,
so that their draws stay the same bits.

An interrupt from the keyboard keeps the stretches that are done: chains are then shorter than asked for, with the verdict
INTERRUPTED.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Callable

import jax
import jax.numpy as jnp

from partime_mcmc.closures import Named
from partime_mcmc.dynamics import Dynamics
from partime_mcmc.kernels import Evidence, Independent, Kernel, Tape
from partime_mcmc.mcmc.books import Books
from partime_mcmc.mcmc.draws import End
from partime_mcmc.mcmc.programs import Clock, run_program
from partime_mcmc.mcmc.tapes import recurrence_of, throw_dice
from partime_mcmc.predict.advise import Advice
from partime_mcmc.recipes import sequential
from partime_mcmc.schedule import Schedule, Stretches, Whole
from partime_mcmc.solution import Solution, Tolerance
from partime_mcmc.solve import solve
from partime_mcmc.solvers import Rollout, Solver
from partime_mcmc.solvers.rollout import roll_on
from partime_mcmc.types import Key, PyTree

# (what makes the dynamics, initial carries (C, ...), tapes (C, T, ...)) -> solver, schedule, and the advice behind them if any.
# Who does not look at the dynamics need not wait for it to be traced.
Choice = Callable[[Callable[[], Dynamics], PyTree, Tape], tuple[Solver, Schedule, Advice | None]]


@dataclasses.dataclass
class Chains:
    """Solved chains.

    Attributes:
        initial: Where they started, leaves `(C, ...)`.
        carries: Their paths, leaves `(C, T, ...)`.
        tape: Their dice, leaves `(C, T, ...)`.
        discrete: The discrete leaves after the last step, `(C, ...)`.
        first: Steps before these.
        books: What happened.
        clock: Seconds.
        solver: What solved them.
        schedule: How time was cut.
        advice: Why, if advice was asked for.
        notes: What steps noted, `(C, T, R)`; None where nothing was noted, or not of all steps.
        defects: How far each step is from the recurrence, `(C, T, D)`; None as `notes`.
    """

    initial: PyTree
    carries: PyTree
    tape: Tape
    discrete: dict
    first: int
    books: Books
    clock: Clock
    solver: Solver
    schedule: Schedule
    advice: Advice | None
    notes: jax.Array | None = None
    defects: jax.Array | None = None


def run_chains(kernel: Kernel, positions: PyTree, keys: Key, num_samples: int, *, choose: Choice, tolerance: Tolerance,
               max_iterations: int | None, advance: Callable[..., None], evidence: Evidence = Independent(),
               end: End | None = None, total: int | None = None, stretch: int | None = None,
               clock: Clock | None = None) -> Chains:
    """Solve all chains.

    Args:
        kernel: The tuned kernel.
        positions: One start per chain, leaves `(C, ...)`; not looked at where `end` is given.
        keys: One key per chain, shape `(C,)`.
        num_samples: T.
        choose: What picks the solver and the schedule once dynamics, starts and tapes are known. `Stretches` are run
            from here; other schedules within one solve.
        tolerance: How small residuals must be.
        max_iterations: Passes per stretch.
        advance: Told of the steps done, and what to show, after each stretch.
        evidence: Whether steps note what a certificate needs.
        end: Where the chains go on from, to the last bit; None is where `positions` are, before the first step.
        total: The step at which the whole run ends; None is the end of these T.
        stretch: Most steps that are solved at once, whatever the schedule says; None leaves it to the schedule.
        clock: Where seconds are booked.

    Returns:
        The chains. Every chain with status CONVERGED is exact.
    """
    clock, first = Clock() if clock is None else clock, 0 if end is None else end.num_steps
    initial, tape, discrete = throw_dice(kernel, positions, keys, num_samples, end, clock)
    with clock.measure("advise"):
        solver, schedule, advice = choose(functools.partial(recurrence_of, kernel, initial, tape, Clock()), initial, tape)
    size = min(_stretch_size(solver, schedule, num_samples), stretch or max(num_samples, 1))
    inside = Whole() if isinstance(schedule, Stretches) else schedule
    solve_stretch = _solving(solver, inside, tolerance, max_iterations, clock)
    roll_stretch = _solving(sequential(), Whole(), tolerance, None, clock)
    finish_stretch = functools.partial(run_program, _finish, clock=clock)
    recurrence = recurrence_of(kernel, initial, tape, clock, evidence)
    books = Books(keys.shape[0], first, first + num_samples if total is None else total, end.failed_running if end else 0)
    current, pieces = initial, []
    try:
        for start in range(0, num_samples, size):
            stop = min(start + size, num_samples)
            part = tape if size >= num_samples else jax.tree.map(lambda leaf: leaf[:, start:stop], tape)
            chosen = roll_stretch if books.hopeless else solve_stretch
            found = chosen(recurrence, current, part)
            states = books.enter(found, start, stop, chosen is roll_stretch,
                                 functools.partial(finish_stretch, recurrence, current, part))
            # At once, so that an interrupt finds a stretch with its notes or not at all.
            pieces.append((states, found.notes, found.defects) if books.as_found else (states, None, None))
            if stop < num_samples:
                current = jax.tree.map(lambda leaf: leaf[:, -1], states)
            advance(stop - start, **books.shown())
    except KeyboardInterrupt:
        if not pieces:
            raise
        done = sum(jax.tree.leaves(states)[0].shape[1] for states, *_ in pieces)
        discrete = jax.tree.map(lambda leaf: leaf[:, done], tape.discrete) if done < num_samples else discrete
        tape = jax.tree.map(lambda leaf: leaf[:, :done], tape)
        books.interrupt(done)
    return Chains(initial, _joined(initial, [states for states, *_ in pieces]), tape, discrete, first, books, clock, solver,
                  schedule, advice, *_all_kept([(notes, defects) for _, notes, defects in pieces]))


def _all_kept(kept: list[tuple]) -> tuple[jax.Array | None, jax.Array | None]:
    """Notes and defects of all stretches, if all of them have some."""
    if not kept or any(notes is None for notes, _ in kept):
        return None, None
    return kept[0] if len(kept) == 1 else tuple(jnp.concatenate(pieces, axis=1) for pieces in zip(*kept))


def _joined(initial: PyTree, pieces: list[PyTree]) -> PyTree:
    if len(pieces) == 1:
        return pieces[0]
    if pieces:
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *pieces)
    return jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], 0, *leaf.shape[1:]), leaf.dtype), initial)


def _stretch_size(solver: Solver, schedule: Schedule, num_samples: int) -> int:
    # A sequential run gains nothing from stretches, and neither does an empty one.
    if isinstance(schedule, Stretches) and not isinstance(solver, Rollout):
        return schedule.size
    return max(num_samples, 1)


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
