"""Forgetting: Lyapunov exponents against known ones, meeting times against brute force, advice that keeps its word."""

import functools
import math

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc.engine.dynamics import Dynamics, rollout
from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.windows import AllAtOnce, Windows
from partime_mcmc.forgetting import advise, distances, lyapunov, meeting_times
from partime_mcmc.forgetting.coalescence import expected_max_meeting_time, survival_time
from partime_mcmc.kernels import from_blackjax
from partime_mcmc.kernels.multishift_hmc import hmc_cycle
from partime_mcmc.solvers import Sequential, Shooting


def _linear(params, state, drive):
    return params @ state + drive


def _network(params, state, drive):
    return jnp.tanh(params @ state) + drive


def _logistic_map(params, state, drive):
    del drive
    return params * state * (1 - state)


def _piecewise_constant(params, state, drive):
    return jnp.round(params * state) + drive


def _normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.cache
def _exponent(step, num_directions=1):
    @jax.jit
    def run(params, initial, drives, key):
        dynamics = Dynamics(step, params)
        return lyapunov(
            dynamics,
            initial,
            rollout(dynamics, initial, drives),
            drives,
            key=key,
            num_directions=num_directions,
        )

    return run


# Lyapunov exponents


def test_exponent_of_a_linear_system(precision):
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    matrix = jnp.asarray(rotation @ np.diag([0.9, -0.5, 0.2]) @ rotation.T, precision)
    found = _exponent(_linear)(
        matrix, jnp.ones(3, precision), _normal(1, (2000, 3), precision), jax.random.key(0)
    )
    assert found.exponent.dtype == precision
    np.testing.assert_allclose(found.exponent, math.log(0.9), atol=1e-5)
    assert found.standard_error < 1e-5 and found.num_zero == 0 and found.num_nonfinite == 0


def test_exponent_of_an_unstable_linear_system():
    matrix = jnp.asarray([[1.02, 5.0], [0.0, 0.3]])
    found = _exponent(_linear, 3)(matrix, jnp.zeros(2), jnp.zeros((1000, 2)), jax.random.key(1))
    np.testing.assert_allclose(found.exponent, math.log(1.02), atol=1e-4)


def test_exponent_of_the_logistic_map_and_its_error(double):
    errors = []
    for seed in range(12):
        start = jnp.asarray(np.random.default_rng(seed).uniform(0.1, 0.9), double)
        found = _exponent(_logistic_map)(
            jnp.asarray(4.0, double), start, jnp.arange(4096), jax.random.key(seed)
        )
        assert 1e-4 < found.standard_error < 0.05
        errors.append(float((found.exponent - math.log(2)) / found.standard_error))
    # The batch means of this map are negatively correlated, which makes the error an upper bound here.
    assert max(map(abs, errors)) < 4


def test_error_of_the_mean_covers(double):
    # An AR(1) with random coefficients: the growth rates are independent, their mean is known.
    def step(params, state, drive):
        return jnp.exp(drive) * state

    misses = []
    for seed in range(20):
        drives = -0.1 + 0.5 * _normal(seed, (1024,), double)
        found = _exponent(step)(None, jnp.ones((), double), drives, jax.random.key(seed))
        misses.append(abs(float(found.exponent) + 0.1) / float(found.standard_error))
    assert sum(miss < 2.5 for miss in misses) >= 17 and sum(miss > 0.5 for miss in misses) >= 5


_step_names = {"contractive": (0.5, -1), "chaotic": (6.0, 1)}


@pytest.mark.parametrize("kind", _step_names)
def test_sign_of_the_exponent_of_networks(kind):
    gain, sign = _step_names[kind]
    weights = gain / math.sqrt(16) * _normal(2, (16, 16))
    found = _exponent(_network)(
        weights, _normal(3, (16,)), 0.1 * _normal(4, (1500, 16)), jax.random.key(0)
    )
    assert np.sign(found.exponent) == sign
    assert abs(found.exponent) > 5 * found.standard_error > 0


def test_exponent_of_a_piecewise_constant_map_is_minus_infinity():
    found = _exponent(_piecewise_constant)(
        jnp.asarray(0.5), jnp.asarray(3.0), jnp.ones(200), jax.random.key(0)
    )
    assert found.exponent == -np.inf and np.isnan(found.standard_error) and found.num_zero > 0


