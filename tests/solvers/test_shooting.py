"""Shooting: its two ends are known methods, its path is the chain, its counts of work are right, and it knows when to give up."""

import functools

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import (
    Dynamics,
    SlidingWindow,
    Status,
    Target,
    Tolerance,
    Windows,
    certify,
    deer,
    from_blackjax,
    mala,
    random_walk,
    residual,
    rollout,
    sample,
    sequential,
    shooting,
    solve,
)
from partime_mcmc.engine.solution import DEFAULT_ULPS
from partime_mcmc.kernels import blackjax_loop
from partime_mcmc.linearize import Clipped, DenseJacobian, HutchinsonDiagonal
from partime_mcmc.solvers.hoist import hoist_drive_only
from partime_mcmc.solvers.narrowing import widths
from partime_mcmc.solvers.sequential import finish_sequentially


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def tanh_network(gain=0.5, width=3):
    weights = gain * jax.random.orthogonal(jax.random.key(0), width).astype(float)
    return Dynamics(_tanh_step, weights)


def _tanh_step(weights, state, drive):
    return jnp.tanh(weights @ state) + drive


def logistic_map():
    return Dynamics(lambda _, state, drive: 4 * state * (1 - state) + 0 * drive)


def mala_chain(num_steps, step_size=0.35, key=1):
    kernel = from_blackjax(
        blackjax.mala(lambda x: -0.5 * jnp.sum(x**2) - 0.1 * jnp.sum(x**4), step_size)
    )
    state = kernel.init(jnp.ones(3))
    return kernel, state, kernel.tape(jax.random.key(key), num_steps, state)


DRIVES = jax.random.normal


def test_one_segment_is_the_sequential_chain():
    dynamics, drives = tanh_network(), jax.random.normal(jax.random.key(1), (200, 3))
    found = solve(dynamics, jnp.zeros(3), drives, solver=shooting(1)).or_raise()
    np.testing.assert_allclose(
        found.states, rollout(dynamics, jnp.zeros(3), drives), rtol=0, atol=1e-15
    )
    assert float(found.stats.evaluations) == 1.0 and int(found.stats.depth) == 200


def test_one_step_with_the_jacobian_is_deer():
    """The starts of pass k are DEER's iterate k, so both need the same number of passes (one more here: the last roll)."""
    dynamics, drives = tanh_network(0.95), jax.random.normal(jax.random.key(1), (300, 3))
    # One bound for both: in units of the path's own, meetings in segments shorter than 16 steps are judged more strictly.
    tolerance = Tolerance(absolute=DEFAULT_ULPS * float(jnp.finfo(drives.dtype).eps))
    newton = solve(dynamics, jnp.zeros(3), drives, solver=deer(), tolerance=tolerance).or_raise()
    shot = solve(
        dynamics,
        jnp.zeros(3),
        drives,
        solver=shooting(steps=1, correction=DenseJacobian()),
        tolerance=tolerance,
    ).or_raise()
    assert abs(int(shot.iterations) - int(newton.iterations)) <= 1 < int(newton.iterations)
    np.testing.assert_allclose(shot.states, newton.states, rtol=0, atol=1e-12)
    # Without the correction the same segments need many more passes: the agreement above is the correction's doing.
    plain = solve(dynamics, jnp.zeros(3), drives, solver=shooting(steps=1))
    assert int(plain.iterations) > 2 * int(newton.iterations)


@pytest.mark.parametrize("num_steps", [1, 2, 63, 64, 257])
@pytest.mark.parametrize(
    "solver",
    [
        shooting(),
        shooting(5),
        shooting(steps=7),
        shooting(1000),
        shooting(steps=16, correction=Clipped(DenseJacobian())),
    ],
    ids=str,
)
def test_any_length_and_any_cut_give_the_path(solver, num_steps):
    dynamics, drives = tanh_network(), jax.random.normal(jax.random.key(1), (num_steps, 3))
    found = solve(dynamics, jnp.zeros(3), drives, solver=solver).or_raise()
    # An error within the tolerance at a meeting is carried on by a map that halves it every step.
    np.testing.assert_allclose(
        found.states, rollout(dynamics, jnp.zeros(3), drives), rtol=0, atol=1e-12
    )
    measured = float(jnp.max(residual(dynamics, jnp.zeros(3), found.states, drives)))
    assert measured <= float(found.residual) + 1e-15


