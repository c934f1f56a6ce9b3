"""What only an accelerator can show: its own rounding, its own precisions of products, and that the same run gives the same bits.

Skipped where there is none; `bash benchmarks/gpu.sh OUT` runs them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import (
    MultishiftCoupling,
    Status,
    Target,
    Tolerance,
    certify,
    coalescing_hmc,
    deer,
    hmc,
    mala,
    quasi_deer,
    rollout,
    sample,
    shooting,
    solve,
)
from partime_mcmc.kernels import Whitening
from partime_mcmc.scan import AssociativeScan, ChunkedScan, SequentialScan
from partime_mcmc.scan.affine import Dense, Diagonal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="there is no accelerator"),
]

T, SIZE = 4096, 5
ROWS = jax.random.normal(jax.random.key(7), (300, SIZE))


def regression(x):
    """A logistic regression: products of matrices, which an accelerator likes to take in a lower precision."""
    return -jnp.sum(jnp.logaddexp(0, -(ROWS @ x))) - 0.5 * jnp.sum(x**2)


def unit():
    """Coordinates as they are."""
    return Whitening.of_covariance(jnp.zeros(SIZE), jnp.zeros(SIZE), 0.01 * jnp.eye(SIZE))


KERNELS = {
    "mala": lambda: mala(regression, 0.6, unit()),
    "hmc": lambda: hmc(regression, 0.5, unit(), 3),
    "coalescing mala": lambda: mala(regression, 0.6, unit(), coupling=MultishiftCoupling()),
    "coalescing hmc": lambda: coalescing_hmc(regression, 0.5, unit(), 3),
}


@functools.cache
def run_of(name):
    """A kernel, its start and its tape."""
    kernel = KERNELS[name]()
    state = kernel.init(jnp.zeros(SIZE))
    return (
        kernel,
        kernel.carry(state),
        jax.jit(lambda key: kernel.tape(key, T, state))(jax.random.key(1)),
    )


@pytest.mark.parametrize("name", KERNELS)
def test_shooting_is_certified_and_stays_with_the_loop(name):
    kernel, initial, tape = run_of(name)
    solution = jax.jit(
        lambda *args: solve(
            kernel.dynamics(), *args, solver=shooting(64), tolerance=Tolerance(1e-6, 1e-5)
        )
    )(initial, tape)
    certificate = jax.jit(functools.partial(certify, kernel))(initial, solution.states, tape)
    assert Status(int(solution.status)) == Status.CONVERGED and bool(certificate.certified)
    assert int(certificate.num_rejected) > T // 100
    path = jax.jit(lambda *args: rollout(kernel.dynamics(), *args))(initial, tape)
    # Float32 flips a knife-edge decision now and then; forgetful chains come back.
    apart = np.abs(np.asarray(path) - np.asarray(solution.states)).max(axis=1) > 1e-3
    assert apart.mean() < 0.02


@pytest.mark.parametrize(
    "solver", [deer(), quasi_deer(), shooting(64)], ids=["DEER", "quasi-DEER", "shooting"]
)
def test_ten_repeats_give_the_same_bits(solver):
    kernel, initial, tape = run_of("mala")
    run = jax.jit(
        lambda *args: (
            solve(kernel.dynamics(), *args, solver=solver, tolerance=Tolerance(1e-6, 1e-5)).states
        )
    )
    first = np.asarray(run(initial, tape))
    for _ in range(9):
        np.testing.assert_array_equal(np.asarray(run(initial, tape)), first)


@pytest.mark.parametrize(
    "scan",
    [AssociativeScan(), ChunkedScan(64)],
    ids=["associative", "chunked"],
)
@pytest.mark.parametrize("kind", [Diagonal, Dense])
def test_scans_agree(scan, kind):
    shape = (10_000, 8) if kind is Diagonal else (10_000, 8, 8)
    linear = jax.random.uniform(jax.random.key(0), shape, minval=-1, maxval=1) / (
        1 if kind is Diagonal else 8
    )
    elements, start = kind(linear, jax.random.normal(jax.random.key(1), (10_000, 8))), jnp.ones(8)
    # Products of 8 numbers at the highest precision: what is left is the order of summation.
    with jax.default_matmul_precision("highest"):
        found, wanted = (
            jax.jit(scan.__call__)(elements, start),
            jax.jit(SequentialScan().__call__)(elements, start),
        )
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_lower_precision_in_the_solve_alone_is_never_certified_unseen():
    """The path of rounded products is judged by exact ones, which refuse it."""
    kernel, initial, tape = run_of("mala")
    with jax.default_matmul_precision("bfloat16"):
        states = jax.jit(lambda *args: solve(kernel.dynamics(), *args, solver=shooting(64)).states)(
            initial, tape
        )
    with jax.default_matmul_precision("highest"):
        certificate = jax.jit(functools.partial(certify, kernel))(initial, states, tape)
    assert not bool(certificate.certified) and float(certificate.max_residual) > 1e-3


def test_sampling_from_start_to_end():
    target = Target(regression, lambda key: jax.random.normal(key, (SIZE,)))
    draws = sample(
        jax.random.key(0), target, coalescing_hmc, num_samples=4096, progress=False
    ).or_raise()
    assert (
        bool(np.asarray(draws.certificate.certified).all())
        and int(draws.report.num_sequential.sum()) == 0
    )
