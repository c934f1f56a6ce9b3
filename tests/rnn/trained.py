"""Weights that some steps of training have moved, for tests that must hold for more than random ones."""

import jax
import numpy as np


def trained(slope, params, rate=0.03, num_updates=20):
    """Parameters after some steps of Adam, in NumPy: there is nothing to compile.

    `slope` is `params -> gradient`.
    """
    leaves, structure = jax.tree.flatten(params)
    leaves = [np.asarray(leaf) for leaf in leaves]
    mean, square = [0 * leaf for leaf in leaves], [0 * leaf for leaf in leaves]
    for step in range(1, num_updates + 1):
        grads = [
            np.asarray(leaf)
            for leaf in jax.tree.leaves(slope(jax.tree.unflatten(structure, leaves)))
        ]
        mean = [0.9 * one + 0.1 * grad for one, grad in zip(mean, grads)]
        square = [0.999 * one + 0.001 * grad**2 for one, grad in zip(square, grads)]
        leaves = [
            (leaf - rate * (m / (1 - 0.9**step)) / (np.sqrt(s / (1 - 0.999**step)) + 1e-8)).astype(
                leaf.dtype
            )
            for leaf, m, s in zip(leaves, mean, square)
        ]
    return jax.tree.unflatten(structure, [jax.numpy.asarray(leaf) for leaf in leaves])
