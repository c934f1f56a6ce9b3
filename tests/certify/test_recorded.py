"""Certificates recorded while chains are rolled agree with an independent pass over the same path."""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_catalogue import KERNELS, logdensity_of, start_of

from partime_mcmc import (
    CertifyIndependently,
    CertifyWhileRolling,
    Target,
    Tolerance,
    Windows,
    hmc,
    jacobi,
    mala,
    random_walk,
    sample,
    shooting,
)
from partime_mcmc.certify.independent import certify_with_records
from partime_mcmc.certify.recorded import certify_recorded
from partime_mcmc.engine.recipes import sequential
from partime_mcmc.engine.solution import Status
from partime_mcmc.engine.solve import solve
from partime_mcmc.kernels import Kernel, from_blackjax
from partime_mcmc.solvers.shooting import Shooting

T = 120
ROLLING = {"shooting": shooting(steps=12), "sequential": sequential()}
COUNTS = (
    "num_rejected",
    "longest_rejection",
    "num_nonfinite_proposals",
    "num_ambiguous",
    "frozen",
    "certified",
    "discrete_consistent",
)


def recorded_and_independent(kernel, position, solver, num_steps=T, tolerance=Tolerance()):
    """Both certificates with the records of the steps, and the path, of one chain."""
    state = kernel.init(position, jax.random.key(1))
    initial, tape = kernel.carry(state), kernel.tape(jax.random.key(0), num_steps, state)

    @jax.jit
    def run(initial, tape):
        found = solve(kernel.recording(), initial, tape, solver=solver, tolerance=tolerance)
        recorded = certify_recorded(kernel, initial, found.states, tape, found.notes, found.defects)
        return found, recorded, certify_with_records(kernel, initial, found.states, tape)

    found, recorded, independent = run(initial, tape)
    return found, recorded, independent, initial


# Every shape of state and of info; the others are among the slow tests.
OFTEN = {"mala", "dynamic hmc", "ghmc", "nuts", "hmc cycle"}
CASES = [
    pytest.param(
        row,
        name,
        id=f"{row.name}, {name}",
        marks=()
        if row.name in OFTEN and (name == "shooting" or row.name == "mala")
        else pytest.mark.slow,
    )
    for row in KERNELS
    for name in ROLLING
]


@pytest.mark.parametrize("row, name", CASES)
def test_both_certificates_agree(row, name, double):
    kernel = row.build(logdensity_of(double), 3, double)
    found, (mine, recorded), (theirs, records), _ = recorded_and_independent(
        kernel, start_of(double), ROLLING[name]
    )
    assert found.verdict == Status.CONVERGED and bool(mine.certified)
    assert not bool(mine.independent) and bool(theirs.independent)
    for field in COUNTS:
        assert np.array_equal(getattr(mine, field), getattr(theirs, field)), field
    # Two programs evaluate the same step, so they differ by rounding.
    np.testing.assert_allclose(mine.residual, theirs.residual, atol=1e-11)
    assert np.array_equal(mine.accepted, theirs.accepted) and np.array_equal(
        recorded.held, records.held
    )
    if row.decides:
        assert int(mine.num_rejected) > 0
    for one, other in zip(jax.tree.leaves(recorded), jax.tree.leaves(records)):
        np.testing.assert_allclose(
            np.asarray(one, float), np.asarray(other, float), rtol=1e-8, atol=1e-9
        )