def test_exponent_of_a_derivative_that_is_not_finite():
    def step(params, state, drive):
        return jnp.sqrt(jnp.abs(state)) * drive

    found = _exponent(step)(None, jnp.asarray(1.0), jnp.zeros(100), jax.random.key(0))
    assert np.isnan(found.exponent) and found.num_nonfinite > 0


def test_lyapunov_refuses_what_it_cannot_use():
    dynamics = Dynamics(_linear, jnp.eye(2))
    with pytest.raises(ValueError, match="num_directions"):
        lyapunov(
            dynamics,
            jnp.zeros(2),
            jnp.zeros((5, 2)),
            jnp.zeros((5, 2)),
            key=jax.random.key(0),
            num_directions=0,
        )
    with pytest.raises(ValueError, match="common length"):
        lyapunov(
            dynamics, jnp.zeros(2), jnp.zeros((5, 2)), jnp.zeros((6, 2)), key=jax.random.key(0)
        )
    with pytest.raises(ValueError, match="at least 2"):
        lyapunov(
            dynamics, jnp.zeros(2), jnp.zeros((1, 2)), jnp.zeros((1, 2)), key=jax.random.key(0)
        )


# Meeting times


def test_meeting_times_against_brute_force(precision):
    weights = 0.6 * _normal(5, (4, 4), precision) / 2
    dynamics = Dynamics(_network, weights)
    starts, others = 3 * _normal(6, (5, 4), precision), 3 * _normal(7, (5, 4), precision)
    drives = _normal(8, (5, 300, 4), precision)
    bound = 256 * float(jnp.finfo(precision).eps)
    found = meeting_times(dynamics, starts, others, drives, tolerance=Tolerance(bound, bound))
    paths = [
        jax.jit(jax.vmap(lambda a, u: rollout(dynamics, a, u)))(begin, drives)
        for begin in (starts, others)
    ]
    a, b = (np.asarray(path) for path in paths)
    near = (np.abs(a - b) <= bound * (1 + np.abs(b))).all(axis=2)
    assert near.any(axis=1).all() and bool(found.met.all())
    # A batch of another width may round otherwise, which moves a meeting by a step at most.
    np.testing.assert_allclose(found.steps, near.argmax(axis=1) + 1, atol=1)
    gaps = distances(dynamics, starts, others, drives)
    assert gaps.shape == (5, 300)
    np.testing.assert_allclose(gaps, np.abs(a - b).max(axis=2), atol=1e-5)
    np.testing.assert_allclose(
        found.distance, np.asarray(gaps)[np.arange(5), np.asarray(found.steps) - 1], atol=bound
    )


def test_shared_drives_and_drives_of_each_pair_agree():
    dynamics = Dynamics(_network, 0.3 * _normal(9, (4, 4)))
    starts, others, drives = _normal(10, (3, 4)), _normal(11, (3, 4)), _normal(12, (100, 4))
    shared = meeting_times(dynamics, starts, others, drives)
    apart = meeting_times(dynamics, starts, others, jnp.broadcast_to(drives, (3, 100, 4)))
    np.testing.assert_array_equal(shared.steps, apart.steps)
    assert distances(dynamics, starts, others, drives).shape == (3, 100)


def test_equal_starts_meet_at_once_and_nan_never():
    dynamics = Dynamics(_network, 0.3 * _normal(9, (4, 4)))
    starts = _normal(13, (3, 4))
    others = starts.at[1].add(1.0).at[2, 0].set(jnp.nan)
    found = meeting_times(
        dynamics, starts, others, _normal(14, (200, 4)), tolerance=Tolerance(1e-6, 1e-6)
    )
    assert found.steps[0] == 0 and found.met.tolist() == [True, True, False]
    assert found.distance[0] == 0 and np.isnan(found.distance[2])
    # Nobody waits for a NaN: the loop ended when the second pair had met.
    assert found.steps[2] == found.steps[1] < 200


