"""From NumPyro's arguments and states to ours, and back: keys, starts, tuned kernels, `HMCState`s, and collected fields.

Both ways to run a kernel of ours go through here: `ParallelMCMC`, and NumPyro's own `MCMC` (`kernels`). Of its random numbers
chain c has `rng_key` c for its steps; warm-up and starts have streams of their own, folded into the first chain's key.
Collected fields are those of `HMCState`, for every kept draw; of draws in a store those that it has are read when they are
asked for.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer.hmc import HMCState

from partime_mcmc.compile_cache import Timings, run_program
from partime_mcmc.diagnostics.checks import check_precision, check_starts
from partime_mcmc.kernels import Whitening
from partime_mcmc.kernels.kernel_program import (
    KernelProgram,
    ParametrisedKernel,
    density_of,
    parametrised_kernel,
    program_and_params,
)
from partime_mcmc.numpyro.arguments import check_sites, is_typed
from partime_mcmc.sampling.arguments import SampleArguments, key_words
from partime_mcmc.sampling.chunk import ChainState
from partime_mcmc.sampling.draws import Draws
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.sampling.target import Target
from partime_mcmc.storage.saved_run import digest_arrays
from partime_mcmc.storage.stored_draws import StoredDraws
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Key, PyTree
from partime_mcmc.validation import check_dtypes

# One of `numpyro.kernels`, which import this module.
ParallelKernel = Any


_WARMUP_STREAM, _START_STREAM = 2**31 - 1, 2**31 - 2  # steps use the numbers from 0 on
_UNTUNED_STEP_SIZE = 0.1


class AdaptState(NamedTuple):
    """What warm-up chose, the same for every chain.

    Attributes:
        step_size: Of the builder's main step.
        inverse_mass_matrix: The metric, `(D, D)` or `(D,)`.
        center: Of the whitened coordinates, `(D,)`.
        mass_matrix_sqrt_inv: The metric's root, `(D, D)` or `(D,)`.
        settings: All settings by the builder's argument names.
        discrete: Counters that the kernel carries, by name.
    """

    step_size: Any
    inverse_mass_matrix: Any
    center: Any
    mass_matrix_sqrt_inv: Any
    settings: dict
    discrete: dict


def keys_of(rng_key: Any) -> Key:
    """One typed key per chain, shape `(C,)`, from one key or a batch, typed or legacy."""
    keys = rng_key if is_typed(rng_key) else jax.random.wrap_key_data(jnp.asarray(rng_key))
    return keys.reshape(-1)


def sample_arguments(
    sampler: ParallelKernel,
    target: Target,
    keys: Key,
    num_warmup: int,
    init_params: PyTree = None,
    state: HMCState | None = None,
    **options: Any,
) -> SampleArguments:
    """What a NumPyro run asks for.

    Args:
        sampler: A kernel of ours.
        target: What is sampled.
        keys: One key per chain, shape `(C,)`.
        num_warmup: Warm-up steps per chain at most; 0 adapts nothing.
        init_params: One start per chain, leaves `(C, ...)`, or None.
        state: Where chains go on from, leaves `(C, ...)`; None warms up.
        **options: Further fields of `SampleArguments`.
    """
    extra = {}
    if options.get("store") is not None:
        extra = {"init_params": _digest(init_params), "post_warmup_state": _digest(state)}
    starts = functools.partial(_checked_starts, sampler, target, keys[0], init_params)
    kernel, chain_state = sampler.tuned_builder(), None
    if state is not None:
        kernel = kernel_from(sampler, target, state)
        num_steps = int(np.asarray(state.i)[0])
        chain_state = ChainState(state.r, state.adapt_state.discrete, num_steps)
    elif not num_warmup:
        # Every chain has its start, and all of them the kernel made at the first.
        starts = functools.cache(starts)
        kernel = _untuned(sampler, target, starts(keys.shape[0]))
    return SampleArguments(
        front="ParallelMCMC.run",
        target=target,
        kernel=kernel,
        starts=starts,
        warmup_key=jax.random.fold_in(keys[0], _WARMUP_STREAM),
        chain_keys=keys,
        key_words=key_words(keys),
        key_impl=str(jax.random.key_impl(keys)),
        num_warmup=num_warmup,
        adaptation=sampler.adaptation,
        state=chain_state,
        extra=extra,
        **options,
    )


def hmc_state(plan: Plan, state: ChainState, sampler: ParallelKernel) -> HMCState:
    """NumPyro's state of every chain, leaves `(C, ...)`, as if it had just been warmed up.

    Args:
        plan: Of the run: its kernel belongs to a program.
        state: Where the chains stand.
        sampler: The kernel, which may have a fixed step size.
    """
    kernel, num_chains = plan.kernel, plan.num_chains
    family, params = program_and_params(kernel)
    whitening, counts = params.whitening, dict(family.counts)
    dtype = whitening.center.dtype

    def each(value, dtype=dtype):
        value = np.asarray(value, dtype)
        return np.broadcast_to(value, (num_chains, *value.shape))

    settings = {**params.settings, **counts}
    fixed = jnp.nan if sampler._step_size is None else sampler._step_size
    step = settings.get("step_size", fixed)
    length = counts.get("num_integration_steps", 1)
    root = np.asarray(whitening.scale)
    adapted = AdaptState(
        each(step),
        each(root**2 if root.ndim == 1 else root @ root.T),
        each(whitening.center),
        each(root),
        {
            name: each(value, np.int32 if name in counts else dtype)
            for name, value in settings.items()
        },
        state.discrete,
    )
    if plan.warmup is None:
        positions = jax.vmap(kernel.position)(state.carries)
        values = log_densities(plan.target, positions)[0]
    else:
        positions, values = plan.warmup.positions, plan.warmup.logdensity
    potential, zero, integer = -np.asarray(values, dtype), each(0.0), each(0, np.int32)
    return jax.device_put(
        HMCState(
            i=integer,
            z=positions,
            z_grad=None,
            potential_energy=potential,
            energy=potential,
            r=state.carries,
            trajectory_length=each(length * np.asarray(step)),
            num_steps=integer,
            accept_prob=zero,
            mean_accept_prob=zero,
            diverging=each(False, bool),
            adapt_state=adapted,
            rng_key=plan.keys,
        )
    )


def kernel_from(sampler: ParallelKernel, target: Target, state: HMCState) -> ParametrisedKernel:
    """The tuned kernel that a batch of states belongs to; counts are read from the state."""
    # On the host: every small operation on arrays of a device is a program of its own.
    one = jax.device_put(
        jax.tree.map(lambda leaf: np.asarray(leaf)[0], state._replace(rng_key=None, r=None))
    )
    density, data = density_of(target.logdensity, one.z)
    adapted = one.adapt_state
    settings = {
        name: int(value) if jnp.issubdtype(value.dtype, jnp.integer) else value
        for name, value in adapted.settings.items()
    }
    whitening = Whitening(one.z, adapted.center, adapted.mass_matrix_sqrt_inv)
    return parametrised_kernel(
        KernelProgram(density, sampler.tuned_builder()), data, whitening, settings
    )


def log_densities(target: Target, positions: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """Log densities at positions `(C, ...)`, and whether they and their gradients are finite, each `(C,)`."""
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[0], positions)
    density, data = density_of(target.logdensity, first)
    return run_program(_Evaluate(density), data, positions, timings=Timings())


class _Evaluate(HashableFunction):
    """Log densities, and whether they and their gradients are finite; the part is the density."""

    def __call__(self, data, positions):
        def one(position):
            value, gradient = jax.value_and_grad(self.parts[0], argnums=1)(data, position)
            finite = jnp.isfinite(value) & jnp.isfinite(ravel_pytree(gradient)[0]).all()
            return value, finite

        return jax.vmap(one)(positions)


def _checked_starts(
    sampler: ParallelKernel, target: Target, key: Key, init_params: PyTree, count: int
) -> PyTree:
    """So many starts: those given first, then the model's own, or the given ones again.

    Raises:
        InvalidStart: If no chain could move from one of them.
        ValueError: If `init_params` are those of another model, or the metric given has another dimension.
    """
    key = jax.random.fold_in(key, _START_STREAM)
    starts = _starts(sampler, target, key, init_params, count)
    try:
        good = log_densities(target, starts)[1]
    except TypeError:
        # This says what is wrong with a density that has no gradient.
        check_starts(target.logdensity, starts, "init_params")
        raise
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[0], starts)
    dimension = sum(map(np.size, jax.tree.leaves(first)))
    guess = getattr(sampler.adaptation, "guess", None)
    if guess is not None and guess.shape[0] != dimension:
        raise ValueError(
            f"inverse_mass_matrix: shape {guess.shape}, wanted ({dimension},) or ({dimension}, {dimension})"
        )
    if not np.asarray(good).all():
        if init_params is None and sampler._posterior is not None:
            sampler._posterior.check_found(good)
        check_starts(target.logdensity, starts, "init_params")
    check_precision(target.logdensity, first)
    return starts


def _starts(
    sampler: ParallelKernel, target: Target, key: Key, init_params: PyTree, count: int
) -> PyTree:
    if init_params is None:
        return target.starts(jax.random.split(key, count))
    given = check_dtypes(init_params, "init_params")
    if sampler._posterior is not None:
        check_sites(given, sampler._posterior.shapes)
    have = jax.tree.leaves(given)[0].shape[0]
    if have >= count:
        return given
    if sampler.model is None:
        return jax.tree.map(lambda leaf: leaf[jnp.arange(count) % have], given)
    more = target.starts(jax.random.split(key, count - have))
    return jax.tree.map(lambda a, b: jnp.concatenate([a.astype(b.dtype), b]), given, more)


def _untuned(sampler: ParallelKernel, target: Target, starts: PyTree) -> ParametrisedKernel:
    """The kernel as it is without warm-up: the metric given, or none, and the step size given, or a cautious one."""
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[0], starts)
    density, data = density_of(target.logdensity, first)
    flat, guess = ravel_pytree(first)[0], getattr(sampler.adaptation, "guess", None)
    if guess is None:
        guess = jnp.ones_like(flat)
        warnings.warn(
            "num_warmup: got 0, so nothing is adapted; step size and metric are those given, or "
            f"{_UNTUNED_STEP_SIZE} and the identity",
            stacklevel=4,
        )
    whitening = Whitening.of_covariance(first, jnp.zeros_like(flat), guess)
    settings = {} if sampler._step_size is not None else {"step_size": _UNTUNED_STEP_SIZE}
    program = KernelProgram(density, sampler.tuned_builder())
    return parametrised_kernel(program, data, whitening, settings)


def _digest(tree: PyTree) -> str | None:
    if tree is None:
        return None
    return digest_arrays(
        jnp.asarray(leaf) if not hasattr(leaf, "dtype") else leaf for leaf in jax.tree.leaves(tree)
    )


def collect(
    draws: Draws,
    state: HMCState,
    postprocess: Callable | None,
    names: tuple[str, ...],
    removed: tuple[str, ...],
    thinning: int,
) -> tuple[dict[str, PyTree], HMCState]:
    """Collected fields and the last state.

    Args:
        draws: Of all chains, `(C, T, ...)`; T may be 0.
        state: Before the first draw.
        postprocess: The user's own map of one unconstrained draw; None is the model's.
        names: Fields to collect, the draws' own field `z` first.
        removed: Sites to leave out of `z`.
        thinning: Of so many draws the last is kept.

    Returns:
        Fields with leaves `(C, T', ...)`, and the state of every chain after its last step.

    Raises:
        ValueError: For a field that there is not, naming those that there are.
    """
    everything = _fields(draws, state)
    kept = _kept(draws, thinning)
    fields = {}
    for name in names:
        if name == "z":
            value = (
                draws.constrained
                if postprocess is None
                else jax.vmap(jax.vmap(postprocess))(draws.positions)
            )
            if (
                not isinstance(draws.positions, dict)
                and postprocess is None
                and set(value) == {"x"}
            ):
                value = draws.positions
            if removed:
                value = {site: one for site, one in value.items() if site not in removed}
        elif (
            name.startswith("z.")
            and isinstance(draws.positions, dict)
            and name[2:] in draws.positions
        ):
            value = draws.positions[name[2:]]
        elif name in everything:
            value = everything[name]
        else:
            raise ValueError(
                f"extra_fields: got {name!r}; wanted some of {sorted(everything)}, or z.<site>"
            )
        fields[name] = value if kept is None else jax.tree.map(lambda leaf: leaf[:, kept], value)
    return jax.device_put(fields), _last(draws, state, everything)


def empty_collection(state: HMCState, num_chains: int) -> tuple[dict[str, PyTree], HMCState]:
    """No draws, as NumPyro wants them, empty arrays, and the state, without its axis of chains if there is one chain."""
    shape = (0,) if num_chains == 1 else (0, num_chains)
    none = {
        "z": jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape[1:]), leaf.dtype), state.z)
    }
    return none, jax.tree.map(lambda leaf: leaf[0], state) if num_chains == 1 else state


def with_chains(tree: PyTree, num_chains: int) -> PyTree:
    """A state or starts of NumPyro's with the axis of chains, which a single chain lacks."""
    return jax.tree.map(lambda leaf: leaf[None], tree) if num_chains == 1 else tree


