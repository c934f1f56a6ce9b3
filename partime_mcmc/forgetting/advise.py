"""Advice before a long run: can this recurrence be solved in parallel over time, and with how many segments?

Pilot pairs under the same drives, from `initial` and from posterior-like starts, show whether it forgets and after how
many steps (`coalescence`). If it does, `solvers.segments` gives the number of segments from the expected largest
meeting time; if not, or if the chain is too short for what it must forget, the sequential loop is right.

Nothing is timed, so the same arguments give the same advice, about shooting and the loop alone.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.engine import (
    AllAtOnce,
    Dynamics,
    Tolerance,
    Windows,
    ravel,
    sequential,
    shooting,
)
from partime_mcmc.engine.solve import check_step
from partime_mcmc.forgetting.coalescence import (
    MeetingTimes,
    expected_max_meeting_time,
    meeting_times,
    survival_time,
)
from partime_mcmc.solvers import Solver
from partime_mcmc.solvers.narrowing import widths
from partime_mcmc.solvers.segments import device_lanes, segment_length
from partime_mcmc.types import PyTree
from partime_mcmc.validation import check_count

_MIN_PAIRS, _MAX_PAIRS = 16, 32
# A thirty-second of the run is what the question may cost, within reason at both ends.
_PILOT_SHARE, _MIN_PILOT, _MAX_PILOT = 32, 512, 8192
# If fewer pairs than this have met, some segment of every solve would never meet its stored path.
_ENOUGH_MET = 0.9


class Meeting(NamedTuple):
    """Steps until pilot pairs met; pairs that did not count with the steps that were looked at."""

    median: float
    ninety_percent: float
    worst: int
    fraction_met: float


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to do, how much work it should be, and why.

    Attributes:
        solver: `shooting(steps=...)`, or `sequential()`.
        schedule: `AllAtOnce()`, or windows that fit in memory; S segments are cut from each window.
        num_segments: S; 1 for the sequential loop.
        evaluations_per_step: Expected evaluations of `f` per step.
        depth: Expected evaluations of `f` one after another.
        meeting: What the pilot pairs did.
        reason: Why, in one or two sentences.
        parallel: Whether to solve in parallel over time.
    """

    solver: Solver
    schedule: AllAtOnce | Windows
    num_segments: int
    evaluations_per_step: float
    depth: int
    meeting: Meeting
    reason: str
    parallel: bool

    def __str__(self) -> str:
        if not self.parallel:
            return f"Run sequentially. {self.reason}"
        size = getattr(self.schedule, "size", None)
        per = f"window of {size:,} steps" if size else "chain"
        return (
            f"Solve in parallel over time with {self.num_segments:,} segments per {per}: about "
            f"{self.evaluations_per_step:.2f} evaluations per step, {self.depth:,} of them one after another. {self.reason}"
        )


def advise(
    dynamics: Dynamics,
    initial: PyTree,
    drives: PyTree,
    *,
    starts: PyTree,
    num_steps: int,
    num_chains: int = 1,
    max_bytes: float | None = None,
    tolerance: Tolerance = Tolerance(),
) -> Advice:
    """How to run `num_chains` chains of `num_steps` steps.

    Args:
        dynamics: The recurrence of one chain; for a kernel `kernel.dynamics()`.
        initial: `x_0` of one chain, from which shooting guesses: half of the pilot pairs start here.
        drives: Drives of one chain, leaves `(T', ...)`, any length; a pilot takes at most
            max(512, num_steps / 32) of them.
        starts: At least two states to forget, as warm-up or the chains left them: leaves `(K, ...)`, or one array
            `(K, D)` of flat states.
        num_steps: T, steps per chain.
        num_chains: C, chains that are run side by side.
        max_bytes: Memory that the paths and their copies may take; None is 1 GiB on a CPU, 4 GiB elsewhere.
        tolerance: As for the solve.

    Returns:
        The advice; `str(advice)` is a paragraph for its reader.

    Raises:
        ValueError: If counts are not positive, `starts` has fewer than two states or the wrong shapes, or `drives` is
            empty.
    """
    check_count(num_steps, "num_steps", 1)
    check_count(num_chains, "num_chains", 1)
    if max_bytes is None:
        max_bytes = 2**30 if jax.default_backend() == "cpu" else 2**32
    initial, drives, starts = (
        jax.tree.map(jnp.asarray, tree) for tree in (initial, drives, starts)
    )
    if (
        not jax.tree.leaves(drives)
        or min(leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(drives)) < 1
    ):
        raise ValueError("drives: wanted at least one leaf, with a leading axis T' of at least 1")
    flat, start, _ = ravel(check_step(dynamics, initial, drives), initial)
    pool = _flat_starts(starts, initial, start)
    found, looked = _pilots(flat, start, pool, drives, num_steps, tolerance)
    met, steps = np.asarray(found.met), np.asarray(found.steps)
    meeting = Meeting(
        float(np.median(steps)), float(np.quantile(steps, 0.9)), int(steps.max()), float(met.mean())
    )
    if meeting.fraction_met < _ENOUGH_MET:
        return _stay(num_steps, meeting, _unforgetting(found, looked))
    schedule, size = _schedule(num_steps, num_chains, start.size * start.dtype.itemsize, max_bytes)
    forgets = (
        f"Pairs of chains with the same random numbers became one after {meeting.median:.0f} steps in the median and "
        f"{meeting.worst:,} at worst ({met.sum()} of {met.size} pairs)"
    )
    longest = expected_max_meeting_time(steps, met, device_lanes())
    length = segment_length(size, num_chains, longest)
    if size < 2 * length:
        return _stay(num_steps, meeting, f"{forgets}, but {_why_not(num_chains, longest, size)}.")
    num_segments = math.ceil(size / length)
    lanes = num_segments * num_chains
    last = expected_max_meeting_time(steps, met, lanes)
    rerun = _rerun(steps, met, last, widths(lanes, num_chains))
    return Advice(
        shooting(steps=length),
        schedule,
        num_segments,
        1 + rerun / (num_chains * size),
        math.ceil(num_steps / size) * math.ceil(length + last),
        meeting,
        f"{forgets}; the last of {lanes:,} segments should need about {last:.0f}.",
        True,
    )


