"""Every solver on every dynamics gives the path of the sequential loop, and its residual is as small as claimed.

Without `--full-catalogue` a covering choice runs: every solver with every dynamics at one length and in one type, in
turn (a variant with every third dynamics), and every dynamics at every short length.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import (
    DYNAMICS,
    QUICK,
    SOLVERS,
    SolverRow,
    by_name,
    flat,
    langevin_problem,
    measured_residual,
    run,
    sequential_path,
    within,
)

from partime_mcmc.engine.recipes import deer, jacobi, quasi_elk
from partime_mcmc.engine.solution import DEFAULT_ULPS, Status
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.time_axis import LocalTime
from partime_mcmc.engine.windows import SlidingWindow, Windows
from partime_mcmc.scan import AssociativeScan, ChunkedScan

TYPES = ("float32", "float64")
LENGTHS = (0, 1, 2, 17, 257)


def covering():
    """Pairs of a solver and a dynamics at one long length each, and every dynamics at every short length."""
    for i, row in enumerate(SOLVERS):
        for j, dynamics in enumerate(DYNAMICS):
            if not row.variant or (i + j) % 3 == 0:
                yield row, dynamics, (17, 257)[(i + j) // 2 % 2], TYPES[(i // 2 + j) % 2]
    for j, dynamics in enumerate(DYNAMICS):
        for length in (0, 1, 2):
            yield (
                SOLVERS[(3 * j + length) % len(SOLVERS)],
                dynamics,
                length,
                TYPES[(j + length) % 2],
            )


def pytest_generate_tests(metafunc):
    if "length" in metafunc.fixturenames:
        full = metafunc.config.getoption("full_catalogue")
        cases = itertools.product(SOLVERS, DYNAMICS, LENGTHS, TYPES) if full else covering()
        metafunc.parametrize(
            ("row", "dynamics", "length", "kind"),
            [
                pytest.param(*case, id=f"{case[0].name}-{case[1].name}-{case[2]}-{case[3]}")
                for case in cases
            ],
        )


def assert_exact(problem, solution, num_steps):
    """The verdict is CONVERGED and an independent evaluation agrees."""
    assert Status(int(solution.status)) is Status.CONVERGED
    assert int(solution.num_exact) == num_steps
    states = flat(solution.states, num_steps)
    assert np.isfinite(states).all()
    # The library's bound is 256 ulp; two compilations of one step differ by a few more.
    assert within(measured_residual(problem, solution.states), states, DEFAULT_ULPS + 32).all()
    largest = np.abs(measured_residual(problem, solution.states)).max(initial=0.0)
    np.testing.assert_allclose(
        solution.residual,
        largest,
        atol=32 * np.finfo(states.dtype).eps * (1 + np.abs(states).max(initial=0.0)),
    )


def assert_same_path(solution, wanted, num_steps, ulps=16 * DEFAULT_ULPS):
    """Equal up to residuals of 256 ulp carried along by a system that remembers some ten steps."""
    got, wanted = flat(solution.states, num_steps), flat(wanted, num_steps)
    assert within(got - wanted, wanted, ulps).all()


def test_equals_the_sequential_path(row, dynamics, length, kind):
    with jax.enable_x64(kind == "float64"):
        problem = dynamics.build(length, jnp.dtype(kind))
        # The theorem's bound on long paths, where Picard needs all of it; the default on short ones.
        solution = run(
            row, problem, max_iterations=length if row.newton_like and length > 2 else None
        )
        wanted = sequential_path(problem)
        assert jax.tree.structure(solution.states) == jax.tree.structure(wanted)
        for got, state in zip(jax.tree.leaves(solution.states), jax.tree.leaves(problem.initial)):
            assert got.shape == (length, *state.shape) and got.dtype == state.dtype == kind
        if row.newton_like or dynamics.forgets or solution.status == Status.CONVERGED:
            assert_exact(problem, solution, length)
        if dynamics.forgets:
            assert_same_path(solution, wanted, length)
        if dynamics.rejects and length >= 17:
            path = flat(wanted, length)
            rejected = (path[1:] == path[:-1]).all(axis=1)
            assert 0 < rejected.sum() < length - 1
        if row.newton_like and length:
            assert int(solution.iterations) <= length * -(-length // row.schedule.window(length))


@pytest.mark.parametrize(
    "schedule, size",
    [
        (Windows, 1),
        (Windows, 7),
        (Windows, 1000),
        (SlidingWindow, 1),
        (SlidingWindow, 3),
        (SlidingWindow, 39),
    ],
)
def test_windows_shorter_than_a_burst_of_rejections(schedule, size, double):
    problem = langevin_problem(40, double, step_size=1.3)
    wanted = sequential_path(problem)
    rejected = (np.diff(wanted, axis=0) == 0).all(axis=1)
    longest = max(map(len, "".join("r" if step else " " for step in rejected).split()))
    assert longest > 7 and not rejected.all()
    solution = run(SolverRow("jacobi", jacobi(), True, schedule=schedule(size)), problem)
    assert_exact(problem, solution, 40)
    assert_same_path(solution, wanted, 40)
    if size == 1:
        # A window of one step is the sequential loop: one pass to move on, one to see that it is exact.
        assert float(solution.stats.evaluations) <= 2.1


@pytest.mark.parametrize(
    "solver, scan",
    [(deer(), AssociativeScan()), (quasi_elk(), ChunkedScan(4))],
    ids=["deer, associative", "quasi-elk, chunked"],
)
def test_another_scan_gives_the_same_path(solver, scan, double):
    problem = by_name(DYNAMICS, "accept or reject").build(17, double)
    solution = run(SolverRow("", solver, False, axis=LocalTime(scan)), problem)
    assert_exact(problem, solution, 17)
    assert_same_path(solution, sequential_path(problem), 17)


def test_vmap_gives_each_path_its_own_answer(double):
    problem = by_name(DYNAMICS, "accept or reject").build(30, double)
    starts = jnp.stack([problem.initial, -problem.initial, 3 * problem.initial])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def batched(starts):
        return jax.vmap(
            lambda start: solve(problem.dynamics, start, problem.drives, solver=deer())
        )(starts)

    solution = batched(starts)
    assert solution.status.shape == (3,) and solution.stats.residual_history.ndim == 2
    for index, start in enumerate(starts):
        one = jax.tree.map(lambda leaf: leaf[index], solution)
        here = type(problem)(problem.dynamics, start, problem.drives)
        assert_exact(here, one, 30)
        assert_same_path(one, sequential_path(here), 30)


def test_without_jit_as_with_it(double):
    problem = by_name(DYNAMICS, "pytree").build(17, double)
    solution = solve(problem.dynamics, problem.initial, problem.drives, solver=deer()).or_raise()
    assert_same_path(solution, sequential_path(problem), 17)
    assert_same_path(solution, run(by_name(SOLVERS, "deer"), problem).states, 17)


def test_plain_numbers_and_numpy_arrays_are_taken():
    problem = by_name(DYNAMICS, "AR(1)").build(17, jnp.float32)
    solution = solve(problem.dynamics, 2.0, np.asarray(problem.drives), solver=jacobi()).or_raise()
    assert solution.states.dtype == jnp.float32
    assert_same_path(solution, sequential_path(problem), 17)


def test_work_is_counted(double):
    problem = by_name(DYNAMICS, "tanh network").build(17, double)
    for name, jvps in (("quasi-deer, two probes", 2), ("jacobi", 0)):
        solution = run(by_name(SOLVERS, name), problem, max_iterations=17)
        passes = int(solution.iterations) + 1
        assert float(solution.stats.evaluations) == passes and int(solution.stats.depth) == passes
        assert float(solution.stats.jvps) == jvps * passes
        history = np.asarray(solution.stats.residual_history)
        assert np.isfinite(history[:passes]).all() and np.isnan(history[passes:]).all()
        assert history[0] > 0.1 and history[passes - 1] == float(solution.residual)
    solution = run(by_name(SOLVERS, "sequential"), problem)
    assert float(solution.stats.evaluations) == 1 and int(solution.stats.depth) == 17