def test_tolerance_zero_leaves_no_gap_anywhere():
    dynamics, drives = tanh_network(), jax.random.normal(jax.random.key(1), (500, 3))
    found = solve(
        dynamics, jnp.zeros(3), drives, solver=shooting(8), tolerance=Tolerance(0.0, 0.0)
    ).or_raise()
    assert float(found.residual) == 0.0
    loose = solve(
        dynamics, jnp.zeros(3), drives, solver=shooting(8), tolerance=Tolerance(0.0, 1e-3)
    ).or_raise()
    assert 0.0 < float(loose.residual) <= 1e-3
    assert float(loose.stats.evaluations) < float(found.stats.evaluations)
    # The residual reported is the one that an independent evaluation finds.
    measured = float(jnp.max(residual(dynamics, jnp.zeros(3), loose.states, drives)))
    assert measured == pytest.approx(float(loose.residual), abs=1e-14)


def test_evaluations_are_lanes_times_depth():
    dynamics, drives = tanh_network(), jax.random.normal(jax.random.key(1), (1000, 3))
    found = solve(dynamics, jnp.zeros(3), drives, solver=shooting(10)).or_raise()
    assert float(found.stats.evaluations) == pytest.approx(10 * int(found.stats.depth) / 1000)
    # A map that halves distances forgets 13 digits in some 45 steps.
    assert 100 < int(found.stats.depth) < 100 + 60


def _fading_step(_, state, drive):
    return drive[0] * state + drive[1:]


def test_lanes_that_have_met_are_let_go():
    """Few segments forget slowly: their lanes go on in a narrower loop, and the others cost nothing more."""
    steps, count = 64, 64
    fading = jnp.full((count, steps), 0.1).at[5::16].set(0.55)
    drives = jnp.concatenate(
        [fading.reshape(-1, 1), jax.random.normal(jax.random.key(1), (steps * count, 2))], axis=1
    )
    found = solve(Dynamics(_fading_step), jnp.zeros(2), drives, solver=shooting(count)).or_raise()
    np.testing.assert_allclose(
        found.states, rollout(Dynamics(_fading_step), jnp.zeros(2), drives), rtol=0, atol=1e-12
    )
    depth, evaluations = int(found.stats.depth), float(found.stats.evaluations)
    assert depth > steps + 40, "13 digits at 0.55 a step"
    # 0.1 forgets them in some 14 steps of 64 lanes; the four slow ones go on in 16.
    assert 1 + 13 / 64 < evaluations < 1 + (18 + (depth - steps) / 4) / 64
    # Chains must not decide about one another's rounding, so several of them keep all their lanes.
    assert (
        widths(count, 1) == (64, 16)
        and widths(1024, 1) == (1024, 256, 64, 16)
        and widths(1024, 2) == (1024,)
    )


def test_segments_that_are_open_in_a_later_pass_are_written_back():
    """Two segments hardly forget: from the third pass on only the second of them and its successor are rolled."""
    fading = jnp.full((64, 64), 0.1).at[5:7].set(0.9)
    noise = jax.random.normal(jax.random.key(1), (64 * 64, 2))
    drives = jnp.concatenate([fading.reshape(-1, 1), noise], axis=1)
    found = solve(Dynamics(_fading_step), jnp.zeros(2), drives, solver=shooting(64)).or_raise()
    assert int(found.iterations) >= 2
    truth = rollout(Dynamics(_fading_step), jnp.zeros(2), drives)
    np.testing.assert_allclose(found.states, truth, rtol=0, atol=1e-12)


def test_what_is_computed_ahead_has_the_parameters_of_the_step():
    weights = jax.random.normal(jax.random.key(0), (2, 3))
    dynamics = Dynamics(lambda w, x, u: jnp.tanh(0.5 * x + w @ u), weights)
    drives = jax.random.normal(jax.random.key(1), (96, 3))
    found = solve(dynamics, jnp.zeros(2), drives, solver=shooting(4)).or_raise()
    truth = rollout(dynamics, jnp.zeros(2), drives)
    np.testing.assert_allclose(found.states, truth, rtol=0, atol=1e-12)


