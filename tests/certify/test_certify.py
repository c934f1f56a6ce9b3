"""Certificates: every way in which a path can be wrong shows, in the field that is meant to show it, and nothing else does."""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.mcmc.random_walk import normal
from catalogue import QUICK

from partime_mcmc.certify.certificate import _of_rank, _spread, describe_certification
from partime_mcmc.certify.independent import certify, certify_held, certify_with_records, hold
from partime_mcmc.certify.step_record import record
from partime_mcmc.engine.dynamics import rollout
from partime_mcmc.engine.recipes import jacobi, quasi_deer
from partime_mcmc.engine.solution import Status
from partime_mcmc.engine.solve import solve
from partime_mcmc.kernels import Kernel, Tape, Whitening, blackjax_loop, from_blackjax, hmc, mala

T, STEP = 80, 0.55


def gaussian(x):
    """A correlated normal density in two dimensions."""
    return -0.5 * (1.3 * x[0] ** 2 - 1.0 * x[0] * x[1] + 0.9 * x[1] ** 2)


@pytest.fixture(autouse=True)
def in_float64(request):
    """Float64 in every test here but those that take `precision`."""
    if "precision" in request.fixturenames:
        yield
    else:
        with jax.enable_x64(True):
            yield


@functools.cache
def run_of(name, num_steps=T, seed=0):
    """A kernel by name with its tape, its sequential path and a compiled certificate of any path, in float64."""
    kernel = {
        "mala": lambda: mala(gaussian, STEP),
        "whitened mala": lambda: mala(
            gaussian,
            STEP,
            Whitening.of_covariance(jnp.zeros(2), jnp.ones(2), jnp.array([[4.0, 1.0], [1.0, 2.0]])),
        ),
        "hmc": lambda: hmc(gaussian, 1.4, jnp.ones(2), 2),
        "frozen mala": lambda: mala(gaussian, 1e6),
        "dynamic hmc": lambda: from_blackjax(
            blackjax.dynamic_hmc(
                gaussian,
                0.9,
                jnp.ones(2),
                integration_steps_fn=lambda key: jax.random.randint(key, (), 1, 4),
            )
        ),
        "ghmc": lambda: from_blackjax(blackjax.ghmc(gaussian, 0.8, jnp.ones(2), 0.5, 0.3)),
        "multinomial hmc": lambda: from_blackjax(
            blackjax.multinomial_hmc(gaussian, 1.1, jnp.ones(2), 2)
        ),
    }[name]()
    state = kernel.init(jnp.array([0.5, -1.0]), jax.random.key(seed + 1))
    initial, tape = kernel.carry(state), kernel.tape(jax.random.key(seed), num_steps, state)
    path = rollout(kernel.dynamics(), initial, tape)
    program = jax.jit(functools.partial(certify, kernel), compiler_options=QUICK)
    return SimpleNamespace(
        kernel=kernel,
        state=state,
        initial=initial,
        tape=tape,
        path=path,
        certify=lambda states, tape=tape, **more: program(initial, states, tape, **more),
    )


def longest(flags):
    """Longest run of True."""
    return max(
        map(len, "".join("x" if flag else " " for flag in np.asarray(flags)).split()), default=0
    )


def mala_by_hand(run, step_size=STEP):
    """Proposals, acceptance probabilities and uniforms of a sequential MALA path, from the published formulas."""

    def gradient(x):
        return np.stack([-1.3 * x[:, 0] + 0.5 * x[:, 1], 0.5 * x[:, 0] - 0.9 * x[:, 1]], axis=1)

    before = np.concatenate([np.asarray(run.initial)[None], np.asarray(run.path)[:-1]])
    keys = jax.vmap(jax.random.split)(run.tape.randomness)
    noise = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys[:, 0]))
    uniform = np.asarray(jax.vmap(jax.random.uniform)(keys[:, 1]))
    after = before + step_size * gradient(before) + np.sqrt(2 * step_size) * noise
    back = np.sum((before - after - step_size * gradient(after)) ** 2, axis=1) / (4 * step_size)
    forth = np.sum(noise**2, axis=1) / 2
    values = [np.asarray(jax.vmap(gaussian)(x)) for x in (before, after)]
    return after, np.exp(np.minimum(values[1] - values[0] - back + forth, 0)), uniform


