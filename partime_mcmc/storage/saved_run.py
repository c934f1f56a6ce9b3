"""What is stored of a run besides its draws: what was asked for, and what was chosen; numbers and words, never code.

    run.json    hashes of model and data, and the plain values that all draws hang on; a run that is resumed has the same
    plan.npz    keys of all chains, where they start, the tuned kernel's numbers, solver, schedule, tolerance, steps per chunk

A log density is traced, and the arrays it captures are taken out of it (`tracing.explicit`): what is left is the
model, a program, and the arrays are the data. Either has a hash of its own, so that an error can say which of both has
changed. Numbers that a model has written into itself belong to the program.

The kernel is made again from the model and the builder that the user gives, and from the stored numbers. The run that
writes them goes on from what it reads back, so that a resumed run cannot differ from it. The code of a host callback and
compiler settings from the environment are not compared.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from partime_mcmc.compile_cache import (
    Timings,
    as_committed_array,
    compiler_options,
    device,
    versions,
)
from partime_mcmc.diagnostics.values import leaf_names
from partime_mcmc.engine import Dynamics
from partime_mcmc.kernels import Kernel, Whitening
from partime_mcmc.kernels.coordinates import learned_maps, weights_of
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
from partime_mcmc.sampling.arguments import SampleArguments
from partime_mcmc.sampling.chunk import ChainState
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.sampling.randomness import MAX_STEPS, recurrence
from partime_mcmc.sampling.target import Target
from partime_mcmc.storage.files import Damaged, StoreError
from partime_mcmc.storage.serialize import decode, digest_arrays, encode, pack_arrays, unpack_arrays
from partime_mcmc.storage.store import Folder, Store
from partime_mcmc.tracing import HashableFunction, WithoutParams, explicit, inner_arrays
from partime_mcmc.types import PyTree, jax_config
from partime_mcmc.warmup.warmup import Warmup

STRATEGIES = ("adaptation", "coupling", "solver", "schedule", "tolerance", "certificate")
"""Arguments of a run that are objects of this package."""
PLAIN = (
    "front",
    "key_words",
    "key_impl",
    "num_samples",
    "num_chains",
    "num_warmup",
    "max_iterations",
    "max_bytes",
    "thinning",
)
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
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


class StoreMismatch(ValueError):
    """A stored run and the one that was asked for are not the same."""


def fingerprint_of(target: Target, example: PyTree) -> dict[str, Any]:
    """Hashes of a target's parts.

    Args:
        target: What is sampled.
        example: A position; only structure, shapes and types matter.

    Returns:
        `model`, `data` and `initial`, each a hash.
    """
    density, (captured, _) = explicit(WithoutParams(target.logdensity), None, example)
    programs, arrays = [density.jaxpr], [*captured, *inner_arrays(density.jaxpr)]
    if target.constrain is not None:
        constrain, (more, _) = explicit(_Composed(dict, target.constrain), None, example)
        programs.append(constrain.jaxpr)
        arrays += [*more, *inner_arrays(constrain.jaxpr)]
    return {"model": _text(*programs), "data": digest_arrays(arrays), "initial": _initial(target)}


def name_of(kernel: Any) -> str:
    """A kernel in words that stay the same: of a builder, its name and what is fixed."""
    if isinstance(kernel, Warmup):
        kernel = (
            kernel.kernel.family.builder
            if isinstance(kernel.kernel, ParametrisedKernel)
            else kernel.kernel
        )
    if isinstance(kernel, Kernel):
        return f"the tuned kernel {kernel.name}"
    builder, fixed = unwrapped(kernel)
    # The coupling is chosen by pilots, unless the user fixed them, and are stored apart.
    said = ", ".join(
        f"{name}={_ADDRESS.sub('', repr(value))}"
        for name, value in sorted(fixed.items())
        if name != "coupling"
    )
    return f"{builder.__module__}.{getattr(builder, '__qualname__', type(builder).__qualname__)}({said})"


def tuned_digest(kernel: Any) -> str | None:
    """A hash of what a warm-up chose: settings, coordinates and where its chains go on; None where none stands behind it.

    Args:
        kernel: As the user gives it.
    """
    positions = jax.tree.leaves(kernel.positions) if isinstance(kernel, Warmup) else []
    kernel = kernel.kernel if isinstance(kernel, Warmup) else kernel
    if not isinstance(kernel, ParametrisedKernel):
        return digest_arrays(positions) if positions else None
    whitening, settings = kernel.numbers.whitening, sorted(kernel.numbers.settings.items())
    numbers = [
        *jax.tree.leaves((whitening.center, whitening.scale, weights_of(whitening.maps))),
        *(value for _, value in settings),
        *positions,
    ]
    return _digest(f"{[name for name, _ in settings]} {digest_arrays(numbers)}".encode())


def program_of(dynamics: Dynamics, kernel: Kernel) -> dict[str, str | None]:
    """Hashes of a kernel's recurrence as it runs: its program, the arrays that this captures, and the certificate's unit.

    Args:
        dynamics: Without captures (`without_captures`).
        kernel: Whose recurrence it is.
    """
    captured, _ = dynamics.params
    unit = None if kernel.noise_scale is None else digest_arrays([np.asarray(kernel.noise_scale)])
    return {
        "program": _text(dynamics.step.jaxpr),
        "arrays": digest_arrays([*captured, *inner_arrays(dynamics.step.jaxpr)]),
        "unit": unit,
    }


def describe_run(arguments: SampleArguments, store: Store) -> dict[str, Any]:
    """What a store has of a run: everything its draws depend on, in plain values and hashes.

    Args:
        arguments: What is asked for.
        store: Where.

    Raises:
        ValueError: If no steps are asked for, or more than a key has random numbers for, or no draw would be kept, or a
            value is named as an axis of all values is.
        NotStorable: If a strategy is not of this package.
    """
    asked, target = arguments, arguments.target
    if not 1 <= asked.num_samples <= MAX_STEPS:
        raise ValueError(
            f"num_samples: got {asked.num_samples} with a store, wanted 1 to {MAX_STEPS}: a key has random numbers for so "
            "many steps"
        )
    if asked.thinning > asked.num_samples:
        raise ValueError(
            f"thinning: got {asked.thinning} with num_samples={asked.num_samples}, wanted at most as many: no draw would "
            "be kept"
        )
    example = target.example()
    values = example if target.constrain is None else jax.eval_shape(target.constrain, example)
    named = [*leaf_names(values)] if isinstance(values, Mapping) else []
    if twice := {name for name in named if named.count(name) > 1}:
        raise ValueError(
            f"target: two values are named {min(twice)!r} in a store, one of them a part of another value: rename one"
        )
    for name in ("chain", "draw"):
        if name in named:
            raise ValueError(
                f"target: a value is named {name!r}, which names an axis of every value in a store: rename it"
            )
    return {
        "chunk": store.chunk,
        "folds": sorted(store.folds or {}),
        "names": list(target.names) if target.names else None,
        "dims": {name: list(dims) for name, dims in target.dims.items()} if target.dims else None,
        **fingerprint_of(target, example),
        # What decides about bits besides the model.
        "dtype": str(jax.tree.leaves(example)[0].dtype),
        "x64": bool(jax_config.jax_enable_x64),
        "versions": versions(),
        "device": device(),
        "partitionable": bool(jax_config.jax_threefry_partitionable),
        "compiler": compiler_options(),
        "kernel": name_of(asked.kernel),
        "tuned": tuned_digest(asked.kernel),
        **{name: getattr(asked, name) for name in PLAIN},
        **{name: encode(getattr(asked, name), name) for name in STRATEGIES},
        **asked.extra,
    }


def read_arguments(
    path: str | os.PathLike, kernel: Kernel | Builder | Warmup | None = None
) -> dict[str, Any]:
    """What a stored run was asked for, but for its target and kernel.

    Args:
        path: The folder.
        kernel: That the run is to go on with. Once warm-up is over its numbers are in the store, and the builder of a
            warm-up's kernel will do.

    Returns:
        Values by the names of `SampleArguments`, and `num_chains` and `chunk`.

    Raises:
        FileNotFoundError: If there is no stored run.
        StoreError: If its description is damaged, or of another version of the format.
    """
    folder = Folder(path)
    run = folder.read_run()
    if missing := {*PLAIN, *STRATEGIES, "chunk", "tuned"} - set(run):
        raise StoreError(f"store: {folder.path}/run.json is damaged: it lacks {min(missing)!r}")
    builder = not isinstance(kernel, (Kernel, Warmup)) and folder.read_plan() is not None
    return {
        **{name: run[name] for name in (*PLAIN, "chunk")},
        **{name: decode(run[name]) for name in STRATEGIES},
        "extra": {"tuned": run["tuned"]} if builder else {},
    }


def require_same(stored: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Refuse to go on with a run that is not the one that was asked for.

    Args:
        stored: What the store says.
        wanted: What was asked for; only its entries are compared.
        where: The store.

    Raises:
        StoreMismatch: Naming every field that differs, and for plain values both of them.
    """
    different = []
    for name, value in wanted.items():
        have = stored.get(name)
        if name == "versions" and isinstance(have, dict):
            different += [
                f"versions: {package} was {have.get(package)}, is {version}"
                for package, version in value.items()
                if have.get(package) != version
            ]
        elif have != value:
            different.append(
                _SENTENCES.get(name) or f"{name}: the store has {_short(have)}, got {_short(value)}"
            )
    if different:
        raise StoreMismatch(
            f"store: {where} holds another run. {'; '.join(different)}. Give what the run was begun with, "
            "or choose a new folder"
        )


