"""Chunks on the default device: one compiled solve for all chains, window after window, then the certificate.

    draw      the random numbers of the chunk
    solve     window w of every chain is the recurrence x_t = f(x_{t-1}, u_t) for its part of the tape, from where the
              chain ended before; a chain whose solve does not converge is finished sequentially (`executor.RunRecorder`)
    certify   where every step was computed by rolling, from what it recorded; elsewhere the kernel is evaluated once
              more along the whole path. A solver is accurate to its tolerance only, so rejected steps are then set to
              the state before them: what is returned is what was certified.

Groups of chains run side by side (`chain_groups`); a bad chain never changes how others are run, bit for bit. An interrupt
keeps the windows that are done.
"""

import dataclasses
import functools
from typing import Callable, Iterator, NamedTuple

import jax
import jax.numpy as jnp

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.certify.independent import certify_held
from partime_mcmc.certify.recorded import certify_recorded
from partime_mcmc.certify.step_record import info_dict
from partime_mcmc.compile_cache import Timings, device
from partime_mcmc.engine import AllAtOnce, Solution, Windows, sequential
from partime_mcmc.engine.solve import solve
from partime_mcmc.kernels import Tape
from partime_mcmc.kernels.kernel_program import program_and_params
from partime_mcmc.sampling.chain_groups import run_explicit_groups, run_groups
from partime_mcmc.sampling.chunk import ChainState, Chunk
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
from partime_mcmc.sampling.randomness import draw_tapes
from partime_mcmc.solvers import Sequential
from partime_mcmc.solvers.sequential import finish_sequentially
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import PyTree


class SolvedChains(NamedTuple):
    """Solved chains.

    Attributes:
        paths: Where they started, leaves `(C, ...)`, their paths `(C, n, ...)` and random numbers `(C, n, ...)`; and, where all
            steps were computed by rolling, what these recorded `(C, n, R)` and how far each is from the recurrence `(C, n, D)`.
        discrete: The discrete leaves after the last step, `(C, ...)`.
    """

    paths: tuple
    discrete: dict


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
    initial, tape, discrete = _draw(plan, state, num_steps, timings)
    size = _window_size(plan, state.max_window or max(num_steps, 1))
    current, windows = initial, []
    # What is left where the plan's solver gives up.
    loop = dataclasses.replace(
        plan, solver=sequential(), schedule=AllAtOnce(), max_iterations=None, compiler_options=None
    )
    try:
        for start in range(0, num_steps, size):
            stop = min(start + size, num_steps)
            part = tape if size >= num_steps else _steps(tape, start, stop)
            rolled = recorder.gives_up
            found = _solve_window(loop if rolled else plan, current, part, timings)
            finish = functools.partial(_finished, plan, current, part, found, timings)
            found, num_finite = recorder.record(found, start, stop, rolled, finish)
            states, notes = found.states, (found.notes, found.defects)
            if (num_finite < stop - start).any():
                states, notes = without_nonfinite(states, num_finite), (None, None)
            # At once, so that an interrupt finds a window with its notes or not at all.
            windows.append((states, *notes))
            if stop < num_steps:
                current = _steps(states, -1)
            advance(stop - start, **recorder.progress())
    except KeyboardInterrupt:
        if not windows:
            raise
        done = sum(jax.tree.leaves(states)[0].shape[1] for states, *_ in windows)
        if done < num_steps:
            tape, discrete = _steps(tape, 0, done), _steps(tape.discrete, done)
        recorder.interrupt(done)
    if not windows:
        empty = lambda leaf: jnp.zeros((leaf.shape[0], 0, *leaf.shape[1:]), leaf.dtype)
        return SolvedChains((initial, jax.tree.map(empty, initial), tape), discrete)
    if any(notes is None for _, notes, _ in windows):
        windows = [(states,) for states, *_ in windows]
    states, *recorded = windows[0]
    if len(windows) > 1:
        join = lambda *leaves: jnp.concatenate(leaves, axis=1)
        states, *recorded = jax.tree.map(join, *windows)
    return SolvedChains((initial, states, tape, *recorded), discrete)


def _draw(
    plan: Plan, state: ChainState, num_steps: int, timings: Timings
) -> tuple[PyTree, Tape, dict]:
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


def _window_size(plan: Plan, size: int) -> int:
    """Steps of a window, at most `size`: a sequential run gains nothing from windows, and neither does an empty one."""
    if isinstance(plan.schedule, Windows) and not isinstance(plan.solver, Sequential):
        return min(size, plan.schedule.size)
    return size


