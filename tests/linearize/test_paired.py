"""Blocks of pairs: the right entries of the Jacobian, the right compositions, and few iterations where pairs turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import Dynamics, Status, quasi_deer, rollout, solve
from partime_mcmc.linearize import Clipped, Damped, PairedDiagonal
from partime_mcmc.scan import AssociativeScan, Dense, Pairs, SequentialScan
from partime_mcmc.solvers import Newton

STIFFNESS = jnp.diag(jnp.asarray([1.0, 2.0, 0.5])) + 0.03


def force(q):
    return -STIFFNESS @ q - 0.05 * q**3


def leapfrog(step_size, state, _):
    """One leapfrog of three weakly coupled oscillators."""
    q, p = state
    p = p + 0.5 * step_size * force(q)
    q = q + step_size * p
    return q, p + 0.5 * step_size * force(q)


def as_matrix(maps):
    """Blocks `(T, 2, 2, D/2)` as matrices `(T, D, D)`."""
    blocks = np.asarray(maps.blocks)
    return np.concatenate(
        [
            np.concatenate([block[..., None] * np.eye(block.shape[-1]) for block in row], axis=-1)
            for row in (np.moveaxis(blocks, 0, 2)[i] for i in range(2))
        ],
        axis=-2,
    )


@pytest.fixture
def trajectory(double):
    start = jnp.asarray([1.0, -0.5, 0.3]), jnp.asarray([0.2, 0.7, -1.0])
    return Dynamics(leapfrog, jnp.asarray(0.2)), start, jnp.arange(100)


def test_blocks_are_those_of_the_jacobian(double):
    flat = Dynamics(lambda _, x, u: jnp.concatenate(leapfrog(0.2, jnp.split(x, 2), u)))
    previous = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)))
    values, maps = PairedDiagonal()(flat, previous, jnp.arange(5), jax.random.key(0))
    exact = jax.vmap(jax.jacfwd(lambda x: flat(x, 0)))(previous)
    kept = np.kron(np.ones((2, 2)), np.eye(3))
    np.testing.assert_allclose(as_matrix(maps), exact * kept, rtol=0, atol=1e-14)
    np.testing.assert_allclose(values, jax.vmap(lambda x: flat(x, 0))(previous), rtol=1e-14)
    # Hutchinson's error is what stands beside the diagonals, here at most 0.2 of a coupling of 0.03 each.
    estimated = PairedDiagonal(2)(flat, previous, jnp.arange(5), jax.random.key(0))[1]
    assert 0 < np.abs(as_matrix(estimated) - exact * kept).max() < 0.02


def test_compositions_are_those_of_matrices(double):
    rng = np.random.default_rng(1)
    maps = Pairs(jnp.asarray(rng.normal(size=(9, 2, 2, 3))), jnp.asarray(rng.normal(size=(9, 6))))
    dense, start = Dense(jnp.asarray(as_matrix(maps)), maps.shift), jnp.asarray(rng.normal(size=6))
    wanted = SequentialScan()(dense, start)
    for scan in (SequentialScan(), AssociativeScan()):
        np.testing.assert_allclose(scan(maps, start), wanted, rtol=1e-10, atol=1e-10)


def test_a_trajectory_is_solved_by_blocks_where_a_diagonal_fails(trajectory):
    wanted = rollout(*trajectory)
    found = solve(*trajectory, solver=Newton(PairedDiagonal()))
    assert found.verdict is Status.CONVERGED and int(found.iterations) < 25
    assert float(found.stats.jvps) == 6 * (int(found.iterations) + 1)
    for got, one in zip(found.states, wanted):
        np.testing.assert_allclose(got, one, rtol=0, atol=1e-11)
    assert int(solve(*trajectory, solver=quasi_deer(clip=None)).iterations) > 60
    for tamed in (Clipped(PairedDiagonal(1), 1.0), Damped(PairedDiagonal(), 0.05)):
        assert solve(*trajectory, solver=Newton(tamed)).verdict is Status.CONVERGED


def test_refusals(double):
    odd = Dynamics(lambda _, x, u: 0.5 * x)
    with pytest.raises(ValueError, match="3 numbers, wanted an even count"):
        solve(odd, jnp.ones(3), jnp.arange(4), solver=Newton(PairedDiagonal()))
    with pytest.raises(ValueError, match="num_probes"):
        PairedDiagonal(0)