def test_paths_and_random_numbers_of_different_length_are_refused():
    run = run_of("mala")
    for states, tape in (
        (run.path[:-1], run.tape),
        (run.path, jax.tree.map(lambda leaf: leaf[:-1], run.tape)),
    ):
        with pytest.raises(
            ValueError, match="states and drives: leading axes .*, wanted one common"
        ):
            run.certify(states, tape)


# --- a right path


def test_a_right_path_and_every_number_about_it():
    run = run_of("mala")
    certificate = run.certify(run.path)
    proposals, rate, uniform = mala_by_hand(run)
    accepted = uniform < rate
    np.testing.assert_allclose(
        np.asarray(run.path)[accepted], proposals[accepted], rtol=1e-10
    )  # hand and code agree
    assert 10 < accepted.sum() < T - 10 and longest(~accepted) > 1
    assert bool(certificate.certified) and bool(certificate.finite) and not bool(certificate.frozen)
    np.testing.assert_array_equal(certificate.accepted, accepted)
    assert int(certificate.num_rejected) == (~accepted).sum()
    assert int(certificate.longest_rejection) == longest(~accepted)
    assert int(certificate.num_steps) == T and certificate.residual.shape == (T,)
    assert float(certificate.tolerance) == 1e-8 and float(certificate.max_residual) < 1e-13
    assert float(certificate.max_residual) == np.max(certificate.residual)
    assert int(certificate.num_nonfinite_proposals) == 0 and bool(certificate.discrete_consistent)
    assert int(certificate.num_ambiguous) == 0
    np.testing.assert_allclose(certificate.min_margin, np.abs(rate - uniform).min(), rtol=1e-9)


def test_records_are_the_loops_infos():
    run = run_of("hmc")
    _, infos = blackjax_loop(run.kernel, run.state, run.tape.randomness)
    records = jax.jit(
        lambda path: certify_with_records(run.kernel, run.initial, path, run.tape)[1]
    )(run.path)
    np.testing.assert_array_equal(records.accepted, infos.is_accepted)
    np.testing.assert_allclose(records.acceptance_rate, infos.acceptance_rate, rtol=1e-9)
    np.testing.assert_allclose(records.energy, infos.energy, rtol=1e-9)
    np.testing.assert_allclose(
        records.logdensity, jax.vmap(gaussian)(run.path), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_array_equal(records.num_steps, np.full(T, 2))
    assert not np.asarray(records.nonfinite).any() and not np.asarray(records.diverging).any()


def test_a_parallel_path_certifies():
    run = run_of("hmc")
    solution = solve(run.kernel.dynamics(), run.initial, run.tape, solver=quasi_deer(damping=0.1))
    certificate = run.certify(solution.or_raise().states)
    assert bool(certificate.certified)
    np.testing.assert_array_equal(certificate.accepted, run.certify(run.path).accepted)


@pytest.mark.parametrize("name", ["mala", "frozen mala"])
def test_standing_still_is_counted_by_decisions_not_bits(name):
    """A solver stops within a tolerance, so a rejected step may differ from the state before it by rounding."""
    run = run_of(name, T if name == "mala" else 30)
    right = run.certify(run.path)
    rejected = ~np.asarray(right.accepted)
    wobble = 1 + np.where(rejected, np.arange(len(rejected)) % 2, 0) * 2 * np.finfo(float).eps
    certificate = run.certify(run.path * wobble[:, None])
    assert bool(certificate.certified) and 0 < float(certificate.max_residual) < 1e-14
    assert (
        int(certificate.longest_rejection) == longest(rejected) == int(right.longest_rejection) > 1
    )
    assert bool(certificate.frozen) == (name == "frozen mala")


def test_what_is_certified_is_the_path_that_stands_still():
    """In one pass, with a second look at the steps that then start from another state, as in two passes."""
    run = run_of("mala", 400)
    wobble = 1 + (np.arange(400) % 2) * 1e-12
    path = run.path * wobble[:, None]
    two, first = (
        jax.jit(functools.partial(program, run.kernel), compiler_options=QUICK)
        for program in (certify_with_records, certify_held)
    )
    _, records = two(run.initial, path, run.tape)
    still = hold(run.initial, path, records.held)
    assert int(np.sum((np.asarray(still) != np.asarray(path)).any(axis=1))) > 40, (
        "more than one look takes"
    )
    chains = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (run.initial, path, run.tape))
    certificate, records, found = jax.tree.map(lambda leaf: leaf[1], first(*chains))
    np.testing.assert_array_equal(found, still)
    # Two programs may round an evaluation apart: residuals are in units of the noise, of size 1 as the states are.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-14),
        (certificate, records),
        two(run.initial, still, run.tape),
    )
    rejected = ~np.asarray(certificate.accepted)
    assert (
        bool(certificate.certified)
        and rejected.any()
        and not np.asarray(certificate.residual)[rejected].any()
    )


