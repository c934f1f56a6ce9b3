"""Chunks over a mesh of devices, of one or several hosts: window after window, each spread over all of them.

Under `jax.shard_map` each device draws the random numbers of its own steps, rolls its own segments, certifies its own shard
from the state that its neighbour ends with, and puts its own draws into the user's space.

    _draw_tapes     the random numbers of steps [first, first + n P), every device its own n
    _solve_window   one window of all chains
    _finish_chains  chains that did not converge, rolled by one device after another from where they stop being exact
    _certify        certificate of every shard, records, positions; rejected steps stand still to the last bit

Step t of a chain has the key that it has on one device, so the draws are the same to rounding, and the same bits where steps
do not round by batch width (coalescing MALA). Every host runs the same loop and reaches the same decisions, because all it
looks at has been exchanged. A window gives each of P devices n steps; what is left of a chunk at the end goes in shorter
shards, and fewer than P steps (or a rest not worth another program) are computed by every device for itself.
"""

import dataclasses
import functools
from typing import Any, Callable, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from partime_mcmc.certify.independent import certify_with_records
from partime_mcmc.certify.step_record import info_dict
from partime_mcmc.compile_cache import Timings, run_program
from partime_mcmc.distributed.collectives import (
    allgather_to_hosts,
    broadcast_from_host0,
    gather_to_host0,
    place,
)
from partime_mcmc.distributed.mesh import OnDevices, solution_specs
from partime_mcmc.distributed.sharded_solve import time_axis
from partime_mcmc.engine import (
    LocalTime,
    NoDerivatives,
    Schedule,
    TimeAxis,
    Windows,
    sequential,
)
from partime_mcmc.engine.solve import solve
from partime_mcmc.host_keys import splits_by_counting
from partime_mcmc.kernels import Carry
from partime_mcmc.kernels.explicit_randomness import ExplicitRandomnessKernel
from partime_mcmc.kernels.kernel_program import program_and_params
from partime_mcmc.sampling.chunk import ChainState, Chunk, merge_shard_certificates
from partime_mcmc.sampling.executor import (
    MAX_HALVINGS,
    ProgressReporter,
    RunRecorder,
    finite_steps,
    iterate_chunks,
    without_nonfinite,
)
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.sampling.randomness import step_keys
from partime_mcmc.scan.affine import Diagonal
from partime_mcmc.solvers import Shooting, Solver
from partime_mcmc.solvers.sequential import finish_sequentially
from partime_mcmc.types import Array, PyTree

CHAINS, SAME = PartitionSpec("chains"), PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a window lies on the mesh.

    Attributes:
        mesh: The devices.
        axis: The time axis.
        steps: Steps per device.
        along: Where paths `(C, T, ...)` lie.
    """

    mesh: Mesh
    axis: TimeAxis
    steps: int
    along: PartitionSpec

    @property
    def length(self) -> int:
        """Steps in all."""
        return self.axis.length(self.steps)


def _draw_tapes(program, axis, steps, kind, total, params, words, carries, counters, first):
    """The tape of a window, and the counters after it; `kind` is the keys', `total` as for `step_keys`."""
    kernel, places = program.kernel(params), axis.index(steps)

    def one(word, carry, counters):
        key = jax.random.wrap_key_data(word, impl=kind)
        keys = step_keys(key, first + places.astype(jnp.uint32), total)
        tape = kernel.tape_of(keys, kernel.state(carry, counters))
        if not counters:
            return tape, counters
        every = kernel.algorithm.count(counters, axis.length(steps) + 1)
        mine, after = (jax.tree.map(lambda leaf: leaf[at], every) for at in (places, -1))
        return dataclasses.replace(tape, discrete=mine), after

    return jax.vmap(one)(words, carries, counters)


def _solve_window(program, axis, max_iterations, solver, tolerance, params, carries, tape):
    """One window of every chain."""
    dynamics = program.kernel(params).dynamics()
    return jax.vmap(
        lambda first, drives: solve(
            dynamics,
            first,
            drives,
            solver=solver,
            tolerance=tolerance,
            max_iterations=max_iterations,
            adjoint=NoDerivatives(),
            axis=axis,
        )
    )(carries, tape)


def _finish_chains(program, axis, steps, params, carries, tape, states, num_exact):
    """Paths rolled by one device after another from where they stop being exact, and how many steps are then finite."""
    dynamics = program.kernel(params).dynamics()
    exact = jnp.clip(num_exact - axis.index(steps)[0], 0, steps)

    def roll(first):
        return _swapped(finish_sequentially(dynamics, first, states, tape, exact)[0])

    states = _swapped(axis.in_turn(roll, carries))
    return states, jax.vmap(axis.length_of_true)(finite_steps(states))


def _certify(program, axis, params, carries, states, tape):
    """Certificates of all shards `(C, P)`, and the path standing still where its kernel does.

    Returns:
        `accepted` and `residual` of every step; the other fields of the shards' certificates, with the lengths of the runs
        without movement with which each shard begins and ends; what the kernel reports of each step; the path; positions;
        the carries at the end; and whether standing still changed nothing.
    """
    certify = functools.partial(_certified_shard, program.kernel(params), axis)
    return jax.vmap(certify)(carries, states, tape)


