"""Pre-flight checks: every bad input is refused with a message that names the argument, what it got and what it wanted."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc.diagnostics.checks import (
    NonDeterministicTarget,
    PrecisionWarning,
    check_deterministic,
    check_precision,
    check_start,
    check_starts,
    looks_improper,
)
from partime_mcmc.validation import (
    InvalidStart,
    TooLarge,
    check_bytes,
    check_count,
    check_dtypes,
    check_key,
)


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def precision(request):
    """The default float's dtype, with x64 off and on, for one test."""
    with jax.enable_x64(request.param):
        yield jnp.dtype("float64" if request.param else "float32")


def normal(x):
    return -0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))


# --- keys and counts


def test_good_keys_become_typed_keys():
    key = jax.random.key(7)
    for given in (key, jax.random.PRNGKey(7), np.asarray(jax.random.PRNGKey(7))):
        got = check_key(given)
        assert jnp.issubdtype(got.dtype, jax.dtypes.prng_key) and got.shape == ()
        assert jax.random.uniform(got) == jax.random.uniform(key)
    other = jax.random.key(0, impl="rbg")
    assert check_key(other) is other
    assert jax.jit(lambda key: jax.random.uniform(check_key(key)))(key) == jax.random.uniform(key)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (0, TypeError, "got 0 of type int"),
        (np.int64(3), TypeError, "dtype int64"),
        (1.5, TypeError, "got 1.5 of type float"),
        (None, TypeError, "got None"),
        ("seed", TypeError, "got 'seed'"),
        (np.zeros(2, np.float32), TypeError, "dtype float32"),
        (np.zeros(2, np.int32), TypeError, "dtype int32"),
        (np.zeros(4, np.uint32), ValueError, r"shape \(4,\)"),
        (np.zeros((3, 2), np.uint32), ValueError, "batch of legacy keys"),
        (np.uint32(1), ValueError, r"shape \(\)"),
    ],
)
def test_bad_keys(bad, error, message):
    with pytest.raises(error, match=message) as caught:
        check_key(bad, "key_of_run")
    assert str(caught.value).startswith("key_of_run: got") and "wanted one key" in str(caught.value)


def test_batch_of_typed_keys():
    with pytest.raises(
        ValueError, match=r"key: got a batch of keys of shape \(4,\); wanted one key"
    ):
        check_key(jax.random.split(jax.random.key(0), 4))


@pytest.mark.parametrize("good, minimum", [(0, 0), (np.int32(5), 1), (np.array(3), 1)])
def test_good_counts(good, minimum):
    got = check_count(good, "num_samples", minimum)
    assert type(got) is int and got == good


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (0, ValueError, "got 0"),
        (-3, ValueError, "got -3"),
        (True, TypeError, "the bool True"),
        (np.True_, TypeError, "the bool True"),
        (4.0, TypeError, "got 4.0 of type float"),
        ("4", TypeError, "got '4' of type str"),
        (None, TypeError, "got None"),
        (np.arange(2), TypeError, "ndarray"),
    ],
)
def test_bad_counts(bad, error, message):
    with pytest.raises(error, match=message) as caught:
        check_count(bad, "num_chains", 1)
    assert str(caught.value).startswith("num_chains: got") and "wanted an int of at least 1" in str(
        caught.value
    )


# --- dtypes


def test_numpy_follows_the_default_dtype(precision):
    got = check_dtypes({"a": np.ones(3), "b": 2.0, "c": np.float64(1.0)})
    assert all(
        isinstance(leaf, jax.Array) and leaf.dtype == precision for leaf in jax.tree.leaves(got)
    )
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(got))
    np.testing.assert_array_equal(got["a"], np.ones(3))


def test_float32_arrays_and_python_numbers_follow_the_default(precision):
    got = check_dtypes({"a": jnp.ones(3, "float32"), "b": 2.0})
    assert got["a"].dtype == got["b"].dtype == precision


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_of_few_digits_are_refused(precision, dtype):
    with pytest.raises(InvalidStart, match=rf"got {dtype}; wanted float32 or float64"):
        check_dtypes({"a": jnp.ones(3, dtype), "b": 2.0})


