"""Advice before a long run: can this recurrence be solved in parallel over time, and with how many segments?

Two questions, two kinds of evidence:

    does it forget?    pilot pairs under the same drives, from `initial` and from posterior-like starts (`coalescence`)
    does it pay?       T c(C)  against  b(C T) + (T/S) c'(L) + Σ_k Δ_k c'(W_k),   L = C S lanes,   S a power of two

for C chains of T steps: a loop over all chains against shooting with S segments a chain. c(L) is the cost of a step of
L lanes, b that of the dice in one batch, c' that of a step without them (`cost`). Δ_k is how long a rerun takes in each of
the widths W_k it is narrowed to (`solvers.lanes`), by the pilots' meeting times with an exponential tail beyond their
median; the last lane is expected at m_L = median + scale · (log(L/2) + γ). Chains and segments fill the same lanes: many
chains, few segments each.

Every number follows from the program, the seeds and the machine's stated constants. Nothing is timed, so the same
arguments give the same advice. Left out: warm-up, compilation, and solvers other than shooting and the loop.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.dynamics import Dynamics, ravel, without_captures
from partime_mcmc.predict.coalescence import MeetingTimes, meeting_times, slowest, still_open
from partime_mcmc.predict.cost import StepCost, step_cost
from partime_mcmc.predict.machine import Machine, default_machine
from partime_mcmc.recipes import sequential, shooting
from partime_mcmc.schedule import Schedule, Stretches, Whole
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers import Solver
from partime_mcmc.solvers.lanes import widths
from partime_mcmc.types import PyTree

_MIN_PAIRS, _MAX_PAIRS = 16, 32
# A thirty-second of the run is what the question may cost, within reason at both ends.
_PILOT_SHARE, _MIN_PILOT, _MAX_PILOT = 32, 512, 8192
# With fewer pairs met than this, some segment of every solve would have to wait for ever.
_ENOUGH_MET = 0.9
_WORTH_IT = 1.1
# Twice the segments must gain this much: they cost work and memory for certain, and the model is rough.
_BETTER = 1.05


class Meeting(NamedTuple):
    """Steps until pilot pairs met; pairs that did not count with the steps that were looked at."""

    median: float
    ninety_percent: float
    worst: int
    fraction_met: float


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to do, what it should cost, and why.

    Attributes:
        solver: `shooting(num_segments=S)`, or `sequential()`.
        schedule: `Whole()`, or stretches that fit in memory; S segments are cut from each stretch.
        num_segments: S; 1 for the sequential loop.
        evaluations_per_step: Expected evaluations of `f` per step.
        depth: Expected evaluations of `f` one after another.
        speedup: Expected, against the loop over the same chains; 1 for the loop itself.
        meeting: What the pilot pairs did.
        reason: Why, in one or two sentences.
        parallel: Whether to solve in parallel over time.
    """

    solver: Solver
    schedule: Schedule
    num_segments: int
    evaluations_per_step: float
    depth: int
    speedup: float
    meeting: Meeting
    reason: str
    parallel: bool

    def __str__(self) -> str:
        if not self.parallel:
            return f"Run sequentially. {self.reason}"
        whole = isinstance(self.schedule, Whole)
        per = "chain" if whole else f"stretch of {self.schedule.size:,} steps"
        return (
            f"Solve in parallel over time with {self.num_segments:,} segments per {per}: "
            f"about {self.speedup:.1f} times as fast as the sequential loop, with {self.evaluations_per_step:.2f} "
            f"evaluations per step and {self.depth:,} of them one after another. {self.reason}"
        )