# --- wrong paths


@pytest.mark.parametrize("name", ["mala", "whitened mala"])
def test_residual_of_mala_is_in_units_of_its_noise(name):
    run = run_of(name)
    shift = 0.01 * np.sqrt(2 * STEP)
    certificate = run.certify(run.path.at[-1, 1].add(shift))
    assert not bool(certificate.certified) and bool(certificate.finite)
    np.testing.assert_allclose(certificate.max_residual, 0.01, rtol=1e-9)
    assert int(certificate.worst_step) == T - 1
    np.testing.assert_allclose(certificate.residual[:-1], 0, atol=1e-13)


def test_a_wrong_state_in_the_middle_shows_there_and_in_the_next_step_only():
    run = run_of("mala")
    certificate = run.certify(run.path.at[30, 0].add(1e-6))
    residual = np.asarray(certificate.residual)
    assert set(np.flatnonzero(residual > 1e-12)) == {30, 31} and not bool(certificate.certified)
    np.testing.assert_allclose(residual[30], 1e-6 / np.sqrt(2 * STEP), rtol=1e-6)


def test_tolerance_lies_between_rounding_and_the_smallest_error_that_counts():
    run = run_of("mala")
    for size, certified in ((0.5e-8, True), (2e-8, False)):
        certificate = run.certify(run.path.at[-1, 0].add(size * np.sqrt(2 * STEP)))
        assert bool(certificate.certified) == certified


@pytest.mark.parametrize("shift", [1e-9, 1e-12])
def test_a_rejected_step_that_moves_is_not_certified(shift):
    """No noise of the proposal explains such a difference there; on an accepted step it does."""
    run = run_of("mala")
    accepted = np.asarray(run.certify(run.path).accepted)
    for flag in (False, True):
        # The next step is accepted, so that only this one is off where the kernel stands still.
        step = int(np.flatnonzero((accepted[:-1] == flag) & accepted[1:])[3])
        certificate = run.certify(run.path.at[step, 0].add(shift))
        assert bool(certificate.certified) == flag
        np.testing.assert_array_equal(certificate.accepted, accepted)


def test_residual_of_hmc_is_in_standard_deviations_of_the_chain_unless_given():
    run = run_of("hmc")
    wrong = run.path.at[-1, 1].add(1e-3)
    spread = np.std(np.asarray(wrong), axis=0)
    assert not np.isclose(spread[0], spread[1], rtol=0.05)
    np.testing.assert_allclose(run.certify(wrong).max_residual, 1e-3 / spread[1], rtol=1e-9)
    np.testing.assert_allclose(
        run.certify(wrong, scale=jnp.array([7.0, 0.5])).max_residual, 2e-3, rtol=1e-9
    )


