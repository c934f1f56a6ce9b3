"""What a builder wants tuned, and the rules: step sizes and paths of kernels from trials on the pooled chains.

    hmc              step size and leapfrog steps of a quarter period (`path`), accepted ≥ 0.8
    coalescing_hmc   the same, and the largest Langevin step h_m ≤ min(√2, 2.2 h) accepted ≥ 0.6; its ε is h_m²/2
    mala             the largest Langevin step accepted ≥ 0.8: where one of two chains rejects, their coupling is lost,
                     and passes and meeting times grow with the rate of rejections; 0.65 with dice that coalesce
    nuts             the largest step size with which a quarter period is accepted ≥ 0.8
    others           the largest step size with which the kernel itself accepts ≥ 0.7 (random walks 0.3), by trials of
    its own

Settings fixed by the user (`functools.partial(hmc, num_integration_steps=4)`) stay and the others are chosen for them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels import (
    MultishiftCoupling,
    Whitening,
    coalescing_hmc,
    hmc,
    mala,
    nuts,
    random_walk,
)
from partime_mcmc.kernels.kernel_program import Builder, KernelProgram, KernelParams
from partime_mcmc.warmup.trajectory_length import Path, Trial, TrajectoryRule, boldest_step
from partime_mcmc.compile_cache import compiler_options
from partime_mcmc.warmup.hmc_batch import STEPS
from partime_mcmc.types import Key

_TARGETS = {hmc: 0.8, coalescing_hmc: 0.8, nuts: 0.8, mala: 0.8, random_walk: 0.3}
_COALESCING_MALA, _OTHERS = 0.65, 0.7
_LANDING, _LANDING_LIMIT, _LANDING_RATIO = 0.6, math.sqrt(2), 2.2

# (step size, leapfrog steps) -> acceptance probabilities of HMC trials, shape (S, C).


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        settings: By the builder's argument names, without those that the user fixed.
        acceptance: In the trials.
        target: What was aimed at.
    """

    settings: dict[str, Any]
    acceptance: float
    target: float


def unwrapped(builder: Builder) -> tuple[Builder, dict[str, Any]]:
    """A builder and what partial applications have fixed."""
    fixed: dict[str, Any] = {}
    while isinstance(builder, functools.partial):
        fixed = {**builder.keywords, **fixed}
        builder = builder.func
    return builder, fixed


def target_of(builder: Builder) -> float:
    """The mean acceptance that a builder's kernels are tuned for."""
    base, fixed = unwrapped(builder)
    return (
        _COALESCING_MALA
        if base is mala and isinstance(fixed.get("coupling"), MultishiftCoupling)
        else _TARGETS.get(base, _OTHERS)
    )


def path_rule_of(builder: Builder, target: float, length: float | None) -> TrajectoryRule:
    """The rule for the HMC paths of warm-up's own windows, which are the kernel's own where it is HMC."""
    base, fixed = unwrapped(builder)
    if base not in (hmc, coalescing_hmc):
        return TrajectoryRule()
    return TrajectoryRule(
        target, fixed.get("step_size"), fixed.get("num_integration_steps"), length
    )


def choose(
    builder: Builder, path: Path, trial: Trial, own: Callable[[dict], np.ndarray], target: float
) -> Choice:
    """Settings for a builder.

    Args:
        builder: Possibly with fixed settings.
        path: Of the last window.
        trial: HMC trials from pooled states.
        own: Trials of the builder's own kernel, settings to acceptance probabilities `(S, C)`.
        target: Mean acceptance wanted.
    """
    base, fixed = unwrapped(builder)
    if base in (hmc, coalescing_hmc):
        settings, rate = (
            {"step_size": path.step_size, "num_integration_steps": path.num_steps},
            path.acceptance,
        )
        if base is coalescing_hmc and "mala_step_size" not in fixed:
            bold = min(_LANDING_LIMIT, _LANDING_RATIO * path.step_size)
            settings["mala_step_size"] = boldest_step(trial, bold, _LANDING).step_size ** 2 / 2
    elif "step_size" in fixed:
        settings, rate = {}, float(own({}).mean())
    elif base is mala:
        found = boldest_step(trial, _LANDING_LIMIT, target)
        settings, rate = {"step_size": found.step_size**2 / 2}, found.acceptance
    elif base is nuts:
        found = boldest_step(trial, _LANDING_LIMIT, target, TrajectoryRule()._steps_for)
        settings, rate = {"step_size": found.step_size}, found.acceptance
    else:
        found = boldest_step(
            lambda step, _: own({"step_size": step}), 1.6 if base is random_walk else 1.0, target
        )
        settings, rate = {"step_size": found.step_size}, found.acceptance
    return Choice(
        {name: value for name, value in settings.items() if name not in fixed}, rate, target
    )


def own_trials(
    family: KernelProgram, data, whitening: Whitening, draws: np.ndarray, key: Key
) -> Callable[[dict], np.ndarray]:
    """One step of the family's own kernel from each of 16 states of every chain; compiled once."""
    num_draws, num_chains, dimension = draws.shape
    states = draws[np.linspace(0, num_draws - 1, STEPS).astype(int)].reshape(-1, dimension)
    unravel = ravel_pytree(whitening.example)[1]

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def accept(numbers, states, key):
        kernel, keys = family.kernel(numbers), jax.random.split(key, len(states))

        def one(flat, key):
            return kernel.step(key, kernel.init(unravel(flat)))[1].acceptance_rate

        rates = jax.vmap(one)(states, keys)
        return jnp.where(jnp.isfinite(rates), rates, 0)

    def trial(settings: dict) -> np.ndarray:
        sizes = {
            name: jnp.asarray(value, whitening.center.dtype) for name, value in settings.items()
        }
        found = accept(
            KernelParams(data, whitening, sizes), jnp.asarray(states, whitening.center.dtype), key
        )
        return np.asarray(found).reshape(STEPS, num_chains)

    return trial
