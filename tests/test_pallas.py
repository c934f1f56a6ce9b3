"""The GPU kernels of the scans, in Pallas' interpret mode: one answer with the plain loop, which is their oracle.

What only a GPU can show is in `test_gpu`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc.scan import (
    AssociativeScan,
    Dense,
    Diagonal,
    Identity,
    LocalTime,
    PallasScan,
    SequentialScan,
)

# Chunks of 4 steps, and from 20 columns on a single pass.
SCAN = PallasScan(size=4, wide=20, interpret=True)


def problem(kind, num_steps, width, dtype):
    """Maps of norm at most 1, and a start."""
    rng = np.random.default_rng(0)
    shape = (num_steps, width) if kind is Diagonal else (num_steps, width, width)
    linear = rng.uniform(-1, 1, shape) / (1 if kind is Diagonal else width)
    return (
        kind(jnp.asarray(linear, dtype), jnp.asarray(rng.normal(size=(num_steps, width)), dtype)),
        jnp.asarray(rng.normal(size=width), dtype),
    )


# Chunks and steps that fill their tiles and that do not, D a power of two and not; every type, with fewer of each other.
@pytest.mark.parametrize(
    "kind, num_steps, width, dtype",
    [
        (Diagonal, 9, 3, "float32"),
        (Diagonal, 8, 4, "float64"),
        (Diagonal, 9, 3, "bfloat16"),
        (Diagonal, 7, 20, "float32"),
        (Diagonal, 7, 20, "bfloat16"),
        (Diagonal, 5, 130, "float64"),
        (Diagonal, 1, 2, "float32"),
        (Diagonal, 0, 2, "float32"),
        (Dense, 9, 3, "float32"),
        (Dense, 8, 1, "float64"),
        (Dense, 6, 8, "bfloat16"),
    ],
)
def test_kernels_are_the_loop_forwards_and_backwards(kind, num_steps, width, dtype):
    with jax.enable_x64(dtype == "float64"):
        maps, start = problem(kind, num_steps, width, dtype)
        for way in ("prefix", "suffix"):
            got, wanted = (
                jax.jit(getattr(LocalTime(scan), way))(maps, start)
                for scan in (SCAN, SequentialScan())
            )
            assert got.dtype == wanted.dtype == jnp.dtype(dtype) and got.shape == (num_steps, width)
            # At most nine steps, of up to eight products each; two-byte floats are rounded once.
            bound = float(jnp.finfo(dtype).eps) * (1 if dtype == "bfloat16" else 100)
            got, wanted = (np.asarray(path, np.float64) for path in (got, wanted))
            np.testing.assert_allclose(
                got, wanted, rtol=0, atol=bound * np.abs(wanted).max(initial=1)
            )


def test_what_is_wrong_with_a_map_shows():
    """The oracle above would be no use if the kernels did not look at their input."""
    maps, start = problem(Diagonal, 9, 3, "float32")
    changed = Diagonal(maps.diagonal.at[4, 1].add(0.5), maps.shift)
    run = jax.jit(SCAN.__call__)
    one, other = run(maps, start), run(changed, start)
    assert not np.array_equal(one[4:, 1], other[4:, 1])
    np.testing.assert_array_equal(one[:4], other[:4])


def test_chains_side_by_side():
    maps, start = problem(Diagonal, 9, 3, "float32")
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), (maps, start))
    got, wanted = (jax.jit(jax.vmap(scan))(*two) for scan in (SCAN, SequentialScan()))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "maps",
    [Identity(jnp.ones((5, 3))), Dense(jnp.ones((5, 9, 9)) / 9, jnp.ones((5, 9)))],
    ids=["identity", "dense, wide"],
)
def test_maps_without_a_kernel_go_to_the_tree(maps):
    start = jnp.ones(maps.shift.shape[1])
    np.testing.assert_array_equal(SCAN(maps, start), AssociativeScan()(maps, start))
    np.testing.assert_array_equal(SCAN.suffix(maps, start), AssociativeScan().suffix(maps, start))


def test_errors_say_what_to_do():
    maps, start = problem(Diagonal, 4, 2, "float32")
    with pytest.raises(ValueError, match="platform is cpu.*SequentialScan"):
        PallasScan()(maps, start)
    with pytest.raises(ValueError, match="size must be an integer of at least 1, got 0"):
        PallasScan(size=0)
    with pytest.raises(ValueError, match="wide must be an integer of at least 1, got 0.5"):
        PallasScan(wide=0.5)
