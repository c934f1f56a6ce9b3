"""The three forms of a metric's root against plain matrices."""

import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc.kernels.metric_root import (
    LowRank,
    dual,
    is_diagonal,
    largest_ratio,
    metric_of,
    solve,
    times,
    transposed_times,
)

D, K = 7, 3


def root_of(form, seed=0):
    rng = np.random.default_rng(seed)
    sigma = np.exp(rng.normal(size=D))
    if form == "diagonal":
        return sigma
    if form == "dense":
        return np.tril(rng.normal(size=(D, D)), -1) + np.diag(sigma)
    return LowRank(sigma, np.linalg.qr(rng.normal(size=(D, K)))[0], np.exp(2 * rng.normal(size=K)))


def matrix_of(root):
    """The root as a matrix, by its definition."""
    if isinstance(root, LowRank):
        u = root.directions
        return np.diag(root.sigma) @ (np.eye(D) + u @ np.diag(root.factors - 1) @ u.T)
    return np.diag(root) if root.ndim == 1 else root


FORMS = ["diagonal", "dense", "low rank"]


@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_the_matrix(form):
    root, rows = root_of(form), np.random.default_rng(1).normal(size=(2, 4, D))
    matrix = matrix_of(root)
    np.testing.assert_allclose(times(root, rows), rows @ matrix.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(times(root, rows[0, 0]), matrix @ rows[0, 0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(transposed_times(root, rows), rows @ matrix, rtol=1e-10, atol=1e-12)
    back = transposed_times(dual(root), times(root, rows))
    np.testing.assert_allclose(back, rows, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(
        solve(root, rows[0, 0]), np.linalg.solve(matrix, rows[0, 0]), rtol=1e-8, atol=1e-10
    )
    assert is_diagonal(root) == (form == "diagonal")
    metric = np.diag(metric_of(root)) if form == "diagonal" else metric_of(root)
    np.testing.assert_allclose(metric, matrix @ matrix.T, rtol=1e-10, atol=1e-12)
    assert isinstance(times(root, rows), np.ndarray), "what is on the host stays there"


def test_jax_arrays_stay_jax_arrays():
    root = root_of("dense").astype(np.float32)
    assert isinstance(dual(jnp.asarray(root)), jnp.ndarray)
    assert isinstance(dual(root), np.ndarray)


@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
def test_the_largest_ratio_is_the_largest_singular_value(old, new):
    old, new = root_of(old), root_of(new, 1)
    wanted = np.linalg.norm(np.linalg.solve(matrix_of(new), matrix_of(old)), 2)
    # The power method ends when it is good enough for a step size.
    assert largest_ratio(old, new) == pytest.approx(wanted, rel=0.02)
