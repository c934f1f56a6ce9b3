"""Warm-up of NumPyro runs: from keys and starts to `HMCState`s of all chains, and from these back to a tuned kernel."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer.hmc import HMCState

from partime_mcmc.closures import Named
from partime_mcmc.diagnostics.checks import (
    check_dtypes,
    check_precision,
    check_starts,
    looks_improper,
)
from partime_mcmc.kernels import Whitening
from partime_mcmc.kernels.kernel_program import KernelProgram, ParametrisedKernel, density_of, parametrised_kernel
from partime_mcmc.numpyro.arguments import check_sites, is_typed
from partime_mcmc.numpyro.base import AdaptState, ParallelKernel
from partime_mcmc.compile_cache import Timings, run_program
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.warmup import Warmup, warm_up
from partime_mcmc.types import Key, PyTree

_LEAST_WARMUP = 20
_WARMUP_STREAM, _START_STREAM = 2**31 - 1, 2**31 - 2  # steps use the numbers from 0 on


def keys_of(rng_key: Any) -> Key:
    """One typed key per chain, shape `(C,)`, from one key or a batch, typed or legacy."""
    keys = rng_key if is_typed(rng_key) else jax.random.wrap_key_data(jnp.asarray(rng_key))
    return keys.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Chains ready to be sampled: a tuned kernel, where they are, the log density there, the warm-up if there was one,
    and the step size if the user fixed it."""

    kernel: ParametrisedKernel
    positions: PyTree
    logdensity: np.ndarray
    warmup: Warmup | None
    step_size: float


def begin(
    sampler: ParallelKernel,
    target: Target,
    keys: Key,
    num_warmup: int,
    init_params: PyTree,
    progress: Progress,
) -> Beginning:
    """Starts, checks and warm-up.

    Args:
        sampler: The kernel.
        target: What is sampled.
        keys: One key per chain, shape `(C,)`.
        num_warmup: 0, or steps to take: at least 20 are taken, because fewer teach nothing, and a note says so.
        init_params: One start per chain, leaves `(C, ...)`, or None.
        progress: What to tell.

    Raises:
        ValueError: If starts are bad (`InvalidStart`).
    """
    num_chains = keys.shape[0]
    wanted = max(num_chains, sampler.adaptation.num_chains) if num_warmup else num_chains
    starts = _starts(
        sampler, target, jax.random.fold_in(keys[0], _START_STREAM), wanted, init_params
    )
    # On the host: every small operation on arrays of a device is a program of its own.
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[0], starts)
    density, data = density_of(target.logdensity, first)
    try:
        value, good = run_program(_Evaluate(density), data, starts, timings=Timings())
    except TypeError:
        check_starts(
            target.logdensity, starts, "init_params"
        )  # says what is wrong with a density that has no gradient
        raise
    dimension, guess = (
        sum(map(np.size, jax.tree.leaves(first))),
        getattr(sampler.adaptation, "guess", None),
    )
    if guess is not None and guess.shape[0] != dimension:
        raise ValueError(
            f"inverse_mass_matrix: shape {guess.shape}, wanted ({dimension},) or ({dimension}, {dimension})"
        )
    fixed = jnp.nan if sampler._step_size is None else sampler._step_size
    if not np.asarray(good).all():
        if init_params is None and sampler._posterior is not None:
            sampler._posterior.check_found(good)
        check_starts(target.logdensity, starts, "init_params")
    check_precision(target.logdensity, first)
    if not num_warmup:
        return Beginning(
            _untuned(sampler, density, data, first), starts, np.asarray(value), None, fixed
        )
    num_steps = max(num_warmup, _LEAST_WARMUP)
    with progress.stage("warm-up", num_steps) as advance:
        warmup = warm_up(
            jax.random.fold_in(keys[0], _WARMUP_STREAM),
            target.logdensity,
            sampler.tuned_builder(),
            starts,
            num_steps,
            sampler.adaptation,
            advance,
        )
    if num_steps > num_warmup:
        note = f"num_warmup was {num_warmup}, too few to learn anything: {num_steps} steps were allowed."
        warmup = dataclasses.replace(warmup, notes=(*warmup.notes, note))
    suspicion = looks_improper(starts, warmup.positions, warmup.settings.get("step_size", 1.0))
    if suspicion:
        progress.warn(suspicion)
    progress.note(str(warmup))
    positions = jax.device_put(
        jax.tree.map(lambda leaf: np.asarray(leaf)[:num_chains], warmup.positions)
    )
    warmup = dataclasses.replace(
        warmup, positions=positions, logdensity=warmup.logdensity[:num_chains]
    )
    return Beginning(warmup.kernel, positions, warmup.logdensity, warmup, fixed)


