"""A solve watched is the solve itself: the same paths, residuals and verdicts, one row per iteration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import DYNAMICS, QUICK, SOLVERS, by_name, flat, measured_residual, run

from partime_mcmc import iterates, jacobi, quasi_deer, shooting, solve
from partime_mcmc.engine.solution import Status

NUM_STEPS, NUM_ITERATIONS = 40, 40
ROWS = [row for row in SOLVERS if not row.variant]


@functools.cache
def watched(row):
    return jax.jit(
        functools.partial(
            iterates, solver=row.solver, axis=row.axis, num_iterations=NUM_ITERATIONS
        ),
        compiler_options=QUICK,
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_the_iterate_of_the_solve(row, double):
    problem = by_name(DYNAMICS, "accept or reject").build(NUM_STEPS, double)
    found = watched(row)(problem.dynamics, problem.initial, problem.drives)
    solved = run(row, problem, max_iterations=NUM_ITERATIONS)
    last = int(found.iterations)
    assert last == int(solved.iterations) and int(found.status) == int(solved.status) == 0
    # Shooting meets its old path to the tolerance where one pass at a time rolls on; the rest is the same arithmetic.
    np.testing.assert_allclose(found.states[last], solved.states, rtol=1e-11, atol=1e-11)
    if row.name != "shooting":
        history = np.asarray(solved.stats.residual_history)[: last + 1]
        np.testing.assert_allclose(found.residual[: last + 1], history, rtol=1e-6, atol=1e-13)
    for k in {0, last // 2, last}:
        by_hand = measured_residual(problem, found.states[k])
        np.testing.assert_allclose(
            found.residuals[k], np.abs(by_hand).max(axis=1), rtol=1e-6, atol=1e-13
        )
        np.testing.assert_allclose(found.merit[k], 0.5 * (by_hand**2).sum(), rtol=1e-6, atol=1e-25)
    exact = np.asarray(found.num_exact)
    assert exact[-1] == exact[last] == NUM_STEPS and (last == 0 or exact[last - 1] < NUM_STEPS)
    if row.newton_like:
        assert (exact[: last + 1] >= np.minimum(np.arange(last + 1), NUM_STEPS)).all()
        assert (found.states[0] == problem.initial).all() and found.residual[0] > 0.1
    assert (found.states[last:] == found.states[last]).all()


@pytest.mark.parametrize(
    "correction", [jacobi().linearizer, by_name(SOLVERS, "deer").solver.linearizer]
)
def test_shooting_is_watched_after_every_pass(correction, double):
    problem = by_name(DYNAMICS, "linear").build(64, double)
    solver = shooting(steps=8, correction=correction)
    found = iterates(problem.dynamics, problem.initial, problem.drives, solver=solver)
    exact, last = np.asarray(found.num_exact), int(found.iterations)
    assert int(found.status) == Status.CONVERGED
    # After k + 1 passes the first k + 1 segments are right but for the last step, whose successor was rolled from elsewhere.
    assert all(exact[k] >= min(8 * (k + 1) - 1, 64) for k in range(last + 1))
    if hasattr(correction, "jvps") and correction.jvps(3):
        # The recurrence is linear: one Newton step on the starts of segments makes all of them right.
        assert last == 1
    else:
        assert last > 1 and 0 < float(found.residual[1]) < float(found.residual[0])


def test_verdicts_pytrees_and_wrong_arguments(double):
    chaos = by_name(DYNAMICS, "logistic map").build(NUM_STEPS, double)
    found = iterates(chaos.dynamics, chaos.initial, chaos.drives, solver=jacobi(), num_iterations=5)
    assert int(found.status) == Status.OUT_OF_ITERATIONS and int(found.iterations) == 5
    assert found.merit.shape == (6,) and (np.asarray(found.num_exact) < NUM_STEPS).all()
    tree = by_name(DYNAMICS, "pytree").build(5, double)
    found = iterates(tree.dynamics, tree.initial, tree.drives, num_iterations=7)
    assert jax.tree.structure(found.states) == jax.tree.structure(tree.initial)
    assert found.states["rest"][1].shape == (8, 5, 2, 2)
    last = jax.tree.map(lambda leaf: leaf[int(found.iterations)], found.states)
    assert np.abs(measured_residual(tree, last)).max() < 1e-12 and flat(last, 5).shape == (5, 7)
    with pytest.raises(ValueError, match="num_iterations"):
        iterates(tree.dynamics, tree.initial, tree.drives, num_iterations=0)
    with pytest.raises(ValueError, match="no steps"):
        iterates(chaos.dynamics, chaos.initial, jnp.arange(0))


def test_what_is_not_looked_at_is_not_kept(double):
    problem = by_name(DYNAMICS, "tanh network").build(1000, double)

    def bytes_of(look):
        program = jax.jit(lambda *args: look(iterates(*args, num_iterations=100)))
        memory = (
            program.lower(problem.dynamics, problem.initial, problem.drives)
            .compile()
            .memory_analysis()
        )
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    all_states = 101 * 1000 * 4 * 8
    assert bytes_of(lambda found: found.merit) < all_states / 4
    assert bytes_of(lambda found: found.states) > all_states


@pytest.mark.parametrize("seed", [None, 3])
def test_estimates_are_those_of_the_solve_with_the_same_key(seed, double):
    key = None if seed is None else jax.random.key(seed)
    problem = by_name(DYNAMICS, "accept or reject").build(NUM_STEPS, double)
    problem = problem.dynamics, problem.initial, problem.drives
    solver = quasi_deer(num_probes=1)
    found = iterates(*problem, solver=solver, num_iterations=3, key=key)
    solved = solve(*problem, solver=solver, max_iterations=3, key=key)
    np.testing.assert_allclose(found.states[-1], solved.states, rtol=1e-11, atol=1e-11)
    other = iterates(*problem, solver=solver, num_iterations=3, key=jax.random.key(4))
    assert (np.asarray(found.states[-1]) != other.states[-1]).any(), "another key, other estimates"


def test_one_iteration_has_two_rows(double):
    problem = by_name(DYNAMICS, "linear").build(NUM_STEPS, double)
    found = iterates(
        problem.dynamics, problem.initial, problem.drives, solver=jacobi(), num_iterations=1
    )
    assert found.states.shape[0] == found.residuals.shape[0] == 2 and int(found.iterations) == 1
