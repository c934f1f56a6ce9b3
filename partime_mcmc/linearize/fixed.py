"""Linear parts that need no derivative: Picard's identity and Jacobi's zero.

    Picard   A_t = I     x_t ← x_0 + Σ_{s≤t} (f(x̂_{s-1}) − x̂_{s-1}):  good where a step changes little
    Jacobi   A_t = 0     x_t ← f(x̂_{t-1}):                              good where a step forgets its past

Both are the same iteration as DEER with a cruder matrix (Gonzalez et al. 2025, arXiv:2509.21716), and both are exact
after at most T iterations.
"""

import jax

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.linearize.base import no_shift
from partime_mcmc.scan.affine import Identity, Zero
from partime_mcmc.types import Array, Key, PyTree, pytree


@pytree()
class IdentityJacobian:
    """`A_t` is the identity."""

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, Identity]:
        del key
        values = jax.vmap(dynamics)(previous, drives)
        return values, Identity(no_shift(values))

    def jvps(self, dimension: int) -> int:
        del dimension
        return 0

    def map_size(self, dimension: int) -> int:
        del dimension
        return 0


@pytree()
class ZeroJacobian:
    """`A_t` is zero."""

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, Zero]:
        del key
        values = jax.vmap(dynamics)(previous, drives)
        return values, Zero(no_shift(values))

    def jvps(self, dimension: int) -> int:
        del dimension
        return 0

    def map_size(self, dimension: int) -> int:
        del dimension
        return 0