@pytest.mark.parametrize("was", [True, False], ids=["accepted", "rejected"])
def test_a_flipped_decision_is_never_certified(was):
    run = run_of("mala")
    proposals, rate, uniform = mala_by_hand(run)
    at = np.flatnonzero((uniform < rate) == was)[-1]
    before = run.path[at - 1]
    other = before if was else proposals[at]
    # The rest of the path follows the random numbers from the wrong state: only the flip itself is wrong.
    rest = rollout(
        run.kernel.dynamics(),
        jnp.asarray(other),
        jax.tree.map(lambda leaf: leaf[at + 1 :], run.tape),
    )
    certificate = run.certify(jnp.concatenate([run.path[:at], jnp.asarray(other)[None], rest]))
    assert not bool(certificate.certified) and int(certificate.worst_step) == at
    assert bool(certificate.accepted[at]) == was, "decisions are the certifier's, not the path's"
    move = np.abs(proposals[at] - before).max() / np.sqrt(2 * STEP)
    np.testing.assert_allclose(certificate.max_residual, move, rtol=1e-9)
    assert float(certificate.max_residual) > 0.05
    assert (np.delete(np.asarray(certificate.residual), at) < 1e-12).all()


def test_a_path_stopped_early_is_not_certified_beyond_its_exact_part():
    run = run_of("mala")
    solution = solve(
        run.kernel.dynamics(), run.initial, run.tape, solver=quasi_deer(), max_iterations=3
    )
    assert Status(int(solution.status)) is Status.OUT_OF_ITERATIONS
    certificate = run.certify(solution.states)
    exact = int(solution.num_exact)
    assert not bool(certificate.certified) and 3 <= exact < T and bool(certificate.finite)
    assert (np.asarray(certificate.residual)[:exact] < 1e-12).all() and float(
        certificate.residual[exact]
    ) > 1e-12


