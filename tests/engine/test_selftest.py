"""The compiler does its sums: JAX 0.10.2 does not, on a CPU, and is excluded by the package's requirements.

There `jit(vmap(...))` of a small matrix-vector product followed by a sum is silently wrong beyond row 16,384 in float64
and 32,768 in float32, and everything here is made of such products. Lengths just above both limits, with the compiler's
usual settings.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMISED


@pytest.mark.parametrize("dimension", [3, 5, 7])
@pytest.mark.parametrize("length", [2**14 + 3, 2**15 + 3])
def test_a_batched_product_followed_by_a_sum(precision, length, dimension):
    rng = np.random.default_rng(dimension)
    matrix, points = rng.normal(size=(dimension, dimension)), rng.normal(size=(length, dimension))
    form = jax.jit(
        jax.vmap(lambda x: jnp.sum(jnp.dot(jnp.asarray(matrix, precision), x) ** 2)),
        compiler_options=OPTIMISED,
    )
    got = np.asarray(form(jnp.asarray(points, precision)), np.float64)
    wanted = ((points @ matrix.T) ** 2).sum(axis=1)
    # Two dozen roundings, of terms that are at most what they sum to.
    np.testing.assert_allclose(
        got,
        wanted,
        rtol=200 * np.finfo(precision).eps,
        atol=1e-5 if precision == "float32" else 1e-13,
    )