def test_pairs_that_do_not_meet_say_how_far_apart_they_are():
    dynamics = Dynamics(_linear, jnp.eye(2))
    found = meeting_times(
        dynamics,
        jnp.zeros((2, 2)),
        jnp.asarray([[1.0, 3.0], [0.0, 2.0]]),
        jnp.ones((50, 2)),
        max_steps=20,
        scale=jnp.asarray([1.0, 2.0]),
    )
    assert not found.met.any() and found.steps.tolist() == [20, 20]
    np.testing.assert_allclose(found.distance, [1.5, 1.0])


def test_states_may_be_trees():
    def step(params, state, drive):
        return {"a": 0.5 * state["a"] + drive, "b": 0.1 * state["b"] + state["a"].sum()}

    starts = {"a": _normal(15, (3, 2)), "b": _normal(16, (3,))}
    others = jax.tree.map(lambda leaf: leaf + 1, starts)
    found = meeting_times(Dynamics(step), starts, others, _normal(17, (100, 2)))
    assert found.met.all() and (found.steps < 40).all()


def test_meeting_times_refuses_what_does_not_fit():
    dynamics = Dynamics(_network, jnp.eye(4))
    with pytest.raises(ValueError, match="drives"):
        meeting_times(dynamics, jnp.zeros((3, 4)), jnp.ones((3, 4)), jnp.zeros((2, 10, 4)))
    with pytest.raises(ValueError, match="others"):
        meeting_times(dynamics, jnp.zeros((3, 4)), jnp.ones((2, 4)), jnp.zeros((10, 4)))
    with pytest.raises(ValueError, match="pairs"):
        meeting_times(dynamics, jnp.zeros((0, 4)), jnp.zeros((0, 4)), jnp.zeros((10, 4)))
    with pytest.raises(ValueError, match="max_steps"):
        meeting_times(
            dynamics, jnp.zeros((3, 4)), jnp.ones((3, 4)), jnp.zeros((10, 4)), max_steps=0
        )


# Kernels


def _gaussian(x):
    return -0.5 * jnp.sum(x**2)


