"""Running chains: one compiled solve for all of them, stretch after stretch, in as many groups as cores share them.

Stretch s of every chain is the recurrence x_t = f(x_{t-1}, u_t) for its part of the tape, from where the chain ended before.
Groups are solved side by side (`cores`) and booked together; paths stay in groups until they are certified.
What steps note of themselves is kept where every chain was solved by rolling it.
A chain whose solve does not converge is finished sequentially (`books`). One bad chain never changes how the others are run,
so that their draws stay the same bits.

An interrupt from the keyboard keeps the stretches that are done: chains are then shorter than asked for, with the verdict
INTERRUPTED.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.closures import Named
from partime_mcmc.dynamics import Dynamics
from partime_mcmc.forgetting.advise import Advice
from partime_mcmc.kernels import Evidence, Independent, Kernel, Tape
from partime_mcmc.mcmc.books import Books
from partime_mcmc.mcmc.cores import cut, joined, num_groups, run_groups
from partime_mcmc.mcmc.draws import End
from partime_mcmc.mcmc.programs import Clock
from partime_mcmc.mcmc.tapes import recurrence, throw_dice
from partime_mcmc.recipes import sequential
from partime_mcmc.schedule import Schedule, Stretches, Whole
from partime_mcmc.solution import Solution, Status, Tolerance
from partime_mcmc.solve import solve
from partime_mcmc.solvers import Rollout, Solver
from partime_mcmc.solvers.rollout import roll_on
from partime_mcmc.types import Key, PyTree

# (what makes the dynamics, initial carries and tapes of a group of chains, how many such groups there are) -> solver,
# schedule, and the advice behind them if any. Who does not look at the dynamics need not wait for it to be traced.
Choice = Callable[
    [Callable[[], Dynamics], PyTree, Tape, int], tuple[Solver, Schedule, Advice | None]
]


@dataclasses.dataclass
class Chains:
    """Solved chains.

    What is said of `(G, ...)` is a list of groups with G chains each, C in all.

    Attributes:
        initial: Where they started, leaves `(G, ...)`.
        carries: Their paths, leaves `(G, T, ...)`.
        tape: Their dice, leaves `(G, T, ...)`.
        discrete: The discrete leaves after the last step, `(C, ...)`.
        first: Steps before these.
        books: What happened.
        clock: Seconds.
        solver: What solved them.
        schedule: How time was cut.
        advice: Why, if advice was asked for.
        notes: What steps noted, `(G, T, R)`; None where nothing was noted, or not of all steps.
        defects: How far each step is from the recurrence, `(G, T, D)`; None as `notes`.
    """

    initial: list[PyTree]
    carries: list[PyTree]
    tape: list[Tape]
    discrete: dict
    first: int
    books: Books
    clock: Clock
    solver: Solver
    schedule: Schedule
    advice: Advice | None
    notes: list[jax.Array] | None = None
    defects: list[jax.Array] | None = None


def run_chains(
    kernel: Kernel,
    positions: PyTree,
    keys: Key,
    num_samples: int,
    *,
    choose: Choice,
    tolerance: Tolerance,
    max_iterations: int | None,
    advance: Callable[..., None],
    evidence: Evidence = Independent(),
    end: End | None = None,
    total: int | None = None,
    stretch: int | None = None,
    groups: int | None = None,
    clock: Clock | None = None,
) -> Chains:
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
        groups: Into how many groups chains are cut; None is as many as suit the cores.
        clock: Where seconds are booked.

    Returns:
        The chains. Every chain with status CONVERGED is exact.
    """
    clock, first = Clock() if clock is None else clock, 0 if end is None else end.num_steps
    solved = recurrence(kernel, positions, keys, end, clock, evidence)
    count = num_groups(keys.shape[0], solved) if groups is None else groups
    initial, tape, discrete = map(
        list, zip(*throw_dice(kernel, positions, keys, num_samples, end, clock, count))
    )
    with clock.measure("advise"):
        looked_at = functools.partial(recurrence, kernel, positions, keys, end, Clock())
        solver, schedule, advice = choose(looked_at, initial[0], tape[0], count)
    size = min(_stretch_size(solver, schedule, num_samples), stretch or max(num_samples, 1))
    inside = Whole() if isinstance(schedule, Stretches) else schedule
    solve_stretch = _solving(solver, inside, tolerance, max_iterations, clock)
    roll_stretch = _solving(sequential(), Whole(), tolerance, None, clock)
    books = Books(
        keys.shape[0],
        first,
        first + num_samples if total is None else total,
        end.failed_running if end else 0,
    )
    current, pieces, discrete = initial, [], joined(discrete)
    try:
        for start in range(0, num_samples, size):
            stop = min(start + size, num_samples)
            part = (
                tape
                if size >= num_samples
                else jax.tree.map(lambda leaf: leaf[:, start:stop], tape)
            )
            chosen = roll_stretch if books.hopeless else solve_stretch
            found = chosen(solved, current, part)
            states = _booked(
                books,
                found,
                start,
                stop,
                chosen is roll_stretch,
                functools.partial(_finished, solved, current, part, clock),
            )
            # At once, so that an interrupt finds a stretch with its notes or not at all.
            pieces.append(
                (states, [(one.notes, one.defects) for one in found] if books.as_found else None)
            )
            if stop < num_samples:
                current = jax.tree.map(lambda leaf: leaf[:, -1], states)
            advance(stop - start, **books.shown())
    except KeyboardInterrupt:
        if not pieces:
            raise
        done = sum(jax.tree.leaves(states)[0].shape[1] for states, _ in pieces)
        if done < num_samples:
            discrete = joined(
                jax.tree.map(lambda leaf: leaf[:, done], [one.discrete for one in tape])
            )
            tape = jax.tree.map(lambda leaf: leaf[:, :done], tape)
        books.interrupt(done)
    return Chains(
        initial,
        _in_time(initial, [states for states, _ in pieces]),
        tape,
        discrete,
        first,
        books,
        clock,
        solver,
        schedule,
        advice,
        *_all_kept([kept for _, kept in pieces]),
    )