def state_of(ready: Beginning, keys: Key) -> HMCState:
    """The state of every chain before its first step, leaves `(C, ...)`."""
    kernel, num_chains = ready.kernel, keys.shape[0]
    whitening, counts = kernel.numbers.whitening, dict(kernel.family.counts)
    carries, discrete = run_program(
        _Enter(kernel.family), kernel.numbers, ready.positions, timings=Timings()
    )
    dtype = whitening.center.dtype

    def each(value, dtype=dtype):
        value = np.asarray(value, dtype)
        return np.broadcast_to(value, (num_chains, *value.shape))

    settings = {**kernel.numbers.settings, **counts}
    step = settings.get("step_size", ready.step_size)
    length = counts.get("num_integration_steps", 1)
    root = np.asarray(whitening.scale)
    metric = root**2 if root.ndim == 1 else root @ root.T
    adapted = AdaptState(
        each(step),
        each(metric),
        each(whitening.center),
        each(root),
        {
            name: each(value, np.int32 if name in counts else dtype)
            for name, value in settings.items()
        },
        discrete,
    )
    potential = -np.asarray(ready.logdensity, dtype)
    zero, integer = each(0.0), each(0, np.int32)
    state = HMCState(
        integer,
        ready.positions,
        None,
        potential,
        potential,
        carries,
        each(length * np.asarray(step)),
        integer,
        zero,
        zero,
        each(False, bool),
        adapted,
        keys,
    )
    return jax.device_put(state)


def kernel_from(sampler: ParallelKernel, target: Target, state: HMCState) -> ParametrisedKernel:
    """The tuned kernel that a batch of states belongs to; counts are read from the state."""
    # On the host, as above.
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
    return parametrised_kernel(KernelProgram(density, sampler.tuned_builder()), data, whitening, settings)


class _Enter(Named):
    """Carries and counters of chains before their first step; the part is the kernel's family."""

    def __call__(self, numbers, positions):
        kernel = self.parts[0].kernel(numbers)

        def one(position):
            state = kernel.init(position)
            return kernel.carry(state), kernel.discrete(state)

        return jax.vmap(one)(positions)


class _Evaluate(Named):
    """Log densities, and whether they and their gradients are finite; the part is the density."""

    def __call__(self, data, positions):
        def one(position):
            value, gradient = jax.value_and_grad(self.parts[0], argnums=1)(data, position)
            return value, jnp.isfinite(value) & jnp.isfinite(ravel_pytree(gradient)[0]).all()

        return jax.vmap(one)(positions)


def _starts(
    sampler: ParallelKernel, target: Target, key: Key, wanted: int, init_params: PyTree
) -> PyTree:
    """One start per chain of the warm-up: those given first, then the model's own, or the given ones again."""
    if init_params is None:
        return target.starts(jax.random.split(key, wanted))
    given = check_dtypes(init_params, "init_params")
    if sampler.model is not None:
        check_sites(given, sampler._posterior.shapes)
    have = jax.tree.leaves(given)[0].shape[0]
    if have >= wanted:
        return given
    if sampler.model is None:
        return jax.tree.map(lambda leaf: leaf[jnp.arange(wanted) % have], given)
    more = target.starts(jax.random.split(key, wanted - have))
    return jax.tree.map(lambda a, b: jnp.concatenate([a.astype(b.dtype), b]), given, more)


def _untuned(sampler: ParallelKernel, density: Any, data: PyTree, first: PyTree) -> ParametrisedKernel:
    """The kernel as it is without warm-up: the metric given, or none, and the step size given, or a cautious one."""
    flat = ravel_pytree(first)[0]
    guess = getattr(sampler.adaptation, "guess", None)
    if guess is None:
        guess = jnp.ones_like(flat)
        warnings.warn(
            "num_warmup: got 0, so nothing is adapted; step size and metric are those given, or 0.1 and the identity",
            stacklevel=4,
        )
    whitening = Whitening.of_covariance(first, jnp.zeros_like(flat), guess)
    settings = {} if sampler._step_size is not None else {"step_size": 0.1}
    return parametrised_kernel(KernelProgram(density, sampler.tuned_builder()), data, whitening, settings)
