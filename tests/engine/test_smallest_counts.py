"""Counts: one is the smallest that is allowed, and it works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import MultishiftCoupling, coalescing_hmc, hmc, nuts, random_walk
from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.recipes import deer, quasi_deer
from partime_mcmc.engine.solution import Solution
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.time_axis import LocalTime
from partime_mcmc.engine.windows import SlidingWindow, Windows
from partime_mcmc.forgetting import lyapunov, meeting_times
from partime_mcmc.kernels import Whitening
from partime_mcmc.scan import ChunkedScan
from partime_mcmc.solvers import Sequential, Shooting


def _path(**arguments):
    """A path of five steps of which each is right after as many iterations as it has steps before it."""
    drives = jnp.arange(5.0)[:, None]
    return solve(Dynamics(lambda a, x, u: a * x + u, 0.5), jnp.zeros(1), drives, **arguments)


_STARTS = jnp.array([[1.0], [2.0]])
_ONES = {
    "size of windows": lambda n: _path(schedule=Windows(n)),
    "size of sliding windows": lambda n: _path(schedule=SlidingWindow(n)),
    "max_iterations": lambda n: _path(max_iterations=n),
    "num_segments": lambda n: _path(solver=Shooting(num_segments=n)),
    "steps": lambda n: _path(solver=Shooting(steps=n)),
    "max_passes": lambda n: _path(solver=Shooting(steps=2, max_passes=n)),
    "num_probes": lambda n: _path(solver=quasi_deer(num_probes=n)),
    "size of chunks": lambda n: _path(solver=deer(), axis=LocalTime(ChunkedScan(n))),
    "num_directions": lambda n: lyapunov(
        Dynamics(lambda a, x, u: a * x + u, 0.5),
        jnp.zeros(1),
        jnp.zeros((5, 1)),
        jnp.zeros((5, 1)),
        key=jax.random.key(0),
        num_directions=n,
    ),
    "max_steps": lambda n: meeting_times(
        Dynamics(lambda a, x, u: a * x + u, 0.5),
        _STARTS,
        _STARTS + 1,
        jnp.zeros((5, 1)),
        max_steps=n,
    ),
    "num_integration_steps": lambda n: hmc(lambda x: -jnp.sum(x**2), 0.1, jnp.ones(2), n),
    "every": lambda n: coalescing_hmc(
        lambda x: -jnp.sum(x**2),
        0.1,
        Whitening.of_covariance(jnp.zeros(2), jnp.zeros(2), jnp.eye(2)),
        every=n,
    ),
    "max_num_doublings": lambda n: nuts(lambda x: -jnp.sum(x**2), 0.1, jnp.ones(2), n),
    "block": lambda n: random_walk(
        lambda x: -jnp.sum(x**2),
        0.1,
        coupling=MultishiftCoupling(),
        block=n,
        metric=Whitening.of_covariance(jnp.zeros(2), jnp.zeros(2), jnp.eye(2)),
    ),
}


@pytest.mark.parametrize("name", _ONES)
def test_the_smallest_count_is_one(name):
    found = _ONES[name](1)
    if isinstance(found, Solution):
        done = np.asarray(_path(solver=Sequential()).states)
        exact = int(found.num_exact)
        np.testing.assert_allclose(found.states[:exact], done[:exact], rtol=1e-6)
        assert exact >= 1
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"{name.split()[0]}.*{wrong}"):
            _ONES[name](wrong)
