"""JAX's keys split and folded on the host, where no program is compiled for it.

A key of JAX's default generator is two words, and its child number t, `fold_in(key, t)` and `split(key, T)[t]` alike, is

    threefry2x32(key, (0, t))        (Salmon, Moraes, Dror and Shaw 2011: "Parallel random numbers: as easy as 1, 2, 3"),

20 rounds of sums, rotations and exclusive ors of 32-bit words. On a device every first call is a program to trace and to compile;
the children are the same, bit for bit. Keys of other generators or under other settings, traced ones, and those that a user has put on
a device are left to JAX.
"""

from collections.abc import Sequence

import jax
import numpy as np

from partime_mcmc.types import Key, Tracer, jax_config

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def fold_in(key: Key, number: int) -> Key:
    """`jax.random.fold_in(key, number)` of a key of shape ()."""
    words = _words(key)
    if words is None:
        return jax.random.fold_in(key, number)
    return _key(_children(words, [number])[0])


def split(key: Key, count: int) -> Key:
    """`jax.random.split(key, count)` of a key of shape (), shape `(count,)`."""
    words = _words_of_split(key, count)
    return jax.random.split(key, count) if words is None else _key(words)


def split_into(key: Key, count: int) -> list[Key]:
    """`list(jax.random.split(key, count))` of a key of shape ()."""
    words = _words_of_split(key, count)
    return list(jax.random.split(key, count)) if words is None else list(map(_key, words))


def first_key(keys: Key) -> Key:
    """`keys[0]` of keys of shape `(C,)`."""
    words = _words(keys)
    return keys[0] if words is None else _key(words[0])


def splits_by_counting(keys: Key) -> bool:
    """Whether the keys that `split` gives are those that `fold_in` gives."""
    impl = str(jax.random.key_impl(keys))
    return impl == "threefry2x32" and bool(jax_config.jax_threefry_partitionable)


def _words(key: Key) -> np.ndarray | None:
    """The words of keys, `(..., 2)`; None where JAX is to work on them."""
    if isinstance(key, Tracer) or str(jax.random.key_impl(key)) != "threefry2x32":
        return None
    data = jax.random.key_data(key)
    return None if data.committed else np.asarray(data)


def _words_of_split(key: Key, count: int) -> np.ndarray | None:
    """Words of the keys that a key is split into; None where JAX is to split it."""
    words = _words(key)
    # Under the older setting children hang on how many there are.
    if words is None or not jax_config.jax_threefry_partitionable:
        return None
    return _children(words, range(count))


def _key(words: np.ndarray) -> Key:
    # JAX puts them on the default device.
    return jax.random.wrap_key_data(words, impl="threefry2x32")  # pyright: ignore[reportArgumentType]


def _children(words: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Words of the children of these numbers, `(n, 2)`."""
    low = np.asarray(numbers, np.uint32)
    keys = (words[0], words[1], words[0] ^ words[1] ^ _PARITY)
    # Arrays, not numbers: sums of these wrap around in silence.
    x, y = np.zeros_like(low) + keys[0], low + keys[1]
    for stage in range(5):
        for bits in _ROTATIONS[stage % 2]:
            x = x + y
            y = (y << np.uint32(bits) | y >> np.uint32(32 - bits)) ^ x
        x = x + keys[(stage + 1) % 3]
        y = y + keys[(stage + 2) % 3] + np.uint32(stage + 1)
    return np.stack([x, y], axis=1)