@pytest.mark.parametrize("step", [0, 7, T - 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite(step, value):
    run = run_of("mala")
    certificate = run.certify(run.path.at[step, 1].set(value))
    assert not bool(certificate.finite) and not bool(certificate.certified)
    assert not np.isfinite(certificate.max_residual) and int(certificate.worst_step) == step


class _State(NamedTuple):
    position: jax.Array


def test_nan_replaced_by_zero_is_not_certified():
    """What two published codes do: the kernel itself leaves the finite numbers, and the path pretends it did not."""

    def step(key, state):
        new = 0.5 * state.position + jax.random.normal(key, (2,))
        return _State(jnp.where(jnp.abs(new) > 1.5, jnp.nan, new)), ()

    kernel = Kernel(SimpleNamespace(init=_State, step=step))
    tape = Tape(jax.random.split(jax.random.key(0), 40), {})

    def advance(x, key):
        x = jnp.nan_to_num(step(key, _State(x))[0].position)
        return x, x

    path = jax.lax.scan(advance, jnp.zeros(2), tape.randomness)[1]
    assert (np.asarray(path) == 0).any()
    certificate = certify(kernel, jnp.zeros(2), path, tape)
    assert bool(certificate.finite) and not bool(certificate.certified)
    replaced = (np.asarray(path) == 0).any(axis=1)
    np.testing.assert_array_equal(np.isnan(certificate.residual), replaced)
    assert (
        np.isnan(certificate.max_residual)
        and int(certificate.worst_step) == np.flatnonzero(replaced)[0]
    )


def test_a_wrong_discrete_leaf_shows():
    run = run_of("dynamic hmc")
    good = run.certify(run.path)
    assert bool(good.discrete_consistent) and bool(good.certified)
    keys = run.tape.discrete["random_generator_arg"]
    bad = Tape(run.tape.randomness, {"random_generator_arg": keys.at[9].set(jax.random.key(123))})
    # A path that follows the wrong tape exactly: only the tape is wrong.
    certificate = run.certify(_through(run, bad), tape=bad)
    assert not bool(certificate.discrete_consistent) and not bool(certificate.certified)
    assert float(certificate.max_residual) < 1e-12


def _through(run, tape):
    """The path of carries with the tape's own leaves before every step."""

    def advance(carry, drive):
        carry = run.kernel.transition(carry, drive)[0]
        return carry, carry

    return jax.lax.scan(advance, run.initial, tape)[1]


def test_wrong_momenta_show_too():
    """The carry of GHMC is more than its position."""
    run = run_of("ghmc")
    assert bool(run.certify(run.path).certified)
    others = {**run.path.others, "momentum": run.path.others["momentum"].at[-1, 0].add(1e-3)}
    certificate = run.certify(type(run.path)(run.path.position, others))
    assert not bool(certificate.certified) and int(certificate.worst_step) == T - 1


def test_only_the_bad_one_of_batched_chains_shows():
    run = run_of("mala")
    paths = jnp.stack([run.path] * 3).at[1, 12, 0].add(1.0)
    batched = jax.vmap(lambda path: certify(run.kernel, run.initial, path, run.tape))(paths)
    np.testing.assert_array_equal(batched.certified, [True, False, True])
    assert batched.residual.shape == (3, T) and int(batched.worst_step[1]) in (12, 13)


@pytest.mark.parametrize("num_steps", [200, 5_000])
def test_an_explosion_does_not_set_the_unit(num_steps):
    """A quartile of a thousand steps is right within some 4% of the standard deviation, of two hundred within 10%."""
    path = np.random.default_rng(0).normal(size=(num_steps, 3)) * [1.0, 10.0, 0.1]
    path[50:52] = 1e6
    assert (path.std(axis=0) > 1e3).all()
    np.testing.assert_allclose(_spread(jnp.asarray(path)), [1.0, 10.0, 0.1], rtol=0.25)


@pytest.mark.parametrize("unit", [0.0, -1.0, np.inf, np.nan], ids=str)
def test_a_unit_that_would_certify_anything_is_refused(unit):
    """Either an error, or at least no certificate."""
    run = run_of("mala")
    try:
        certified = bool(
            certify(run.kernel, run.initial, run.path + 1.0, run.tape, scale=unit).certified
        )
    except ValueError as error:
        assert "scale" in str(error)
    else:
        assert not certified


# --- frozen chains


def test_a_frozen_chain():
    run = run_of("frozen mala", 30)
    certificate = run.certify(run.path)
    assert bool(certificate.frozen) and bool(certificate.certified), (
        "frozen is not wrong, it is useless"
    )
    assert int(certificate.num_rejected) == int(certificate.longest_rejection) == 30
    # A healthy chain may reject nine proposals in a row.
    for count, frozen in ((9, False), (10, True)):
        tape = jax.tree.map(lambda leaf, count=count: leaf[:count], run.tape)
        assert bool(certify(run.kernel, run.initial, run.path[:count], tape).frozen) == frozen


def test_one_accepted_step_is_not_frozen():
    run = run_of("mala")
    proposals, rate, uniform = mala_by_hand(run)
    accepted = uniform < rate
    start = np.flatnonzero(accepted[:-1] & ~accepted[1:])[0]  # one acceptance, then a rejection
    two = jax.tree.map(lambda leaf: leaf[start : start + 2], run.tape)
    before = run.path[start - 1] if start else run.initial
    assert not bool(certify(run.kernel, before, run.path[start : start + 2], two).frozen)
    still = jax.tree.map(lambda leaf: leaf[start + 1 : start + 2], run.tape)
    certificate = certify(run.kernel, run.path[start], run.path[start + 1 : start + 2], still)
    assert not bool(certificate.frozen), "one rejection proves nothing"
    assert int(certificate.longest_rejection) == 1


# --- margins


@pytest.mark.parametrize("name", ["multinomial hmc", "ghmc"])
def test_margins_are_unknown_where_the_uniform_is(name):
    run = run_of(name)
    certificate = run.certify(run.path)
    assert int(certificate.num_ambiguous) == -1 and np.isnan(certificate.min_margin)


def test_margins_are_unknown_where_nothing_was_rejected():
    """Then any uniform would explain the decisions."""
    kernel = mala(gaussian, 1e-6)
    tape = kernel.tape(jax.random.key(0), 10, kernel.init(jnp.zeros(2)))
    certificate = certify(
        kernel, jnp.zeros(2), rollout(kernel.dynamics(), jnp.zeros(2), tape), tape
    )
    assert int(certificate.num_rejected) == 0 and int(certificate.num_ambiguous) == -1


def test_ambiguous_decisions_are_counted_in_float32():
    with jax.enable_x64(False):
        kernel, num_steps = mala(gaussian, STEP), 2000
        tape = kernel.tape(jax.random.key(2), num_steps, kernel.init(jnp.zeros(2)))
        path = rollout(kernel.dynamics(), jnp.zeros(2), tape)
        certificate = jax.jit(functools.partial(certify, kernel), compiler_options=QUICK)(
            jnp.zeros(2), path, tape
        )
        _, rate, uniform = mala_by_hand(SimpleNamespace(initial=jnp.zeros(2), path=path, tape=tape))
        margin = np.abs(rate - uniform)
        # About 2 · 2e-3 · T of them; those within rounding of the bound may go either way.
        assert (
            2
            <= (margin < 1.9e-3).sum()
            <= int(certificate.num_ambiguous)
            <= (margin < 2.1e-3).sum()
        )
        np.testing.assert_allclose(certificate.min_margin, margin.min(), atol=1e-5)


# --- proposals outside the support


def box(x):
    """Support (-1, 1)²; NaN outside."""
    return jnp.sum(jnp.log(1 - x**2))


def box_walled(x):
    """Support (-1, 1)²; -inf outside."""
    inside = jnp.all(jnp.abs(x) < 1)
    return jnp.where(inside, jnp.sum(jnp.log(jnp.where(inside, 1 - x**2, 1.0))), -jnp.inf)


@pytest.mark.parametrize(
    ("name", "density", "solver"),
    [
        ("mala", box, quasi_deer()),
        ("hmc", box_walled, quasi_deer()),
        ("random walk", box, jacobi()),
    ],
    ids=["mala, NaN", "hmc, -inf", "random walk, NaN"],
)
def test_nonfinite_proposals_are_rejected_and_counted(name, density, solver):
    kernel = {
        "mala": lambda: mala(density, 0.15),
        "hmc": lambda: hmc(density, 0.5, jnp.ones(2), 1),
        "random walk": lambda: from_blackjax(
            blackjax.additive_step_random_walk(density, normal(0.6 * jnp.ones(2)))
        ),
    }[name]()
    num_steps = 150

    @functools.partial(jax.jit, compiler_options=QUICK)
    def program(key):
        state = kernel.init(jnp.array([0.2, -0.3]))
        tape = kernel.tape(key, num_steps, state)
        solution = solve(kernel.dynamics(), state.position, tape, solver=solver)
        return solution, certify(kernel, state.position, solution.states, tape), tape

    solution, certificate, tape = program(jax.random.key(1))
    path = np.asarray(solution.or_raise().states)
    assert np.isfinite(path).all() and np.abs(path).max() < 1
    assert bool(certificate.certified) and not bool(certificate.frozen)
    outside = (np.abs(_proposals(name, density, path, tape)) >= 1).any(axis=1)
    assert 10 < outside.sum() < num_steps - 10
    counted = int(certificate.num_nonfinite_proposals)
    # MALA and the random walk do not show their proposals: an acceptance probability of exactly 0 counts too.
    assert (
        counted == outside.sum() or name != "hmc" and outside.sum() < counted <= outside.sum() + 5
    )
    assert not np.asarray(certificate.accepted)[outside].any()


def _proposals(name, density, path, tape):
    """Where each step wanted to go, by the formulas."""
    before = np.concatenate([[[0.2, -0.3]], path[:-1]])
    gradient = np.asarray(jax.vmap(jax.grad(density))(before))
    first = jax.vmap(jax.random.split)(tape.randomness)[:, 0]
    noise = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (2,)))(first))
    if name == "mala":
        return before + 0.15 * gradient + np.sqrt(0.3) * noise
    if name == "hmc":
        return before + 0.5 * (noise + 0.25 * gradient)
    return before + 0.6 * noise


