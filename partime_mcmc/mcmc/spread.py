"""A run over many devices and hosts, from the host's side: stretch after stretch, the books, and one set of draws at
the end.

Every host runs this same loop and reaches the same decisions, because all it looks at has been exchanged. A stretch
gives each of P devices n steps; what is left of T at the end goes in shorter parts, and fewer than P steps (or a rest
not worth another program) are computed by every device for itself. A chain that its solver cannot finish is rolled by
one device after another; when all chains have needed that twice running, the rest of the run is rolled at once.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any, Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partime_mcmc.distributed.sharded_solve import time_axis
from partime_mcmc.kernels import Certificate, Kernel
from partime_mcmc.kernels.certificate import FEWEST_TO_FREEZE
from partime_mcmc.kernels.drawn import Drawn
from partime_mcmc.mcmc.across import CHAINS, SAME, Cut, Finish, Judge, Solve, Throw
from partime_mcmc.mcmc.books import Books
from partime_mcmc.mcmc.draws import Draws, End
from partime_mcmc.mcmc.family import family_of
from partime_mcmc.mcmc.finish import constrained_values, run_report
from partime_mcmc.mcmc.programs import Clock, run_program
from partime_mcmc.mcmc.tapes import splits_by_counting
from partime_mcmc.mcmc.target import Target
from partime_mcmc.mcmc.warmup import Warmup
from partime_mcmc.recipes import sequential
from partime_mcmc.scan.time_axis import LocalTime
from partime_mcmc.schedule import Stretches
from partime_mcmc.solution import Status, Tolerance
from partime_mcmc.solvers import Shooting, Solver
from partime_mcmc.types import Key, PyTree

# Steps that every device may compute for itself rather than have another program compiled.
_NOT_WORTH_IT = 256


def draw_across(target: Target, kernel: Kernel, keys: Key, num_samples: int, *, mesh: Mesh, solver: Solver,
                schedule: Stretches, tolerance: Tolerance, max_iterations: int | None, end: End, total: int,
                warmup: Warmup | None, plan: dict[str, Any], advance: Callable[..., None]) -> Draws:
    """Chains of a tuned kernel over a mesh, certified.

    Args:
        target: For the model's own space.
        kernel: The kernel.
        keys: One per chain, shape `(C,)`.
        num_samples: T, at least 1.
        mesh: With the axes `chains` and `time`.
        solver: A recipe.
        schedule: Steps of a stretch, over all devices.
        tolerance: How small residuals must be.
        max_iterations: Passes per stretch.
        end: Where chains go on from, to the last bit, on whatever devices they got there.
        total: The step at which the whole run ends.
        warmup: The warm-up before them, if any.
        plan: What gives these draws again.
        advance: Told of the steps done, and what to show, after each stretch.

    Returns:
        The draws, all of them on every host, as NumPy arrays.

    Raises:
        ValueError: If hosts disagree about what to run, or counters of the kernel follow from stepping only.
    """
    if end.discrete and not (isinstance(kernel.algorithm, Drawn) and kernel.algorithm.count):
        raise ValueError(f"kernel: {kernel.name} has counters that follow from stepping only, so no device can begin in the "
                         "middle; wanted one whose dice tell them, or no mesh")
    begin, clock = end.num_steps, Clock()
    books = Books(keys.shape[0], begin, total, end.failed_running)
    family, numbers = family_of(kernel)
    kind, known = str(jax.random.key_impl(keys)), None if splits_by_counting(keys) else total
    numbers, words, carries, counters = agreed((numbers, np.asarray(jax.random.key_data(keys)), end.carries, end.discrete))
    everywhere, by_chain = functools.partial(_place, mesh, SAME), functools.partial(_place, mesh, CHAINS)
    numbers, (words, carries, counters) = everywhere(numbers), by_chain((words, carries, counters))
    whole = Cut(mesh, time_axis(mesh), 1, PartitionSpec("chains", "time"))
    run = functools.partial(run_program, clock=clock)
    pieces, work, done = [], [], 0
    for cut, recipe in cuts(num_samples, whole, solver, schedule):
        first = everywhere(np.uint32(begin + done))
        tape, counters = run(Throw(family, cut, kind, known), numbers, words, carries, counters, first)
        states, finite, evaluations = _solved(run, family, cut, recipe, tolerance, max_iterations, books, numbers, carries,
                                              tape, done)
        work.append(evaluations)
        judge = functools.partial(run, Judge(family, cut), numbers, carries, what="certify")
        *judged, still, places, carries, same = judge(states, tape)
        if not fetch(same).all():
            *judged, _, _, _, _ = judge(still, tape)
        pieces.append(_without_lost(fetch((*judged, places)), finite))
        done += cut.length
        advance(cut.length, **books.shown())
    steps, parts, said, places = joined(pieces)
    certificate = combined(steps, parts, num_samples)
    spread = [part.mean(axis=0) for part in work if part.shape[1] == mesh.shape["time"]]
    device = mesh.devices.flat[0]
    report = run_report(books, certificate, clock, jax.tree.leaves(places)[0].dtype,
                        f"{mesh.size} x {device.platform}: {device.device_kind}",
                        tuple(np.sum(spread, axis=0) / num_samples) if spread else ())
    end = End(fetch(carries), fetch(counters), begin + num_samples, books.failed_running)
    return Draws(places, constrained_values(target, places, clock), {**said, "residual": steps["residual"]}, certificate,
                 report, {**plan, "mesh": dict(mesh.shape)}, warmup, dict(target.dims) if target.dims else None,
                 tuple(target.names) if target.names else None, None, end)


def check_mesh(mesh: Mesh, num_chains: int, schedule: Any) -> None:
    """Refuse a mesh that chains cannot be laid on, or a schedule that cannot be spread.

    Raises:
        ValueError: If an axis is missing, or does not divide the number of chains, or the schedule has a moving window.
    """
    if schedule is not None and not isinstance(schedule, Stretches):
        raise ValueError(f"schedule: got {schedule!r} with a mesh, wanted Stretches(size) or None")
    time_axis(mesh)
    if "chains" not in mesh.shape or num_chains % mesh.shape["chains"]:
        raise ValueError(f"num_chains: got {num_chains} on a mesh of {dict(mesh.shape)}, wanted a multiple of its axis "
                         "'chains'")


def cuts(num_samples: int, whole: Cut, solver: Solver, schedule: Stretches) -> list[tuple[Cut, Solver]]:
    """The stretches of a run and what solves each.

    Args:
        num_samples: T.
        whole: How a stretch lies on the mesh.
        solver: For all of them; segments of shooting are made to fit.
        schedule: Steps of a stretch, over all devices.
    """
    parts, found = whole.axis.length(1), []

    def fitting(steps):
        return dataclasses.replace(solver, num_segments=None, steps=steps) if isinstance(solver, Shooting) else solver

    def shared(steps, unit):
        """Stretches of `steps` per device, in segments of at most `unit`."""
        segments = -(-steps // unit)
        steps = steps // segments * segments
        return dataclasses.replace(whole, steps=steps), fitting(steps // segments)

    here = min(schedule.size, num_samples) // parts
    unit = solver.segment_steps(here * parts, parts) if isinstance(solver, Shooting) and here else max(here, 1)
    while here and num_samples - sum(cut.length for cut, _ in found) >= here * parts:
        found.append(shared(here if here < unit else here // unit * unit, unit))
    rest = num_samples - sum(cut.length for cut, _ in found)
    if here and rest > max(parts, _NOT_WORTH_IT):
        found.append(shared(rest // parts, unit))
        rest -= found[-1][0].length
    if rest:
        alone = Cut(whole.mesh, LocalTime(), rest, CHAINS)
        found.append((alone, fitting(min(unit, rest))))
    return found


def _solved(run, family, cut, solver, tolerance, max_iterations, books, numbers, carries, tape, done):
    """The paths of one stretch, how many of their steps are finite, and the evaluations of each device."""
    rolled = books.hopeless
    if rolled:
        solver, max_iterations = sequential(), None
    found = run(Solve(family, cut, max_iterations), solver, tolerance, numbers, carries, tape)
    kept, seen = [found.states, None], fetch(dataclasses.replace(found, states=()))

    def finish(_, num_exact):
        kept[:] = run(Finish(family, cut), numbers, carries, tape, found.states, _place(cut.mesh, CHAINS, num_exact))
        return (), fetch(kept[1])

    books.enter(seen, done, done + cut.length, rolled, finish)
    nonfinite = seen.status == Status.NONFINITE
    finite = np.where(nonfinite, seen.num_exact, cut.length) if kept[1] is None else fetch(kept[1])
    return kept[0], finite, seen.stats.evaluations_by_part * cut.length


def _without_lost(piece, finite):
    """What is not finite is not a draw: NaN from there on."""
    *others, places = piece
    keep = np.arange(piece[0]["residual"].shape[1]) < finite[:, None]

    def masked(leaf):
        return np.where(keep.reshape(*keep.shape, *(1,) * (leaf.ndim - 2)), leaf, np.nan).astype(leaf.dtype)

    return (*others, jax.tree.map(masked, places))


def joined(pieces: list) -> Any:
    """Stretches one after another, leaves `(C, ...)` joined along the second axis."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *pieces)