_SENTENCES = {
    "model": "model: the log density is another program (or a number written into it has changed)",
    "data": "data: the arrays that the model captures have other values, shapes or types",
    "initial": "initial: the starts are others",
    "program": "kernel: its step is another program (another kernel, or a setting written into it)",
    "unit": "kernel: its noise_scale, the unit in which the certificate judges, is another one",
    "tuned": "kernel: the warm-up behind it is another one (settings, metric or positions)",
    "key_words": "key: it is another one",
    "key_impl": "key: its random number generator is another one",
    "front": "the run was begun with the other one of `sample` and `ParallelMCMC.run`",
    "arrays": "kernel: its step holds other arrays (settings, metric or data)",
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _initial(target: Target) -> str:
    if not callable(target.initial):
        return digest_arrays(np.asarray(leaf) for leaf in jax.tree.leaves(target.initial))
    try:
        start, (captured, _) = explicit(_Composed(target.initial), None, jax.random.key(0))
    except Exception:  # a function that JAX cannot trace: its name is all there is
        return getattr(target.initial, "__qualname__", type(target.initial).__qualname__)
    return _digest(
        f"{_text(start.jaxpr)}{digest_arrays([*captured, *inner_arrays(start.jaxpr)])}".encode()
    )


class _Composed(HashableFunction):
    """Functions of one argument after one another, the last one first, as one of no parameters and this argument."""

    def __call__(self, params, argument):
        for function in reversed(self.parts):
            argument = function(argument)
        return argument


def _text(*programs: Any) -> str:
    """A hash of what programs look like, without addresses of this process."""
    return _digest(_ADDRESS.sub("", "\n".join(map(str, programs))).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pack_plan(plan: Plan, state: ChainState, run_sum: str) -> bytes:
    """Everything that a run needs to go on.

    Args:
        plan: What was chosen.
        state: Where the chains start.
        run_sum: The checksum of what was asked for.

    Raises:
        NotStorable: If a strategy is not of this package.
    """
    kernel = plan.kernel
    words = {
        "run": run_sum,
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
        coordinates = (
            jax.tree.leaves(whitening.example),
            whitening.center,
            whitening.scale,
            weights_of(whitening.maps),
        )
        words["whitening"] = encode(jax.tree.map(np.asarray, coordinates), "kernel")
        words["settings"] = encode(dict(kernel.numbers.settings), "kernel")
        words["coupling"] = encode(unwrapped(kernel.family.builder)[1].get("coupling"), "coupling")
    return pack_arrays({}, words)[0]


def unpack_plan(
    data: bytes,
    target: Target,
    given_kernel: Kernel | Builder | Warmup,
    where: str = ".",
    run_sum: str | None = None,
) -> tuple[Plan, ChainState]:
    """The plan that was packed, and where its chains start.

    Args:
        data: The bytes of `pack_plan`.
        target: What is sampled.
        given_kernel: What the user gives as the kernel: what the run was begun with, or its builder.
        where: The store, for messages.
        run_sum: The checksum of what was asked for; None on a host that does not see the store.

    Raises:
        Damaged: If the bytes are not those that were written, or of another run.
        TypeError: If a tuned kernel is needed and a builder was given, or the other way round.
        StoreMismatch: If the same model and the same name of a kernel are another program.
    """
    _, words, _ = unpack_arrays(data, f"{where}/plan.npz")
    if run_sum not in (None, words.get("run")):
        raise Damaged(
            f"store: {where}/plan.npz is not the plan of the run in {where}/run.json: put back the one that was there, or take it "
            "away, and the run starts again"
        )
    example = target.example()
    choices = {name: decode(value) for name, value in words["choices"].items()}
    kernel, keys = _kernel_of(words, target, given_kernel, example), decode(words["keys"])
    state = chain_state_of(decode(words["state"]), kernel, example)
    dynamics = recurrence(kernel, keys, state, Timings(), choices["certificate"])
    require_same(words["program"], program_of(dynamics, kernel), where)
    return Plan(target=target, kernel=kernel, recurrence=dynamics, keys=keys, **choices), state


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
    words: dict[str, Any], target: Target, given: Kernel | Builder | Warmup, example: PyTree
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
    leaves, center, scale, weights = jax.tree.map(as_committed_array, decode(words["whitening"]))
    position = jax.tree.unflatten(jax.tree.structure(example), leaves)
    maps = learned_maps(target.centring, position, weights)
    whitening = Whitening(position, center, scale, maps)
    density, captured = density_of(target.logdensity, whitening.example)
    settings = {
        name: as_committed_array(np.asarray(value))
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