def advise(
    dynamics: Dynamics,
    initial: PyTree,
    drives: PyTree,
    *,
    starts: PyTree,
    num_steps: int,
    num_chains: int = 1,
    machine: Machine | None = None,
    tolerance: Tolerance = Tolerance(),
) -> Advice:
    """How to run `num_chains` chains of `num_steps` steps.

    Args:
        dynamics: The recurrence of one chain; for a kernel `kernel.dynamics()`.
        initial: `x_0` of one chain, from which shooting guesses: half of the pilot pairs start here.
        drives: Drives of one chain, leaves `(T', ...)`, any length; the pilots take stretches of them, at most
            max(512, num_steps / 32) steps long.
        starts: At least two states to forget, as warm-up or the chains left them: leaves `(K, ...)`, or one array
            `(K, D)` of flat states.
        num_steps: T, steps per chain.
        num_chains: C, chains that are run side by side.
        machine: Constants of the cost model; None takes those of the backend.
        tolerance: As for the solve.

    Returns:
        The advice; `str(advice)` is a paragraph for its reader.

    Raises:
        ValueError: If counts are not positive, `starts` has fewer than two states or the wrong shapes, or `drives` is
            empty.
    """
    for name, value in (("num_steps", num_steps), ("num_chains", num_chains)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    machine = default_machine(jax.default_backend()) if machine is None else machine
    initial, drives, starts = (
        jax.tree.map(jnp.asarray, tree) for tree in (initial, drives, starts)
    )
    if (
        not jax.tree.leaves(drives)
        or min(leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(drives)) < 1
    ):
        raise ValueError("drives: wanted at least one leaf, with a leading axis T' of at least 1")
    drive = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), drives)
    flat, start, _ = ravel(without_captures(dynamics, initial, drive), initial)
    pool = _flat_starts(starts, initial, start)
    found, looked = _pilots(flat, start, pool, drives, num_steps, tolerance)
    met = np.asarray(found.met)
    steps = np.asarray(found.steps)
    meeting = Meeting(
        float(np.median(steps)), float(np.quantile(steps, 0.9)), int(steps.max()), float(met.mean())
    )
    if meeting.fraction_met < _ENOUGH_MET:
        return _stay(num_steps, meeting, _unforgetting(found, looked))
    cost = step_cost(flat, start, drive, min(num_steps, _MAX_PILOT), num_chains, machine)
    schedule, size = _schedule(num_steps, num_chains, start.size * start.dtype.itemsize, machine)
    plan = _best(cost, machine, size, num_chains, steps, met)
    forgets = (
        f"Pairs of chains with the same dice became one after {meeting.median:.0f} steps in the median and "
        f"{meeting.worst:,} at worst ({met.sum()} of {met.size} pairs)"
    )
    if plan is None or plan.speedup < _WORTH_IT:
        what = (
            "these chains are too short for what they need to forget"
            if plan is None
            else f"the best plan, {plan.num_segments:,} segments per chain, is expected to be only {plan.speedup:.2f} "
            f"times as fast as the loop on {machine.name}"
        )
        with_chains = (
            f", which {num_chains} chains side by side already fill"
            if plan and num_chains > 1
            else ""
        )
        return _stay(num_steps, meeting, f"{forgets}, but {what}{with_chains}.")
    stretches = math.ceil(num_steps / size)
    chains = f"{num_chains} chain{'s' if num_chains > 1 else ''}"
    reason = (
        f"{forgets}; the slowest of {plan.num_segments * num_chains:,} segments should need about "
        f"{plan.meeting:.0f}. Estimated for {chains} on {machine.name}."
    )
    return Advice(
        shooting(num_segments=plan.num_segments),
        schedule,
        plan.num_segments,
        plan.evaluations,
        stretches * plan.depth,
        plan.speedup,
        meeting,
        reason,
        True,
    )


class _Plan(NamedTuple):
    num_segments: int
    speedup: float
    meeting: float
    depth: int
    evaluations: float


def _best(
    cost: StepCost, machine: Machine, num_steps: int, num_chains: int, steps, met
) -> _Plan | None:
    """The plan with the least expected time, or one with fewer segments that is nearly as good; None if none fits."""
    best, segments = None, 2
    loop = num_steps * cost.loop(machine, num_chains)
    while segments <= num_steps // 2 and segments * num_chains <= max(
        machine.max_lanes, 2 * num_chains
    ):
        lanes = segments * num_chains
        meeting, roll = slowest(steps, met, lanes), math.ceil(num_steps / segments)
        again = _rerun(steps, met, meeting, widths(lanes, num_chains))
        seconds = (
            cost.batched(machine, num_chains * num_steps)
            + roll * cost.rolled(machine, lanes)
            + sum(count * cost.rolled(machine, width) for width, count in again)
        )
        if best is None or loop / seconds > _BETTER * best.speedup:
            evaluations = (roll * lanes + sum(width * count for width, count in again)) / (
                num_chains * num_steps
            )
            best = _Plan(segments, loop / seconds, meeting, math.ceil(roll + meeting), evaluations)
        segments *= 2
    return best