def _solve_window(plan: Plan, initial: PyTree, tape: Tape, timings: Timings) -> Solution:
    """One window of all chains; for shapes, compiled in a thread."""
    # Windows are cut by the caller.
    schedule = AllAtOnce() if isinstance(plan.schedule, Windows) else plan.schedule
    strategies = plan.solver, schedule
    opaque = [one if jax.tree.structure(one) == _LEAF else None for one in strategies]
    given = [None if jax.tree.structure(one) == _LEAF else one for one in strategies]
    return run_groups(
        _Solve(plan.max_iterations, *opaque),
        (*given, plan.tolerance, plan.recurrence),
        (initial, tape),
        plan.num_groups,
        timings=timings,
        options=plan.compiler_options,
    )


_LEAF = jax.tree.structure(0)


def compile_first_chunk(plan: Plan, state: ChainState) -> None:
    """Compile the large programs of a plan's first chunk, which draw, solve and certify a window.

    Args:
        plan: The plan; its kernel may have other numbers than the kernel that will be used.
        state: Shapes and types of where chains stand (`jax.ShapeDtypeStruct`), so that nothing runs.
    """
    timings, num_steps = Timings(), min(plan.chunk, plan.num_samples)
    initial, tape, _ = _draw(plan, state, num_steps, timings)
    size = min(_window_size(plan, num_steps), num_steps)
    found = _solve_window(plan, initial, _resized(tape, size), timings)
    if found.notes is not None:
        states, *recorded = _resized((found.states, found.notes, found.defects), num_steps)
        _certify(plan, (initial, states, tape, *recorded), timings)


def _resized(tree: PyTree, num_steps: int) -> PyTree:
    """Shapes `(C, n, ...)` with so many steps."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], num_steps, *leaf.shape[2:]), leaf.dtype),
        tree,
    )


def _steps(tree: PyTree, start: int, stop: int | None = None) -> PyTree:
    """Steps from `start` to `stop`, or the one step `start`, of leaves `(C, n, ...)`."""
    return jax.tree.map(lambda leaf: leaf[:, start if stop is None else slice(start, stop)], tree)


def _finished(
    plan: Plan,
    current: PyTree,
    part: Tape,
    found: Solution,
    timings: Timings,
    num_exact: jax.Array,
) -> tuple[Solution, jax.Array]:
    """A window whose chains go on sequentially after their exact steps, and how many of its steps are then finite, `(C,)`."""
    chains = (current, part, found.states, num_exact, found.notes, found.defects)
    states, finite, notes, defects = run_groups(
        _finish, (plan.recurrence,), chains, plan.num_groups, timings=timings
    )
    return dataclasses.replace(found, states=states, notes=notes, defects=defects), finite


def _finish(dynamics, initial, tape, states, num_exact, notes, defects):
    """Chains finished sequentially after their exact steps; how many steps are then finite, shape `(C,)`; notes and defects."""
    states, notes = finish_sequentially(dynamics, initial, states, tape, num_exact, notes)
    if defects is not None:
        exact = jnp.arange(defects.shape[1]) < num_exact[:, None]
        defects = jnp.where(exact[:, :, None], defects, 0)
    finite = jnp.cumprod(finite_steps(states), axis=1).sum(axis=1)
    return states, finite, notes, defects


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


def _certified(
    plan: Plan, chains: SolvedChains, state: ChainState, recorder: RunRecorder, timings: Timings
) -> Chunk:
    """The chunk of solved chains."""
    certificate, records, last, positions = _certify(plan, chains.paths, timings)
    constrained = plan.target.constrained_values(positions, timings, plan.compiler_options)
    info = info_dict(records, certificate.residual.shape) | {"residual": certificate.residual}
    path = jax.tree.leaves(chains.paths[1])[0]
    after = ChainState(
        last, chains.discrete, state.num_steps + path.shape[1], recorder.num_failed_windows
    )
    report = recorder.report(certificate, timings, path.dtype, device())
    return Chunk(positions, constrained, info, certificate, report, after)


def _certify(plan: Plan, paths: tuple, timings: Timings) -> tuple:
    """What `_Certify` says of paths; for shapes, compiled in a thread."""
    program, params = program_and_params(plan.kernel)
    _, _, _, *recorded = paths
    return run_explicit_groups(
        _Certify(program),
        params,
        paths,
        plan.num_groups,
        timings=timings,
        what="certify",
        # Without what steps recorded the kernel is evaluated once more.
        options=plan.pass_options if recorded else plan.compiler_options,
    )


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
