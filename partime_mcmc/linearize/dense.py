"""The exact Jacobian of every step: DEER.

    A_t = ∂f(x, u_t)/∂x at x̂_{t-1},      D forward-mode products per step, D² numbers per step.

Newton's method with it converges quadratically near the path (Lim et al. 2024, arXiv:2309.12252). Through accept and
reject the derivative is that of the branch taken: it exists almost everywhere and ignores that the branch can change,
which costs iterations where it matters and never exactness.
"""

import jax
import jax.numpy as jnp

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.scan.affine import Dense
from partime_mcmc.types import Array, Key, PyTree, pytree


@pytree()
class DenseJacobian:
    """`A_t` is the Jacobian, shape `(D, D)` per step."""

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, Dense]:
        values, matrices = jax.vmap(lambda x, drive: jacobian(dynamics, x, drive))(previous, drives)
        return values, Dense(matrices, jnp.zeros_like(values))

    def jvps(self, dimension: int) -> int:
        return dimension

    def map_size(self, dimension: int) -> int:
        return dimension * dimension


def jacobian(dynamics: Dynamics, x: Array, drive: PyTree) -> tuple[Array, Array]:
    """The value of one step and its Jacobian, shapes `(D,)` and `(D, D)`, from one forward pass."""

    def push(direction):
        return jax.jvp(lambda state: dynamics(state, drive), (x,), (direction,))

    # out_axes None keeps the value unbatched: it is computed once, not once per direction.
    return jax.vmap(push, out_axes=(None, -1))(jnp.eye(x.shape[0], dtype=x.dtype))
