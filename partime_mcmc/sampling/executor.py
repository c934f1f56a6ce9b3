"""A run as a stream of certified pieces: time advances chunk by chunk, and nothing but its end is carried to the next.

    end_k  --throw, solve, certify-->  draws_k, end_{k+1}

A chunk is solved, certified and handed on before the next one begins, so that memory does not grow with the run. What
passes on is an `End`: carries and counters to the last bit, the number of steps, and the few things in the books that
decide later behaviour. Steps have dice of their own (`tapes`), so a run that is taken up again from an `End` is the run
that never stopped.

A device that runs out of memory gets half as many steps at once, three times at most; the report says so.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from partime_mcmc.kernels import Evidence, Kernel, Recorded
from partime_mcmc.sampling.choose_coupling import dice_of
from partime_mcmc.sampling.draws import Draws, End
from partime_mcmc.distributed.collectives import Collect, everywhere
from partime_mcmc.sampling.finish import finish
from partime_mcmc.compile_cache import Timings
from partime_mcmc.sampling.local import Choice, run_chains
from partime_mcmc.distributed.spread import Spread, draw_across
from partime_mcmc.storage.state import as_committed_array
from partime_mcmc.sampling.randomness import begin, throw
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.warmup import Warmup
from partime_mcmc.schedule import Schedule
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers import Solver
from partime_mcmc.types import Key, PyTree

MOST_HALVINGS = 3


@dataclasses.dataclass(frozen=True)
class Course:
    """What is to be run.

    Attributes:
        target: For the model's own space.
        kernel: The tuned kernel.
        keys: One per chain, shape `(C,)`.
        num_samples: T, of the whole run.
        tolerance: How small residuals must be.
        max_iterations: Passes per stretch; None is the stated default.
        choose: What picks solver and schedule.
        warmup: The warm-up before, if any.
        plan: More plain values for `Draws.plan`.
        mesh: Devices to spread it over; None is the default device alone. Chains on a mesh are certified independently.
        evidence: What certificates rest on.
        groups: Into how many groups chains are cut on the cores of one device; None is as many as suit it.
        collect: On a mesh, what this host keeps of the draws.
        across: And what puts it together, as `draw_across` does.
    """

    target: Target
    kernel: Kernel
    keys: Key
    num_samples: int
    tolerance: Tolerance
    max_iterations: int | None
    choose: Choice
    warmup: Warmup | None = None
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    evidence: Evidence = Recorded()
    groups: int | None = None
    collect: Collect = everywhere
    across: Callable[..., Any] = draw_across

    def spread(self, solver: Solver, schedule: Schedule) -> Spread:
        """What is run over the mesh."""
        return Spread(
            self.kernel,
            self.keys,
            self.mesh,
            solver,
            schedule,
            self.tolerance,
            self.max_iterations,
            self.collect,
        )


def stream(
    course: Course,
    positions: PyTree,
    chunk: int,
    tell: Tell,
    end: End | None = None,
    last: int | None = None,
) -> Iterator[Draws]:
    """The draws of a run, chunk by chunk; at least one chunk, which may be empty.

    Args:
        course: What is to be run.
        positions: One start per chain, leaves `(C, ...)`; not looked at where `end` is given.
        chunk: Most steps of a chunk.
        tell: Told of steps done and of certified draws.
        end: Where the chains stand; None is at `positions`.
        last: The step to stop at; None is `course.num_samples` steps from `end`.

    Yields:
        Certified draws, or what `course.across` makes of them, whose `.end` is where the next ones go on. After an interrupt
        from the keyboard the last ones are shorter, with the verdict INTERRUPTED.
    """
    last = (0 if end is None else end.num_steps) + course.num_samples if last is None else last
    while True:
        draws, chosen = _chunk(course, positions, end, chunk, last, tell)
        end = draws.end
        tell.certified(draws)
        yield draws
        # Advice is asked for once, and restored chains and those that went on run the same programs.
        carries, discrete = jax.tree.map(as_committed_array, (end.carries, end.discrete))
        end = dataclasses.replace(end, carries=carries, discrete=discrete)
        course = dataclasses.replace(course, choose=lambda *_, chosen=chosen: chosen)
        if end.num_steps >= last or draws.report.interrupted:
            return


def _chunk(
    course: Course, positions: PyTree, end: End | None, chunk: int, last: int, tell: Tell
) -> tuple[Draws, tuple]:
    """The next chunk, in as many steps at once as the device can hold, and what was chosen for it."""
    first, stretch, notes = (
        0 if end is None else end.num_steps,
        None if end is None else end.stretch,
        (),
    )
    while True:
        steps = min(chunk, last - first, stretch or chunk)
        try:
            return _attempt(course, positions, end, steps, stretch, last, tell, notes)
        except jax.errors.JaxRuntimeError as error:
            # Of several hosts none may change its mind alone.
            alone = course.mesh is None or jax.process_count() == 1
            if not (alone and out_of_memory(error)) or len(notes) == MOST_HALVINGS or steps < 2:
                raise
        # Outside the handler, so that what the failed attempt held is let go.
        tell.undo()
        stretch = steps // 2
        notes = (
            *notes,
            f"steps {first} to {first + steps}: the device ran out of memory; from there on at most {stretch} "
            "steps at once",
        )


def _attempt(course, positions, end, steps, stretch, last, tell, notes):
    if course.mesh is not None:
        return _across(course, positions, end, steps, stretch, last, tell, notes)
    chains = run_chains(
        course.kernel,
        positions,
        course.keys,
        steps,
        choose=course.choose,
        tolerance=course.tolerance,
        max_iterations=course.max_iterations,
        advance=tell,
        evidence=course.evidence,
        end=end,
        total=last,
        stretch=stretch,
        groups=course.groups,
        clock=Timings(),
    )
    plan = {
        "kernel": course.kernel.name,
        "dice": dice_of(course.kernel),
        "solver": repr(chains.solver),
        "schedule": repr(chains.schedule),
        "num_samples": jax.tree.leaves(chains.carries)[0].shape[1],
        "num_chains": course.keys.shape[0],
        **course.plan,
    }
    try:
        draws = finish(course.target, course.kernel, chains, course.warmup, plan)
    except KeyboardInterrupt:
        # Certifying takes a fraction of what would be lost where nothing comes after these steps.
        if chains.books.first + chains.books.num_steps < last and not chains.books.interrupted:
            raise
        draws = finish(course.target, course.kernel, chains, course.warmup, plan)
    report = dataclasses.replace(draws.report, fallbacks=(*notes, *draws.report.fallbacks))
    draws = dataclasses.replace(
        draws, end=dataclasses.replace(draws.end, stretch=stretch), report=report
    )
    return draws, (chains.solver, chains.schedule, chains.advice)


def _across(course, positions, end, steps, stretch, last, tell, notes):
    end = begin(course.kernel, positions, course.keys, Timings()) if end is None else end
    dynamics, initial, tape, _ = throw(course.kernel, None, course.keys, 1, end)
    chosen = course.choose(lambda: dynamics, initial, tape, 1)
    solver, schedule, _ = chosen
    plan = {
        "kernel": course.kernel.name,
        "dice": dice_of(course.kernel),
        "solver": repr(solver),
        "schedule": repr(schedule),
        "num_chains": course.keys.shape[0],
        **course.plan,
    }
    draws = course.across(
        course.spread(solver, schedule),
        course.target,
        steps,
        end=end,
        total=last,
        warmup=course.warmup,
        plan=plan,
        advance=tell,
    )
    report = dataclasses.replace(draws.report, fallbacks=(*notes, *draws.report.fallbacks))
    return dataclasses.replace(
        draws, end=dataclasses.replace(draws.end, stretch=stretch), report=report
    ), chosen


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of the compiler's runtime means that the device's memory is full."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


class Tell:
    """What a run says while it works: one line, of all chunks, from the host, between compiled calls.

    Shown are draws per second, evaluations per draw, the worst residual, sequential fallbacks if any, and from the
    chunks that are certified acceptance and divergences. Segments that are open are not among them: a solve does not
    speak before it ends.

    Args:
        advance: Of a stage of `Progress`, told of steps.
        num_chains: C.
    """

    def __init__(self, advance: Callable[..., None], num_chains: int):
        self._advance, self._num_chains = advance, num_chains
        self._begin, self._steps, self._chunk = None, 0, 0
        self._shown: dict[str, Any] = {"draws/s": "?"}
        self._accepted, self._diverging, self._draws = 0.0, 0, 0

    def __call__(self, steps: int, **shown: Any) -> None:
        now = time.perf_counter()
        if self._begin is not None:
            self._steps += steps
            rate = self._steps * self._num_chains / max(now - self._begin, 1e-9)
            self._shown["draws/s"] = f"{rate:,.0f}"
        else:
            # The first stretch was compiled as well: speed is that of the others.
            self._begin = now
        self._chunk += steps
        self._shown |= shown
        self._advance(steps, **self._shown)

    def certified(self, draws: Draws) -> None:
        """Take in what a certified chunk says of its steps."""
        self._chunk = 0
        accepted = draws.info.get(
            "acceptance_rate", draws.info.get("accepted", draws.certificate.accepted)
        )
        accepted = np.asarray(accepted, float)
        self._accepted, self._draws = self._accepted + accepted.sum(), self._draws + accepted.size
        self._shown["accept"] = f"{self._accepted / max(self._draws, 1):.2f}"
        if "diverging" in draws.info:
            self._diverging += int(np.asarray(draws.info["diverging"]).sum())
            self._shown["diverging"] = self._diverging
        self._advance(0, **self._shown)

    def skip(self, steps: int) -> None:
        """Show steps that a run before this one has done."""
        self._advance(steps)

    def undo(self) -> None:
        """Take back the steps of a chunk that has to be done again."""
        self._advance(-self._chunk, **self._shown)
        self._steps, self._chunk = max(self._steps - self._chunk, 0), 0