def test_a_hopeless_but_finite_proposal_is_not_counted_as_nonfinite():
    """Its acceptance probability underflows to exactly 0, its log density is a number, and Barker's kernel shows it."""
    kernel = from_blackjax(blackjax.barker(gaussian, 1e6))
    tape = kernel.tape(jax.random.key(0), 12, kernel.init(jnp.zeros(2)))
    certificate = certify(kernel, jnp.zeros(2), jnp.zeros((12, 2)), tape)
    assert bool(certificate.certified) and bool(certificate.frozen)
    assert int(certificate.num_nonfinite_proposals) == 0


# --- short chains, both types


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_short_chains(num_steps, precision):
    kernel = mala(gaussian, 0.3)
    initial = jnp.array([0.5, -1.0], precision)
    tape = kernel.tape(jax.random.key(0), num_steps, kernel.init(initial))
    path = rollout(kernel.dynamics(), initial, tape)
    certificate = certify(kernel, initial, path, tape)
    assert bool(certificate.certified) and bool(certificate.finite) and not bool(certificate.frozen)
    assert (
        int(certificate.num_steps) == num_steps
        and int(certificate.worst_step) == 0
        or num_steps > 1
    )
    assert certificate.residual.shape == certificate.accepted.shape == (num_steps,)
    assert certificate.residual.dtype == certificate.max_residual.dtype == precision
    assert float(certificate.tolerance) == pytest.approx(
        {"float32": 1e-4, "float64": 1e-8}[precision.name]
    )
    if num_steps:
        assert not bool(certify(kernel, initial, path.at[0, 0].add(1.0), tape).certified)


