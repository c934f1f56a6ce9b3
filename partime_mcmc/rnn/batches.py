"""How many sequences or networks a `vmap` around a call runs side by side.

A `vmap` is hidden from the function that it maps. `custom_vmap` lets a function say what shall happen instead, and the rule
is given the size of the mapped axis while the program is traced: a function that does nothing but multiply these sizes tells
them. What it cannot see is a `vmap` outside of a `jit`, because that function is traced once for all callers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.types import PyTree


def batch_around(tree: PyTree) -> int:
    """The product of the sizes of all mapped axes that some array is mapped along; 1 where none is.

    Args:
        tree: Arrays.
    """
    sizes = []

    @jax.custom_batching.custom_vmap
    def look(*leaves):
        return jnp.zeros(())

    @look.def_vmap
    def _(axis_size, in_batched, *leaves):
        sizes.append(axis_size)
        # The next `vmap` outside of this one, if there is one.
        return look(*leaves), False

    # Nothing is to be differentiated here, and a function with a rule of its own could not be.
    look(*lax.stop_gradient(jax.tree.leaves(tree)))
    return math.prod(sizes)
