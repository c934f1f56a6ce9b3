"""Chunks on the default device: one compiled solve for all chains, window after window, then the certificate.

    draw      the random numbers of the chunk, per group of chains (`chain_groups`)
    solve     window w of every chain is the recurrence x_t = f(x_{t-1}, u_t) for its part of the tape, from where the
              chain ended before; a chain whose solve does not converge is finished sequentially (`executor.RunRecorder`)
    certify   where every step was computed by rolling, from what it recorded; elsewhere the kernel is evaluated once
              more along the whole path. A solver is accurate to its tolerance only, so rejected steps are then set to
              the state before them: what is returned is what was certified.

Groups are solved side by side and recorded together; a bad chain never changes how others are run, bit for bit. An
interrupt keeps the windows that are done.
"""

import dataclasses
import functools
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.certify.independent import certify_held
from partime_mcmc.certify.recorded import certify_recorded
from partime_mcmc.certify.step_record import info_dict
from partime_mcmc.compile_cache import Timings, compile_in_thread, device
from partime_mcmc.engine import AllAtOnce, Dynamics, Schedule, Solution, Status, Windows, sequential
from partime_mcmc.engine.solve import solve
from partime_mcmc.kernels import Tape
from partime_mcmc.kernels.kernel_program import program_and_params
from partime_mcmc.sampling.chain_groups import (
    concat_chains,
    run_explicit_groups,
    run_groups,
    split_chains,
)
from partime_mcmc.sampling.chunk import ChainState, Chunk
from partime_mcmc.sampling.executor import (
    MAX_HALVINGS,
    ProgressReporter,
    RunRecorder,
    finite_steps,
    iterate_chunks,
)
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.sampling.randomness import compile_begin, draw_tapes, shapes_of_tapes
from partime_mcmc.solvers import Sequential, Solver
from partime_mcmc.solvers.sequential import finish_sequentially
from partime_mcmc.tracing import HashableFunction, explicit
from partime_mcmc.types import PyTree


@dataclasses.dataclass
class SolvedChains:
    """Solved chains, lists of one entry per group of G chains, C in all.

    Attributes:
        initial: Where they started, leaves `(G, ...)`.
        states: Their paths, leaves `(G, n, ...)`.
        tape: Their random numbers, leaves `(G, n, ...)`.
        discrete: The discrete leaves after the last step, `(C, ...)`.
        notes: What steps recorded, `(G, n, R)`; None where nothing was recorded, or not by all steps.
        defects: How far each step is from the recurrence, `(G, n, D)`; None as `notes`.
    """

    initial: list[PyTree]
    states: list[PyTree]
    tape: list[Tape]
    discrete: dict
    notes: list[jax.Array] | None
    defects: list[jax.Array] | None


@dataclasses.dataclass(frozen=True)
class LocalExecutor:
    """Makes the chunks of a plan on the default device.

    Attributes:
        plan: The plan.
        progress: Shown meanwhile.
    """

    plan: Plan
    progress: Progress

    def chunks(self, state: ChainState) -> Iterator[Chunk]:
        """The chunks from a state to the end of the run; a run of no steps has one, which is empty.

        After an interrupt from the keyboard the last one is shorter, with the verdict INTERRUPTED.
        """
        return iterate_chunks(self.plan, state, self._chunk, self.progress, MAX_HALVINGS)

    def _chunk(self, state: ChainState, num_steps: int, reporter: ProgressReporter) -> Chunk:
        plan, timings = self.plan, Timings()
        recorder = RunRecorder(plan, state)
        chains = solve_windows(plan, state, num_steps, recorder, timings, reporter)
        certify = functools.partial(_certified, plan, chains, state, recorder, timings)
        try:
            return certify()
        except KeyboardInterrupt:
            # These are the last steps: certifying them takes a fraction of the time that would be lost.
            if recorder.first + recorder.num_steps < plan.last_step and not recorder.interrupted:
                raise
            return certify()


def solve_windows(
    plan: Plan,
    state: ChainState,
    num_steps: int,
    recorder: RunRecorder,
    timings: Timings,
    advance: Callable[..., None],
) -> SolvedChains:
    """Solve the next steps of all chains.

    Args:
        plan: Of the run.
        state: Where the chains stand.
        num_steps: n.
        recorder: What happens is recorded there.
        timings: Where seconds are counted.
        advance: Called with the steps done, and what to show, after each window.
    """
    initial, tape, discrete = map(list, zip(*_draw(plan, state, num_steps, timings)))
    solve_window, size = _window_solver(plan, state.max_window or max(num_steps, 1), timings)
    roll_window = _solve_groups(sequential(), AllAtOnce(), plan.tolerance, None, timings)
    current, windows, discrete = initial, [], concat_chains(discrete)
    try:
        for start in range(0, num_steps, size):
            stop = min(start + size, num_steps)
            part = tape if size >= num_steps else _steps(tape, start, stop)
            chosen = roll_window if recorder.gives_up else solve_window
            found = chosen(plan.recurrence, current, part)
            finish = _Finish(plan.recurrence, current, part, found, timings)
            states = _recorded(recorder, found, start, stop, chosen is roll_window, finish)
            # At once, so that an interrupt finds a window with its notes or not at all.
            windows.append((states, None if Status.NONFINITE in recorder.status else finish.notes))
            if stop < num_steps:
                current = jax.tree.map(lambda leaf: leaf[:, -1], states)
            advance(stop - start, **recorder.progress())
    except KeyboardInterrupt:
        if not windows:
            raise
        done = sum(jax.tree.leaves(states)[0].shape[1] for states, _ in windows)
        if done < num_steps:
            discrete = concat_chains([_steps(one.discrete, done) for one in tape])
            tape = _steps(tape, 0, done)
        recorder.interrupt(done)
    paths = _concat_windows(initial, [states for states, _ in windows])
    return SolvedChains(initial, paths, tape, discrete, *_all_notes([kept for _, kept in windows]))