def test_random_numbers_drawn_ahead_are_the_same():
    kernel, state, tape = mala_chain(50)
    cached, first = kernel.dynamics().cached, jax.tree.map(lambda leaf: leaf[0], tape)
    memory = jax.eval_shape(cached.init, None, state.position, first)
    ahead, rest = hoist_drive_only(cached.step, None, memory, first)

    @jax.jit
    def both(position, tape):
        values = jax.vmap(ahead, in_axes=(None, 0))(None, tape)
        at = functools.partial(jax.tree.map, lambda leaf: leaf[7])
        start = cached.init(None, position, at(tape))
        return values, cached.step(None, start, at(tape)), rest(None, start, at(values))

    values, wanted, got = both(state.position, tape)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(values)) == [(50,), (50, 3)], (
        "noise and accept uniform"
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-13), got, wanted)

    def minibatch(data, state, key):
        return 0.5 * state + data[jax.random.randint(key, (200,), 0, 1000)].mean(axis=0)

    # 200 rows per step are better gathered when they are needed: only what is small is kept.
    arguments = jnp.ones((1000, 3)), jnp.ones(3), jax.random.key(0)
    small = jax.eval_shape(hoist_drive_only(minibatch, *arguments)[0], arguments[0], arguments[2])
    assert sum(leaf.size for leaf in jax.tree.leaves(small)) <= 3
    kept, _ = hoist_drive_only(
        lambda data, state, key: data[jax.random.randint(key, (200,), 0, 1000)] @ state, *arguments
    )
    assert kept(arguments[0], arguments[2]) is arguments[2]


@pytest.mark.parametrize("width, most", [(8, 4 * 8 + 1), (1, 16 + 1)])
def test_what_is_kept_of_a_step_is_at_most_four_states(width, most):
    """Or sixteen numbers, and as much as the drive, which is kept as it is."""

    def is_cut(number):
        def step(params, x, u):
            return (jnp.exp(u * jnp.arange(number))[:, None] * x).sum(axis=0)

        arguments = None, jnp.ones(width, jnp.float32), jnp.float32(0.1)
        ahead, _ = hoist_drive_only(step, *arguments)
        return ahead(None, arguments[-1]) is not arguments[-1]

    assert is_cut(most) and not is_cut(most + 1)


def test_paths_are_finished_from_where_they_stop_being_exact():
    dynamics, drives = tanh_network(), jax.random.normal(jax.random.key(1), (3, 40, 3))
    starts = jnp.ones((3, 3))
    wanted = jax.vmap(functools.partial(rollout, dynamics))(starts, drives)
    exact = jnp.array([0, 17, 40])
    spoiled = jnp.where((jnp.arange(40) < exact[:, None])[..., None], wanted, jnp.nan)
    got, _ = finish_sequentially(dynamics, starts, spoiled, drives, exact)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(got[1, :17], wanted[1, :17])
    np.testing.assert_array_equal(got[2], wanted[2])


def test_proposals_outside_the_support_are_rejected():
    def logdensity(x):
        return jnp.select(
            [jnp.abs(x[0]) >= 1, jnp.abs(x[1]) >= 1], [-jnp.inf, jnp.nan], -0.5 * jnp.sum(x**2)
        )

    kernel = from_blackjax(blackjax.mala(logdensity, 0.3))
    state = kernel.init(jnp.full(2, 0.5))
    tape = kernel.tape(jax.random.key(3), 400, state)
    carries, info = jax.jit(lambda start, keys: blackjax_loop(kernel, start, keys))(
        state, tape.randomness
    )
    found = solve(kernel.dynamics(), kernel.carry(state), tape, solver=shooting(8)).or_raise()
    np.testing.assert_allclose(found.states, carries, rtol=0, atol=1e-10)
    certificate = certify(kernel, kernel.carry(state), found.states, tape)
    assert bool(certificate.certified) and float(jnp.abs(found.states).max()) < 1
    assert int(certificate.num_rejected) == int((~info.is_accepted).sum()) > 50
    assert int(certificate.num_nonfinite_proposals) > 50


def test_the_chain_is_blackjaxs_own_with_rejections():
    kernel, state, tape = mala_chain(2000)
    carries, info = jax.jit(lambda start, keys: blackjax_loop(kernel, start, keys))(
        state, tape.randomness
    )
    found = solve(kernel.dynamics(), kernel.carry(state), tape, solver=shooting(16)).or_raise()
    np.testing.assert_allclose(found.states, carries, rtol=0, atol=1e-10)
    certificate = certify(kernel, kernel.carry(state), found.states, tape)
    assert bool(certificate.certified) and int(certificate.num_rejected) > 20
    np.testing.assert_array_equal(certificate.accepted, info.is_accepted)
    assert float(found.stats.evaluations) < 2.0


