"""Keys of the host are JAX's own, bit for bit, and none of its programs is compiled for them."""

import jax
import numpy as np
import pytest

from partime_mcmc import host_keys

pytestmark = [pytest.mark.fast, pytest.mark.smoke]


def words(keys):
    return np.asarray(jax.random.key_data(keys))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5])
def test_children_are_those_of_jax(impl, partitionable, seed):
    with jax.threefry_partitionable(partitionable):
        key = jax.random.key(seed, impl=impl)
        for number in (0, 1, 2**31 - 3, 2**32 - 1):
            expected = jax.random.fold_in(key, np.uint32(number))
            np.testing.assert_array_equal(words(host_keys.fold_in(key, number)), words(expected))
        expected = jax.random.split(key, 5)
        found = host_keys.split(key, 5)
        assert found.shape == (5,) and found.dtype == expected.dtype
        np.testing.assert_array_equal(words(found), words(expected))
        for one, other in zip(host_keys.split_into(key, 5), expected, strict=True):
            assert one.shape == () and np.array_equal(words(one), words(other))
        np.testing.assert_array_equal(words(host_keys.first_key(expected)), words(expected[0]))
        counting = [words(jax.random.fold_in(key, number)) for number in range(5)]
        assert host_keys.splits_by_counting(key) <= np.array_equal(words(expected), counting)


def test_inside_a_program_and_on_a_device_of_choice_they_are_jaxs():
    key = jax.random.key(3)
    inside = jax.jit(lambda key: host_keys.split(host_keys.fold_in(key, 2), 3))(key)
    np.testing.assert_array_equal(
        words(inside), words(jax.random.split(jax.random.fold_in(key, 2), 3))
    )
    there = jax.device_put(key, jax.devices()[0])
    assert host_keys.fold_in(there, 1).devices() == there.devices()


def test_nothing_is_compiled():
    key, compiled = jax.random.key(11), []

    def hear(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        host_keys.first_key(host_keys.split(host_keys.fold_in(key, 4), 19))
        host_keys.split_into(key, 23)
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert not compiled