def _draw(plan: Plan, state: ChainState, num_steps: int, timings: Timings) -> list[tuple]:
    """`draw_tapes` of a plan; for shapes, compiled in a thread."""
    return draw_tapes(
        plan.kernel,
        plan.keys,
        state,
        num_steps,
        timings,
        plan.num_groups,
        plan.pass_options,
    )


def _window_solver(plan: Plan, size: int, timings: Timings) -> tuple[Callable, int]:
    """What solves a window, as `_solve_groups` has it, and the steps of one, at most `size`."""
    inside = plan.schedule
    if isinstance(inside, Windows):
        # A sequential run gains nothing from windows, and neither does an empty one.
        size = size if isinstance(plan.solver, Sequential) else min(size, inside.size)
        inside = AllAtOnce()
    solve = _solve_groups(
        plan.solver, inside, plan.tolerance, plan.max_iterations, timings, plan.compiler_options
    )
    return solve, size


def compile_first_chunk(plan: Plan, positions: PyTree, state: ChainState) -> None:
    """Compile the large programs of a plan's first chunk, which begin, draw, solve and certify a window.

    Args:
        plan: The plan; its kernel may have other numbers than the kernel that will be used.
        positions: Shapes and types of one start per chain (`jax.ShapeDtypeStruct`), so that nothing runs.
        state: Likewise of where chains stand.
    """
    timings, num_steps = Timings(), min(plan.chunk, plan.num_samples)
    initial, tape, _ = map(
        list,
        zip(*shapes_of_tapes(plan.kernel, plan.keys, state, num_steps, plan.num_groups)),
    )
    solve_window, size = _window_solver(plan, num_steps, timings)
    # First, since it takes longest; then what is wanted before it.
    found = solve_window(plan.recurrence, initial, _resized(tape, min(size, num_steps)))
    compile_begin(plan.kernel, positions, plan.keys)
    _draw(plan, state, num_steps, timings)
    kept = [(one.states, one.notes, one.defects) for one in found if one.notes is not None]
    if kept:
        paths = [
            (first, states, drives, *notes)
            for first, drives, (states, *notes) in zip(initial, tape, _resized(kept, num_steps))
        ]
        program, params = program_and_params(plan.kernel)
        certify, params = explicit(_Certify(program), params, *paths[0])
        compile_in_thread(certify, params, *paths[0], options=plan.pass_options)


def _resized(tree: PyTree, num_steps: int) -> PyTree:
    """Shapes `(G, n, ...)` with so many steps."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], num_steps, *leaf.shape[2:]), leaf.dtype),
        tree,
    )


def _steps(tree: PyTree, start: int, stop: int | None = None) -> PyTree:
    """Steps from `start` to `stop`, or the one step `start`, of leaves `(G, n, ...)`."""
    return jax.tree.map(lambda leaf: leaf[:, start if stop is None else slice(start, stop)], tree)


def _recorded(
    recorder: RunRecorder,
    found: list[Solution],
    start: int,
    stop: int,
    rolled: bool,
    finish: Callable,
) -> list[PyTree]:
    """Record a window of all groups; their carries. Paths are joined only where some chain did not converge."""
    without = [dataclasses.replace(one, states=None, notes=None, defects=None) for one in found]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *without)
    if (whole.status == Status.CONVERGED).all():
        recorder.record(whole, start, stop, rolled, finish)
        return [one.states for one in found]
    whole = dataclasses.replace(whole, states=concat_chains([one.states for one in found]))
    return split_chains(recorder.record(whole, start, stop, rolled, finish), len(found))


class _Finish:
    """Finishes chains of a window sequentially, group by group.

    Args:
        dynamics: The recurrence.
        current: Where the window begins, by group.
        part: Its tape.
        found: As it was solved.
        timings: Where seconds are counted.

    Attributes:
        notes: Notes and defects of every step, by group: those of the solved window, or of the finished one.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        current: list[PyTree],
        part: list[Tape],
        found: list[Solution],
        timings: Timings,
    ):
        self._dynamics, self._current, self._part, self._timings = dynamics, current, part, timings
        self.notes = [(one.notes, one.defects) for one in found]

    def __call__(self, states: PyTree, num_exact: jax.Array) -> tuple[PyTree, jax.Array]:
        """The paths of all chains, and how many of their steps are finite, `(C,)`."""
        count = len(self._part)
        split = split_chains(states, count), split_chains(num_exact, count)
        groups = [
            (*group, *notes) for *group, notes in zip(self._current, self._part, *split, self.notes)
        ]
        finished = run_groups(_finish, (self._dynamics,), groups, timings=self._timings)
        self.notes = [(notes, defects) for _, _, notes, defects in finished]
        return concat_chains([(states, finite) for states, finite, _, _ in finished])


