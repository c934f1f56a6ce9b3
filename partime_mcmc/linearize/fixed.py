"""Linear parts that need no derivative: Picard's identity and Jacobi's zero.

    Picard   A_t = I     x_t ← x_0 + Σ_{s≤t} (f(x̂_{s-1}) − x̂_{s-1}):  good where a step changes little
    Jacobi   A_t = 0     x_t ← f(x̂_{t-1}):                              good where a step forgets its past

Both are the same iteration as DEER with a cruder matrix (Gonzalez et al. 2025, arXiv:2509.21716), and both are exact
after at most T iterations.
"""

import jax
import jax.numpy as jnp

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.scan.affine import Identity, Zero
from partime_mcmc.types import Array, Key, PyTree, pytree


class _Fixed:
    """What linear parts without a derivative cost."""

    def jvps(self, dimension: int) -> int:
        return 0

    map_size = jvps


@pytree()
class IdentityJacobian(_Fixed):
    """`A_t` is the identity."""

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, Identity]:
        values = jax.vmap(dynamics)(previous, drives)
        return values, Identity(jnp.zeros_like(values))


@pytree()
class ZeroJacobian(_Fixed):
    """`A_t` is zero."""

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, Zero]:
        values = jax.vmap(dynamics)(previous, drives)
        return values, Zero(jnp.zeros_like(values))