def _kept(draws: Draws, thinning: int) -> np.ndarray | None:
    """Which draws are kept; None for all."""
    if thinning == 1:
        return None
    num_steps = draws.num_samples
    return np.arange(num_steps % thinning + thinning - 1, num_steps, thinning)


def _fields(draws: Draws, state: HMCState) -> dict[str, Any]:
    """All fields, `(C, T, ...)`, on the host: what is the same in all steps (metrics) is not written out."""
    info = draws.info
    shape = draws.certificate.residual.shape
    num_chains, num_steps = shape
    ones = np.ones(shape)
    accept = np.asarray(info.get("acceptance_rate", ones))
    potential = -np.asarray(info.get("logdensity", np.nan * ones))
    before = np.asarray(state.i)[:, None]
    mean = np.asarray(state.mean_accept_prob)[:, None] * before + np.cumsum(accept, axis=1)
    index = before + np.arange(1, num_steps + 1)

    def each(value):
        value = np.asarray(value)
        return np.broadcast_to(value[:, None], (num_chains, num_steps, *value.shape[1:]))

    found = {
        "i": index.astype(np.int32),
        "potential_energy": potential,
        "energy": info.get("energy", potential),
        "num_steps": info.get("num_steps", np.ones(shape, np.int32)),
        "accept_prob": accept,
        "mean_accept_prob": (mean / np.maximum(index, 1)).astype(accept.dtype),
        "diverging": info.get("diverging", np.zeros(shape, bool)),
        "trajectory_length": each(state.trajectory_length),
        "residual": draws.certificate.residual,
        "accepted": draws.certificate.accepted,
    }
    for name in ("step_size", "inverse_mass_matrix"):
        found[f"adapt_state.{name}"] = each(getattr(state.adapt_state, name))
    return {name: np.asarray(value) for name, value in found.items()}