def _booked(
    books: Books, found: list[Solution], start: int, stop: int, rolled: bool, finish: Callable
) -> list[PyTree]:
    """Book a stretch of all groups; their carries. Paths are joined only where some chain did not converge."""
    without = [dataclasses.replace(one, states=None, notes=None, defects=None) for one in found]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *without)
    if (whole.status == Status.CONVERGED).all():
        books.enter(whole, start, stop, rolled, finish)
        return [one.states for one in found]
    whole = dataclasses.replace(whole, states=joined([one.states for one in found]))
    return cut(books.enter(whole, start, stop, rolled, finish), len(found))


def _finished(
    dynamics: Dynamics,
    current: list[PyTree],
    part: list[Tape],
    clock: Clock,
    states: PyTree,
    num_exact: jax.Array,
) -> tuple[PyTree, jax.Array]:
    """`_finish` of all chains, group by group."""
    count = len(part)
    groups = list(zip(current, part, cut(states, count), cut(num_exact, count)))
    return joined(run_groups(_finish, (dynamics,), groups, clock=clock))


def _all_kept(kept: list[list[tuple] | None]) -> tuple[list | None, list | None]:
    """Notes and defects of all stretches, by group, if all of them have some."""
    if not kept or any(groups is None or groups[0][0] is None for groups in kept):
        return None, None
    by_group = [
        pieces[0]
        if len(pieces) == 1
        else tuple(jnp.concatenate(one, axis=1) for one in zip(*pieces))
        for pieces in zip(*kept)
    ]
    return [notes for notes, _ in by_group], [defects for _, defects in by_group]


def _in_time(initial: list[PyTree], pieces: list[list[PyTree]]) -> list[PyTree]:
    """The paths of all groups, their stretches one after another."""
    if not pieces:
        return jax.tree.map(
            lambda leaf: jnp.zeros((leaf.shape[0], 0, *leaf.shape[1:]), leaf.dtype), initial
        )
    return [
        of_group[0]
        if len(of_group) == 1
        else jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *of_group)
        for of_group in zip(*pieces)
    ]


def _stretch_size(solver: Solver, schedule: Schedule, num_samples: int) -> int:
    # A sequential run gains nothing from stretches, and neither does an empty one.
    if isinstance(schedule, Stretches) and not isinstance(solver, Rollout):
        return schedule.size
    return max(num_samples, 1)


def _finish(dynamics, initial, tape, states, num_exact):
    """Chains finished sequentially after their exact steps; how many steps are then finite, shape `(C,)`."""
    states = roll_on(dynamics, initial, states, tape, num_exact)
    finite = [
        jnp.isfinite(leaf).reshape(*leaf.shape[:2], -1).all(axis=2)
        for leaf in jax.tree.leaves(states)
    ]
    return states, jnp.cumprod(functools.reduce(jnp.logical_and, finite), axis=1).sum(axis=1)


class _Solve(Named):
    """One stretch of every chain; parts are `max_iterations` and strategies that are no pytrees."""

    def __call__(self, solver, schedule, tolerance, dynamics, initial, tape) -> Solution:
        max_iterations, *opaque = self.parts
        solver, schedule = (
            given if given is not None else fixed
            for given, fixed in zip((solver, schedule), opaque)
        )
        return jax.vmap(
            lambda first, drives: solve(
                dynamics,
                first,
                drives,
                solver=solver,
                schedule=schedule,
                tolerance=tolerance,
                max_iterations=max_iterations,
            )
        )(initial, tape)


def _solving(
    solver: Solver,
    schedule: Schedule,
    tolerance: Tolerance,
    max_iterations: int | None,
    clock: Clock,
):
    """`(dynamics, initial, tape) -> Solution` of every group of chains, compiled once for all runs."""
    strategies = solver, schedule
    opaque = [None if jax.tree.structure(one) != _LEAF else one for one in strategies]
    given = [one if jax.tree.structure(one) != _LEAF else None for one in strategies]
    program = _Solve(max_iterations, *opaque)
    return lambda dynamics, initial, tape: run_groups(
        program, (*given, tolerance, dynamics), list(zip(initial, tape)), clock=clock
    )


_LEAF = jax.tree.structure(0)