def _rosenbrock(x):
    return -((1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2) / 20


_EFFECT, _ERROR = (
    np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
)


def _eight_schools(x):
    mu, log_tau, theta = 3.3 * x[0] + 4.4, 1.1 * x[1] + 0.8, x[2:]
    tau = jnp.exp(log_tau)
    misfit = (jnp.asarray(_EFFECT, x.dtype) - mu - tau * theta) / jnp.asarray(_ERROR, x.dtype)
    return (
        -0.5 * (mu / 5) ** 2
        - jnp.log1p((tau / 5) ** 2)
        + log_tau
        - 0.5 * jnp.sum(theta**2)
        - 0.5 * jnp.sum(misfit**2)
    )


def _system(algorithm, dimension, num_steps):
    """A kernel as dynamics, a start and the random numbers of one chain."""
    kernel = from_blackjax(algorithm)
    state = kernel.init(jnp.zeros(dimension))
    return kernel.dynamics(), kernel.carry(state), kernel.tape(jax.random.key(0), num_steps, state)


@functools.cache
def _schools_hmc(num_steps=16384):
    return _system(blackjax.hmc(_eight_schools, 0.4, jnp.ones(10), 4), 10, num_steps)


def test_mala_on_a_gaussian_meets_and_a_random_walk_does_not():
    starts, others = 2 * _normal(20, (6, 5)), 2 * _normal(21, (6, 5))
    dynamics, _, tape = _system(blackjax.mala(_gaussian, 0.3), 5, 1000)
    found = meeting_times(dynamics, starts, others, tape)
    assert found.met.all() and found.steps.max() < 300
    walk = blackjax.additive_step_random_walk(
        _gaussian, blackjax.mcmc.random_walk.normal(0.8 * jnp.ones(5))
    )
    dynamics, _, tape = _system(walk, 5, 1000)
    found = meeting_times(dynamics, starts, others, tape)
    assert not found.met.any() and (found.distance > 0.05).all()


def test_pairs_begin_with_the_first_random_numbers():
    """A kernel that counts: its Langevin step comes after every third transition, in which chains meet, and in no other."""
    dynamics, _, tape = _system(hmc_cycle(_gaussian, 0.5, 3, 0.5, 3), 2, 60)
    starts, others = 2 * _normal(22, (6, 2)), 2 * _normal(23, (6, 2))
    found = meeting_times(dynamics, starts, others, tape, tolerance=Tolerance(0.0, 0.0))
    a, b = (jax.vmap(lambda x: rollout(dynamics, x, tape))(x) for x in (starts, others))
    same = np.asarray((a == b).all(axis=2))
    assert same[:, -1].all() and (found.steps % 3 == 0).all()
    np.testing.assert_array_equal(found.steps, same.argmax(axis=1) + 1)


# Advice


def _starts(dimension, count=8):
    return _normal(22, (count, dimension))


def test_forgetful_chains_are_solved_in_parallel_and_the_same_question_gets_the_same_answer():
    dynamics, initial, tape = _schools_hmc()
    ask = functools.partial(advise, dynamics, initial, tape, starts=_starts(10), num_steps=16384)
    advice = ask()
    assert (
        advice.parallel and isinstance(advice.solver, Shooting) and advice.schedule == AllAtOnce()
    )
    assert advice.num_segments * advice.solver.steps == 16384
    assert advice.num_segments == 2 ** round(math.log2(advice.num_segments))
    assert 16 <= advice.num_segments <= 256 and advice.meeting.worst <= advice.solver.steps
    assert 1 < advice.evaluations_per_step < 2.5
    assert advice.meeting.fraction_met == 1 and advice.meeting.median <= advice.meeting.worst
    text = str(advice)
    for number in (
        f"{advice.num_segments}",
        f"{advice.evaluations_per_step:.2f}",
        f"{advice.meeting.median:.0f} steps",
        "16 of 16",
    ):
        assert number in text
    assert ask() == advice
    solution = jax.jit(lambda: solve(dynamics, initial, tape, solver=advice.solver))()
    assert solution.status == 0
    # What was promised is what it takes, within the spread of a maximum.
    assert 0.6 * advice.depth < solution.stats.depth < 1.6 * advice.depth


def test_chains_and_segments_share_the_device():
    dynamics, initial, tape = _schools_hmc()
    few, many, crowd = (
        advise(dynamics, initial, tape, starts=_starts(10), num_steps=16384, num_chains=num_chains)
        for num_chains in (1, 64, 1024)
    )
    assert few.num_segments > many.num_segments > 1
    assert not crowd.parallel and isinstance(crowd.solver, Sequential)
    assert "1024 chains side by side already fill the device" in crowd.reason


def test_chains_that_are_too_short_for_what_they_must_forget_stay_sequential():
    dynamics, initial, tape = _schools_hmc()
    advice = advise(dynamics, initial, tape, starts=_starts(10), num_steps=100)
    assert not advice.parallel and advice.meeting.fraction_met == 1
    assert str(advice).startswith("Run sequentially. ") and "100 steps are too short" in str(advice)


@pytest.mark.parametrize("name", ["random walk", "long paths on Rosenbrock"])
def test_chains_that_do_not_forget_stay_sequential_for_a_stated_reason(name):
    if name == "random walk":
        algorithm, dimension = (
            blackjax.additive_step_random_walk(
                _gaussian, blackjax.mcmc.random_walk.normal(0.8 * jnp.ones(5))
            ),
            5,
        )
    else:
        algorithm, dimension = blackjax.hmc(_rosenbrock, 0.1, jnp.ones(2), 40), 2
    dynamics, initial, tape = _system(algorithm, dimension, 512)
    advice = advise(dynamics, initial, tape, starts=_starts(dimension), num_steps=8192)
    assert not advice.parallel and isinstance(advice.solver, Sequential)
    assert advice.depth == 8192 and advice.meeting.fraction_met < 0.9
    unmet = round(16 * (1 - advice.meeting.fraction_met))
    assert f"512 steps with the same random numbers {unmet} of 16 pairs" in advice.reason
    assert "standard deviations" in advice.reason and "do not forget" in str(advice)


def test_starts_that_are_not_finite_are_reported():
    dynamics = Dynamics(_network, 0.3 * _normal(9, (4, 4)))
    advice = advise(
        dynamics, jnp.full(4, jnp.nan), _normal(25, (600, 4)), starts=_starts(4), num_steps=600
    )
    assert not advice.parallel and "8 of 16 pairs left the finite numbers" in advice.reason


def test_long_paths_are_cut_to_what_memory_holds(double):
    dynamics = Dynamics(_network, 0.3 * _normal(9, (4, 4), double))
    advice = advise(
        dynamics,
        jnp.zeros(4),
        _normal(26, (2000, 4), double),
        starts=_starts(4),
        num_steps=10**9,
        max_bytes=2**32,
    )
    assert isinstance(advice.schedule, Windows)
    assert 2**31 < 6 * advice.schedule.size * 4 * 8 <= 2**32
    assert f"window of {advice.schedule.size:,} steps" in str(advice)


def test_starts_may_be_trees_or_flat():
    def step(params, state, drive):
        return {"a": 0.5 * state["a"] + drive, "b": 0.1 * state["b"] + state["a"].sum()}

    initial, drives = {"a": jnp.zeros(2), "b": jnp.zeros(())}, _normal(27, (1000, 2))
    as_tree = {"a": _normal(28, (4, 2)), "b": _normal(29, (4,))}
    as_array = jnp.concatenate([as_tree["a"], as_tree["b"][:, None]], axis=1)
    ask = functools.partial(advise, Dynamics(step), initial, drives, num_steps=1000)
    assert ask(starts=as_tree) == ask(starts=as_array)
    with pytest.raises(ValueError, match="starts"):
        ask(starts=as_array[:, :2])
    with pytest.raises(ValueError, match="starts"):
        ask(starts=as_array[:1])
    with pytest.raises(ValueError, match="num_steps"):
        advise(Dynamics(step), initial, drives, starts=as_tree, num_steps=0)
    with pytest.raises(ValueError, match="drives"):
        advise(Dynamics(step), initial, {}, starts=as_tree, num_steps=10)


def test_expected_largest_meeting_time_follows_the_tail():
    rng = np.random.default_rng(30)
    times = 20 + rng.exponential(10, size=2000)
    expected = np.mean([(20 + rng.exponential(10, size=256)).max() for _ in range(400)])
    assert expected_max_meeting_time(times, np.full(2000, True), 256) == pytest.approx(
        expected, rel=0.1
    )
    cut = np.minimum(times, 45)
    assert expected_max_meeting_time(cut, times < 45, 256) == pytest.approx(expected, rel=0.15)
    assert expected_max_meeting_time(np.full(16, 7), np.full(16, True), 1000) == 7


def test_survival_time_is_the_quantile_of_the_tail():
    times = 20 + np.random.default_rng(31).exponential(10, size=2000)
    for fraction in (0.5, 0.1, 0.01):
        found = survival_time(times, np.full(2000, True), fraction)
        assert found == pytest.approx(np.quantile(times, 1 - fraction), rel=0.1)


def test_pairs_that_begin_with_drives_of_their_own():
    """A drive of one step is a vector, of which the step takes the first two numbers apart from the third."""
    step = lambda a, x, u: a * x + u[:2] * u[2]
    drives = _normal(0, (3, 60, 3))
    starts, others = _normal(1, (3, 2)), _normal(2, (3, 2))
    dynamics = Dynamics(step, 0.5)
    found = meeting_times(dynamics, starts, others, drives, tolerance=Tolerance(1e-3, 0.0))
    for k in range(3):
        alone = meeting_times(
            dynamics,
            starts[k : k + 1],
            others[k : k + 1],
            drives[k],
            tolerance=Tolerance(1e-3, 0.0),
        )
        assert int(found.steps[k]) == int(alone.steps[0]) > 5
    assert np.asarray(found.met).all()


@pytest.mark.parametrize(
    "starts", [jnp.zeros(()), jnp.zeros((0, 2)), (jnp.zeros(2), jnp.zeros(3)), ()], ids=str
)
def test_pairs_that_begin_nowhere_are_refused(starts):
    dynamics = Dynamics(lambda params, x, u: x)
    with pytest.raises(ValueError, match="starts: leading axes .*, wanted one common number"):
        meeting_times(dynamics, starts, starts, jnp.zeros((5, 1)))