def test_integers_become_floats_with_a_warning(precision):
    with pytest.warns(
        UserWarning, match=r"initial\['n'\]: got integers .*they become " + str(precision)
    ):
        got = check_dtypes({"n": np.arange(3)})
    assert got["n"].dtype == precision
    with pytest.warns(UserWarning, match="initial: got integers"):
        assert check_dtypes(3) == 3.0


@pytest.mark.parametrize("bad", [True, np.array([False]), 1j, np.array([None]), "x"])
def test_leaves_that_are_no_real_numbers(precision, bad):
    with pytest.raises(
        InvalidStart, match=r"initial\['a'\]: got .*; wanted real floating-point numbers"
    ):
        check_dtypes({"a": bad})


def test_a_mix_of_precisions_loses_nothing(precision):
    got = check_dtypes({"a": np.ones(2, np.float32), "b": {"c": np.full(2, 1 + 1e-12)}})
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {precision}
    np.testing.assert_array_equal(got["b"]["c"], np.full(2, 1 + 1e-12).astype(precision))


# --- starts


def test_a_good_start_passes(precision):
    check_start(normal, {"a": jnp.ones(3), "b": jnp.zeros(())})
    check_starts(normal, {"a": jnp.ones((4, 3)), "b": jnp.zeros(4)})


@pytest.mark.parametrize(
    "logdensity, message",
    [
        (lambda x: jnp.where(jnp.all(jnp.abs(x) < 0.5), 0.0, -jnp.inf), "log density is -inf"),
        (lambda x: jnp.sum(jnp.log(-x)), "log density is nan"),
        (lambda x: jnp.sum(1 / (x - 1)), "log density is inf"),
        (lambda x: -0.5 * x**2, r"got shape \(2,\) .*`.sum\(\)`"),
        (lambda x: -0.5 * jnp.sum(x**2, keepdims=True), r"got shape \(1,\) .*`.sum\(\)`"),
        (lambda x: (jnp.sum(x), 1.0), "wanted one real number"),
        (lambda x: jnp.sum(x > 0), "wanted one real number"),
        (lambda x: jnp.sum(x) * 1j, "wanted one real number"),
    ],
)
def test_bad_log_densities(precision, logdensity, message):
    with pytest.raises(InvalidStart, match=message) as caught:
        check_start(logdensity, jnp.ones(2))
    assert "wanted" in str(caught.value)


def test_a_gradient_that_is_nan_while_the_value_is_fine(precision):
    trap = lambda x: jnp.sum(jnp.where(x["a"] > 1, jnp.sqrt(x["a"] - 1), 0.0)) + normal(x)
    with pytest.raises(InvalidStart, match="double-where") as caught:
        check_start(trap, {"a": jnp.array([2.0, 0.5])})
    assert "gradient with respect to initial['a'][1]: got nan" in str(caught.value)
    safe = lambda x: jnp.sum(jnp.where(x > 1, jnp.sqrt(jnp.where(x > 1, x, 2.0) - 1), 0.0))
    check_start(safe, jnp.array([2.0, 0.5]))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_position_that_is_not_finite(precision, bad):
    with pytest.raises(
        InvalidStart, match=r"initial\['tau'\]\[1, 0\]: got .*; wanted finite numbers"
    ):
        check_start(
            lambda x: jnp.zeros(()),
            {"mu": jnp.zeros(2), "tau": jnp.zeros((2, 1)).at[1, 0].set(bad)},
        )


@pytest.mark.parametrize("empty", [jnp.zeros(0), {}, {"a": jnp.zeros((3, 0))}])
def test_a_position_without_entries(empty):
    with pytest.raises(InvalidStart, match="dimension 0"):
        check_start(normal, empty)


@pytest.mark.parametrize("bad", [jnp.arange(3), jnp.ones(3, bool), jnp.ones(3, complex), 3])
def test_leaves_of_the_wrong_kind(bad):
    with pytest.raises(InvalidStart, match="wanted real floating-point numbers"):
        check_start(normal, bad)