def _finish(dynamics, initial, tape, states, num_exact, notes, defects):
    """Chains finished sequentially after their exact steps; how many steps are then finite, shape `(C,)`; notes and defects."""
    states, notes = finish_sequentially(dynamics, initial, states, tape, num_exact, notes)
    if defects is not None:
        exact = jnp.arange(defects.shape[1]) < num_exact[:, None]
        defects = jnp.where(exact[:, :, None], defects, 0)
    finite = jnp.cumprod(finite_steps(states), axis=1).sum(axis=1)
    return states, finite, notes, defects


def _all_notes(kept: list[list[tuple] | None]) -> tuple[list | None, list | None]:
    """Notes and defects of all windows, by group, if all of them have some."""
    if not kept or any(groups is None or groups[0][0] is None for groups in kept):
        return None, None
    by_group = [
        windows[0]
        if len(windows) == 1
        else tuple(jnp.concatenate(one, axis=1) for one in zip(*windows))
        for windows in zip(*kept)
    ]
    return [notes for notes, _ in by_group], [defects for _, defects in by_group]


def _concat_windows(initial: list[PyTree], windows: list[list[PyTree]]) -> list[PyTree]:
    """The paths of all groups, their windows one after another."""
    if not windows:
        return jax.tree.map(
            lambda leaf: jnp.zeros((leaf.shape[0], 0, *leaf.shape[1:]), leaf.dtype), initial
        )
    return [
        of_group[0]
        if len(of_group) == 1
        else jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *of_group)
        for of_group in zip(*windows)
    ]


class _Solve(HashableFunction):
    """One window of every chain; parts are `max_iterations` and strategies that are no pytrees."""

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


def _solve_groups(
    solver: Solver,
    schedule: Schedule,
    tolerance: Any,
    max_iterations: int | None,
    timings: Timings,
    options: dict[str, Any] | None = None,
) -> Callable[[Dynamics, list, list], list[Solution]]:
    """`(dynamics, initial, tape) -> solutions` of every group of chains, compiled once for all runs."""
    opaque = [one if jax.tree.structure(one) == _LEAF else None for one in (solver, schedule)]
    given = [None if jax.tree.structure(one) == _LEAF else one for one in (solver, schedule)]
    program = _Solve(max_iterations, *opaque)
    return lambda dynamics, initial, tape: run_groups(
        program,
        (*given, tolerance, dynamics),
        list(zip(initial, tape)),
        timings=timings,
        options=options,
    )


_LEAF = jax.tree.structure(0)


def _certified(
    plan: Plan, chains: SolvedChains, state: ChainState, recorder: RunRecorder, timings: Timings
) -> Chunk:
    """The chunk of solved chains."""
    recorded = () if chains.notes is None else (chains.notes, chains.defects)
    paths = list(zip(chains.initial, chains.states, chains.tape, *recorded))
    program, params = program_and_params(plan.kernel)
    groups = run_explicit_groups(
        _Certify(program),
        params,
        paths,
        timings=timings,
        what="certify",
        options=plan.pass_options if recorded else plan.compiler_options,
    )
    certificate, records, last, positions = concat_chains(groups)
    constrained = plan.target.constrained_values(positions, timings, plan.compiler_options)
    info = info_dict(records, certificate.residual.shape) | {"residual": certificate.residual}
    path = jax.tree.leaves(chains.states)[0]
    after = ChainState(
        last, chains.discrete, state.num_steps + path.shape[1], recorder.num_failed_windows
    )
    report = recorder.report(certificate, timings, path.dtype, device())
    return Chunk(positions, constrained, info, certificate, report, after)


class _Certify(HashableFunction):
    """Certificate, records, last carries and positions of a path, from what its steps recorded; a path without that is
    certified independently, with rejected steps set to the state before. The part is the kernel's program."""

    def __call__(
        self, params, initial, states, tape, *recorded
    ) -> tuple[Certificate, PyTree, PyTree, PyTree]:
        kernel = self.parts[0].kernel(params)
        if recorded:
            certificate, records = jax.vmap(functools.partial(certify_recorded, kernel))(
                initial, states, tape, *recorded
            )
        else:
            certificate, records, states = certify_held(kernel, initial, states, tape)
        last = jax.tree.map(
            lambda leaf, first: leaf[:, -1] if leaf.shape[1] else first, states, initial
        )
        return certificate, records, last, jax.vmap(jax.vmap(kernel.position))(states)