def _rerun(steps, met, meeting: float, levels: tuple[int, ...]) -> list[tuple[int, float]]:
    """The widths of a rerun, and the steps expected in each of them."""
    begin, found = 0.0, []
    for width, narrower in zip(levels, (*levels[1:], 0)):
        end = min(meeting, still_open(steps, met, narrower / levels[0])) if narrower else meeting
        found.append((width, max(end - begin, 0.0)))
        begin = max(begin, end)
    return found


def _pilots(dynamics, start, pool, drives, num_steps, tolerance) -> tuple[MeetingTimes, int]:
    """Meeting times of pilot pairs, each under its own stretch of the drives, and how many steps were allowed."""
    available = min(leaf.shape[0] for leaf in jax.tree.leaves(drives))
    looked = min(available, max(_MIN_PILOT, min(_MAX_PILOT, num_steps // _PILOT_SHARE)))
    count = pool.shape[0]
    num_pairs = min(max(count, _MIN_PAIRS), _MAX_PAIRS)
    pair = np.arange(num_pairs)
    # States spread over all that were given; pairs beyond the first round have other partners and other dice.
    first = pair * count // num_pairs if count > num_pairs else pair % count
    second = (first + 1 + (pair // count) % (count - 1)) % count
    from_initial = jnp.asarray(pair % 2 == 1)[:, None]
    begin = np.linspace(0, available - looked, num_pairs).astype(int)
    index = begin[:, None] + np.arange(looked)
    scale = jnp.std(pool, axis=0)
    found = meeting_times(
        dynamics,
        jnp.where(from_initial, start, pool[second]),
        pool[first],
        jax.tree.map(lambda leaf: leaf[index], drives),
        tolerance=tolerance,
        scale=jnp.where(jnp.isfinite(scale) & (scale > 0), scale, 1),
    )
    return found, looked


def _flat_starts(starts, initial, flat):
    """Starts as one array `(K, D)`."""
    leaves = jax.tree.leaves(starts)
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"starts: leading axes {sorted(counts)}, wanted one common number of states K of at least 2"
        )
    if len(leaves) == 1 and leaves[0].shape[1:] == flat.shape:
        return leaves[0].astype(flat.dtype)
    shapes = jax.tree.map(lambda leaf: leaf.shape[1:], starts)
    if jax.tree.structure(starts) != jax.tree.structure(initial) or shapes != jax.tree.map(
        jnp.shape, initial
    ):
        raise ValueError(
            f"starts: shapes {jax.tree.map(jnp.shape, starts)}, wanted those of initial, "
            f"{jax.tree.map(jnp.shape, initial)}, behind a leading axis K, or flat ones (K, {flat.size})"
        )
    return jax.vmap(lambda state: ravel_pytree(state)[0])(starts).astype(flat.dtype)


def _schedule(
    num_steps: int, num_chains: int, bytes_per_state: int, machine: Machine
) -> tuple[Schedule, int]:
    """All of time if the path and its copies fit, else the longest stretches that do, a power of two."""
    # Shooting holds the path three times over, its residual, and about twice as much in dice.
    fitting = machine.max_bytes / (6 * num_chains * bytes_per_state)
    if num_steps <= fitting:
        return Whole(), num_steps
    size = 2 ** max(6, int(math.log2(max(fitting, 1))))
    return (Stretches(size), size) if size < num_steps else (Whole(), num_steps)


def _unforgetting(found: MeetingTimes, looked: int) -> str:
    met, distance = np.asarray(found.met), np.asarray(found.distance)
    apart, broken = ~met & np.isfinite(distance), ~met & ~np.isfinite(distance)
    said = []
    if apart.any():
        said.append(
            f"after {looked:,} steps with the same dice {apart.sum()} of {met.size} pairs of chains were still "
            f"apart, {np.median(distance[apart]):.2g} standard deviations in the median"
        )
    if broken.any():
        said.append(f"{broken.sum()} of {met.size} pairs left the finite numbers")
    why = (
        "these chains do not forget where they started"
        if apart.any()
        else "nothing can be said about forgetting"
    )
    text = " and ".join(said)
    return f"{text[0].upper()}{text[1:]}: {why}, and a solver parallel over time would not end before the loop does."


def _stay(num_steps: int, meeting: Meeting, reason: str) -> Advice:
    return Advice(sequential(), Whole(), 1, 1.0, num_steps, 1.0, meeting, reason, False)
