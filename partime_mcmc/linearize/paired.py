"""A 2 × 2 block of the Jacobian per coordinate: block quasi-DEER, for states that are positions and velocities.

    x = (q, p),   A_t ∈ ℝ^{D×D} with ∂q'_j/∂q_j, ∂q'_j/∂p_j, ∂p'_j/∂q_j, ∂p'_j/∂p_j for j = 1..D/2 and 0 elsewhere

The state's first half holds q and its second half p, as the ravelled pair `(q, p)` does. A leapfrog turns q_j and p_j into each
other, of which a diagonal knows nothing: with these blocks the leapfrogs of one trajectory are solved in parallel (Zoltowski et
al. 2025, arXiv:2508.18413). Exact, or by Hutchinson's estimate from random signs v of D/2 coordinates,

    (J (v, 0)) ⊙ (v, v)  and  (J (0, v)) ⊙ (v, v),     two products per probe.

A composition costs 4 D multiplications.
"""

import jax
import jax.numpy as jnp

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.scan.affine import Pairs
from partime_mcmc.types import Array, Key, PyTree, pytree
from partime_mcmc.validation import check_count


@pytree(static=("num_probes",))
class PairedDiagonal:
    """`A_t` has a 2 × 2 block for every coordinate of the two halves of the state, whose size D is even.

    Attributes:
        num_probes: Random directions per half and step; None takes the exact blocks, D products.
    """

    num_probes: int | None = None

    def __post_init__(self):
        if self.num_probes is not None:
            check_count(self.num_probes, "num_probes", 1)

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, Pairs]:
        num_steps, dimension = previous.shape
        if dimension % 2:
            raise ValueError(
                f"initial: a state of {dimension} numbers, wanted an even count: two halves (q, p) of one size"
            )
        half = dimension // 2
        if self.num_probes is None:
            directions = jnp.broadcast_to(
                jnp.eye(half, dtype=previous.dtype), (num_steps, half, half)
            )
        else:
            shape = (num_steps, self.num_probes, half)
            directions = jax.random.rademacher(key, shape, previous.dtype)
        # Unit vectors add up to the diagonal, random signs average to it.
        share = 1.0 if self.num_probes is None else 1.0 / self.num_probes

        def one(x, drive, directions):
            def push(direction, first):
                nothing = jnp.zeros_like(direction)
                tangent = jnp.concatenate([direction, nothing] if first else [nothing, direction])
                value, image = jax.jvp(lambda state: dynamics(state, drive), (x,), (tangent,))
                return value, image.reshape(2, half) * direction

            columns = []
            for first in (True, False):
                value, images = jax.vmap(lambda v: push(v, first), out_axes=(None, 0))(directions)
                columns.append(share * images.sum(axis=0))
            return value, jnp.stack(columns, axis=1)

        values, blocks = jax.vmap(one)(previous, drives, directions)
        return values, Pairs(blocks, jnp.zeros_like(values))

    def jvps(self, dimension: int) -> int:
        return dimension if self.num_probes is None else 2 * self.num_probes

    def map_size(self, dimension: int) -> int:
        return 2 * dimension
