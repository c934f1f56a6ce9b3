"""The laws of the scans: associativity and action of every monoid, one answer from every scan, and the textbook filter.

Tolerances are multiples of the machine epsilon times a bound on what was added up: a sum of n products errs by at most
about n·eps times the sum of their absolute values, whatever the order, and inverses add the condition number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import QUICK
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from partime_mcmc.engine.time_axis import LocalTime
from partime_mcmc.scan import (
    AssociativeScan,
    ChunkedScan,
    Dense,
    DenseBelief,
    DenseMessage,
    Diagonal,
    DiagonalBelief,
    DiagonalMessage,
    Identity,
    SequentialScan,
    Zero,
    default_scan,
)
from partime_mcmc.solvers.kalman import trust_region_step

D = 3
MAPS = [Dense, Diagonal, Identity, Zero]
MESSAGES = [DenseMessage, DiagonalMessage]
SCANS = [SequentialScan(), AssociativeScan(), ChunkedScan(1), ChunkedScan(3), ChunkedScan(100)]
quick = functools.partial(jax.jit, compiler_options=QUICK)

# Numbers of one size, with exact zeros and ties among them: rounding errors are then bounded by one scale.
numbers = st.floats(-2, 2, width=32, allow_subnormal=False)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def make_maps(kind, matrix, shift):
    """Maps of a class from arrays of shape `(..., D, D)` and `(..., D)`."""
    if kind is Dense:
        return Dense(matrix, shift)
    if kind is Diagonal:
        return Diagonal(np.diagonal(matrix, axis1=-2, axis2=-1).copy(), shift)
    return kind(shift)


def as_matrix(maps):
    """The linear parts as NumPy matrices, in float64."""
    shift = np.asarray(maps.shift, np.float64)
    eye = np.eye(shift.shape[-1])
    if isinstance(maps, Dense):
        return np.asarray(maps.matrix, np.float64)
    if isinstance(maps, Diagonal):
        return np.asarray(maps.diagonal, np.float64)[..., None] * eye
    return np.broadcast_to(
        eye if isinstance(maps, Identity) else 0 * eye, (*shift.shape, shift.shape[-1])
    ).copy()


def make_messages(kind, matrix, shift, other):
    """Messages from arrays: `A` any matrix, `C` and `J` covariances (halved, to stay well conditioned)."""
    if kind is DenseMessage:

        def square(m):
            return 0.25 * m @ np.swapaxes(m, -1, -2)

        return DenseMessage(
            matrix,
            shift,
            square(other),
            0.5 * shift[..., ::-1],
            square(np.swapaxes(matrix, -1, -2)),
        )
    diagonal, spread = matrix[..., 0], other[..., 0]
    return DiagonalMessage(
        diagonal, shift, spread**2, 0.5 * shift[..., ::-1], diagonal[..., ::-1] ** 2
    )


def belief_of(kind, shift):
    if kind is DenseMessage:
        return DenseBelief(shift, np.eye(D) + 0.25 * np.outer(shift, shift))
    return DiagonalBelief(shift, 1.0 + shift**2)


@quick
def both_ways(first, second, third, x):
    """Two orders of composing three elements, and two ways to act on `x`."""
    left = third.after(second).after(first)
    right = third.after(second.after(first))
    return (left, right), (second.after(first)(x), second(first(x)))


def assert_close(got, wanted, bound):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", MAPS)
@given(
    matrices=arrays(np.float64, (3, D, D), elements=numbers),
    shifts=arrays(np.float64, (4, D), elements=numbers),
)
def test_affine_maps_are_a_monoid_that_acts(precision, kind, matrices, shifts):
    first, second, third = (
        cast(make_maps(kind, matrices[i], shifts[i]), precision) for i in range(3)
    )
    (left, right), (together, in_turn) = both_ways(
        first, second, third, jnp.asarray(shifts[3], precision)
    )
    # Entries are at most 2 and D = 3: products of three matrices and shifts are at most 2·6·6·6.
    bound = 8 * D * 500 * np.finfo(precision).eps
    assert type(left) is kind
    assert_close(left, right, bound)
    assert_close(together, in_turn, bound)


@pytest.mark.parametrize("kind", MAPS)
@given(
    matrix=arrays(np.float64, (D, D), elements=numbers),
    vectors=arrays(np.float64, (3, D), elements=numbers),
)
def test_affine_maps_are_what_their_matrices_say(precision, kind, matrix, vectors):
    step = cast(make_maps(kind, matrix, vectors[0]), precision)
    x, y = jnp.asarray(vectors[1:], precision)
    A = as_matrix(step)
    bound = 8 * D * 14 * np.finfo(precision).eps
    np.testing.assert_allclose(step(x), A @ vectors[1] + vectors[0], rtol=0, atol=bound)
    np.testing.assert_allclose(step.linear(x), A @ vectors[1], rtol=0, atol=bound)
    np.testing.assert_array_equal(step.with_shift(y).shift, y)
    np.testing.assert_array_equal(as_matrix(step.with_shift(y)), A)


@pytest.mark.parametrize("kind", MESSAGES)
@given(
    matrices=arrays(np.float64, (3, 2, D, D), elements=numbers),
    shifts=arrays(np.float64, (4, D), elements=numbers),
)
def test_messages_are_a_monoid_that_acts(precision, kind, matrices, shifts):
    first, second, third = (
        cast(make_messages(kind, matrices[i, 0], shifts[i], matrices[i, 1]), precision)
        for i in range(3)
    )
    belief = cast(belief_of(kind, shifts[3]), precision)
    (left, right), (together, in_turn) = both_ways(first, second, third, belief)
    # I + C J has condition at most about (1 + 9·9)², entries grow like 6³, and each is one of a few dozen products.
    bound = 64 * D * 82**2 * 216 * np.finfo(precision).eps
    if precision == np.float32:
        # The worst case would allow anything in float32; what is measured stays below 1e-3 of the largest entry.
        bound = 1e-3 * max(
            float(np.abs(leaf).max()) for leaf in jax.tree.leaves((left, together, 1.0))
        )
    assert_close(left, right, bound)
    assert_close(together, in_turn, bound)


def random_maps(kind, num_steps, dtype, seed=0):
    rng = np.random.default_rng(seed)
    # Spectral norm about 1: neither growth nor decay hides an error.
    return cast(
        make_maps(kind, 0.6 * rng.normal(size=(num_steps, D, D)), rng.normal(size=(num_steps, D))),
        dtype,
    )


@quick
def all_scans(elements, start):
    prefixes = [LocalTime(scan).prefix(elements, start) for scan in SCANS]
    return prefixes, [
        LocalTime(scan).suffix(elements, start) for scan in (*SCANS[:2], ChunkedScan(4))
    ]


# 0, 1, 2, a multiple of the chunk and no multiple of it.
@pytest.mark.parametrize(
    "num_steps, dtype",
    [(0, "float64"), (1, "float64"), (2, "float32"), (9, "float64"), (11, "float32")],
)
@pytest.mark.parametrize("kind", MAPS)
def test_every_scan_is_the_loop(kind, num_steps, dtype):
    with jax.enable_x64(dtype == "float64"):
        maps = random_maps(kind, num_steps, dtype)
        start = jnp.asarray([1.0, -2.0, 0.5], dtype)
        matrices, shifts = as_matrix(maps), np.asarray(maps.shift, np.float64)
        forwards, backwards = np.zeros((2, num_steps, D))
        x = y = np.asarray(start, np.float64)
        for t in range(num_steps):
            x = forwards[t] = matrices[t] @ x + shifts[t]
            y = backwards[-1 - t] = matrices[-1 - t] @ y + shifts[-1 - t]
        # T steps of D products each; compositions grow to some ten times the path.
        scale = 1 + np.abs(forwards).max(initial=0) + np.abs(backwards).max(initial=0)
        bound = 100 * D * np.finfo(dtype).eps * scale
        prefixes, suffixes = all_scans(maps, start)
        for got, wanted in [
            *((prefix, forwards) for prefix in prefixes),
            *((suffix, backwards) for suffix in suffixes),
        ]:
            assert got.dtype == dtype and got.shape == (num_steps, D)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", [Dense, Diagonal, Identity])
def test_two_byte_floats_are_added_up_in_four(kind):
    # 1,000 times 1 + 2⁻⁷: bfloat16, with 8 bits, would stop growing at 256.
    num_steps, unit = 1000, 1 + 2**-7
    matrices = np.broadcast_to(np.eye(D), (num_steps, D, D))
    maps = cast(make_maps(kind, matrices, np.full((num_steps, D), unit)), jnp.bfloat16)
    prefixes, suffixes = all_scans(maps, jnp.zeros(D, jnp.bfloat16))
    for got in (*prefixes, *(suffix[::-1] for suffix in suffixes)):
        assert got.dtype == jnp.bfloat16
        wanted = unit * np.arange(1, num_steps + 1)[:, None]
        # One rounding at the end.
        rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted * np.ones(D), rtol=rounding)


def test_the_default_is_chosen_by_platform_and_shape(monkeypatch):
    maps = jax.eval_shape(lambda: random_maps(Diagonal, 1000, "float32"))
    assert default_scan(maps) == SequentialScan()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert default_scan(maps) == AssociativeScan()
    # One map: nothing to compose.
    assert (
        default_scan(jax.eval_shape(lambda: random_maps(Diagonal, 1, "float32")))
        == SequentialScan()
    )


def textbook_filter(matrices, shifts, damping, start):
    """Predict and update for x_t = A x_{t-1} + b + N(0, I), seen as 0 with variance 1/damping."""
    mean, covariance = start, np.zeros((D, D))
    means, covariances = [], []
    for A, b in zip(matrices, shifts):
        mean, covariance = A @ mean + b, A @ covariance @ A.T + np.eye(D)
        gain = covariance @ np.linalg.inv(covariance + np.eye(D) / damping)
        mean, covariance = mean - gain @ mean, covariance - gain @ covariance
        means.append(mean)
        covariances.append(covariance)
    return np.array(means), np.array(covariances)


@functools.partial(jax.jit, static_argnames="message", compiler_options=QUICK)
def filters(steps, damping, start, message):
    messages = jax.vmap(lambda step: message.trust_region(step, damping))(steps)
    return [scan(messages, message.certain(start)) for scan in SCANS[:4]]


@pytest.mark.parametrize("maps, message", [(Dense, DenseMessage), (Diagonal, DiagonalMessage)])
def test_messages_are_the_textbook_filter(precision, maps, message):
    steps = random_maps(maps, 7, precision, seed=1)
    start = jnp.asarray([1.0, -1.0, 2.0], precision)
    tolerance = (
        2000 * np.finfo(precision).eps
    )  # seven steps of some thirty products, each amplified up to tenfold
    for damping in (1e-3, 1.0, 30.0):
        means, covariances = textbook_filter(
            as_matrix(steps),
            np.asarray(steps.shift, np.float64),
            damping,
            np.asarray(start, np.float64),
        )
        wanted = covariances if maps is Dense else np.diagonal(covariances, axis1=1, axis2=2)
        for belief in filters(steps, jnp.asarray(damping, precision), start, message):
            spread = belief.covariance if maps is Dense else belief.variance
            np.testing.assert_allclose(belief.mean, means, atol=tolerance * np.abs(means).max())
            np.testing.assert_allclose(spread, wanted, atol=tolerance * np.abs(wanted).max())


def damped_least_squares(matrices, residuals, damping):
    """argmin Σ‖r_t + A_t δ_{t-1} − δ_t‖² + λ Σ‖δ_t‖², as one dense least-squares problem."""
    num_steps = len(residuals)
    system = np.eye(num_steps * D)
    for t in range(1, num_steps):
        system[t * D : (t + 1) * D, (t - 1) * D : t * D] = -matrices[t]
    rows = np.concatenate([system, np.sqrt(damping) * np.eye(num_steps * D)])
    right = np.concatenate([residuals.ravel(), np.zeros(num_steps * D)])
    return np.linalg.lstsq(rows, right, rcond=None)[0].reshape(num_steps, D)


trust_regions = quick(
    lambda maps, damping: [
        trust_region_step(maps, damping, maps.shift[0], LocalTime(scan)) for scan in SCANS[:2]
    ]
)


@pytest.mark.parametrize(
    "num_steps, dtype", [(1, "float64"), (2, "float32"), (7, "float64"), (7, "float32")]
)
@pytest.mark.parametrize("kind", MAPS)
def test_the_trust_region_step_is_damped_least_squares(kind, num_steps, dtype):
    with jax.enable_x64(dtype == "float64"):
        maps = random_maps(kind, num_steps, dtype, seed=2)
        for damping in (0.0, 1e-3, 1.0, 1e3):
            wanted = damped_least_squares(
                as_matrix(maps), np.asarray(maps.shift, np.float64), damping
            )
            # Filter and smoother each lose what the textbook filter above loses.
            bound = 4000 * np.finfo(dtype).eps * np.abs(wanted).max()
            for got in trust_regions(maps, jnp.asarray(damping, dtype)):
                np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


def test_the_time_axis_on_small_numbers(precision):
    axis, states = LocalTime(), jnp.arange(6, dtype=precision).reshape(3, 2)
    np.testing.assert_array_equal(
        axis.previous(-jnp.ones(2, precision), states), [[-1, -1], [0, 1], [2, 3]]
    )
    np.testing.assert_array_equal(
        axis.following(states, -jnp.ones(2, precision)), [[2, 3], [4, 5], [-1, -1]]
    )
    assert (
        axis.previous(states[0], states[:0]).shape
        == axis.following(states[:0], states[0]).shape
        == (0, 2)
    )
    assert float(axis.maximum(jnp.asarray([1.0, 3.0, 2.0], precision))) == 3
    assert np.isnan(axis.maximum(jnp.asarray([1.0, jnp.nan, 2.0], precision)))
    assert float(axis.maximum(jnp.zeros(0, precision))) == 0
    assert float(axis.total(jnp.asarray([1.0, 3.0, 2.0], precision))) == 6
    for flags, length in (([], 0), ([0, 1, 1], 0), ([1, 1, 0, 1], 2), ([1, 1], 2)):
        assert int(axis.length_of_true(jnp.asarray(flags, bool))) == length


def test_the_sequential_and_the_parallel_scan_do_different_work(double):
    """The laws above would hold if every scan were the same loop: here their depths differ."""
    maps, start = random_maps(Dense, 64, double), jnp.ones(D, double)
    loops = {
        type(scan): str(jax.make_jaxpr(scan)(maps, start)).count("scan[")
        for scan in (SequentialScan(), AssociativeScan(), ChunkedScan(8))
    }
    assert loops == {SequentialScan: 1, AssociativeScan: 0, ChunkedScan: 3}