def test_chains_share_the_lanes_and_one_bad_chain_harms_no_other():
    dynamics, drives = tanh_network(), jax.random.normal(jax.random.key(1), (8, 400, 3))
    starts = jnp.ones((8, 3))

    def run(starts, drives):
        return jax.vmap(lambda start, drive: solve(dynamics, start, drive, solver=shooting(8)))(
            starts, drives
        )

    good = jax.jit(run)(starts, drives)
    bad = jax.jit(run)(starts, drives.at[3, 200].set(jnp.nan))
    assert (np.asarray(good.status) == Status.CONVERGED).all()
    assert int(bad.status[3]) == Status.NONFINITE and int(bad.num_exact[3]) == 200
    others = np.arange(8) != 3
    assert (np.asarray(bad.status)[others] == Status.CONVERGED).all()
    np.testing.assert_array_equal(np.asarray(bad.states)[others], np.asarray(good.states)[others])


def test_every_chain_may_have_parameters_of_its_own():
    weights = jnp.stack([tanh_network(0.3).params, tanh_network(0.6).params])
    drives = jax.random.normal(jax.random.key(1), (200, 3))
    found = jax.vmap(
        lambda w: solve(Dynamics(_tanh_step, w), jnp.zeros(3), drives, solver=shooting(4))
    )(weights)
    for one, states in zip(weights, found.states):
        wanted = rollout(Dynamics(_tanh_step, one), jnp.zeros(3), drives)
        np.testing.assert_allclose(states, wanted, rtol=0, atol=1e-12)


def test_derivatives_do_not_depend_on_the_solver():
    drives = jax.random.normal(jax.random.key(1), (60, 3))

    def loss(weights, run):
        return jnp.sum(run(Dynamics(_tanh_step, weights)) ** 2)

    weights = tanh_network(0.7).params
    got = jax.grad(loss)(
        weights, lambda d: solve(d, jnp.zeros(3), drives, solver=shooting(4)).states
    )
    wanted = jax.grad(loss)(weights, lambda d: rollout(d, jnp.zeros(3), drives))
    np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", [Windows(150), SlidingWindow(150)], ids=str)
def test_time_can_be_cut(schedule):
    dynamics, drives = tanh_network(), jax.random.normal(jax.random.key(1), (500, 3))
    found = solve(dynamics, jnp.zeros(3), drives, solver=shooting(4), schedule=schedule).or_raise()
    np.testing.assert_allclose(
        found.states, rollout(dynamics, jnp.zeros(3), drives), rtol=0, atol=1e-12
    )


def test_chaos_is_given_up_and_the_exact_prefix_is_exact():
    drives = jnp.zeros(2000)
    found = solve(logistic_map(), jnp.array([0.3]), drives, solver=shooting(32))
    assert int(found.status) == Status.OUT_OF_ITERATIONS
    exact = int(found.num_exact)
    # Every pass adds a segment of 63 steps at least, and the budget of 4 + 256/63 evaluations allows some eight.
    assert 63 <= exact < 2000
    defects = residual(logistic_map(), jnp.array([0.3]), found.states, drives)
    assert float(defects[:exact].max()) < 1e-12 and float(defects[exact]) > 1e-6
    assert float(found.stats.evaluations) < 12


@pytest.mark.parametrize("num_chains", [1, 3])
def test_segments_that_are_exact_whatever_the_system_are_no_sign_of_forgetting(num_chains):
    """Of 16 segments of 64 steps four are exact after four passes, on a random walk too, whose paths never meet."""
    walk = Dynamics(lambda _, state, drive: state + drive)
    drives = jax.random.normal(jax.random.key(4), (num_chains, 1024, 2))
    starts = jnp.zeros((num_chains, 2))
    found = jax.jit(
        jax.vmap(lambda start, drives: solve(walk, start, drives, solver=shooting(steps=64)))
    )(starts, drives)
    assert (found.status == Status.OUT_OF_ITERATIONS).all()
    # The step from one segment to the next is not exact where the next begins elsewhere; the check adds a step.
    assert (found.num_exact == 255).all() and (found.stats.depth <= 257).all()
    np.testing.assert_array_less(found.stats.evaluations, 5.1)


def test_a_recurrence_that_overflows_is_not_finite_and_ends():
    for solver in (shooting(), shooting(steps=5), shooting(4, correction=DenseJacobian())):
        found = solve(
            Dynamics(lambda _, x, u: 1e10 * x + u), jnp.ones(1), jnp.ones(100), solver=solver
        )
        # 1e10 to the 31st is past the largest number of float64.
        assert int(found.status) == Status.NONFINITE and 29 <= int(found.num_exact) <= 31


