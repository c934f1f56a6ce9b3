"""Only a path that obeys the recurrence is called CONVERGED, and what fails says how."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import (
    DYNAMICS,
    QUICK,
    SOLVERS,
    Problem,
    SolverRow,
    by_name,
    flat,
    measured_residual,
    run,
    sequential_path,
    within,
)

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.recipes import deer, elk, jacobi
from partime_mcmc.engine.solution import DEFAULT_ULPS, SolveError, Status, Tolerance
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.windows import AllAtOnce
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


def _map(params, state, drive):
    """One scalar map for all faults, so that one program per solver serves them all."""
    image = (
        params * drive["linear"] * state + drive["logistic"] * state * (1 - state) + drive["shift"]
    )
    return jnp.where(drive["broken"], jnp.nan, image)


def scalar(num_steps, dtype, *, start=0.3, linear=0.0, logistic=0.0, shift=0.0, broken=()):
    """`x ← linear · x + logistic · x (1 − x) + shift`, NaN at the steps `broken`."""
    flags = np.zeros(num_steps, bool)
    flags[list(broken)] = True
    drives = {
        name: jnp.asarray(np.broadcast_to(value, num_steps), dtype)
        for name, value in (("linear", linear), ("logistic", logistic), ("shift", shift))
    }
    drives["broken"] = jnp.asarray(flags)
    return Problem(Dynamics(_map, jnp.ones((), dtype)), jnp.asarray(start, dtype), drives)


NUM_STEPS = 2000
NOISE = np.random.default_rng(0).normal(size=NUM_STEPS)
# Grows by 1.1 for 1,000 steps, then forgets: 1.1^1000 is 2e41, beyond float32 and far from the end of float64.
BURST = np.where(np.arange(NUM_STEPS) < 1000, 1.1, 0.5)


@every_solver
def test_nan_at_step_500_is_found_there(row):
    # Drives 0 and 499 are those of steps 1 and 500.
    for broken, exact in (((499,), 499), ((0, 300), 0), ((700, 720), 700)):
        problem = scalar(NUM_STEPS, jnp.float32, linear=0.3, shift=NOISE, broken=broken)
        solution = run(row, problem)
        if row.name == "picard":
            # The identity is a poor linear part here: Picard does not get as far as step 500 in 200 passes.
            assert verdict(solution) in (Status.NONFINITE, Status.OUT_OF_ITERATIONS)
            assert int(solution.num_exact) <= exact
        else:
            assert verdict(solution) is Status.NONFINITE
            assert int(solution.num_exact) == exact
        assert np.isnan(solution.residual)
        assert_honest(problem, solution, NUM_STEPS)
        wanted = sequential_path(problem)[:exact]
        assert np.isfinite(wanted).all()
        exact = int(solution.num_exact)
        assert within(
            (solution.states[:exact] - wanted[:exact])[:, None],
            wanted[:exact, None],
            2 * DEFAULT_ULPS,
        ).all()
    # The same program, unbroken, goes through: the verdicts above are not the solver's failure.
    if row.name != "picard":
        assert (
            verdict(run(row, scalar(NUM_STEPS, jnp.float32, linear=0.3, shift=NOISE)))
            is Status.CONVERGED
        )


@pytest.mark.parametrize("row", [DEER, JACOBI, SEQUENTIAL], ids=lambda row: row.name)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_start_that_is_not_finite(row, value):
    solution = run(row, scalar(NUM_STEPS, jnp.float32, start=value, linear=0.3, shift=NOISE))
    assert verdict(solution) is Status.NONFINITE and int(solution.num_exact) == 0


@every_solver
def test_overflow_of_the_system_itself(row):
    problem = scalar(NUM_STEPS, jnp.float32, start=1.0, linear=BURST, shift=0.01)
    overflow = int(np.argmin(np.isfinite(sequential_path(problem))))
    assert 900 < overflow < 1000
    solution = run(row, problem)
    assert verdict(solution) is not Status.CONVERGED
    assert_honest(problem, solution, NUM_STEPS)
    assert int(solution.num_exact) <= overflow
    if row.name in ("sequential", "deer", "quasi-deer, windows"):
        # These reach the end of the numbers exactly, and the verdict is that it is the system that leaves them.
        assert verdict(solution) is Status.NONFINITE and int(solution.num_exact) == overflow


@pytest.mark.parametrize("row", [DEER, SEQUENTIAL], ids=lambda row: row.name)
def test_growth_that_float64_can_hold(row, double):
    problem = scalar(NUM_STEPS, double, start=1.0, linear=BURST, shift=0.01)
    solution = run(row, problem)
    assert verdict(solution) is Status.CONVERGED
    assert_honest(problem, solution, NUM_STEPS)
    np.testing.assert_allclose(
        solution.states, sequential_path(problem), rtol=1e-11
    )  # 2,000 roundings of 2e-16 each


@every_solver
def test_chaos_is_never_called_converged_wrongly(row):
    problem = scalar(NUM_STEPS, jnp.float32, logistic=4.0)
    solution = run(row, problem)
    assert_honest(problem, solution, NUM_STEPS)
    if row.name == "sequential" or row.newton_like and row.schedule != AllAtOnce():
        # A window shorter than the bound on passes is exact by the theorem, chaos or not.
        assert verdict(solution) is Status.CONVERGED
    else:
        assert verdict(solution) is not Status.CONVERGED


@pytest.mark.parametrize("name", ["sequential", "deer, sliding", "elk", "picard"])
def test_one_iteration_is_not_enough(name):
    row, problem = (
        by_name(SOLVERS, name),
        scalar(100, jnp.float32, linear=0.3, logistic=0.2, shift=0.1 * NOISE[:100]),
    )
    solution = run(row, problem, max_iterations=1)
    assert_honest(problem, solution, 100)
    if row.name == "sequential":
        assert verdict(solution) is Status.CONVERGED
    else:
        windows = -(-100 // row.schedule.window(100))
        assert verdict(solution) is Status.OUT_OF_ITERATIONS and int(solution.iterations) == windows


def test_a_small_update_is_not_a_small_residual(double):
    """Updates of some roundings: a test on updates would stop at once, at a path that is wrong."""

    @pytree()
    class Timid:
        inner: object = jacobi()

        def init(self, initial, states):
            return self.inner.init(initial, states)

        def step(self, dynamics, initial, states, drives, state, **context):
            proposal, state = self.inner.step(dynamics, initial, states, drives, state, **context)
            return dataclasses.replace(
                proposal, states=states + 1e-15 * (proposal.states - states)
            ), state

        def jvps(self, dimension):
            return 0

    problem = by_name(DYNAMICS, "tanh network").build(17, double)
    solution = run(SolverRow("timid", Timid(), newton_like=False), problem)
    assert verdict(solution) in (Status.OUT_OF_ITERATIONS, Status.STALLED)
    assert_honest(problem, solution, 17)


@pytest.mark.parametrize(
    "row, dtype", [(DEER, "float32"), (JACOBI, "float64")], ids=["deer", "jacobi"]
)
def test_tolerance_zero_asks_for_every_bit(row, dtype):
    with jax.enable_x64(dtype == "float64"):
        problem = by_name(DYNAMICS, "tanh network").build(100, jnp.dtype(dtype))
        usual = DEFAULT_ULPS * float(jnp.finfo(dtype).eps)
        exact, loose = (
            run(row, problem, tolerance=Tolerance(size, size), max_iterations=100)
            for size in (0.0, usual)
        )
        assert verdict(exact) is verdict(loose) is Status.CONVERGED
        assert float(exact.residual) == 0
        assert int(exact.iterations) > int(loose.iterations)


def test_a_tolerance_in_units_of_each_coordinate(double):
    problem = by_name(DYNAMICS, "tanh network").build(17, double)
    absolute = np.array([1e-3, 1e-9, 1e-9, 1e-9])
    solution = run(JACOBI, problem, tolerance=Tolerance(0.0, absolute), max_iterations=17)
    assert verdict(solution) is Status.CONVERGED
    assert (np.abs(measured_residual(problem, solution.states)) <= absolute * (1 + 1e-6)).all()


def test_below_the_floor_is_never_called_converged():
    # A trust region with constant damping holds on to its last rounding errors and may loop among them.
    problem = by_name(DYNAMICS, "AR(1)").build(60, jnp.float32)
    solution = run(
        by_name(SOLVERS, "quasi-elk, constant damping"), problem, tolerance=Tolerance(0.0, 0.0)
    )
    assert verdict(solution) in (Status.STALLED, Status.OUT_OF_ITERATIONS, Status.CONVERGED)
    assert (verdict(solution) is Status.CONVERGED) == (float(solution.residual) == 0)
    assert_honest(problem, solution, 60, ulps=8)


@pytree()
class TwoCycle:
    """A linearisation that overshoots and returns: x̂ ← c − x̂ for a path c that nobody meets."""

    def init(self, initial, states):
        return ()

    def step(self, dynamics, initial, states, drives, state, **context):
        proposal, state = jacobi().step(dynamics, initial, states, drives, state, **context)
        return dataclasses.replace(proposal, states=1.5 - states), state

    def jvps(self, dimension):
        return 0


def test_a_cycle_stalls_long_before_the_iterations_run_out():
    problem = by_name(DYNAMICS, "tanh network").build(17, jnp.float32)
    solution = run(
        SolverRow("two-cycle", TwoCycle(), newton_like=False), problem, max_iterations=150
    )
    assert verdict(solution) is Status.STALLED and int(solution.iterations) < 10
    assert_honest(problem, solution, 17)


def _root(params, state, drive):
    noise, back_to_zero = drive
    # |x| as sqrt(x²): at x = 0 its value is 0 and its derivative 0/0.
    return jnp.where(back_to_zero, 0.0, params * jnp.sqrt(state**2) + noise)


@pytest.mark.parametrize(
    "row", [row for row in SOLVERS if row.schedule == AllAtOnce()][:6], ids=lambda row: row.name
)
def test_a_nan_jacobian_is_counted_and_poisons_nothing(row):
    noise = jnp.asarray(np.random.default_rng(0).normal(size=40), jnp.float32)
    problem = Problem(
        Dynamics(_root, jnp.float32(0.5)), jnp.float32(1.0), (noise, jnp.arange(40) % 7 == 3)
    )
    solution = run(row, problem)
    assert verdict(solution) is Status.CONVERGED
    assert_honest(problem, solution, 40)
    wanted = flat(sequential_path(problem), 40)
    assert within(flat(solution.states, 40) - wanted, wanted, 16 * DEFAULT_ULPS).all()
    # A trust region approaches 0 and never lands on it, and these need no derivative.
    sees_it = row.newton_like and row.name not in ("picard", "jacobi")
    assert (int(solution.stats.num_replaced_jacobians) > 0) == sees_it
    # Without that, NaN would reach every later update, and those would fall back on Jacobi's.
    assert int(solution.stats.num_replaced_updates) == 0


@pytest.mark.parametrize("solver", [deer(), elk()], ids=["deer", "elk"])
def test_one_bad_path_leaves_the_others_as_they_were(solver):
    problem = scalar(60, jnp.float32, linear=0.4, logistic=0.1, shift=0.1 * NOISE[:60])
    starts = jnp.asarray(np.random.default_rng(1).normal(size=8), jnp.float32)
    flags = jnp.zeros((8, 60), bool)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def batched(starts, flags):
        return jax.vmap(
            lambda start, flag: solve(
                problem.dynamics, start, problem.drives | {"broken": flag}, solver=solver
            )
        )(starts, flags)

    healthy = batched(starts, flags)
    others = np.arange(8) != 3
    for sick in (
        batched(starts.at[3].set(jnp.nan), flags),
        batched(starts, flags.at[3, 20].set(True)),
        batched(starts.at[3].set(3e38), flags),
    ):
        assert list(np.asarray(sick.status)) == [0, 0, 0, Status.NONFINITE, 0, 0, 0, 0]
        for got, wanted in zip(jax.tree.leaves(sick), jax.tree.leaves(healthy)):
            np.testing.assert_array_equal(np.asarray(got)[others], np.asarray(wanted)[others])


def test_or_raise_says_what_where_and_how_much():
    good = run(DEER, scalar(NUM_STEPS, jnp.float32, linear=0.3, shift=NOISE))
    assert good.or_raise() is good
    broken = run(DEER, scalar(NUM_STEPS, jnp.float32, linear=0.3, shift=NOISE, broken=[20]))
    with pytest.raises(
        SolveError, match=r"NONFINITE: the path: .*residual nan, the first 20 steps are exact"
    ):
        broken.or_raise()
    short = run(
        by_name(SOLVERS, "picard"),
        scalar(100, jnp.float32, linear=0.3, logistic=0.5),
        max_iterations=1,
    )
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


@pytest.mark.parametrize(
    "row", [DEER, JACOBI, by_name(SOLVERS, "deer, sliding")], ids=lambda row: row.name
)
def test_a_guess_with_nan_in_it_is_only_a_bad_guess(row):
    problem = by_name(DYNAMICS, "accept or reject").build(60, jnp.float32)
    wanted = sequential_path(problem)
    for bad in (np.nan, np.inf, -np.inf):
        guess = jnp.asarray(wanted).at[10:20, 1].set(bad)
        solution = run(row, problem, guess=guess)
        assert verdict(solution) is Status.CONVERGED
        assert within(solution.states - wanted, wanted, 16 * DEFAULT_ULPS).all()


def test_the_right_guess_costs_one_look():
    problem = by_name(DYNAMICS, "linear").build(17, jnp.float32)
    solution = run(JACOBI, problem, guess=sequential_path(problem))
    assert verdict(solution) is Status.CONVERGED and int(solution.iterations) == 0


def test_a_path_of_no_steps_is_solved():
    decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
    found = solve(decay, jnp.ones(2), jnp.zeros((0, 2)), solver=deer())
    assert int(found.status) == Status.CONVERGED and int(found.iterations) == 0
    assert found.states.shape == (0, 2)