def test_gaps_between_segments_are_reported(double):
    """With a tolerance that lets segments meet early, the residual is what an independent pass finds, and too large."""
    kernel = from_blackjax(KERNELS[0].algorithm(logdensity_of(double), 3, double))
    _, (mine, recorded), (theirs, records), _ = recorded_and_independent(
        kernel, start_of(double), ROLLING["shooting"], tolerance=Tolerance(0.0, 1e-3)
    )
    # Where paths meet, what is recorded is of the step in the path, and not of the one that it replaced.
    np.testing.assert_allclose(recorded.acceptance_rate, records.acceptance_rate, atol=1e-12)
    assert 1e-6 < float(mine.max_residual) < 1e-2 and not bool(mine.certified)
    # Of two gaps that passes left in one segment the larger stands at the place of the newer: the largest of all is exact.
    np.testing.assert_allclose(mine.max_residual, theirs.max_residual, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_rejected_steps_stand_still_to_the_last_bit(steps, double):
    kernel = from_blackjax(KERNELS[0].algorithm(logdensity_of(double), 3, double))
    solver = Shooting(steps=steps, max_evaluations=1e3)
    found, (mine, _), _, initial = recorded_and_independent(
        kernel, start_of(double), solver, tolerance=Tolerance(0.0, 1e-3)
    )
    moved = np.zeros(T, bool)
    for first, path in zip(jax.tree.leaves(initial), jax.tree.leaves(found.states)):
        before = np.concatenate([np.asarray(first)[None], np.asarray(path)[:-1]])
        moved |= (np.asarray(path) != before).reshape(T, -1).any(axis=1)
    rejected = ~np.asarray(mine.accepted)
    assert rejected.sum() > 5 and not moved[rejected].any() and moved[~rejected].all()
    assert float(np.asarray(mine.residual)[rejected].max()) == 0


class Counting(NamedTuple):
    """A state with a counter of its own moves, which does not follow from the random numbers."""

    position: jax.Array
    moves: jax.Array


class Moved(NamedTuple):
    """Whether a step moved, and nothing else."""

    is_accepted: jax.Array


def test_a_counter_that_follows_the_path_is_found(double):
    """The tape has the counter of a chain that stands still; this one counts what was accepted."""

    def init(position):
        return Counting(position, jnp.zeros((), jnp.int32))

    def step(key, state):
        step_key, accept_key = jax.random.split(key)
        moved = jax.random.uniform(accept_key) < jnp.exp(-(state.position[0] ** 2)) + 0.2
        position = jnp.where(
            moved,
            0.5 * state.position + jax.random.normal(step_key, state.position.shape),
            state.position,
        )
        return Counting(position, state.moves + moved.astype(jnp.int32)), Moved(moved)

    kernel = Kernel(SimpleNamespace(init=init, step=step))
    _, (mine, _), (theirs, _), _ = recorded_and_independent(
        kernel, jnp.zeros(2), ROLLING["shooting"]
    )
    assert not bool(mine.discrete_consistent) and not bool(theirs.discrete_consistent)
    assert not bool(mine.certified)


TARGET = Target(
    lambda x: -0.5 * jnp.sum(x**2) - 0.1 * jnp.sum(x**4),
    initial=lambda key: jax.random.normal(key, (4,)),
)


@functools.cache
def kernel_of(builder, **settings):
    with jax.enable_x64(True):
        return builder(TARGET.logdensity, **settings)


def draws_of(kernel, **more):
    with jax.enable_x64(True):
        return sample(
            jax.random.key(3), TARGET, kernel, num_samples=256, num_chains=2, progress=False, **more
        )


@pytest.mark.parametrize("window", [256, 64])
def test_the_draws_do_not_depend_on_the_certification(window):
    with jax.enable_x64(True):
        kernel = hmc(TARGET.logdensity, 0.7, jnp.ones(4), 2)
    mine, theirs = (
        draws_of(kernel, solver=shooting(steps=16), schedule=Windows(window), certificate=one)
        for one in (CertifyWhileRolling(), CertifyIndependently())
    )
    # A step that also records is another program, which may round apart; this chain forgets, so that nothing adds up.
    np.testing.assert_allclose(mine.positions, theirs.positions, rtol=0, atol=1e-12)
    assert not mine.certificate.independent.any() and theirs.certificate.independent.all()
    assert (
        mine.certificate.certified.all() and (np.asarray(mine.certificate.num_rejected) > 0).all()
    )
    assert set(mine.info) == set(theirs.info) and np.array_equal(
        mine.info["accepted"], theirs.info["accepted"]
    )
    assert "recorded" in mine.certificate.evidence and "independent" in theirs.certificate.evidence


def test_elsewhere_an_independent_pass_is_made():
    """Solvers that do not roll have been evaluated once more."""
    draws = draws_of(kernel_of(mala, step_size=0.4), solver=jacobi())
    assert draws.certificate.independent.all() and draws.certificate.certified.all()


@pytest.mark.parametrize("window", [256, 64])
def test_chains_that_fell_back_are_certified_by_what_was_recorded(window):
    kernel = kernel_of(random_walk, step_size=0.8)
    given_up = Shooting(steps=16, max_evaluations=1.0)
    draws = draws_of(kernel, solver=given_up, schedule=Windows(window))
    loop = draws_of(kernel, solver=sequential())
    assert len(draws.report.fallbacks) >= 2 and (draws.report.num_sequential < 256).all()
    found, known = draws.certificate, loop.certificate
    assert found.certified.all() and not found.independent.any()
    np.testing.assert_allclose(draws.positions, loop.positions, rtol=0, atol=1e-10)
    for name in ("accepted", "acceptance_rate"):
        np.testing.assert_allclose(draws.info[name], loop.info[name], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(found.num_rejected, known.num_rejected)
    assert (np.asarray(found.num_rejected) > 20).all()


def test_something_else_is_refused():
    with pytest.raises(TypeError, match="certificate: got .*wanted CertifyWhileRolling"):
        draws_of(kernel_of(mala, step_size=0.4), certificate="recorded")