def test_a_guess_that_overflows_harms_no_finite_path():
    def step(_, x, t):
        return jnp.where(
            t == 0, 0.0, jnp.where(jnp.abs(x) < 10, 0.5 * x + 1 + 0.1 * jnp.sin(t), x**3)
        )

    dynamics, start, drives = Dynamics(step), jnp.array([100.0]), jnp.arange(200)
    found = solve(dynamics, start, drives, solver=shooting(steps=20)).or_raise()
    np.testing.assert_allclose(found.states, rollout(dynamics, start, drives), rtol=0, atol=1e-12)


def test_corrections_make_slow_systems_converge():
    slow = Dynamics(_linear_step, 0.998 * jnp.eye(3))
    drives = jax.random.normal(jax.random.key(1), (4000, 3))
    plain = solve(slow, jnp.zeros(3), drives, solver=shooting(64))
    assert int(plain.status) == Status.OUT_OF_ITERATIONS
    for correction in (DenseJacobian(), HutchinsonDiagonal(1)):
        found = solve(
            slow, jnp.zeros(3), drives, solver=shooting(64, correction=correction)
        ).or_raise()
        assert int(found.iterations) <= 3 and float(found.stats.jvps) > 0
        np.testing.assert_allclose(
            found.states, rollout(slow, jnp.zeros(3), drives), rtol=0, atol=1e-9
        )


def _linear_step(matrix, state, drive):
    return matrix @ state + drive


def test_a_chain_that_never_moves_is_the_same_chain():
    kernel, state, tape = mala_chain(300, step_size=1e6)
    found = solve(kernel.dynamics(), kernel.carry(state), tape, solver=shooting(8)).or_raise()
    np.testing.assert_array_equal(found.states, jnp.ones((300, 3)))
    assert bool(certify(kernel, kernel.carry(state), found.states, tape).frozen)


def test_segments_shorter_than_a_burst_of_rejections():
    kernel, state, tape = mala_chain(600, step_size=1.2)
    carries, info = jax.jit(lambda start, keys: blackjax_loop(kernel, start, keys))(
        state, tape.randomness
    )
    runs = np.split(np.asarray(info.is_accepted), np.flatnonzero(np.asarray(info.is_accepted)))
    assert max(map(len, runs)) > 6
    found = solve(kernel.dynamics(), kernel.carry(state), tape, solver=shooting(steps=4)).or_raise()
    np.testing.assert_allclose(found.states, carries, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "error, arguments, words",
    [
        (ValueError, dict(num_segments=0), "num_segments: got 0; wanted an int of at least 1"),
        (ValueError, dict(num_segments=2, steps=3), "num_segments and steps: got both"),
        (TypeError, dict(steps=2.5), "steps: got 2.5 of type float; wanted an int of at least 1"),
    ],
)
def test_bad_arguments(error, arguments, words):
    with pytest.raises(error, match=words):
        shooting(**arguments)


def test_sampling_falls_back_where_chains_do_not_forget_and_the_advice_is_why():
    target = Target(lambda x: -0.5 * jnp.sum(x**2), lambda key: jax.random.normal(key, (4,)))
    run = functools.partial(
        sample,
        jax.random.key(0),
        target,
        # Three of the default windows.
        num_samples=3 * 16_384,
        num_chains=4,
        progress=False,
    )
    forgetful = run(mala(target.logdensity, 0.5)).or_raise()
    assert forgetful.advice.parallel and "shooting" in forgetful.plan["solver"].lower()
    assert forgetful.report.evaluations_per_sample < 3 and not forgetful.report.fallbacks
    walk = run(random_walk(target.logdensity, 0.8)).or_raise()
    assert not walk.advice.parallel and "forget" in str(walk.advice)
    # Two windows are tried; the rest of the run is the loop, with the same random numbers.
    assert "from step 32768 on all chains ran sequentially" in walk.report.fallbacks[-1]
    assert (np.asarray(walk.report.num_sequential) > 16_384).all()
    loop = run(random_walk(target.logdensity, 0.8), solver=sequential())
    np.testing.assert_array_equal(walk.info["accepted"], loop.info["accepted"])
    np.testing.assert_allclose(walk.positions, loop.positions, rtol=0, atol=1e-9)