def _why_not(num_chains: int, longest: float, size: int) -> str:
    """Why chains that forget have one segment each."""
    if segment_length(size) <= size / 2 < segment_length(size, num_chains):
        return f"{num_chains} chains side by side already fill the device"
    return (
        f"{size:,} steps are too short for segments that need up to {longest:.0f} steps to forget"
    )


def _rerun(steps, met, last: float, levels: tuple[int, ...]) -> float:
    """Evaluations of a rerun: in each of its widths, as many steps as its lanes should stay open."""
    begin, found = 0.0, 0.0
    for width, narrower in zip(levels, (*levels[1:], 0)):
        end = min(last, survival_time(steps, met, narrower / levels[0])) if narrower else last
        found += width * max(end - begin, 0.0)
        begin = max(begin, end)
    return found


def _pilots(dynamics, start, pool, drives, num_steps, tolerance) -> tuple[MeetingTimes, int]:
    """Meeting times of pilot pairs, each under drives of its own, and how many steps were allowed."""
    available = min(leaf.shape[0] for leaf in jax.tree.leaves(drives))
    looked = min(available, max(_MIN_PILOT, min(_MAX_PILOT, num_steps // _PILOT_SHARE)))
    count = pool.shape[0]
    num_pairs = min(max(count, _MIN_PAIRS), _MAX_PAIRS)
    pair = np.arange(num_pairs)
    # States spread over all that were given; pairs beyond the first round have other partners and other random numbers.
    first = pair * count // num_pairs if count > num_pairs else pair % count
    second = (first + 1 + (pair // count) % (count - 1)) % count
    index = np.linspace(0, available - looked, num_pairs).astype(int)[:, None] + np.arange(looked)
    scale = jnp.std(pool, axis=0)
    found = meeting_times(
        dynamics,
        jnp.where((pair % 2 == 1)[:, None], start, pool[second]),
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
    if jax.tree.structure(starts) != jax.tree.structure(initial) or any(
        state.shape[1:] != one.shape for state, one in zip(leaves, jax.tree.leaves(initial))
    ):
        raise ValueError(
            f"starts: shapes {jax.tree.map(jnp.shape, starts)}, wanted those of initial, "
            f"{jax.tree.map(jnp.shape, initial)}, behind a leading axis K, or flat ones (K, {flat.size})"
        )
    return jax.vmap(lambda state: ravel_pytree(state)[0])(starts).astype(flat.dtype)


def _schedule(
    num_steps: int, num_chains: int, bytes_per_state: int, max_bytes: float
) -> tuple[AllAtOnce | Windows, int]:
    """All of time if the path and its copies fit, else the longest windows that do, a power of two."""
    # Shooting holds the path three times over, its residual, and about twice as much in random numbers.
    fitting = max_bytes / (6 * num_chains * bytes_per_state)
    if num_steps <= fitting:
        return AllAtOnce(), num_steps
    size = 2 ** max(6, int(math.log2(max(fitting, 1))))
    return (Windows(size), size) if size < num_steps else (AllAtOnce(), num_steps)


def _unforgetting(found: MeetingTimes, looked: int) -> str:
    met, distance = np.asarray(found.met), np.asarray(found.distance)
    apart, broken = ~met & np.isfinite(distance), ~met & ~np.isfinite(distance)
    left = f"{broken.sum()} of {met.size} pairs left the finite numbers"
    loop = "and a solver parallel over time would not end before the loop does."
    if not apart.any():
        return f"{left}: nothing can be said about forgetting, {loop}"
    return (
        f"After {looked:,} steps with the same random numbers {apart.sum()} of {met.size} pairs of chains were still "
        f"apart, {np.median(distance[apart]):.2g} standard deviations in the median"
        f"{f' and {left}' if broken.any() else ''}: these chains do not forget where they started, {loop}"
    )


def _stay(num_steps: int, meeting: Meeting, reason: str) -> Advice:
    return Advice(sequential(), AllAtOnce(), 1, 1.0, num_steps, meeting, reason, False)
