"""A path is judged in its own units: what a solver finds for a path in metres it finds for the same path in nanometres.

The recurrence x' = 0.6 x − 0.2 |x| + s u is multiplied by s exactly, if s is a power of two. So is nearly every number that a
solver computes, as long as it stays among the normal numbers: it takes as many passes.
"""

import functools

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import SOLVERS, Problem, by_name, run, sequential_path

from partime_mcmc import CertifyIndependently, Target, certify, from_blackjax, mala, sample
from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.recipes import deer, shooting
from partime_mcmc.engine.solution import DEFAULT_ULPS, Bound, Status, Tolerance
from partime_mcmc.engine.solve import solve
from partime_mcmc.rnn import unroll

NUM_STEPS = 160
# About 1e-30, 1e-12, 1e12 and 1e30.
SCALES = (2.0**-100, 2.0**-40, 2.0**40, 2.0**100)
every_solver = pytest.mark.parametrize("row", SOLVERS, ids=lambda row: row.name)


def _bent(scale, state, drive):
    return 0.6 * state - 0.2 * jnp.abs(state) + scale * drive


def problem_of(scale, start=0.0):
    noise = np.random.default_rng(0).normal(size=(NUM_STEPS, 4)).astype(np.float32)
    scale = np.broadcast_to(np.float32(scale), 4)
    return Problem(Dynamics(_bent, scale), np.float32(start) * scale, noise)


@functools.cache
def at_scale_one(row):
    return run(row, problem_of(1.0))


def assert_right(problem, solution, slack=0.0):
    """The path is the loop's, each coordinate to some of its own units in the last place."""
    wanted = sequential_path(problem).astype(float)
    error = np.abs(np.asarray(solution.states, float) - wanted)
    # Residuals of up to twice 128 units, carried along by a recurrence that remembers some four steps.
    bound = 16 * DEFAULT_ULPS * np.finfo(np.float32).eps * np.abs(wanted).mean(axis=0)
    assert Status(int(solution.status)) is Status.CONVERGED
    assert (error <= bound + slack).all()


@every_solver
def test_every_scale_is_scale_one(row):
    one = at_scale_one(row)
    assert_right(problem_of(1.0), one)
    for scale in SCALES:
        found = run(row, problem_of(scale))
        assert_right(problem_of(scale), found)
        # Residuals of 1e-37 are flushed to zero, or kept for a pass more.
        assert abs(int(found.iterations) - int(one.iterations)) <= 1


@every_solver
def test_each_coordinate_in_units_of_its_own(row):
    problem = problem_of([2.0**-100, 2.0**-40, 0.0, 2.0**100])
    found = run(row, problem)
    assert_right(problem, found)
    assert not np.asarray(found.states)[:, 2].any()


@every_solver
def test_at_the_end_of_the_numbers(row):
    """Differences of numbers near the smallest normal one are flushed to zero: such numbers are not taken for equal."""
    tiny = float(np.finfo(np.float32).tiny)
    # Of a path in numbers below the normal ones nothing is left but zeros.
    problem = problem_of([8 * tiny, 64 * tiny, 2.0**-140, 1.0])
    found = run(row, problem)
    if not row.name.startswith(("elk", "quasi-elk")) or int(found.status) == Status.CONVERGED:
        # A trust region need not reach equal bits, which is what is asked for there; it says so.
        assert_right(problem, found, slack=4 * tiny)


@pytest.mark.parametrize("name", ["deer", "quasi-deer, windows", "shooting"])
def test_a_start_far_away_is_no_unit(name):
    """The path falls from 10⁶ to 1 within thirty steps: what comes then is not judged by where it came from."""
    row = by_name(SOLVERS, name)
    problem = problem_of(1.0, start=1e6)
    found = run(row, problem)
    wanted, states = sequential_path(problem)[60:], np.asarray(found.states)[60:]
    assert Status(int(found.status)) is Status.CONVERGED
    assert np.abs(states - wanted).max() <= 16 * DEFAULT_ULPS * np.finfo(np.float32).eps