def _last(draws: Draws, state: HMCState, everything: dict[str, Any]) -> HMCState:
    if not draws.num_samples or draws.state is None:
        return state
    own = {
        name: everything[name][:, -1].astype(getattr(state, name).dtype)
        for name in (
            "i",
            "potential_energy",
            "energy",
            "num_steps",
            "accept_prob",
            "mean_accept_prob",
            "diverging",
        )
    }
    z = jax.tree.map(lambda leaf: np.asarray(leaf)[:, -1], draws.positions)
    return state._replace(
        r=draws.state.carries,
        **jax.device_put({"z": z} | own),
        adapt_state=state.adapt_state._replace(discrete=draws.state.discrete),
    )


# --- of draws in a store ---------------------------------------------------------------------------------------------

_FIELDS = {
    "diverging": "diverging",
    "energy": "energy",
    "num_steps": "n_steps",
    "accept_prob": "acceptance_rate",
    "residual": "residual",
    "accepted": "accepted",
}


def read_fields(
    draws: StoredDraws, names: tuple[str, ...], removed: tuple[str, ...], is_dict: bool
) -> dict[str, Any]:
    """Collected fields of the kept draws, in memory, leaves `(C, T', ...)`.

    Args:
        draws: Stored.
        names: Fields, the draws' own field `z` first.
        removed: Sites to leave out of `z`.
        is_dict: Whether positions are named.

    Raises:
        ValueError: For a field that a store does not have.
    """
    found, stats = {}, draws.sample_stats
    potential = (
        -jnp.asarray(stats["lp"].values)
        if "lp" in stats
        else jnp.full(stats["residual"].shape, jnp.nan)
    )
    for name in names:
        if name == "z":
            sites = {
                site: jnp.asarray(one.values)
                for site, one in draws.posterior.data_vars.items()
                if site not in removed
            }
            found[name] = sites if is_dict or set(sites) != {"x"} else sites["x"]
        elif name == "potential_energy":
            found[name] = potential
        elif _FIELDS[name] in stats:
            found[name] = jnp.asarray(stats[_FIELDS[name]].values)
        else:
            # As in memory: what the kernel does not say.
            found[name] = {
                "diverging": jnp.zeros(potential.shape, bool),
                "energy": potential,
                "num_steps": jnp.ones(potential.shape, jnp.int32),
            }.get(name, jnp.ones(potential.shape))
    return found


