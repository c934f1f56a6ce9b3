"""Looking at every step of a path at once: what its kernel makes of each state, and what it says of it.

Steps are looked at in pieces of a few lanes, which fills the device and stays in its caches; a few steps can be looked at again
when the states that they start from have changed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from partime_mcmc.certify.step_record import decision_uniform, record
from partime_mcmc.kernels.explicit_randomness import anyone
from partime_mcmc.kernels.kernel import Kernel


class Observe:
    """One step of a kernel with everything worth recording; equal for equal kernels."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def __call__(self, params, carry, drive):
        del params
        new, state, info = self.kernel.transition(carry, drive)
        return (
            new,
            self.kernel.discrete(state),
            record(state, info),
            decision_uniform(drive.randomness, info),
        )

    def __eq__(self, other):
        mine, yours = self.kernel.algorithm, getattr(other, "kernel", self.kernel).algorithm
        return isinstance(other, Observe) and (mine.init, mine.step) == (yours.init, yours.step)

    def __hash__(self):
        return hash((self.kernel.algorithm.init, self.kernel.algorithm.step))


def in_pieces(function, *args, piece=None):
    """`vmap(function)(*args)`, where there are many steps one piece after another: what fills the device and stays in its caches.

    A piece takes every P-th step, P a multiple of four: in a kernel that is a cycle of two or four, all lanes of a piece are then
    at the same point of it, and what no lane wants is skipped.
    """
    num_steps, piece = jax.tree.leaves(args)[0].shape[0], piece or steps_at_once()
    if num_steps <= 2 * piece:
        return jax.vmap(function)(*args)
    num_pieces = 4 * -(-num_steps // (4 * piece))
    # The last rows are filled up with the last step.
    index = jnp.minimum(jnp.arange(num_pieces * piece), num_steps - 1).reshape(piece, num_pieces).T
    found = jax.lax.map(
        lambda some: jax.vmap(function)(*some), jax.tree.map(lambda leaf: leaf[index], args)
    )
    return jax.tree.map(
        lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])[:num_steps], found
    )


def reevaluate(function, seen, before, drives, again):
    """Replace what was seen of some steps, a piece of them at a time."""
    num_steps = again.shape[0]

    def look(value):
        seen, again = value
        index = jnp.nonzero(again, size=steps_at_once(), fill_value=num_steps)[0]
        some = jax.tree.map(lambda leaf: leaf[jnp.minimum(index, num_steps - 1)], (before, drives))
        found = jax.vmap(function)(*some)
        seen = jax.tree.map(lambda old, new: old.at[index].set(new, mode="drop"), seen, found)
        return seen, again.at[index].set(False, mode="drop")

    if not num_steps:
        return seen
    return jax.lax.while_loop(lambda value: anyone(value[1].any()), look, (seen, again))[0]


def steps_at_once() -> int:
    """Steps that are evaluated in one batch: on a CPU as many as stay in its caches, elsewhere as many as fill the device."""
    return 32 if jax.default_backend() == "cpu" else 1024
