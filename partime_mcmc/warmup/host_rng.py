"""Seeds of warm-up: a tree of random streams whose nodes are made on the host.

Warm-up asks for some dozen short streams, one per window, batch of trials or rescue. `jax.random.fold_in` is a compiled
program of its own each time, which takes as long as twenty transitions; NumPy's `SeedSequence` hashes a root and the path to
a node:

    root = words of a key,     words(n_1, ..., n_k) = SeedSequence(root, spawn_key=(n_1, ..., n_k))
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from partime_mcmc.types import Array, Key

_IMPL = "threefry2x32"


class SeedTree(NamedTuple):
    """A node.

    Attributes:
        root: The words of the key that the tree grows from.
        path: Which child of which child.
    """

    root: tuple[int, ...]
    path: tuple[int, ...] = ()

    @classmethod
    def of(cls, key: Key) -> SeedTree:
        """The root of the tree of a key."""
        return cls(tuple(np.ravel(jax.random.key_data(key)).tolist()))

    def child(self, number: int) -> SeedTree:
        """A node below, for each number from 0 on another."""
        return self._replace(path=(*self.path, number))

    @property
    def words(self) -> np.ndarray:
        """Of a key of JAX's own, shape `(2,)`, for `key_from` inside a program."""
        return np.random.SeedSequence(self.root, spawn_key=self.path).generate_state(2)

    @property
    def key(self) -> Key:
        """As a key."""
        return key_from(self.words)

    @property
    def generator(self) -> np.random.Generator:
        """For dice on the host."""
        return np.random.default_rng(np.random.SeedSequence(self.root, spawn_key=self.path))


def key_from(words: Array) -> Key:
    """The key of a seed's words."""
    return jax.random.wrap_key_data(words, impl=_IMPL)
