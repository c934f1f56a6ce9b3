"""The random numbers of all chains for any steps, drawn before these are taken, at a cost that does not grow with time.

Step t of chain c, counted from 0, uses the key

    k_ct = fold_in(key_c, t)        which is   jax.random.split(key_c, T)[t]   for every T > t

as long as JAX splits keys by counting (`jax_threefry_partitionable`, its default). Under other settings the keys of the
steps before are split again and cut off: the same numbers, at a cost that grows. Counters and other discrete leaves go on
from where the steps before left them. The random numbers of a path and these leaves are its *tape*.
"""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.certify.recorded import Certification, CertifyIndependently
from partime_mcmc.compile_cache import Timings, compiler_options
from partime_mcmc.engine import Dynamics, without_captures
from partime_mcmc.host_keys import splits_by_counting
from partime_mcmc.kernels import Kernel, Tape
from partime_mcmc.kernels.kernel_program import program_and_params
from partime_mcmc.sampling.chain_groups import run_explicit_groups, run_groups
from partime_mcmc.sampling.chunk import ChainState
from partime_mcmc.tracing import HashableFunction, explicit
from partime_mcmc.types import Array, Key, PyTree

# Steps fold the numbers from 0 on into a chain's key.
_INIT_STREAM = 2**31 - 3
MAX_STEPS = 2**31 - 4


def begin(kernel: Kernel, positions: PyTree, keys: Key, timings: Timings) -> ChainState:
    """Where chains stand before their first step.

    Args:
        kernel: The kernel.
        positions: One start per chain, leaves `(C, ...)`; of shapes (`jax.ShapeDtypeStruct`) this is compiled only, in a thread,
            and shapes are returned.
        keys: One key per chain, shape `(C,)`.
        timings: Where seconds are counted.
    """
    program, params = program_and_params(kernel)
    chains, options = (positions, keys), compiler_options(0)
    found = run_explicit_groups(
        _Begin(program), params, chains, 1, timings=timings, options=options
    )
    return ChainState(*found)


def draw_tapes(
    kernel: Kernel,
    keys: Key,
    state: ChainState,
    num_steps: int,
    timings: Timings,
    num_groups: int = 1,
    options: dict[str, Any] | None = None,
) -> tuple[PyTree, Tape, dict]:
    """The tapes of the next steps of all chains.

    Args:
        kernel: The kernel.
        keys: One key per chain, shape `(C,)`.
        state: Where the chains stand; for shapes as for `begin`.
        num_steps: n.
        timings: Where seconds are counted.
        num_groups: How many groups of chains draw side by side (`chain_groups`).
        options: As for `compile_cache.compiled`.

    Returns:
        The carries `(C, ...)` that chains start from, tapes `(C, n, ...)`, and the discrete leaves after the last step
        `(C, ...)`.
    """
    draw, params = _tape_of_a_chain(kernel, keys, state, num_steps, timings)
    shared, chains = (params, np.uint32(state.num_steps)), (state.carries, state.discrete, keys)
    return run_groups(
        _DrawTapes(draw), shared, chains, num_groups, timings=timings, options=options
    )


def recurrence(
    kernel: Kernel,
    keys: Key,
    state: ChainState,
    timings: Timings,
    certificate: Certification = CertifyIndependently(),
    num_steps: int = 1,
) -> Dynamics:
    """The recurrence of a kernel, without captured arrays; nothing is computed.

    Args:
        kernel: The kernel.
        keys: One key per chain, shape `(C,)`; as of the next one, only structure, shapes and types matter.
        state: Where the chains stand.
        timings: Where seconds are counted.
        certificate: What certificates will rest on: steps note what it needs.
        num_steps: Of the tapes that will be drawn, so that what draws them is traced once.
    """
    draw, _ = _tape_of_a_chain(kernel, keys, state, num_steps, timings)
    initial, tape, _ = draw.result
    with timings.measure("compile"):
        return without_captures(certificate.dynamics(kernel), initial, _without_axes(tape, 1))


def coupled_chains(
    kernel: Kernel, positions: PyTree, keys: Key, num_steps: int
) -> tuple[Dynamics, PyTree, Tape]:
    """The recurrence of a kernel, carries at some positions, and the random numbers of their next steps.

    Args:
        kernel: The kernel.
        positions: Leaves `(K, ...)`.
        keys: Shape `(K,)`.
        num_steps: n.

    Returns:
        Dynamics, carries `(K, ...)`, tapes `(K, n, ...)`.
    """
    state = begin(kernel, positions, keys, Timings())
    carries, tape, _ = draw_tapes(kernel, keys, state, num_steps, Timings())
    return recurrence(kernel, keys, state, Timings()), carries, tape


def step_keys(key: Key, places: Array, total: int | None) -> Key:
    """The keys of some steps of a chain.

    Args:
        key: The chain's.
        places: Steps, counted from 0, shape `(n,)`.
        total: None where `splits_by_counting`: these steps alone are paid for. Elsewhere a number of steps that has them
            all, which are split and of which these are taken.
    """
    if total is None:
        return jax.vmap(functools.partial(jax.random.fold_in, key))(places)
    return jax.random.split(key, total)[places]


def _tape_of_a_chain(
    kernel: Kernel, keys: Key, state: ChainState, num_steps: int, timings: Timings
) -> tuple[Callable, PyTree]:
    """What draws the tape of one chain, `(params, carry, discrete, key, first step) -> (carry, tape, last discrete)`, and params."""
    program, params = program_and_params(kernel)
    known = None if splits_by_counting(keys) else state.num_steps
    chain = _without_axes((state.carries, state.discrete, keys), 1)
    with timings.measure("compile"):
        return explicit(_DrawTape(program, num_steps, known), params, *chain, np.uint32(0))


class _DrawTape(HashableFunction):
    """Carry, tape and last discrete leaves of a chain; parts: the kernel's program, n, and the first step where that is part of
    what is compiled."""

    def __call__(self, params, carry, discrete, key, first):
        program, num_steps, known = self.parts
        kernel = program.kernel(params)
        places = first + jnp.arange(num_steps, dtype=jnp.uint32)
        split = step_keys(key, places, None if known is None else known + num_steps)
        return carry, *kernel.tape_and_discrete(split, kernel.state(carry, discrete))


class _DrawTapes(HashableFunction):
    """What `_tape_of_a_chain` gives, of all chains; the part is that."""

    def __call__(self, params, first, carries, discrete, keys):
        (draw,) = self.parts
        return jax.vmap(draw, (None, 0, 0, 0, None))(params, carries, discrete, keys, first)


class _Begin(HashableFunction):
    """Carries and discrete leaves of all chains before their first step; the part is the kernel's program."""

    def __call__(self, params, positions, keys):
        kernel = self.parts[0].kernel(params)

        def one(position, key):
            state = kernel.init(position, jax.random.fold_in(key, _INIT_STREAM))
            return kernel.carry(state), kernel.discrete(state)

        return jax.vmap(one)(positions, keys)


def _without_axes(tree: PyTree, count: int) -> PyTree:
    """Shapes and types of leaves without their first axes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[count:], leaf.dtype), tree)
