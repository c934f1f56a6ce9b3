"""Mutation checks: what breaks a chain or its law is caught by the certificate, the report or the z-scores, by name.

A dropped Hastings correction changes the law and no path, so only statistics can see it; a flipped decision, one pass
too few and a frozen chain change a path or stop it, and the certificate sees them at once.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from partime_mcmc.certify.independent import certify
from partime_mcmc.engine.dynamics import rollout
from partime_mcmc.engine.recipes import jacobi, sequential
from partime_mcmc.engine.solution import SolveError, Status
from partime_mcmc.engine.solve import solve
from partime_mcmc.kernels import Kernel, mala
from partime_mcmc.kernels.explicit_randomness import GradientState
from partime_mcmc.numpyro import HMC, ParallelMCMC
from partime_mcmc.sampling.sample import sample
from partime_mcmc.sampling.target import Target

STEP, STEPS = 0.7, 200


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def density(x):
    return -0.5 * jnp.sum(x**2)


def chain():
    """A MALA chain on a standard normal in the plane: kernel, start, tape and its path."""
    kernel = mala(density, STEP)
    state = kernel.init(jnp.array([0.5, -0.5]))
    tape = kernel.tape(jax.random.key(3), STEPS, state)
    return kernel, kernel.carry(state), tape, rollout(kernel.dynamics(), kernel.carry(state), tape)


def test_a_flipped_decision_is_caught():
    kernel, start, tape, path = chain()
    right = certify(kernel, start, path, tape)
    assert bool(right.certified) and 10 < int(right.num_rejected) < STEPS
    taken = int(np.flatnonzero(np.asarray(right.accepted))[20])
    flipped = path.at[taken:].set(
        rollout(
            kernel.dynamics(), path[taken - 1], jax.tree.map(lambda leaf: leaf[taken + 1 :], tape)
        )[jnp.minimum(jnp.arange(STEPS - taken), STEPS - taken - 2)]
    )
    flipped = flipped.at[taken].set(path[taken - 1])
    found = certify(kernel, start, flipped, tape)
    assert not bool(found.certified) and float(found.max_residual) > 0.1


def test_one_iteration_too_few_is_caught():
    kernel, start, tape, path = chain()
    enough = int(solve(kernel.dynamics(), start, tape, solver=jacobi()).or_raise().iterations)
    short = solve(kernel.dynamics(), start, tape, solver=jacobi(), max_iterations=enough - 1)
    assert short.verdict == Status.OUT_OF_ITERATIONS
    with pytest.raises(SolveError, match="OUT_OF_ITERATIONS"):
        short.or_raise()
    # The solver asks for rounding, the certificate for what matters to the law: half the passes fail that, too.
    half = solve(kernel.dynamics(), start, tape, solver=jacobi(), max_iterations=enough // 2)
    assert not bool(certify(kernel, start, half.states, tape).certified)


def test_a_frozen_chain_is_caught():
    mcmc = ParallelMCMC(
        HMC(
            potential_fn=lambda x: -density(x),
            step_size=50.0,
            adapt_step_size=False,
            num_steps=1,
        ),
        num_warmup=40,
        num_samples=30,
        num_chains=4,
        solver=sequential(),
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), init_params=jnp.ones((4, 2)) * jnp.arange(1, 5)[:, None])
    with pytest.raises(SolveError, match="FROZEN: chain 0"):
        mcmc.or_raise()
    assert mcmc.report.level.name == "FAIL"
    stored = {
        "x": {
            "mean": 0.0,
            "sd": 1.0,
            "q05": -1.645,
            "q50": 0.0,
            "q95": 1.645,
            "ess_bulk": 1e4,
            "mcse_mean": 0.01,
            "mcse_sd": 0.007,
            "mcse_q05": 0.02,
            "mcse_q50": 0.0125,
            "mcse_q95": 0.02,
        }
    }
    assert reference.judge(
        {"x": np.asarray(mcmc.get_samples(group_by_chain=True))[..., 0]}, stored
    ).gates


def langevin(correction):
    """MALA on a standard normal, hand-written, with the Hastings correction counted `correction` times."""

    def init(position):
        return GradientState(position, density(position), -position)

    def step(key, state):
        noise_key, accept_key = jax.random.split(key)
        x, noise = state.position, jax.random.normal(noise_key, state.position.shape)
        y = x - STEP * x + jnp.sqrt(2 * STEP) * noise
        ratio = (
            density(y)
            - density(x)
            + correction * (jnp.sum(noise**2) / 2 - jnp.sum((x - y + STEP * y) ** 2) / (4 * STEP))
        )
        new = jnp.where(jnp.log(jax.random.uniform(accept_key)) < ratio, y, x)
        return init(new), SimpleNamespace()

    return Kernel(SimpleNamespace(init=init, step=lambda key, state: (step(key, state)[0], ())))


@pytest.mark.parametrize("correction, caught", [(0.0, True), (1.0, False)], ids=["dropped", "kept"])
def test_a_dropped_hastings_correction_is_caught(correction, caught):
    """The path is the chain of a wrong kernel, so it is certified; its moments are off."""
    draws = sample(
        jax.random.key(5),
        Target(density, jnp.zeros(2)),
        langevin(correction),
        num_samples=3000,
        num_chains=4,
        solver=sequential(),
        progress=False,
    )
    assert np.all(draws.certificate.certified)
    exact = {
        "mean": 0.0,
        "sd": 1.0,
        "q05": -1.6448536,
        "q50": 0.0,
        "q95": 1.6448536,
        "ess_bulk": 1e12,
        "mcse_mean": 1e-9,
        "mcse_sd": 1e-9,
        "mcse_q05": 1e-9,
        "mcse_q50": 1e-9,
        "mcse_q95": 1e-9,
    }
    verdict = reference.judge(
        {f"x{i}": np.asarray(draws.positions)[..., i] for i in range(2)}, {"x0": exact, "x1": exact}
    )
    assert not verdict.gates
    assert bool(verdict.failures) == caught, verdict
