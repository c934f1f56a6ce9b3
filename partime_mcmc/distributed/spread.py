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
from typing import Any, Callable, Iterator, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from partime_mcmc.distributed.sharded_solve import time_axis
from partime_mcmc.kernels import Certificate, Kernel
from partime_mcmc.kernels.drawn import Drawn
from partime_mcmc.distributed.across import CHAINS, SAME, Cut, Finish, Judge, Solve, Throw
from partime_mcmc.sampling.run_recorder import RunRecorder
from partime_mcmc.sampling.draws import Draws, End, RunReport
from partime_mcmc.distributed.collectives import Collect, agreed, fetch, place
from partime_mcmc.kernels.kernel_program import program_and_params
from partime_mcmc.sampling.finish import constrained_values, run_report
from partime_mcmc.sampling.merge import combined
from partime_mcmc.compile_cache import Timings, run_program
from partime_mcmc.sampling.randomness import splits_by_counting
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.warmup import Warmup
from partime_mcmc.recipes import sequential
from partime_mcmc.scan.time_axis import LocalTime
from partime_mcmc.schedule import Schedule, Stretches
from partime_mcmc.solution import Status, Tolerance
from partime_mcmc.solvers import Shooting, Solver
from partime_mcmc.types import Key, PyTree

# Steps that every device may compute for itself rather than have another program compiled.
_NOT_WORTH_IT = 256


class Piece(NamedTuple):
    """One stretch.

    Attributes:
        length: Its steps.
        draws: What this host keeps of them, see `Collect`.
        work: Evaluations by chain and device, `(C, P)`.
        carries: Where the chains stand after it, leaves `(C, ...)`.
        counters: Their discrete leaves there.
    """

    length: int
    draws: Any
    work: np.ndarray
    carries: PyTree
    counters: PyTree


@dataclasses.dataclass(frozen=True)
class Spread:
    """What is run over a mesh, and how.

    Attributes:
        kernel: The kernel.
        keys: One per chain, shape `(C,)`.
        mesh: With the axes `chains` and `time`.
        solver: A recipe.
        schedule: Steps of a stretch, over all devices.
        tolerance: How small residuals must be.
        max_iterations: Passes per stretch.
        collect: What this host keeps of the draws.
    """

    kernel: Kernel
    keys: Key
    mesh: Mesh
    solver: Solver
    schedule: Schedule
    tolerance: Tolerance
    max_iterations: int | None
    collect: Collect

    def pieces(self, num_samples: int, end: End, books: RunRecorder, clock: Timings) -> Iterator[Piece]:
        """The stretches of a run, certified, one after another.

        Args:
            num_samples: T, at least 1.
            end: Where chains go on from, to the last bit, on whatever devices they got there.
            books: What happens is written there.
            clock: Seconds are booked there.

        Raises:
            ValueError: If hosts disagree about what to run, or counters of the kernel follow from stepping only.
        """
        kernel, mesh, keys = self.kernel, self.mesh, self.keys
        if end.discrete and not (isinstance(kernel.algorithm, Drawn) and kernel.algorithm.count):
            raise ValueError(
                f"kernel: {kernel.name} has counters that follow from stepping only, so no device can begin in "
                "the middle; wanted one whose dice tell them, or no mesh"
            )
        family, numbers = program_and_params(kernel)
        kind, known = (
            str(jax.random.key_impl(keys)),
            None if splits_by_counting(keys) else books.total,
        )
        given = numbers, np.asarray(jax.random.key_data(keys)), end.carries, end.discrete
        numbers, words, carries, counters = agreed(given)
        numbers, (words, carries, counters) = (
            place(mesh, SAME, numbers),
            place(mesh, CHAINS, (words, carries, counters)),
        )
        whole = Cut(mesh, time_axis(mesh), 1, PartitionSpec("chains", "time"))
        run, done = functools.partial(run_program, clock=clock), 0
        for cut, recipe in cuts(num_samples, whole, self.solver, self.schedule):
            first = place(mesh, SAME, np.uint32(end.num_steps + done))
            tape, counters = run(
                Throw(family, cut, kind, known), numbers, words, carries, counters, first
            )
            states, finite, work = _solved(
                run,
                family,
                cut,
                recipe,
                self.tolerance,
                self.max_iterations,
                books,
                numbers,
                carries,
                tape,
                done,
            )
            judge = functools.partial(run, Judge(family, cut), numbers, carries, what="certify")
            *judged, still, places, after, same = judge(states, tape)
            if not fetch(same).all():
                *judged, _, _, _, _ = judge(still, tape)
            kept = self.collect(
                (*judged, places), finite, mesh, cut.along, functools.partial(run, what="certify")
            )
            carries, done = after, done + cut.length
            yield Piece(cut.length, kept, work, carries, counters)


