"""A plan and where chains stand, as bytes and back: numbers and words, never code.

    keys of all chains · where the chains start · the tuned kernel's numbers · solver, schedule, tolerance · steps per chunk

The kernel is made again from the model and the builder that the user gives, and from these numbers. The run that writes
them goes on from what it reads back, so that a resumed run cannot differ from it.
"""

import dataclasses
from typing import Any

import jax

from partime_mcmc.compile_cache import Timings, as_committed_array
from partime_mcmc.kernels import Kernel, Whitening
from partime_mcmc.kernels.kernel_program import (
    Builder,
    KernelProgram,
    ParametrisedKernel,
    density_of,
    parametrised_kernel,
    takes_coupling,
    unwrapped,
    with_coupling,
)
from partime_mcmc.sampling.chunk import ChainState
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.sampling.randomness import recurrence
from partime_mcmc.sampling.target import Target
from partime_mcmc.storage.fingerprint import program_of, require_same
from partime_mcmc.storage.serialize import decode, encode, pack_arrays, unpack_arrays
from partime_mcmc.types import PyTree
from partime_mcmc.warmup.warmup import Warmup

_CHOICES = (
    "first_step",
    "num_samples",
    "solver",
    "schedule",
    "tolerance",
    "max_iterations",
    "certificate",
    "chunk",
    "num_groups",
    "thinning",
    "key_words",
    "num_warmup",
    "warmup_notes",
)


def pack_plan(plan: Plan, state: ChainState) -> bytes:
    """Everything that a run needs to go on.

    Args:
        plan: What was chosen.
        state: Where the chains start.

    Raises:
        NotStorable: If a strategy is not of this package.
    """
    kernel = plan.kernel
    words = {
        "choices": {name: encode(getattr(plan, name), name) for name in _CHOICES},
        "program": program_of(plan.recurrence, kernel),
        "plan": encode(plan.describe(), "plan"),
        "keys": encode(plan.keys, "keys"),
        "state": encode(with_leaves(state), "state"),
        "settings": None,
        "whitening": None,
        "coupling": None,
    }
    if isinstance(kernel, ParametrisedKernel):
        whitening = kernel.numbers.whitening
        coordinates = (jax.tree.leaves(whitening.example), whitening.center, whitening.scale)
        words["whitening"] = encode(coordinates, "kernel")
        settings = dict(kernel.numbers.settings) | dict(kernel.family.counts)
        words["settings"] = encode(settings, "kernel")
        words["coupling"] = encode(unwrapped(kernel.family.builder)[1].get("coupling"), "coupling")
    return pack_arrays({}, words)[0]


def unpack_plan(
    data: bytes, target: Target, given_kernel: Kernel | Builder | Warmup, where: str = "."
) -> tuple[Plan, ChainState]:
    """The plan that was packed, and where its chains start.

    Args:
        data: The bytes of `pack_plan`.
        target: What is sampled.
        given_kernel: What the user gives as the kernel: what the run was begun with, or its builder.
        where: The store, for messages.

    Raises:
        Damaged: If the bytes are not those that were written.
        TypeError: If a tuned kernel is needed and a builder was given, or the other way round.
        StoreMismatch: If the same model and the same name of a kernel are another program.
    """
    _, words, _ = unpack_arrays(data, f"{where}/plan.npz")
    example = target.example()
    choices = {name: decode(value) for name, value in words["choices"].items()}
    kernel, keys = _kernel_of(words, target, given_kernel, example), decode(words["keys"])
    state = chain_state_of(decode(words["state"]), kernel, example)
    dynamics = recurrence(kernel, keys, state, Timings(), choices["certificate"])
    require_same(words["program"], program_of(dynamics, kernel), where)
    plan = Plan(target=target, kernel=kernel, recurrence=dynamics, keys=keys, **choices)
    return plan, state


def read_choices(data: bytes, where: str) -> dict[str, Any]:
    """What can be known of a plan without its model.

    Returns:
        `plan` (plain values that give the draws again), `choices` by the names of `Plan`, `state` (with lists of leaves),
        `settings` of the kernel.

    Raises:
        Damaged: As `unpack_plan`.
    """
    _, words, _ = unpack_arrays(data, f"{where}/plan.npz")
    return {
        "choices": {name: decode(value) for name, value in words["choices"].items()},
        **{name: decode(words[name]) for name in ("plan", "state", "settings")},
    }


def _kernel_of(
    words: dict[str, Any],
    target: Target,
    given: Kernel | Builder | Warmup,
    example: PyTree,
) -> Kernel:
    if words["settings"] is None:
        if not isinstance(given, Kernel):
            raise TypeError(
                "kernel: got a builder, wanted the tuned Kernel that this run was begun with"
            )
        return given
    # A kernel that came tuned from elsewhere has no builder.
    builder = given.kernel if isinstance(given, Warmup) else given
    if isinstance(builder, Kernel):
        builder = builder.family.builder if isinstance(builder, ParametrisedKernel) else None
    coupling = decode(words["coupling"])
    if builder is None:
        raise TypeError("kernel: got a Kernel, wanted the builder that this run was begun with")
    if coupling is not None and takes_coupling(builder):
        builder = with_coupling(builder, coupling)
    leaves, *rest = jax.tree.map(as_committed_array, decode(words["whitening"]))
    whitening = Whitening(jax.tree.unflatten(jax.tree.structure(example), leaves), *rest)
    density, captured = density_of(target.logdensity, whitening.example)
    settings = {
        name: value if isinstance(value, int) else as_committed_array(value)
        for name, value in decode(words["settings"]).items()
    }
    return parametrised_kernel(KernelProgram(density, builder), captured, whitening, settings)


def with_leaves(state: ChainState) -> ChainState:
    """Where chains stand, with lists of leaves."""
    carries, discrete = jax.tree.leaves(state.carries), jax.tree.leaves(state.discrete)
    return dataclasses.replace(state, carries=carries, discrete=discrete)


def chain_state_of(leaves: ChainState, kernel: Kernel, example: PyTree) -> ChainState:
    """A state that was read without its model, with the structure that its kernel wants.

    Args:
        leaves: The state, with leaves in any structure.
        kernel: What moves the chains.
        example: A position; only structure, shapes and types matter.

    Raises:
        ValueError: If the kernel's state has another number of leaves.
    """

    def parts(position):
        state = kernel.init(position, jax.random.key(0))
        return kernel.carry(state), kernel.discrete(state)

    carries, discrete = (
        jax.tree.unflatten(
            jax.tree.structure(wanted), map(as_committed_array, jax.tree.leaves(found))
        )
        for wanted, found in zip(jax.eval_shape(parts, example), (leaves.carries, leaves.discrete))
    )
    return dataclasses.replace(leaves, carries=carries, discrete=discrete)