def test_a_guess_is_no_unit():
    """A guess that is right but for one wild step: the steps before it, and it alone, are exact and wrong."""
    problem = problem_of(2.0**-40)
    guess = sequential_path(problem).copy()
    guess[80] = 1e6
    solution = solve(
        problem.dynamics,
        problem.initial,
        problem.drives,
        solver=by_name(SOLVERS, "jacobi").solver,
        guess=guess,
        max_iterations=1,
    )
    assert int(solution.num_exact) <= 81 and Status(int(solution.status)) is not Status.CONVERGED


def test_an_absolute_tolerance_is_taken_as_given():
    problem = problem_of(2.0**-40)
    loose = solve(
        problem.dynamics,
        problem.initial,
        problem.drives,
        solver=deer(),
        tolerance=Tolerance(absolute=1e-6),
    )
    assert int(loose.iterations) == 0 and not np.asarray(loose.states).any()


def small_normal(scale):
    return lambda x: -0.5 * jnp.sum((x / scale) ** 2)


def test_a_chain_on_a_small_target(double):
    """The path is that of scale 1 but for rounding, and certificates are in units of the kernel's noise."""
    scale, paths = 2.0**-40, []
    for unit in (1.0, scale):
        kernel = mala(small_normal(unit), 0.5 * unit**2)
        state = kernel.init(unit * jnp.ones(3))
        initial, tape = kernel.carry(state), kernel.tape(jax.random.key(0), 200, state)
        found = solve(kernel.dynamics(), initial, tape, solver=shooting(num_segments=5)).or_raise()
        assert bool(certify(kernel, initial, found.states, tape).certified)
        assert not bool(certify(kernel, initial, jnp.zeros_like(found.states), tape).certified)
        paths.append(np.asarray(found.states) / unit)
    np.testing.assert_allclose(paths[1], paths[0], atol=1e-10)


def test_a_kernel_without_a_unit_is_judged_by_its_path():
    """No noise scale is known here, so tolerances and certificates are in units of the path, which may be any."""
    scale = 2.0**-30
    target = Target(small_normal(scale), initial=scale * jnp.ones(2))
    kernel = from_blackjax(blackjax.hmc(small_normal(scale), 0.9 * scale, jnp.ones(2), 2))
    kwargs = dict(num_samples=256, num_chains=2, progress=False, certificate=CertifyIndependently())
    draws = sample(jax.random.key(1), target, kernel, solver=shooting(steps=64), **kwargs)
    assert draws.certificate.certified.all() and not draws.report.fallbacks
    state = kernel.init(target.initial)
    tape = kernel.tape(jax.random.key(0), 256, state)
    standing = jnp.zeros((256, 2))
    assert not bool(certify(kernel, jnp.zeros(2), standing, tape).certified)


def test_a_network_with_small_states_is_not_its_guess():
    scale = 2.0**-30
    inputs = scale * jax.random.normal(jax.random.key(0), (8192, 4))
    weights = 0.4 * jax.random.orthogonal(jax.random.key(1), 4)

    def cell(weights, carry, x):
        carry = weights @ carry + x
        return carry, carry

    found = [
        unroll(cell, weights, jnp.zeros(4), inputs, solver=solver)[1]
        for solver in (None, shooting(steps=64))
    ]
    wanted = jax.lax.scan(lambda h, x: cell(weights, h, x), jnp.zeros(4), inputs)[1]
    for path in found:
        np.testing.assert_allclose(path, wanted, atol=1e-4 * scale)


@pytest.mark.parametrize("absolute", [None, jnp.full(2, 3e-3)])
def test_a_part_of_a_tolerance_is_that_part_everywhere(absolute):
    whole, states, recent = Bound(absolute, jnp.array(1e-3)), jnp.array([2.0, -8.0]), jnp.ones(2)
    np.testing.assert_allclose(
        whole.scaled(0.25).at(states, recent), 0.25 * whole.at(states, recent), rtol=1e-6
    )
