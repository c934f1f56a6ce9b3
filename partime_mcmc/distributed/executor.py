"""Chunks over a mesh of devices, of one or several hosts: window after window, each spread over all of them.

Every host runs this same loop and reaches the same decisions, because all it looks at has been exchanged. A window gives
each of P devices n steps; what is left of a chunk at the end goes in shorter shards, and fewer than P steps (or a rest not
worth another program) are computed by every device for itself. A chain that its solver cannot finish is rolled by one device
after another; when all chains have needed that in two windows in a row, the rest of the run is rolled at once.

Left out: advice (take it from a run on one device), kernels whose counters follow from stepping only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Iterator, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from partime_mcmc.compile_cache import Timings, run_program
from partime_mcmc.distributed.collectives import (
    Gather,
    allgather_to_hosts,
    broadcast_from_host0,
    place,
)
from partime_mcmc.distributed.shard_programs import (
    CHAINS,
    SAME,
    Certify,
    DrawTapes,
    FinishChains,
    Layout,
    SolveWindow,
)
from partime_mcmc.distributed.sharded_solve import time_axis
from partime_mcmc.engine.recipes import sequential
from partime_mcmc.engine.solution import Status
from partime_mcmc.engine.time_axis import LocalTime
from partime_mcmc.engine.windows import Schedule, Windows
from partime_mcmc.kernels.explicit_randomness import ExplicitRandomnessKernel
from partime_mcmc.kernels.kernel_program import program_and_params
from partime_mcmc.sampling.chunk import ChainState, Chunk
from partime_mcmc.sampling.executor import MAX_HALVINGS, ProgressReporter, iterate_chunks
from partime_mcmc.sampling.merge import merge_shard_certificates
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.sampling.randomness import splits_by_counting
from partime_mcmc.sampling.run_recorder import RunRecorder, without_nonfinite
from partime_mcmc.solvers import Shooting, Solver
from partime_mcmc.types import PyTree

# Steps that every device may compute for itself rather than have another program compiled.
_NOT_WORTH_SHARING = 256


class Window(NamedTuple):
    """One solved window.

    Attributes:
        length: Its steps.
        gathered: Of what this host got: values of steps, of shards, info, and positions; None where it got none.
        work: Evaluations by chain and device, `(C, P)`.
        carries: Where the chains stand after it, leaves `(C, ...)`.
        discrete: Their discrete leaves there.
    """

    length: int
    gathered: tuple | None
    work: np.ndarray
    carries: PyTree
    discrete: PyTree


@dataclasses.dataclass(frozen=True)
class MeshExecutor:
    """Makes the chunks of a plan over a mesh.

    Attributes:
        plan: The plan; its chains are certified independently.
        progress: Shown meanwhile.
        mesh: With the axes `chains` and `time`.
        gather: Which hosts get the draws.
    """

    plan: Plan
    progress: Progress
    mesh: Mesh
    gather: Gather

    def chunks(self, state: ChainState) -> Iterator[Chunk]:
        """As `Executor.chunks`.

        Raises:
            ValueError: If hosts disagree about what to run, or counters of the kernel follow from stepping only.
        """
        kernel = self.plan.kernel
        counts = isinstance(kernel.algorithm, ExplicitRandomnessKernel) and kernel.algorithm.count
        if state.discrete and not counts:
            raise ValueError(
                f"kernel: {kernel.name} has counters that follow from stepping only, so no device can begin in the "
                "middle; wanted one whose random numbers tell them, or no mesh"
            )
        # Of several hosts none may change its mind alone.
        halvings = MAX_HALVINGS if jax.process_count() == 1 else 0
        return iterate_chunks(self.plan, state, self._chunk, self.progress, halvings)

    def _chunk(self, state: ChainState, num_steps: int, reporter: ProgressReporter) -> Chunk:
        recorder, timings, windows = RunRecorder(self.plan, state), Timings(), []
        try:
            for window in self._windows(state, num_steps, recorder, timings):
                windows.append(window)
                reporter(window.length, **recorder.progress())
        except KeyboardInterrupt:
            # Several hosts would wait for each other.
            if not windows or jax.process_count() > 1:
                raise
            recorder.interrupt(sum(window.length for window in windows))
        done, last = sum(window.length for window in windows), windows[-1]
        after = ChainState(
            allgather_to_hosts(last.carries),
            allgather_to_hosts(last.discrete),
            state.num_steps + done,
            recorder.num_failed_windows,
        )
        report = functools.partial(
            recorder.report,
            timings=timings,
            dtype=jax.tree.leaves(last.carries)[0].dtype,
            where=self._devices(),
            by_part=self._evaluations_by_device(windows, done),
        )
        if last.gathered is None:
            # A host that keeps nothing looks at no certificate.
            return Chunk(None, {}, {}, None, report(None), after)  # pyright: ignore[reportArgumentType]
        steps, shards, info, positions = jax.tree.map(
            lambda *leaves: np.concatenate(leaves, axis=1), *[one.gathered for one in windows]
        )
        certificate = merge_shard_certificates(steps, shards, done)
        constrained = self.plan.target.constrained_values(positions, timings)
        info = {**info, "residual": steps["residual"]}
        return Chunk(positions, constrained, info, certificate, report(certificate), after)

    def _windows(
        self, state: ChainState, num_steps: int, recorder: RunRecorder, timings: Timings
    ) -> Iterator[Window]:
        """The windows of a chunk, certified, one after another."""
        plan, mesh = self.plan, self.mesh
        program, params = program_and_params(plan.kernel)
        kind = str(jax.random.key_impl(plan.keys))
        known = None if splits_by_counting(plan.keys) else plan.last_step
        words = np.asarray(jax.random.key_data(plan.keys))
        params, *chains = broadcast_from_host0((params, words, state.carries, state.discrete))
        params, (words, carries, discrete) = place(mesh, SAME, params), place(mesh, CHAINS, chains)
        whole = Layout(mesh, time_axis(mesh), 1, PartitionSpec("chains", "time"))
        run, done = functools.partial(run_program, timings=timings), 0
        for layout, solver in layouts(num_steps, whole, plan.solver, plan.schedule):
            first = place(mesh, SAME, np.uint32(state.num_steps + done))
            draw = DrawTapes(program, layout, kind, known)
            tape, discrete = run(draw, params, words, carries, discrete, first)
            states, num_finite, work = self._solved(
                run, program, layout, solver, recorder, params, carries, tape, done
            )
            certify = functools.partial(
                run, Certify(program, layout), params, carries, what="certify"
            )
            *certified, still, positions, after, same = certify(states, tape)
            if not allgather_to_hosts(same).all():
                *certified, _, _, _, _ = certify(still, tape)
            collect = functools.partial(run, what="certify")
            gathered = self.gather((*certified, positions), mesh, layout.along, collect)
            if gathered is not None:
                *others, positions = gathered
                gathered = (*others, without_nonfinite(positions, num_finite))
            carries, done = after, done + layout.length
            yield Window(layout.length, gathered, work, carries, discrete)

    def _solved(
        self,
        run: Callable[..., PyTree],
        program: Any,
        layout: Layout,
        solver: Solver,
        recorder: RunRecorder,
        params: PyTree,
        carries: PyTree,
        tape: PyTree,
        done: int,
    ) -> tuple[PyTree, np.ndarray, np.ndarray]:
        """The paths of one window, how many of their steps are finite, and the evaluations of each device."""
        rolled, max_iterations = recorder.gives_up, self.plan.max_iterations
        if rolled:
            solver, max_iterations = sequential(), None
        window = SolveWindow(program, layout, max_iterations)
        found = run(window, solver, self.plan.tolerance, params, carries, tape)
        finished = [found.states, None]
        seen = allgather_to_hosts(dataclasses.replace(found, states=()))

        def finish(_, num_exact):
            num_exact = place(layout.mesh, CHAINS, num_exact)
            finish_chains = FinishChains(program, layout)
            finished[:] = run(finish_chains, params, carries, tape, found.states, num_exact)
            return (), allgather_to_hosts(finished[1])

        recorder.record(seen, done, done + layout.length, rolled, finish)
        states, num_finite = finished
        if num_finite is None:
            lost = seen.status == Status.NONFINITE
            num_finite = np.where(lost, seen.num_exact, layout.length)
        return (
            states,
            allgather_to_hosts(num_finite),
            seen.stats.evaluations_by_part * layout.length,
        )

    def _devices(self) -> str:
        """The devices, in words."""
        first = self.mesh.devices.flat[0]
        return f"{self.mesh.size} x {first.platform}: {first.device_kind}"

    def _evaluations_by_device(self, windows: list[Window], done: int) -> tuple[float, ...]:
        """Evaluations per draw of each device along time."""
        shared = [
            window.work.mean(axis=0)
            for window in windows
            if window.work.shape[1] == self.mesh.shape["time"]
        ]
        return tuple(np.sum(shared, axis=0) / done) if shared else ()


def layouts(
    num_samples: int, whole: Layout, solver: Solver, schedule: Schedule
) -> list[tuple[Layout, Solver]]:
    """The windows of a chunk and what solves each.

    Args:
        num_samples: T.
        whole: How a window lies on the mesh.
        solver: For all of them; segments of shooting are made to fit.
        schedule: Steps of a window, over all devices; a run begun on one device may have another schedule, which is then
            one window.
    """
    size = schedule.size if isinstance(schedule, Windows) else num_samples
    num_devices, found = whole.axis.length(1), []

    def fitting(steps):
        if not isinstance(solver, Shooting):
            return solver
        return dataclasses.replace(solver, num_segments=None, steps=steps)

    def shared(steps, unit):
        """Windows of `steps` per device, in segments of at most `unit`."""
        segments = -(-steps // unit)
        steps = steps // segments * segments
        return dataclasses.replace(whole, steps=steps), fitting(steps // segments)

    here = min(size, num_samples) // num_devices
    unit = max(here, 1)
    if here and isinstance(solver, Shooting):
        unit = solver.segment_steps(here * num_devices, num_devices)
    while here and num_samples - _length(found) >= here * num_devices:
        found.append(shared(here if here < unit else here // unit * unit, unit))
    rest = num_samples - _length(found)
    if here and rest > max(num_devices, _NOT_WORTH_SHARING):
        found.append(shared(rest // num_devices, unit))
        rest -= found[-1][0].length
    if rest:
        alone = Layout(whole.mesh, LocalTime(), rest, CHAINS)
        found.append((alone, fitting(min(unit, rest))))
    return found


def _length(found: list[tuple[Layout, Solver]]) -> int:
    return sum(layout.length for layout, _ in found)
