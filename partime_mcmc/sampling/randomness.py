"""Tapes: the dice of all chains for any stretch of time, thrown at a cost that does not grow with the time before it.

Step t of chain c, counted from 0, uses the key

    k_ct = fold_in(key_c, t)        which is   jax.random.split(key_c, T)[t]   for every T > t

as long as JAX splits keys by counting (`jax_threefry_partitionable`, its default). Under other settings the keys of the
steps before are split again and cut off: the same dice, at a cost that grows. Counters and other discrete leaves go on from
where the stretch before left them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.closures import Named, explicit
from partime_mcmc.dynamics import Dynamics, without_captures
from partime_mcmc.kernels import Evidence, Independent, Kernel, Tape
from partime_mcmc.sampling.chain_groups import cut, run_explicit_groups
from partime_mcmc.sampling.draws import End
from partime_mcmc.kernels.kernel_program import program_and_params
from partime_mcmc.compile_cache import Timings, run_explicit
from partime_mcmc.types import Array, Key, PyTree

# Steps fold the numbers from 0 on into a chain's key.
_INIT_STREAM = 2**31 - 3
MAX_STEPS = 2**31 - 4


def throw(
    kernel: Kernel,
    positions: PyTree,
    keys: Key,
    num_samples: int,
    end: End | None = None,
    clock: Timings | None = None,
) -> tuple[Dynamics, PyTree, Tape, dict]:
    """The recurrence of a stretch of time and its dice.

    Args:
        kernel: The kernel.
        positions: One start per chain, leaves `(C, ...)`; not looked at where `end` is given.
        keys: One key per chain, shape `(C,)`.
        num_samples: T, steps of the stretch.
        end: Where chains stand; None is at `positions`, before the first step.
        clock: Where seconds are booked.

    Returns:
        Dynamics, starting carries `(C, ...)`, tapes `(C, T, ...)`, and the discrete leaves after the last step `(C, ...)`.
    """
    clock = Timings() if clock is None else clock
    ((initial, tape, discrete),) = throw_dice(kernel, positions, keys, num_samples, end, clock)
    return recurrence_of(kernel, initial, tape, clock), initial, tape, discrete


def throw_dice(
    kernel: Kernel,
    positions: PyTree,
    keys: Key,
    num_samples: int,
    end: End | None,
    clock: Timings,
    count: int = 1,
) -> list[tuple[PyTree, Tape, dict]]:
    """As `throw`, without the recurrence, for each of `count` groups of chains."""
    family, numbers = program_and_params(kernel)
    first = 0 if end is None else end.num_steps
    chains = (positions, None, keys) if end is None else (None, (end.carries, end.discrete), keys)
    groups = [(*group, np.uint32(first)) for group in cut(chains, count)]
    program = _Throw(family, num_samples, None if splits_by_counting(keys) else first)
    return run_explicit_groups(program, numbers, groups, clock=clock)


def recurrence(
    kernel: Kernel,
    positions: PyTree,
    keys: Key,
    end: End | None,
    clock: Timings,
    evidence: Evidence = Independent(),
) -> Dynamics:
    """The recurrence of `throw` alone; nothing is computed.

    Args:
        kernel: The kernel.
        positions: As for `throw`; as with the next ones only structure, shapes and types matter.
        keys: One per chain, shape `(C,)`.
        end: As for `throw`.
        clock: Where seconds are booked.
        evidence: As for `recurrence_of`.
    """
    family, numbers = program_and_params(kernel)
    chains = (positions, None) if end is None else (None, (end.carries, end.discrete))
    with clock.measure("compile"):
        initial, tape, _ = explicit(_Throw(family, 1, 0), numbers, *chains, keys, np.uint32(0))[
            0
        ].result
    return recurrence_of(kernel, initial, tape, clock, evidence)


def recurrence_of(
    kernel: Kernel, initial: PyTree, tape: Tape, clock: Timings, evidence: Evidence = Independent()
) -> Dynamics:
    """The recurrence of a kernel, without captured arrays.

    Args:
        kernel: The kernel.
        initial: Starting carries, leaves `(C, ...)`; only structure, shapes and types matter.
        tape: Tapes, leaves `(C, T, ...)`; likewise.
        clock: Where seconds are booked.
        evidence: What certificates will rest on: steps note what it needs.
    """
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), initial)
    drive = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), tape)
    with clock.measure("compile"):
        return without_captures(evidence.dynamics(kernel), state, drive)


def begin(kernel: Kernel, positions: PyTree, keys: Key, clock: Timings) -> End:
    """Where chains stand before their first step.

    Args:
        kernel: The kernel.
        positions: One start per chain, leaves `(C, ...)`.
        keys: One key per chain, shape `(C,)`.
        clock: Where seconds are booked.
    """
    family, numbers = program_and_params(kernel)
    return End(*run_explicit(_Begin(family), numbers, positions, keys, clock=clock))


def splits_by_counting(keys: Key) -> bool:
    """Whether the keys that `split` gives are those that `fold_in` gives."""
    return _splits_by_counting(
        str(jax.random.key_impl(keys)), bool(jax.config.jax_threefry_partitionable)
    )


@functools.cache
def _splits_by_counting(impl: str, partitionable: bool) -> bool:
    # Two keys are split and one at a time is folded, by programs that a run has compiled before.
    key = jax.random.key(0, impl=impl)
    folded = [np.asarray(jax.random.key_data(jax.random.fold_in(key, place))) for place in range(2)]
    return partitionable and np.array_equal(folded, jax.random.key_data(jax.random.split(key, 2)))


class _Throw(Named):
    """Carries, tapes and last discrete leaves of all chains; parts: the kernel's family, T, and the first step where that is
    part of the program."""

    def __call__(self, numbers, positions, at, keys, first):
        family, num_samples, known = self.parts
        kernel = family.kernel(numbers)

        def one(position, at, key):
            state = _initial(kernel, position, key) if at is None else kernel.state(*at)
            places = first + jnp.arange(num_samples, dtype=jnp.uint32)
            tape, after = kernel.stretch_of(
                step_keys(key, places, None if known is None else known + num_samples), state
            )
            return kernel.carry(state) if at is None else at[0], tape, after

        return jax.vmap(one)(positions, at, keys)


class _Begin(Named):
    """Carries and discrete leaves of all chains before their first step; the part is the kernel's family."""

    def __call__(self, numbers, positions, keys):
        kernel = self.parts[0].kernel(numbers)

        def one(position, key):
            state = _initial(kernel, position, key)
            return kernel.carry(state), kernel.discrete(state)

        return jax.vmap(one)(positions, keys)


def _initial(kernel: Kernel, position: PyTree, key: Key) -> PyTree:
    return kernel.init(position, jax.random.fold_in(key, _INIT_STREAM))


def step_keys(key: Key, places: Array, total: int | None) -> Key:
    """The keys of some steps of a chain.

    Args:
        key: The chain's.
        places: Steps, counted from 0, shape `(n,)`.
        total: None where `splits_by_counting`: these steps alone are paid for. Elsewhere a number of steps that has them all,
            which are split and of which these are taken.
    """
    if total is None:
        return jax.vmap(functools.partial(jax.random.fold_in, key))(places)
    return jax.random.split(key, total)[places]
