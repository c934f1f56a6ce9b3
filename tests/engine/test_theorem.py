"""After k passes of a Newton-like solver at least the first k states are exact, whatever the guess.

Exact means to the last bit: a step whose past is right is `f` of that past plus a correction that is exactly zero. The
passes run one at a time, compiled without shortcuts, because here every bit counts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import DYNAMICS, SOLVERS, by_name, flat, measured_residual, run

from partime_mcmc.engine.dynamics import ravel
from partime_mcmc.engine.solution import Status, Tolerance
from partime_mcmc.engine.windows import AllAtOnce

NEWTON_LIKE = [row for row in SOLVERS if row.newton_like and row.schedule == AllAtOnce()]
NUM_STEPS, NUM_PASSES = 12, 6


@functools.cache
def one_pass(solver, axis):
    @jax.jit
    def program(dynamics, initial, drives, states, memory, key):
        return solver.step(
            dynamics, initial, states, drives, memory, axis=axis, key=key, tolerance=Tolerance()
        )

    return program


def guesses(seed, dimension, dtype):
    """Guesses a solver may be handed: near, far, huge, and huge in one place."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(NUM_STEPS, dimension))
    spike = normal.copy()
    spike[NUM_STEPS // 2] = 1e30
    for guess in (normal, 100 * normal, 1e30 * normal, spike, np.zeros_like(normal)):
        yield jnp.asarray(guess, dtype)


@pytest.mark.parametrize("name", ["tanh network", "accept or reject", "logistic map"])
@pytest.mark.parametrize("row", NEWTON_LIKE, ids=lambda row: row.name)
def test_k_passes_make_k_states_exact(row, name):
    # Each pair in one type, in turn: the theorem is the same in both and compiling is not free.
    turn = NEWTON_LIKE.index(row) % 2
    with jax.enable_x64(bool(turn)):
        dtype = jnp.dtype("float64" if turn else "float32")
        problem = by_name(DYNAMICS, name).build(NUM_STEPS, dtype)
        dynamics, initial, _ = ravel(problem.dynamics, problem.initial)
        program = one_pass(row.solver, row.axis)
        for states in guesses(0, initial.size, dtype):
            memory = row.solver.init(initial, states)
            for k in range(NUM_PASSES + 1):
                proposal, memory = program(
                    dynamics, initial, problem.drives, states, memory, jax.random.key(0)
                )
                # The residual of the path this pass was given, that is after k passes.
                assert (np.asarray(proposal.judged)[:k] == np.asarray(states)[:k]).all()
                assert (np.asarray(proposal.residual)[:k] == 0).all(), f"after {k} passes"
                assert np.isfinite(proposal.states).all()
                states = proposal.states
            assert_by_hand(problem, states, initial, dtype)


def assert_by_hand(problem, states, initial, dtype):
    """The exact prefix obeys the recurrence under a program of its own, up to the rounding of one step."""
    path = jax.tree.map(
        lambda leaf: np.asarray(states).reshape(NUM_STEPS, *leaf.shape), problem.initial
    )
    residual = measured_residual(problem, path)[:NUM_PASSES]
    assert (
        np.abs(residual) <= 32 * np.finfo(dtype).eps * (1 + np.abs(np.asarray(states)[:NUM_PASSES]))
    ).all()


@pytest.mark.parametrize(
    "row", [by_name(SOLVERS, "deer"), by_name(SOLVERS, "picard")], ids=lambda row: row.name
)
def test_as_many_passes_as_steps_always_suffice(row, double):
    problem = by_name(DYNAMICS, "accept or reject").build(NUM_STEPS, double)
    for guess in guesses(1, 3, double):
        solution = run(row, problem, guess=guess, max_iterations=NUM_STEPS)
        assert solution.status == Status.CONVERGED and int(solution.iterations) <= NUM_STEPS


def test_the_exact_prefix_of_an_unfinished_solve_counts_at_least_its_passes(double):
    problem = by_name(DYNAMICS, "logistic map").build(NUM_STEPS, double)
    for passes in (1, 3):
        solution = run(by_name(SOLVERS, "jacobi"), problem, max_iterations=passes)
        assert solution.status == Status.OUT_OF_ITERATIONS and int(solution.iterations) == passes
        assert int(solution.num_exact) >= passes
        residual = measured_residual(problem, solution.states)
        assert (np.abs(residual[: int(solution.num_exact)]) <= 300 * np.finfo(double).eps).all()
        np.testing.assert_allclose(solution.residual, np.abs(residual).max(), rtol=1e-12)
        assert flat(solution.states, NUM_STEPS).shape == (NUM_STEPS, 1)
