"""The Jacobian's diagonal, exact or estimated: quasi-DEER.

    exact        A_t = diag(J_t)                          D forward-mode products per step, D numbers kept
    Hutchinson   A_t = 1/P Σ_p v_p ⊙ (J_t v_p)            P products per step, v_p of independent signs ±1

The scan then costs D per step instead of D³ (Gonzalez et al. 2024, arXiv:2407.19115); the estimate and its use for
Markov chains are Zoltowski et al. 2025 (arXiv:2508.18413). Its error in coordinate i is Σ_{j≠i} J_ij v_i v_j: small where
the Jacobian is nearly diagonal, as it is in whitened coordinates. The signs depend on the key alone, so every
iteration of a solve sees the same estimate of the same Jacobian: a fixed map can converge, a noisy one cannot.
"""

import jax
import jax.numpy as jnp

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.scan.affine import Diagonal
from partime_mcmc.types import Array, Key, PyTree, pytree
from partime_mcmc.validation import check_count


@pytree()
class DiagonalJacobian:
    """`A_t` is the exact diagonal of the Jacobian."""

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, Diagonal]:

        def one(x, drive):
            def push(direction):
                value, tangent = jax.jvp(lambda state: dynamics(state, drive), (x,), (direction,))
                return value, jnp.vdot(direction, tangent)

            return jax.vmap(push, out_axes=(None, 0))(jnp.eye(x.shape[0], dtype=x.dtype))

        values, diagonals = jax.vmap(one)(previous, drives)
        return values, Diagonal(diagonals, jnp.zeros_like(values))

    def jvps(self, dimension: int) -> int:
        return dimension

    map_size = jvps


@pytree(static=("num_probes",))
class HutchinsonDiagonal:
    """`A_t` is Hutchinson's estimate of the diagonal from `num_probes` products per step."""

    num_probes: int = 1

    def __post_init__(self):
        check_count(self.num_probes, "num_probes", 1)

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, Diagonal]:
        num_steps, dimension = previous.shape
        signs = jax.random.rademacher(key, (num_steps, self.num_probes, dimension), previous.dtype)

        def one(x, drive, probes):
            def push(probe):
                value, tangent = jax.jvp(lambda state: dynamics(state, drive), (x,), (probe,))
                return value, probe * tangent

            value, products = jax.vmap(push, out_axes=(None, 0))(probes)
            return value, products.mean(axis=0)

        values, diagonals = jax.vmap(one)(previous, drives, signs)
        return values, Diagonal(diagonals, jnp.zeros_like(values))

    def jvps(self, dimension: int) -> int:
        return self.num_probes

    def map_size(self, dimension: int) -> int:
        return dimension