def test_ranks_are_those_of_sorted_numbers(precision):
    rng = np.random.default_rng(7)
    path = rng.normal(size=(30, 6)) * 10.0 ** rng.integers(-30, 30, size=6)
    path[:, 1], path[::2, 2], path[3, 3] = 0, -1, np.inf
    path[[4, 5], 4], path[6, 5] = [np.nan, -np.nan], -np.inf
    path = path.astype(precision)
    for rank in (0, 1, 7, 22, 28, 29):
        np.testing.assert_array_equal(
            _of_rank(jnp.asarray(path), rank), np.sort(path, axis=0)[rank]
        )


def test_how_certificates_were_made_is_said_in_words():
    words = {
        (True,): "by an independent pass",
        (False,): "recorded while the chains were rolled",
        (True, True): "by an independent pass",
        (True, False): "partly by an independent pass",
        (False, False): "recorded while the chains were rolled",
    }
    assert {made: describe_certification(np.array(made)) for made in words} == words


def test_a_refused_proposal_of_a_known_energy_is_finite():
    """Without an energy a rate of exactly 0, and a proposal that is not shown, may stand for one that was not finite."""
    state = SimpleNamespace(position=jnp.zeros(2), logdensity=jnp.zeros(()))
    refused = {"acceptance_rate": jnp.zeros(()), "is_accepted": jnp.zeros((), bool)}
    assert not record(state, SimpleNamespace(**refused, energy=jnp.ones(()))).nonfinite
    assert record(state, SimpleNamespace(**refused)).nonfinite
    assert record(state, SimpleNamespace(**refused, energy=jnp.array(jnp.nan))).nonfinite


@pytest.mark.parametrize("shown, hidden", [([1.0, 2.0], True), ([1.0, 3.0], False)])
def test_a_proposal_that_differs_in_one_coordinate_is_shown(shown, hidden):
    """One that is the state returned is none: it was not finite if its probability is exactly 0."""
    state = SimpleNamespace(position=jnp.array([1.0, 2.0]))
    proposal = SimpleNamespace(position=jnp.array(shown))
    found = record(
        state,
        SimpleNamespace(acceptance_rate=jnp.zeros(()), is_accepted=False, proposal=proposal),
    )
    assert bool(found.nonfinite) == hidden
