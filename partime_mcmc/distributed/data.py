"""Log densities of data spread over devices: the sum of what each device says of its own rows.

    log p(x) = log prior(x) + Σ_q ℓ_q(x),     ∇ log p(x) = ∇ log prior(x) + Σ_q ∇ℓ_q(x)

Inside `jax.shard_map`, `summed(ℓ)` is the sum over the devices of one mesh axis, and so is its gradient: one
all-reduce of one number and one of D. JAX alone would give every device the gradient of its own rows times the number
of devices, because it cannot know there that x is the same everywhere.
"""

from __future__ import annotations

from typing import Callable

import jax
from jax import lax

from partime_mcmc.types import Array, PyTree


def summed(function: Callable[..., Array], name: str = "data") -> Callable[..., Array]:
    """A function summed over the devices of a mesh axis, with the right derivative in its first argument.

    Args:
        function: `(x, *local) -> scalar`, where `x` is the same on all devices and `local` is this device's own.
        name: The mesh axis.

    Returns:
        `(x, *local) -> scalar`, for use inside `jax.shard_map`: the same on all devices. Reverse mode, and forward
        mode over it.
    """

    @jax.custom_vjp
    def total(x: PyTree, *local: PyTree) -> Array:
        return lax.psum(function(x, *local), name)

    def forward(x, *local):
        value, pull = jax.vjp(function, x, *local)
        return lax.psum(value, name), pull

    def backward(pull, cotangent):
        along, *rest = pull(cotangent)
        return lax.psum(along, name), *rest

    total.defvjp(forward, backward)
    return total
