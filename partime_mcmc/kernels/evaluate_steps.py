"""Evaluation of all steps of a path at once: the kernel's next state of each, and what the kernel reports of it.

Steps are evaluated some at a time, enough to fill the device and few enough for its caches; a few steps can be evaluated
again when the states that they start from have changed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from partime_mcmc.certify.step_record import decision_uniform, record
from partime_mcmc.kernels.explicit_randomness import anyone
from partime_mcmc.kernels.kernel import Kernel


class Observe:
    """One step of a kernel and its record; equal for equal kernels."""

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


def in_batches(function, *args, size=None):
    """`vmap(function)(*args)`, one batch of `size` steps after another where there are many steps.

    A batch takes every P-th step, P a multiple of four: in a kernel that is a cycle of two or four, all steps of a batch are
    then at the same point of it, and work that none of them needs is skipped.
    """
    num_steps, size = jax.tree.leaves(args)[0].shape[0], size or steps_at_once()
    if num_steps <= 2 * size:
        return jax.vmap(function)(*args)
    num_batches = 4 * -(-num_steps // (4 * size))
    # The last rows are filled up with the last step.
    index = jnp.minimum(jnp.arange(num_batches * size), num_steps - 1).reshape(size, num_batches).T
    found = jax.lax.map(
        lambda some: jax.vmap(function)(*some), jax.tree.map(lambda leaf: leaf[index], args)
    )
    return jax.tree.map(
        lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])[:num_steps], found
    )


def reevaluate(function, seen, before, drives, again):
    """Evaluate the steps flagged in `again` once more and replace their results in `seen`, one batch at a time."""
    num_steps = again.shape[0]

    def one_batch(value):
        seen, again = value
        index = jnp.nonzero(again, size=steps_at_once(), fill_value=num_steps)[0]
        some = jax.tree.map(lambda leaf: leaf[jnp.minimum(index, num_steps - 1)], (before, drives))
        found = jax.vmap(function)(*some)
        seen = jax.tree.map(lambda old, new: old.at[index].set(new, mode="drop"), seen, found)
        return seen, again.at[index].set(False, mode="drop")

    if not num_steps:
        return seen
    return jax.lax.while_loop(lambda value: anyone(value[1].any()), one_batch, (seen, again))[0]


def steps_at_once() -> int:
    """Steps that are evaluated in one batch: on a CPU as many as stay in its caches, elsewhere as many as fill the device."""
    return 32 if jax.default_backend() == "cpu" else 1024
