"""From NumPyro's arguments and states to ours, and back: keys, starts, tuned kernels, and `HMCState`s of all chains.

Both ways to run a kernel of ours go through here: `ParallelMCMC`, and NumPyro's own `MCMC` (`base`). Of its random numbers
chain c has `rng_key` c for its steps; warm-up and starts have streams of their own, folded into the first chain's key.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer.hmc import HMCState
from numpyro.infer.mcmc import MCMCKernel

from partime_mcmc.compile_cache import Timings, run_program
from partime_mcmc.diagnostics.checks import check_dtypes, check_precision, check_starts
from partime_mcmc.kernels import Whitening
from partime_mcmc.kernels.kernel_program import (
    KernelProgram,
    ParametrisedKernel,
    density_of,
    parametrised_kernel,
)
from partime_mcmc.numpyro.arguments import check_sites, is_typed
from partime_mcmc.sampling.chunk import ChainState
from partime_mcmc.sampling.plan import Plan, SampleArguments
from partime_mcmc.sampling.sample import key_words
from partime_mcmc.sampling.target import Target
from partime_mcmc.storage.fingerprint import digest_arrays
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Key, PyTree

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
    sampler: MCMCKernel,
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


def hmc_state(plan: Plan, state: ChainState, sampler: MCMCKernel) -> HMCState:
    """NumPyro's state of every chain, leaves `(C, ...)`, as if it had just been warmed up.

    Args:
        plan: Of the run: its kernel belongs to a program.
        state: Where the chains stand.
        sampler: The kernel, which may have a fixed step size.
    """
    kernel, num_chains = plan.kernel, plan.num_chains
    whitening, counts = kernel.numbers.whitening, dict(kernel.family.counts)
    dtype = whitening.center.dtype

    def each(value, dtype=dtype):
        value = np.asarray(value, dtype)
        return np.broadcast_to(value, (num_chains, *value.shape))

    settings = {**kernel.numbers.settings, **counts}
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


def kernel_from(sampler: MCMCKernel, target: Target, state: HMCState) -> ParametrisedKernel:
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
    sampler: MCMCKernel, target: Target, key: Key, init_params: PyTree, count: int
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
    sampler: MCMCKernel, target: Target, key: Key, init_params: PyTree, count: int
) -> PyTree:
    if init_params is None:
        return target.starts(jax.random.split(key, count))
    given = check_dtypes(init_params, "init_params")
    if sampler.model is not None:
        check_sites(given, sampler._posterior.shapes)
    have = jax.tree.leaves(given)[0].shape[0]
    if have >= count:
        return given
    if sampler.model is None:
        return jax.tree.map(lambda leaf: leaf[jnp.arange(count) % have], given)
    more = target.starts(jax.random.split(key, count - have))
    return jax.tree.map(lambda a, b: jnp.concatenate([a.astype(b.dtype), b]), given, more)


def _untuned(sampler: MCMCKernel, target: Target, starts: PyTree) -> ParametrisedKernel:
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