def combined(steps: dict, parts: dict, num_samples: int) -> Certificate:
    """One certificate per chain from those of its parts.

    Args:
        steps: `accepted` and `residual` of every step, `(C, T)`.
        parts: The other fields, of all parts in the order of time, `(C, Q)`, and `runs`, `(C, Q, 2)`: the lengths of
            the runs without movement with which each part begins and ends.
        num_samples: T.
    """
    residual = steps["residual"]
    missing = np.isnan(residual)
    total = lambda name: np.where((parts[name] < 0).all(axis=1), -1, np.maximum(parts[name], 0).sum(axis=1))  # noqa: E731
    smallest = {}
    for name in ("min_margin", "min_lattice_margin"):
        known = np.where(np.isnan(parts[name]), np.inf, parts[name]).min(axis=1)
        smallest[name] = np.where(np.isnan(parts[name]).all(axis=1), np.nan, known).astype(residual.dtype)
    longest = _longest_rejection(parts)
    return Certificate(
        certified=parts["certified"].all(axis=1), max_residual=np.where(missing.any(axis=1), np.nan, np.where(
            missing, 0, residual).max(axis=1)).astype(residual.dtype),
        worst_step=np.where(missing, np.inf, residual).argmax(axis=1), tolerance=parts["tolerance"][:, 0],
        num_steps=np.full(residual.shape[0], num_samples), finite=parts["finite"].all(axis=1),
        frozen=(longest == num_samples) & (num_samples >= FEWEST_TO_FREEZE), num_rejected=total("num_rejected"),
        longest_rejection=longest, num_nonfinite_proposals=parts["num_nonfinite_proposals"].sum(axis=1),
        num_ambiguous=total("num_ambiguous"),
        **smallest, discrete_consistent=parts["discrete_consistent"].all(axis=1),
        independent=parts["independent"].all(axis=1), **steps)


