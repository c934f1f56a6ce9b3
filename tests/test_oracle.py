"""Every solver on every dynamics gives the path of the sequential loop, and its residual is as small as claimed.

Without `--full-catalogue` each pair of a solver and a dynamics runs at one of the long and one of the short lengths, in
turn, so that every solver and every dynamics meets every length in both floating-point types.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import (DYNAMICS, QUICK, SOLVERS, SolverRow, by_name, flat, langevin_problem, measured_residual, run,
                       sequential_path, within)

from partime_mcmc.recipes import deer, jacobi
from partime_mcmc.schedule import Sliding, Stretches
from partime_mcmc.solution import DEFAULT_ULPS, Status
from partime_mcmc.solve import solve

LONG = [(length, kind) for length in (17, 257) for kind in ("float32", "float64")]
SHORT = [(length, kind) for length in (0, 1, 2) for kind in ("float32", "float64")]


def pytest_generate_tests(metafunc):
    if "length" not in metafunc.fixturenames:
        return
    cases = []
    for i, row in enumerate(SOLVERS):
        for j, dynamics in enumerate(DYNAMICS):
            chosen = LONG + SHORT if metafunc.config.getoption("full_catalogue") else [
                LONG[(i + j) % len(LONG)], SHORT[(i + j) % len(SHORT)]]
            cases += [pytest.param(row, dynamics, length, kind, id=f"{row.name}-{dynamics.name}-{length}-{kind}")
                      for length, kind in chosen]
    metafunc.parametrize(("row", "dynamics", "length", "kind"), cases)


def assert_exact(problem, solution, num_steps):
    """The verdict is CONVERGED and an independent evaluation agrees."""
    assert Status(int(solution.status)) is Status.CONVERGED
    assert int(solution.num_exact) == num_steps
    states = flat(solution.states, num_steps)
    assert np.isfinite(states).all()
    # The library's bound is 256 ulp; two compilations of one step differ by a few more.
    assert within(measured_residual(problem, solution.states), states, DEFAULT_ULPS + 32).all()
    largest = np.abs(measured_residual(problem, solution.states)).max(initial=0.0)
    np.testing.assert_allclose(solution.residual, largest, atol=32 * np.finfo(states.dtype).eps * (
        1 + np.abs(states).max(initial=0.0)))


def assert_same_path(solution, wanted, num_steps, ulps=16 * DEFAULT_ULPS):
    """Equal up to residuals of 256 ulp carried along by a system that remembers some ten steps."""
    got, wanted = flat(solution.states, num_steps), flat(wanted, num_steps)
    assert within(got - wanted, wanted, ulps).all()


def test_equals_the_sequential_path(row, dynamics, length, kind):
    with jax.enable_x64(kind == "float64"):
        problem = dynamics.build(length, jnp.dtype(kind))
        # Newton-like solvers need T + 1 passes at most, whatever the system; nobody needs more on a short path.
        solution = run(row, problem, max_iterations=length + 1 if row.newton_like and length else None)
        wanted = sequential_path(problem)
        assert jax.tree.structure(solution.states) == jax.tree.structure(wanted)
        for got, state in zip(jax.tree.leaves(solution.states), jax.tree.leaves(problem.initial)):
            assert got.shape == (length, *state.shape) and got.dtype == state.dtype == kind
        if row.newton_like or dynamics.forgets:
            assert_exact(problem, solution, length)
        else:
            assert int(solution.status) != Status.CONVERGED
        if dynamics.forgets:
            assert_same_path(solution, wanted, length)
        if dynamics.rejects and length >= 17:
            path = flat(wanted, length)
            rejected = (path[1:] == path[:-1]).all(axis=1)
            assert 0 < rejected.sum() < length - 1
        if row.newton_like and length:
            assert int(solution.iterations) <= length * -(-length // row.schedule.window(length))


@pytest.mark.parametrize("size", [1, 3, 7, 40, 1000])
@pytest.mark.parametrize("schedule", [Stretches, Sliding])
def test_windows_shorter_than_a_burst_of_rejections(schedule, size, double):
    problem = langevin_problem(40, double, step_size=1.3)
    wanted = sequential_path(problem)
    rejected = (np.diff(wanted, axis=0) == 0).all(axis=1)
    longest = max(map(len, "".join("r" if step else " " for step in rejected).split()))
    assert longest > 7 and not rejected.all()
    solution = run(SolverRow("jacobi", jacobi(), True, schedule(size)), problem)
    assert_exact(problem, solution, 40)
    assert_same_path(solution, wanted, 40)
    if size == 1:
        # A window of one step is the sequential loop: one pass to move on, one to see that it is exact.
        assert float(solution.stats.evaluations) <= 2.1


def test_default_bound_is_enough_for_short_paths(precision):
    problem = by_name(DYNAMICS, "tanh network").build(2, precision)
    for row in SOLVERS:
        assert run(row, problem).status == Status.CONVERGED, row.name


def test_vmap_gives_each_path_its_own_answer(precision):
    problem = by_name(DYNAMICS, "accept or reject").build(30, precision)
    starts = jnp.stack([problem.initial, -problem.initial, 3 * problem.initial])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def batched(starts):
        return jax.vmap(lambda start: solve(problem.dynamics, start, problem.drives, solver=deer()))(starts)

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


def test_plain_numbers_and_numpy_arrays_are_taken(precision):
    problem = by_name(DYNAMICS, "AR(1)").build(17, precision)
    solution = solve(problem.dynamics, 2.0, np.asarray(problem.drives), solver=deer()).or_raise()
    assert solution.states.dtype == precision
    assert_same_path(solution, sequential_path(problem), 17)


def test_work_is_counted(double):
    problem = by_name(DYNAMICS, "tanh network").build(17, double)
    for name, jvps in (("deer", 4), ("quasi-deer, two probes", 2), ("jacobi", 0)):
        solution = run(by_name(SOLVERS, name), problem, max_iterations=18)
        passes = int(solution.iterations) + 1
        assert float(solution.stats.evaluations) == passes and int(solution.stats.depth) == passes
        assert float(solution.stats.jvps) == jvps * passes
        history = np.asarray(solution.stats.residual_history)
        assert np.isfinite(history[:passes]).all() and np.isnan(history[passes:]).all()
        assert history[0] > 0.1 and history[passes - 1] == float(solution.residual)
    solution = run(by_name(SOLVERS, "sequential"), problem, max_iterations=None)
    assert float(solution.stats.evaluations) == 1 and int(solution.stats.depth) == 17
