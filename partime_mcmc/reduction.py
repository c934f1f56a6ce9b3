"""The largest of some numbers, with NaN counted as larger than anything.

A verdict must not depend on how a backend's `max` treats NaN: some JAX releases return NaN on a CPU, others (0.12.0 is
one) silently skip it, and a path with a NaN in it would then pass as exact.
"""

from __future__ import annotations

import jax.numpy as jnp

from partime_mcmc.types import Array


def largest(values: Array, axis: int | None = None) -> Array:
    """The maximum of non-negative `values` over `axis` (None: all), 0 if there are none, NaN if any is NaN.

    Args:
        values: Floating point, any shape.
        axis: The axis to reduce.

    Returns:
        The shape of `values` without `axis`.
    """
    missing = jnp.isnan(values)
    top = jnp.max(jnp.where(missing, 0, values), axis=axis, initial=0.0)
    return jnp.where(missing.any(axis=axis), jnp.nan, top).astype(values.dtype)