def check_fields(names: tuple[str, ...], postprocess: Callable | None) -> None:
    """Refuse what a store does not have.

    Raises:
        ValueError: For an unknown field, naming those that there are, or a `postprocess_fn` of the user's.
    """
    if postprocess is not None:
        raise ValueError(
            "postprocess_fn: got a function with a store, wanted None: a store holds the model's own values"
        )
    for name in names:
        if name not in ("z", "potential_energy", *_FIELDS):
            known = sorted(["potential_energy", *_FIELDS])
            raise ValueError(f"extra_fields: got {name!r} with a store; wanted some of {known}")


def last_stored_state(draws: StoredDraws, state: HMCState, num_steps: int) -> HMCState:
    """NumPyro's state after the last draw in a store.

    Args:
        draws: Stored.
        state: Where its chains stand, without what the last step reported.
        num_steps: Steps that they have behind them.
    """
    reported = {}
    if draws.num_samples:
        reported["mean_accept_prob"] = draws.mean_acceptance
    if draws.finished and draws.posterior.sizes.get("draw"):
        # The last draw of a finished run is always kept.
        last = draws.sample_stats.isel(draw=-1)
        reported |= {
            name: last[stored].values
            for name, stored in _FIELDS.items()
            if stored in last and hasattr(state, name)
        }
    return state._replace(
        i=jnp.full(state.i.shape, num_steps, jnp.int32),
        **{
            name: jnp.asarray(value, getattr(state, name).dtype) for name, value in reported.items()
        },
    )