def draw_across(
    spread: Spread,
    target: Target,
    num_samples: int,
    *,
    end: End,
    total: int,
    warmup: Warmup | None,
    plan: dict[str, Any],
    advance: Callable[..., None],
) -> Draws:
    """Chains of a tuned kernel over a mesh, certified, on a host that keeps them.

    Args:
        spread: What is run, and how.
        target: For the model's own space.
        num_samples: T, at least 1.
        end: Where chains go on from.
        total: The step at which the whole run ends.
        warmup: The warm-up before them, if any.
        plan: What gives these draws again.
        advance: Told of the steps done, and what to show, after each stretch.

    Returns:
        The draws, as NumPy arrays. After an interrupt from the keyboard of a run on one host the stretches that were done
        by then, with the verdict INTERRUPTED; several hosts would wait for each other, so there it ends the run.

    Raises:
        ValueError: As `Spread.pieces`.
    """
    run = Run.of(spread, num_samples, end, total, advance)
    steps, parts, said, places = joined([piece.draws for piece in run.pieces])
    certificate = combined(steps, parts, run.done)
    report = run.report(certificate, jax.tree.leaves(places)[0].dtype)
    return Draws(
        places,
        constrained_values(target, places, run.clock),
        {**said, "residual": steps["residual"]},
        certificate,
        report,
        {**plan, "num_samples": run.done, "mesh": dict(spread.mesh.shape)},
        warmup,
        dict(target.dims) if target.dims else None,
        tuple(target.names) if target.names else None,
        None,
        run.end(),
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """Stretches that were made, and their books.

    Attributes:
        spread: What was run.
        begin: Where chains went on from.
        pieces: The stretches, at least one.
        books: What happened.
        clock: Seconds.
    """

    spread: Spread
    begin: End
    pieces: list[Piece]
    books: RunRecorder
    clock: Timings

    @classmethod
    def of(
        cls, spread: Spread, num_samples: int, end: End, total: int, advance: Callable[..., None]
    ) -> Run:
        """Make them; arguments as for `draw_across`."""
        clock, pieces = Timings(), []
        books = RunRecorder(spread.keys.shape[0], end.num_steps, total, end.failed_running)
        try:
            for piece in spread.pieces(num_samples, end, books, clock):
                pieces.append(piece)
                advance(piece.length, **books.shown())
        except KeyboardInterrupt:
            if not pieces or jax.process_count() > 1:
                raise
            books.interrupt(sum(piece.length for piece in pieces))
        return cls(spread, end, pieces, books, clock)

    @property
    def done(self) -> int:
        """Steps that were made."""
        return sum(piece.length for piece in self.pieces)

    def end(self) -> End:
        """Where the chains stand after them; all hosts ask together."""
        return _end_of(self.pieces[-1], self.begin, self.done, self.books)

    def report(self, certificate: Certificate, dtype: Any) -> RunReport:
        """How it went."""
        mesh = self.spread.mesh
        shared = [
            piece.work.mean(axis=0)
            for piece in self.pieces
            if piece.work.shape[1] == mesh.shape["time"]
        ]
        device = mesh.devices.flat[0]
        return run_report(
            self.books,
            certificate,
            self.clock,
            dtype,
            f"{mesh.size} x {device.platform}: {device.device_kind}",
            tuple(np.sum(shared, axis=0) / self.done) if shared else (),
        )


def follow_across(spread: Spread, num_samples: int, *, end: End, total: int) -> End:
    """The part of `draw_across` that a host has which keeps no draws; arguments as there."""
    books, done = RunRecorder(spread.keys.shape[0], end.num_steps, total, end.failed_running), 0
    for piece in spread.pieces(num_samples, end, books, Timings()):
        done += piece.length
    return _end_of(piece, end, done, books)


def _end_of(piece: Piece, begin: End, done: int, books: RunRecorder) -> End:
    return End(
        fetch(piece.carries), fetch(piece.counters), begin.num_steps + done, books.failed_running
    )


def cuts(
    num_samples: int, whole: Cut, solver: Solver, schedule: Schedule
) -> list[tuple[Cut, Solver]]:
    """The stretches of a run and what solves each.

    Args:
        num_samples: T.
        whole: How a stretch lies on the mesh.
        solver: For all of them; segments of shooting are made to fit.
        schedule: Steps of a stretch, over all devices; a run begun on one device may have another schedule, which is then
            one stretch.
    """
    size = schedule.size if isinstance(schedule, Stretches) else num_samples
    parts, found = whole.axis.length(1), []

    def fitting(steps):
        return (
            dataclasses.replace(solver, num_segments=None, steps=steps)
            if isinstance(solver, Shooting)
            else solver
        )

    def shared(steps, unit):
        """Stretches of `steps` per device, in segments of at most `unit`."""
        segments = -(-steps // unit)
        steps = steps // segments * segments
        return dataclasses.replace(whole, steps=steps), fitting(steps // segments)

    here = min(size, num_samples) // parts
    unit = (
        solver.segment_steps(here * parts, parts)
        if isinstance(solver, Shooting) and here
        else max(here, 1)
    )
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


def _solved(
    run, family, cut, solver, tolerance, max_iterations, books, numbers, carries, tape, done
):
    """The paths of one stretch, how many of their steps are finite, and the evaluations of each device."""
    rolled = books.hopeless
    if rolled:
        solver, max_iterations = sequential(), None
    found = run(Solve(family, cut, max_iterations), solver, tolerance, numbers, carries, tape)
    kept, seen = [found.states, None], fetch(dataclasses.replace(found, states=()))

    def finish(_, num_exact):
        kept[:] = run(
            Finish(family, cut),
            numbers,
            carries,
            tape,
            found.states,
            place(cut.mesh, CHAINS, num_exact),
        )
        return (), fetch(kept[1])

    books.enter(seen, done, done + cut.length, rolled, finish)
    nonfinite = seen.status == Status.NONFINITE
    finite = np.where(nonfinite, seen.num_exact, cut.length) if kept[1] is None else fetch(kept[1])
    return kept[0], finite, seen.stats.evaluations_by_part * cut.length


def joined(pieces: list) -> Any:
    """Stretches one after another, leaves `(C, ...)` joined along the second axis."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *pieces)
