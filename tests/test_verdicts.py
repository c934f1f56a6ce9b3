"""Only a path that obeys the recurrence is called CONVERGED, and what fails says how."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import (DYNAMICS, QUICK, SOLVERS, Problem, SolverRow, by_name, flat, measured_residual, run,
                       sequential_path, within)

from partime_mcmc.dynamics import Dynamics
from partime_mcmc.recipes import deer, elk, jacobi, quasi_deer
from partime_mcmc.solution import DEFAULT_ULPS, SolveError, Status, Tolerance
from partime_mcmc.solve import solve
from partime_mcmc.solvers import Proposal
from partime_mcmc.types import pytree

every_solver = pytest.mark.parametrize("row", SOLVERS, ids=lambda row: row.name)
DEER, JACOBI, SEQUENTIAL = (by_name(SOLVERS, name) for name in ("deer", "jacobi", "sequential"))


def verdict(solution):
    return Status(int(solution.status))


def assert_honest(problem, solution, num_steps, ulps=DEFAULT_ULPS + 32):
    """The exact prefix is exact by an independent evaluation, and CONVERGED means that all of it is."""
    exact, states = int(solution.num_exact), flat(solution.states, num_steps)
    good = within(measured_residual(problem, solution.states), states, ulps)
    assert good[:exact].all()
    assert (verdict(solution) is Status.CONVERGED) == (exact == num_steps)


def _breakable(params, state, drive):
    noise, broken = drive
    return jnp.where(broken, jnp.nan, jnp.tanh(params @ state) + noise)


def breakable(num_steps, dtype, broken=()):
    rng = np.random.default_rng(0)
    flags = np.zeros(num_steps, bool)
    flags[list(broken)] = True
    return Problem(Dynamics(_breakable, jnp.asarray(0.4 * rng.normal(size=(2, 2)), dtype)), jnp.ones(2, dtype),
                   (jnp.asarray(rng.normal(size=(num_steps, 2)), dtype), jnp.asarray(flags)))


@every_solver
def test_nan_at_step_500_is_found_there(row):
    # Drives 0 and 499 are those of steps 1 and 500.
    for broken, exact in (((499,), 499), ((0, 300), 0), ((550, 570), 550)):
        problem = breakable(600, jnp.float32, broken)
        solution = run(row, problem)
        assert verdict(solution) is Status.NONFINITE
        assert int(solution.num_exact) == exact
        assert np.isnan(solution.residual)
        assert_honest(problem, solution, 600)
        wanted = flat(sequential_path(problem), 600)[:exact]
        got = flat(solution.states, 600)[:exact]
        assert within(got - wanted, wanted, 16 * DEFAULT_ULPS).all()
    # The same program, unbroken, goes through: the verdicts above are not the solver's failure.
    assert verdict(run(row, breakable(600, jnp.float32))) is Status.CONVERGED


@pytest.mark.parametrize("row", [DEER, JACOBI, SEQUENTIAL], ids=lambda row: row.name)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_start_that_is_not_finite(row, value):
    problem = by_name(DYNAMICS, "linear").build(17, jnp.float32)
    problem = Problem(problem.dynamics, problem.initial.at[1].set(value), problem.drives)
    solution = run(row, problem)
    assert verdict(solution) is Status.NONFINITE and int(solution.num_exact) == 0


def _burst(params, state, drive):
    return drive * state + params


def burst(dtype):
    """Grows by 1.1 for 1,000 steps, then forgets: 1.1^1000 is 2e41, beyond float32 and far from the end of float64."""
    factors = jnp.where(jnp.arange(1100) < 1000, 1.1, 0.5).astype(dtype)
    return Problem(Dynamics(_burst, jnp.asarray(0.01, dtype)), jnp.asarray(1.0, dtype), factors)


@every_solver
def test_overflow_of_the_system_itself(row):
    problem = burst(jnp.float32)
    wanted = np.asarray(sequential_path(problem))
    overflow = int(np.argmin(np.isfinite(wanted)))
    assert 900 < overflow < 1000
    solution = run(row, problem)
    assert verdict(solution) is not Status.CONVERGED
    assert_honest(problem, solution, 1100)
    assert int(solution.num_exact) <= overflow
    if row.name in ("sequential", "deer", "quasi-deer, stretches"):
        # These reach the end of the numbers exactly, and say that it is the system that leaves them.
        assert verdict(solution) is Status.NONFINITE and int(solution.num_exact) == overflow


@pytest.mark.parametrize("row", [DEER, SEQUENTIAL], ids=lambda row: row.name)
def test_growth_that_float64_can_hold(row, double):
    problem = burst(double)
    solution = run(row, problem)
    assert verdict(solution) is Status.CONVERGED
    assert_honest(problem, solution, 1100)
    np.testing.assert_allclose(solution.states, sequential_path(problem), rtol=1e-10)  # 1,100 roundings of 2e-16 each


@every_solver
def test_chaos_is_never_called_converged_wrongly(row, double):
    problem = by_name(DYNAMICS, "logistic map").build(2000, double)
    solution = run(row, problem)
    assert_honest(problem, solution, 2000)
    if row.name != "sequential":
        # No window of a chaotic map longer than log(1e16)/log(2) steps settles but from its front: 200 passes do not do.
        assert verdict(solution) is not Status.CONVERGED or row.schedule.window(2000) < 60


@every_solver
def test_one_iteration_is_not_enough(row):
    problem = by_name(DYNAMICS, "tanh network").build(100, jnp.float32)
    solution = run(row, problem, max_iterations=1)
    assert_honest(problem, solution, 100)
    if row.name == "sequential":
        assert verdict(solution) is Status.CONVERGED
    else:
        windows = -(-100 // row.schedule.window(100))
        assert verdict(solution) is Status.OUT_OF_ITERATIONS and int(solution.iterations) == windows


def test_a_small_update_is_not_a_small_residual(double):
    """Updates of a millionth of the residual: a test on updates would stop at once, at a path that is wrong."""

    @pytree()
    class Timid:
        inner: object = jacobi()

        def init(self, initial, states):
            return self.inner.init(initial, states)

        def step(self, dynamics, initial, states, drives, state, *, axis, key):
            proposal, state = self.inner.step(dynamics, initial, states, drives, state, axis=axis, key=key)
            timid = states + 1e-13 * (proposal.states - states)
            return Proposal(timid, states, proposal.residual, *jax.tree.leaves(proposal)[3:]), state

        def jvps(self, dimension):
            return 0

    problem = by_name(DYNAMICS, "tanh network").build(17, double)
    solution = run(SolverRow("timid", Timid(), newton_like=False), problem)
    assert verdict(solution) in (Status.OUT_OF_ITERATIONS, Status.STALLED)
    assert_honest(problem, solution, 17)


def test_tolerance_zero_asks_for_every_bit(precision):
    problem = by_name(DYNAMICS, "tanh network").build(60, precision)
    zero = Tolerance(relative=0.0, absolute=0.0)
    for row in (JACOBI, DEER):
        solution = run(row, problem, tolerance=zero, max_iterations=61)
        assert verdict(solution) is Status.CONVERGED and float(solution.residual) == 0
        loose = run(row, problem, max_iterations=61)
        assert int(solution.iterations) > int(loose.iterations)


def test_a_tolerance_below_the_floor_stalls(double):
    # A trust region never lets go of its last rounding errors, and the iteration settles into a loop among them.
    problem = by_name(DYNAMICS, "linear").build(60, double)
    solution = run(by_name(SOLVERS, "quasi-elk, constant damping"), problem, tolerance=Tolerance(0.0, 0.0))
    assert verdict(solution) is Status.STALLED
    assert float(solution.residual) < 1e-14 and int(solution.iterations) < 100
    assert_honest(problem, solution, 60, ulps=0 if int(solution.num_exact) == 0 else 8)


@pytree()
class TwoCycle:
    """A linearisation that overshoots and returns: x̂ ← c − x̂ for a path c that nobody meets."""

    def init(self, initial, states):
        return ()

    def step(self, dynamics, initial, states, drives, state, *, axis, key):
        proposal, _ = jacobi().step(dynamics, initial, states, drives, (), axis=axis, key=key)
        return Proposal(1.5 - states, states, proposal.residual, *jax.tree.leaves(proposal)[3:]), state

    def jvps(self, dimension):
        return 0


def test_a_cycle_stalls_long_before_the_iterations_run_out():
    problem = by_name(DYNAMICS, "tanh network").build(17, jnp.float32)
    solution = run(SolverRow("two-cycle", TwoCycle(), newton_like=False), problem, max_iterations=150)
    assert verdict(solution) is Status.STALLED and int(solution.iterations) < 10
    assert_honest(problem, solution, 17)


def _root(params, state, drive):
    noise, back_to_zero = drive
    # |x| as sqrt(x²): at x = 0 its value is 0 and its derivative 0/0.
    return jnp.where(back_to_zero, 0.0, params * jnp.sqrt(state**2) + noise)


@every_solver
def test_a_nan_jacobian_is_counted_and_poisons_nothing(row):
    noise = jnp.asarray(np.random.default_rng(0).normal(size=40), jnp.float32)
    problem = Problem(Dynamics(_root, jnp.float32(0.5)), jnp.float32(1.0), (noise, jnp.arange(40) % 7 == 3))
    solution = run(row, problem)
    assert verdict(solution) is Status.CONVERGED
    assert_honest(problem, solution, 40)
    wanted = flat(sequential_path(problem), 40)
    assert within(flat(solution.states, 40) - wanted, wanted, 16 * DEFAULT_ULPS).all()
    derivative_free = row.name in ("sequential", "picard", "jacobi")
    assert (int(solution.stats.num_replaced_jacobians) > 0) != derivative_free


@pytest.mark.parametrize("solver", [deer(), elk(), quasi_deer()], ids=["deer", "elk", "quasi-deer"])
def test_one_bad_path_leaves_the_others_as_they_were(solver):
    problem = breakable(60, jnp.float32)
    starts = jnp.asarray(np.random.default_rng(1).normal(size=(8, 2)), jnp.float32)
    flags = jnp.zeros((8, 60), bool)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def batched(starts, flags):
        return jax.vmap(lambda start, flag: solve(problem.dynamics, start, (problem.drives[0], flag), solver=solver))(
            starts, flags)

    healthy = batched(starts, flags)
    others = np.arange(8) != 3
    for sick in (batched(starts.at[3].set(jnp.nan), flags), batched(starts, flags.at[3, 20].set(True)),
                 batched(starts.at[3].set(3e38), flags.at[3, 0].set(True))):
        assert list(np.asarray(sick.status)) == [0, 0, 0, Status.NONFINITE, 0, 0, 0, 0]
        for got, wanted in zip(jax.tree.leaves(sick), jax.tree.leaves(healthy)):
            np.testing.assert_array_equal(np.asarray(got)[others], np.asarray(wanted)[others])


def test_or_raise_says_what_where_and_how_much():
    good = run(DEER, breakable(60, jnp.float32))
    assert good.or_raise() is good
    broken = run(DEER, breakable(60, jnp.float32, [20]))
    with pytest.raises(SolveError, match=r"NONFINITE: the path: .*residual nan, the first 20 steps are exact"):
        broken.or_raise()
    short = run(JACOBI, by_name(DYNAMICS, "tanh network").build(100, jnp.float32), max_iterations=1)
    with pytest.raises(SolveError, match=r"OUT_OF_ITERATIONS.*max_iterations.*1 iterations"):
        short.or_raise()
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), good, broken)
    with pytest.raises(SolveError, match=r"NONFINITE: path 1 of 2: .*the first 20 steps"):
        both.or_raise()
    with pytest.raises(SolveError, match=f"largest residual {float(short.residual):.3g}"):
        short.or_raise()


def test_every_status_has_a_message():
    for status in Status:
        assert len(status.message) > 20


@pytest.mark.parametrize("row", [DEER, JACOBI, by_name(SOLVERS, "deer, sliding")], ids=lambda row: row.name)
def test_a_guess_with_nan_in_it_is_only_a_bad_guess(row):
    problem = breakable(60, jnp.float32)
    wanted = flat(sequential_path(problem), 60)
    for bad in (np.nan, np.inf, -np.inf):
        guess = jnp.asarray(wanted).at[10:20, 1].set(bad)
        solution = run(row, problem, guess=guess)
        assert verdict(solution) is Status.CONVERGED
        assert within(flat(solution.states, 60) - wanted, wanted, 16 * DEFAULT_ULPS).all()


def test_the_right_guess_costs_one_look():
    problem = by_name(DYNAMICS, "linear").build(17, jnp.float32)
    solution = run(JACOBI, problem, guess=sequential_path(problem))
    assert verdict(solution) is Status.CONVERGED and int(solution.iterations) == 0