def test_a_density_in_another_precision():
    with jax.enable_x64(True):
        with pytest.raises(
            InvalidStart, match="got float64 at initial of dtype float32; wanted one precision"
        ):
            check_start(lambda x: jnp.sum(x * jnp.ones(2)), jnp.ones(2, jnp.float32))
        with pytest.raises(InvalidStart, match="got float32 at initial of dtype float64"):
            check_start(lambda x: normal(x).astype(jnp.float32), jnp.ones(2))


def test_the_bad_chain_is_named():
    starts = jnp.ones((4, 2)).at[2, 1].set(-1.0)
    with pytest.raises(
        InvalidStart, match="chain 2, initial: got a start where the log density is nan"
    ):
        check_starts(lambda x: jnp.sum(jnp.log(x)), starts)


def test_starts_are_compiled_once():
    traces = []

    def counted(x):
        traces.append(0)
        return normal(x)

    check_start(counted, jnp.ones(2))
    once = len(traces)
    traces.clear()
    check_starts(lambda x: counted(x), jnp.ones((8, 2)))
    assert len(traces) == once


def test_forward_mode_and_densities_without_derivative():
    def loop(x):  # no reverse mode through a while loop
        return jax.lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] - jnp.sqrt(jnp.sum(x))), (0, 0.0)
        )[1]

    check_start(loop, jnp.ones(2))
    with pytest.raises(InvalidStart, match="double-where"):
        check_start(loop, jnp.zeros(2))
    host = lambda x: jax.pure_callback(lambda x: np.float32(-np.sum(x**2)), jnp.float32(0), x)
    check_start(host, jnp.ones(2))


def test_a_failing_density_keeps_its_error_with_a_note():
    with pytest.raises(KeyError) as caught:
        check_start(lambda x: x["b"], {"a": jnp.ones(3)})
    assert any("logdensity failed at initial" in note for note in caught.value.__notes__)


def test_nothing_is_captured_as_a_constant(monkeypatch):
    data, seen, shapes = np.ones((300, 300)), [], []
    real = jax.jit

    def spy(function, *args, **kwargs):
        def watched(*operands):
            shapes.extend(jnp.shape(operand) for operand in jax.tree.leaves(operands))
            seen.extend(jax.make_jaxpr(function)(*operands).consts)
            return real(function, *args, **kwargs)(*operands)

        return watched

    monkeypatch.setattr(jax, "jit", spy)
    check_start(lambda x: -jnp.sum((data @ x) ** 2), jnp.ones(300))
    assert shapes and (300, 300) in shapes and not any(np.size(const) > 1 for const in seen)


# --- determinism and precision


def test_host_randomness_and_random_callbacks_show(precision):
    check_deterministic(normal, jnp.ones(2))
    check_deterministic(lambda x: jnp.sum(x) * jnp.nan, jnp.ones(2))
    rng = np.random.default_rng(0)
    draw = lambda: np.float32(rng.normal())
    for random in (
        lambda x: normal(x) + rng.normal(),
        lambda x: normal(x) + jax.pure_callback(draw, jax.ShapeDtypeStruct((), jnp.float32)),
    ):
        with pytest.raises(
            NonDeterministicTarget, match="logdensity: got .* and then .* at the same position"
        ):
            check_deterministic(random, jnp.ones(2))


def test_random_numbers_that_tracing_writes_into_the_program_show(precision):
    """However far from the position they count."""
    rng = np.random.default_rng(0)
    for random in (
        lambda x: normal(x) + jnp.where(jnp.abs(x).max() > 9, rng.normal(), 0.0),
        lambda x: jax.lax.cond(
            jnp.abs(x).max() > 9, lambda y: normal(y * rng.normal(size=2)), normal, x
        ),
    ):
        with pytest.raises(NonDeterministicTarget, match="logdensity: traced twice, it has"):
            check_deterministic(random, jnp.ones(2))