def _longest_rejection(parts: dict) -> np.ndarray:
    """The longest run without movement, through the borders of parts."""
    longest, running = np.zeros(parts["runs"].shape[0], int), np.zeros(parts["runs"].shape[0], int)
    for part in range(parts["runs"].shape[1]):
        lead, trail = parts["runs"][:, part, 0], parts["runs"][:, part, 1]
        longest = np.maximum.reduce([longest, running + lead, parts["longest_rejection"][:, part]])
        running = np.where(lead == parts["num_steps"][:, part], running + lead, trail)
    return longest


def agreed(tree: PyTree) -> PyTree:
    """What the first host holds, on all of them: hosts of other makes may have tuned other last digits."""
    if jax.process_count() == 1:
        return tree
    # Structures first: a host with other shapes would wait for ever.
    shapes = np.frombuffer(repr([(np.shape(leaf), str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]).encode(), np.uint8)
    # Below 2^31, or the broadcast would wrap it in 32 bits.
    summary = np.array([shapes.size, zlib.crc32(shapes.tobytes()) & 0x7FFFFFFF], np.int32)
    if (multihost_utils.broadcast_one_to_all(summary) != summary).any():
        raise ValueError("hosts disagree about the kernel's numbers: run the same script, with the same data and key, on "
                         "all of them")
    return multihost_utils.broadcast_one_to_all(tree)


def _place(mesh: Mesh, spec: PartitionSpec, tree: PyTree) -> PyTree:
    """Arrays that every host holds in full, each device its own part."""
    def one(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), lambda index: leaf[index])

    return jax.tree.map(one, tree)


def fetch(tree: PyTree) -> PyTree:
    """Arrays of all devices on this host, as NumPy arrays."""
    def one(leaf):
        return np.asarray(leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)