def _certified_shard(kernel, axis: TimeAxis, carry: PyTree, states: PyTree, tape: PyTree):
    before = axis.previous(carry, states)
    first = jax.tree.map(lambda leaf: leaf[0], before)
    flatten = jax.vmap(lambda one: ravel_pytree(one)[0])
    flat = flatten(states)
    unit = kernel.noise_scale if kernel.noise_scale is not None else _spread(flat, axis)
    certificate, records = certify_with_records(kernel, first, states, tape, scale=unit)
    position = lambda one: one.position if isinstance(one, Carry) else one
    moved = (flatten(position(states)) != flatten(position(before))).any(
        axis=1
    ) & certificate.accepted
    # Where its kernel stands still the path takes the last state that moved, which may be on another device: a scan of maps
    # x -> x and x -> state, exact because every product is with 0 or 1.
    held = jnp.asarray(records.held)[:, None]
    flat_carry, unravel = ravel_pytree(carry)
    still = axis.prefix(Diagonal(held.astype(flat.dtype), jnp.where(held, 0, flat)), flat_carry)
    same = ((still == flat) | ~jnp.isfinite(flat)).all()
    still = jax.vmap(unravel)(still)
    runs = jnp.stack([_leading(~moved), _leading(~moved[::-1])])
    of_steps = {"accepted": certificate.accepted, "residual": certificate.residual}
    of_part = {
        field.name: getattr(certificate, field.name)
        for field in dataclasses.fields(certificate)
        if field.name not in of_steps
    }
    of_part = jax.tree.map(lambda leaf: leaf[None], {**of_part, "runs": runs})
    positions, end = jax.vmap(kernel.position)(still), axis.last(still)
    return of_steps, of_part, info_dict(records, flat.shape[:1]), still, positions, end, same[None]


def _swapped(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)


def _leading(flags: Array) -> Array:
    return jnp.sum(jnp.cumprod(flags.astype(jnp.int32)))


def _spread(flat: Array, axis: TimeAxis) -> Array:
    """Standard deviation of each coordinate over the whole window; 1 where it does not move."""
    count = axis.length(flat.shape[0])
    spread = jnp.sqrt(axis.total((flat - axis.total(flat) / count) ** 2) / count)
    return jnp.where(jnp.isfinite(spread) & (spread > 0), spread, 1)


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
        everywhere: Whether all hosts get the draws, or the first one alone.
    """

    plan: Plan
    progress: Progress
    mesh: Mesh
    everywhere: bool

    def chunks(self, state: ChainState) -> Iterator[Chunk]:
        """As `LocalExecutor.chunks`.

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
        carries, discrete = allgather_to_hosts((last.carries, last.discrete))
        after = ChainState(carries, discrete, state.num_steps + done, recorder.num_failed_windows)
        device = self.mesh.devices.flat[0]
        # Evaluations of each device along time, in windows that all of them share.
        num_devices = self.mesh.shape["time"]
        shared = [one.work.mean(axis=0) for one in windows if one.work.shape[1] == num_devices]
        report = functools.partial(
            recorder.report,
            timings=timings,
            dtype=jax.tree.leaves(last.carries)[0].dtype,
            where=f"{self.mesh.size} x {device.platform}: {device.device_kind}",
            by_part=tuple(np.sum(shared, axis=0) / done) if shared else (),
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
            axis, steps, along = layout.axis, layout.steps, layout.along
            given, fixed = (SAME, CHAINS, CHAINS, CHAINS, SAME), (program, axis, steps, kind, known)
            draw = OnDevices(_draw_tapes, mesh, given, (along, CHAINS), *fixed)
            tape, discrete = run(draw, params, words, carries, discrete, first)
            states, num_finite, work = self._solved(
                run, program, layout, solver, recorder, params, carries, tape, done
            )
            given, found = (SAME, CHAINS, along, along), (along,) * 5 + (CHAINS, along)
            certify = OnDevices(_certify, mesh, given, found, program, axis)
            certify = functools.partial(run, certify, params, carries, what="certify")
            *certified, still, positions, after, same = certify(states, tape)
            if not allgather_to_hosts(same).all():
                *certified, _, _, _, _ = certify(still, tape)
            gathered = (*certified, positions)
            if self.everywhere:
                gathered = allgather_to_hosts(gathered)
            else:
                collect = functools.partial(run, what="certify")
                gathered = gather_to_host0(gathered, mesh, along, collect)
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
        mesh, axis, along = layout.mesh, layout.axis, layout.along
        given, specs = (SAME, SAME, SAME, CHAINS, along), solution_specs(along, CHAINS)
        window = OnDevices(_solve_window, mesh, given, specs, program, axis, max_iterations)
        found = run(window, solver, self.plan.tolerance, params, carries, tape)
        seen = allgather_to_hosts(dataclasses.replace(found, states=()))

        def finish(num_exact):
            given, fixed = (SAME, CHAINS, along, along, CHAINS), (program, axis, layout.steps)
            rolling = OnDevices(_finish_chains, mesh, given, (along, CHAINS), *fixed)
            num_exact = place(mesh, CHAINS, num_exact)
            states, num_finite = run(rolling, params, carries, tape, found.states, num_exact)
            return dataclasses.replace(seen, states=states), allgather_to_hosts(num_finite)

        solved = dataclasses.replace(seen, states=found.states)
        kept, num_finite = recorder.record(solved, done, done + layout.length, rolled, finish)
        return kept.states, num_finite, seen.stats.evaluations_by_part * layout.length


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
    rest = num_samples
    while here and rest >= here * num_devices:
        found.append(shared(here if here < unit else here // unit * unit, unit))
        rest -= found[-1][0].length
    if here and rest > max(num_devices, _NOT_WORTH_SHARING):
        found.append(shared(rest // num_devices, unit))
        rest -= found[-1][0].length
    if rest:
        found.append((Layout(whole.mesh, LocalTime(), rest, CHAINS), fitting(min(unit, rest))))
    return found