def test_precision_of_a_tame_density():
    error = check_precision(normal, jnp.full(10, 0.3))
    assert 0.0 <= error < 1e-6


def test_cancellation_warns():
    with pytest.warns(
        PrecisionWarning, match="in float32 where float64 gives .*wanted at most 0.001"
    ):
        error = check_precision(
            lambda x: jnp.sum((x + 1e6) ** 2 - 1e12 - 2e6 * x), jnp.full(3, 0.3)
        )
    assert error > 1e-3


def test_a_density_that_exists_in_float64_only():
    grid = np.linspace(0, 1, 20)

    def gaussian_process(x):  # a nearly singular kernel matrix
        kernel = jnp.exp(-0.5 * (grid[:, None] - grid) ** 2 / jnp.exp(2 * x)) + 1e-10 * jnp.eye(20)
        return -jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(kernel))))

    with pytest.warns(PrecisionWarning, match="got nan"):
        assert check_precision(gaussian_process, jnp.float32(0.0)) == np.inf


def test_precision_is_silent_where_it_cannot_be_checked():
    insists = lambda x: jax.lax.scan(_float32_only, jnp.float32(0), x)[0]  # noqa: E731
    assert check_precision(insists, jnp.ones(3)) is None
    assert check_precision(lambda x: normal(x).astype(jnp.float32), jnp.ones(3)) is None
    with jax.enable_x64(True):
        assert check_precision(normal, jnp.ones(3)) is None
    assert not jax.config.jax_enable_x64 and jnp.ones(1).dtype == jnp.float32


def test_precision_leaves_captured_data_alone():
    data = np.linspace(0.0, 1.0, 12).reshape(4, 3)
    inner = jax.jit(lambda x: data @ x)
    logdensity = lambda x: -jnp.sum(inner(x) ** 2)
    assert check_precision(logdensity, jnp.ones(3)) < 1e-6
    assert (
        jnp.asarray(data).dtype == jnp.float32
        and jax.jit(logdensity)(jnp.ones(3)).dtype == jnp.float32
    )


def _float32_only(carry, x):
    return carry + x, None


# --- memory and improper targets


def test_bytes_are_counted():
    assert check_bytes(100, 5, 8, 10**9, per_step=25, num_chains=4) == 4 * 100 * (25 + 5) * 8 * 6
    assert check_bytes(0, 5, 8, 0, per_step=25) == 0


def test_too_large_names_what_fits_before_allocating():
    start = time.perf_counter()
    with pytest.raises(TooLarge) as caught:
        check_bytes(10**7, 100, 4, 2**33, per_step=100**2)
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, MemoryError)
    assert (
        "10000000 steps of dimension 100" in message and "max_bytes=8589934592 (8 GiB)" in message
    )
    size = int(message.split("Windows(")[1].split(")")[0])
    check_bytes(size, 100, 4, 2**33, per_step=100**2)
    with pytest.raises(TooLarge):
        check_bytes(2 * size, 100, 4, 2**33, per_step=100**2)
    assert "quasi_deer()" in message


def test_too_large_for_one_step_and_for_diagonals():
    with pytest.raises(TooLarge, match="not even one step fits"):
        check_bytes(10, 1000, 8, 10**6, per_step=1000**2)
    with pytest.raises(TooLarge) as caught:
        check_bytes(10**9, 10, 8, 10**6, per_step=10)
    assert "quasi_deer" not in str(caught.value) and "Windows(1024)" in str(caught.value)


def test_improper_targets_are_suspected():
    starts, settled = {"a": jnp.ones((4, 2))}, {"a": jnp.full((4, 2), 30.0)}
    assert looks_improper(starts, settled, 0.3) is None
    assert looks_improper(jnp.full((4, 2), 1e7), jnp.full((4, 2), 3e7), np.full(4, 0.3)) is None
    assert "['a'] grew to 4.6e+19" in looks_improper(starts, {"a": jnp.full((4, 2), -4.6e19)}, 0.3)
    assert "step size grew to 4.8e+03" in looks_improper(starts, settled, np.array([0.3, 4850.0]))
