"""The random numbers of all chains for any steps, drawn before these are taken, at a cost that does not grow with time.

Step t of chain c, counted from 0, uses the key

    k_ct = fold_in(key_c, t)        which is   jax.random.split(key_c, T)[t]   for every T > t

as long as JAX splits keys by counting (`jax_threefry_partitionable`, its default). Under other settings the keys of the
steps before are split again and cut off: the same numbers, at a cost that grows. Counters and other discrete leaves go on
from where the steps before left them. The random numbers of a path and these leaves are its *tape*.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.certify.recorded import Certification, CertifyIndependently
from partime_mcmc.compile_cache import Timings, compiler_options, run_explicit
from partime_mcmc.engine import Dynamics, without_captures
from partime_mcmc.kernels import Kernel, Tape
from partime_mcmc.kernels.kernel_program import program_and_params
from partime_mcmc.sampling.chain_groups import run_explicit_groups, split_chains
from partime_mcmc.sampling.chunk import ChainState
from partime_mcmc.tracing import HashableFunction, explicit
from partime_mcmc.types import Array, Key, PyTree, jax_config

# Steps fold the numbers from 0 on into a chain's key.
_INIT_STREAM = 2**31 - 3
MAX_STEPS = 2**31 - 4


def begin(kernel: Kernel, positions: PyTree, keys: Key, timings: Timings) -> ChainState:
    """Where chains stand before their first step.

    Args:
        kernel: The kernel.
        positions: One start per chain, leaves `(C, ...)`.
        keys: One key per chain, shape `(C,)`.
        timings: Where seconds are counted.
    """
    program, params = program_and_params(kernel)
    found = run_explicit(
        _Begin(program), params, positions, keys, timings=timings, options=compiler_options(0)
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
) -> list[tuple[PyTree, Tape, dict]]:
    """The tapes of the next steps, group by group (`chain_groups`).

    Args:
        kernel: The kernel.
        keys: One key per chain, shape `(C,)`.
        state: Where the chains stand.
        num_steps: n.
        timings: Where seconds are counted.
        num_groups: How many groups.
        options: As for `compile_cache.compiled`.

    Returns:
        Of each group the carries `(G, ...)` it starts from, its tape `(G, n, ...)`, and the discrete leaves after the
        last step `(G, ...)`.
    """
    program, params = program_and_params(kernel)
    chains = split_chains((state.carries, state.discrete, keys), num_groups)
    groups = [(*group, np.uint32(state.num_steps)) for group in chains]
    draw = _DrawTapes(program, num_steps, None if splits_by_counting(keys) else state.num_steps)
    return run_explicit_groups(draw, params, groups, timings=timings, options=options)


def recurrence(
    kernel: Kernel,
    keys: Key,
    state: ChainState,
    timings: Timings,
    certificate: Certification = CertifyIndependently(),
) -> Dynamics:
    """The recurrence of a kernel, without captured arrays; nothing is computed.

    Args:
        kernel: The kernel.
        keys: One key per chain, shape `(C,)`; as of the next one, only structure, shapes and types matter.
        state: Where the chains stand.
        timings: Where seconds are counted.
        certificate: What certificates will rest on: steps note what it needs.
    """
    program, params = program_and_params(kernel)
    chains = (state.carries, state.discrete, keys, np.uint32(0))
    with timings.measure("compile"):
        initial, tape, _ = explicit(_DrawTapes(program, 1, 0), params, *chains)[0].result
        one = _shapes_without_axes(initial, 1), _shapes_without_axes(tape, 2)
        return without_captures(certificate.dynamics(kernel), *one)


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
    ((carries, tape, _),) = draw_tapes(kernel, keys, state, num_steps, Timings())
    return recurrence(kernel, keys, state, Timings()), carries, tape


def splits_by_counting(keys: Key) -> bool:
    """Whether the keys that `split` gives are those that `fold_in` gives."""
    return _splits_by_counting(
        str(jax.random.key_impl(keys)), bool(jax_config.jax_threefry_partitionable)
    )


@functools.cache
def _splits_by_counting(impl: str, partitionable: bool) -> bool:
    # Two keys are split and one at a time is folded, by programs that a run has compiled before.
    key = jax.random.key(0, impl=impl)
    folded = [np.asarray(jax.random.key_data(jax.random.fold_in(key, place))) for place in range(2)]
    return partitionable and np.array_equal(folded, jax.random.key_data(jax.random.split(key, 2)))


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


class _DrawTapes(HashableFunction):
    """Carries, tapes and last discrete leaves of all chains; parts: the kernel's program, n, and the first step where that
    is part of what is compiled."""

    def __call__(self, params, carries, discrete, keys, first):
        program, num_steps, known = self.parts
        kernel = program.kernel(params)

        def one(carry, discrete, key):
            places = first + jnp.arange(num_steps, dtype=jnp.uint32)
            split = step_keys(key, places, None if known is None else known + num_steps)
            return carry, *kernel.tape_and_discrete(split, kernel.state(carry, discrete))

        return jax.vmap(one)(carries, discrete, keys)


class _Begin(HashableFunction):
    """Carries and discrete leaves of all chains before their first step; the part is the kernel's program."""

    def __call__(self, params, positions, keys):
        kernel = self.parts[0].kernel(params)

        def one(position, key):
            state = kernel.init(position, jax.random.fold_in(key, _INIT_STREAM))
            return kernel.carry(state), kernel.discrete(state)

        return jax.vmap(one)(positions, keys)


def _shapes_without_axes(tree: PyTree, count: int) -> PyTree:
    """Shapes and types of leaves without their first axes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[count:], leaf.dtype), tree)
