"""A solve watched pass by pass is the solve itself."""

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.diagnostics.passes import residuals_by_pass
from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.recipes import deer, jacobi
from partime_mcmc.engine.solve import solve


def test_a_solve_watched_pass_by_pass_is_the_solve(double):
    network = Dynamics(lambda w, x, u: jnp.tanh(w @ x + u), 0.9 * jnp.eye(3)[::-1])
    inputs = jax.random.normal(jax.random.key(0), (40, 3))
    for solver in (deer(), jacobi()):
        residuals = residuals_by_pass(network, jnp.zeros(3), inputs, solver=solver)
        history = np.asarray(
            solve(network, jnp.zeros(3), inputs, solver=solver).stats.residual_history
        )
        np.testing.assert_allclose(
            residuals.max(axis=1), history[np.isfinite(history)], rtol=1e-6, atol=1e-15
        )
        # Row k is what k passes before left: its first k steps are exact.
        assert (
            all((row[:k] < 1e-14).all() for k, row in enumerate(residuals))
            and residuals[0].max() > 0.1
        )
