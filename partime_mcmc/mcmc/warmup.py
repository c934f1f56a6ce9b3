"""Warm-up: from dispersed starts to a tuned kernel and one state per chain.

Three stages, all chains side by side, each step one after another:

    1  every chain runs BlackJAX's window adaptation (NUTS, dense metric) to find the typical set
    2  twice: the chains' draws are pooled into one covariance Σ, shrunk towards the metric before it; the kernel
       under tuning runs in the whitened coordinates x = μ + L z, LLᵀ = Σ, with its step size chosen anew
    3  freeze; the report says what was chosen and what it cost

A window adaptation alone leaves a poor dense metric on several regressions (step sizes five times smaller than need be),
and it does not know MALA; pooling and step-size trials mend both. Step sizes are chosen by trial, not by a recursion:
candidates from large to small, each tried once from every one of up to 128 pooled states, until the mean acceptance
probability meets the kernel's target. HMC pairs each number of leapfrogs L with the step h = 2 sin(π/4L), so that its
path is a quarter period (Sexton & Weingarten 1992 for the period of leapfrog on a normal).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any, Callable

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.closures import explicit
from partime_mcmc.kernels import Kernel, Whitening, hmc, mala, nuts, random_walk
from partime_mcmc.types import Array, Key, PyTree

Builder = Callable[..., Kernel]

_LEAPFROGS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_NUM_TRIALS = 128
_SHRINK = 0.85
_MAX_CANDIDATES = 60
# What each kernel's own theory asks for, on the safe side: a rejection is a coupling lost.
_TARGETS = {mala: 0.65, hmc: 0.8, nuts: 0.8, random_walk: 0.3}


@dataclasses.dataclass(frozen=True)
class Warmup:
    """What warm-up chose and what it cost.

    Attributes:
        kernel: The tuned kernel.
        positions: One position per chain to go on from, leaves `(C, ...)`.
        settings: What was chosen for the builder: `step_size` and, for HMC, `num_integration_steps`.
        whitening: The coordinates.
        acceptance: Mean acceptance probability in the trials of the chosen step size.
        target_acceptance: What was aimed at.
        num_steps: Transitions per chain, one after another.
        num_gradients: Gradients over all chains; trials included.
        seconds: Wall time, compilation included.
        notes: What a reader should know, in sentences.
    """

    kernel: Kernel
    positions: PyTree
    settings: dict[str, Any]
    whitening: Whitening
    acceptance: float
    target_acceptance: float
    num_steps: int
    num_gradients: int
    seconds: float
    notes: tuple[str, ...]


def warm_up(key: Key, logdensity: Callable[[PyTree], Array], builder: Builder, starts: PyTree, num_warmup: int,
            advance: Callable[[int], None] = lambda steps: None) -> Warmup:
    """Tune a kernel on a density.

    Args:
        key: One key.
        logdensity: `position -> scalar`.
        builder: `(logdensity, step_size, metric) -> Kernel`, such as `mala`, `hmc`, `nuts`, or a `functools.partial` of
            one. The metric it is given is a `Whitening`.
        starts: One position per chain, leaves `(C, ...)`, of finite density.
        num_warmup: Transitions per chain in all, at least 20.
        advance: Called with the number of transitions done since the last call.

    Returns:
        The tuned kernel and where the chains are.
    """
    begin = time.perf_counter()
    example = jax.tree.map(lambda leaf: leaf[0], starts)
    density, params = explicit(_Density(logdensity), None, example)
    keys = jax.random.split(key, 6)
    first, rounds = num_warmup // 2, (num_warmup // 4, num_warmup - num_warmup // 2 - num_warmup // 4)
    positions, draws, metric, num_gradients = _adapt(density, params, starts, keys[0], first)
    advance(first)
    notes: list[str] = []
    for number, steps in enumerate(rounds):
        metric = _pooled_covariance(draws, metric)
        whitening = Whitening.of_covariance(example, _pooled_mean(draws), metric)
        trial = _Trials(builder, density, params, whitening, draws, keys[1 + number])
        settings, acceptance = trial.choose(notes if number else [])
        num_gradients += trial.num_gradients
        positions, draws, cost = _run(builder, density, params, whitening, settings, positions, keys[3 + number], steps)
        num_gradients += cost
        advance(steps)
    kernel = builder(logdensity, metric=whitening, **settings)
    return Warmup(kernel, positions, settings, whitening, acceptance, trial.target, num_warmup, num_gradients,
                  time.perf_counter() - begin, tuple(notes))


class _Density:
    """A log density with parameters first."""

    def __init__(self, logdensity):
        self.logdensity = logdensity

    def __call__(self, params, position):
        del params
        return self.logdensity(position)


def _adapt(density, params, starts, key, num_steps):
    """BlackJAX's window adaptation in every chain: last positions, second half of the draws, the chains' mean metric,
    gradients spent."""

    @jax.jit
    def run(params, starts, keys):
        adaptation = blackjax.window_adaptation(
            blackjax.nuts, functools.partial(density, params), is_mass_matrix_diagonal=False,
            adaptation_info_fn=lambda state, info, _: (state.position, info.num_integration_steps))
        one = lambda key, start: adaptation.run(key, start, num_steps)  # noqa: E731
        return jax.vmap(one)(keys, starts)

    (state, tuned), (draws, steps) = run(params, starts, jax.random.split(key, _num_chains(starts)))
    half = jax.tree.map(lambda leaf: leaf[:, num_steps // 2:], draws)
    return state.position, half, np.asarray(tuned["inverse_mass_matrix"], float).mean(axis=0), int(jnp.sum(steps))


def _run(builder, density, params, whitening, settings, positions, key, num_steps):
    """The kernel under tuning, one step after another: last positions, second half of the draws, gradients spent."""

    @jax.jit
    def run(params, whitening, settings, positions, keys):
        kernel = builder(functools.partial(density, params), metric=whitening, **settings)

        def chain(position, key):
            def advance(state, key):
                state, info = kernel.step(key, state)
                return state, (kernel.position(kernel.carry(state)), getattr(info, "num_integration_steps", 1))

            state, (draws, steps) = jax.lax.scan(advance, kernel.init(position), jax.random.split(key, num_steps))
            return kernel.position(kernel.carry(state)), draws, jnp.sum(jnp.broadcast_to(jnp.asarray(steps), num_steps))

        return jax.vmap(chain)(positions, keys)

    last, draws, steps = run(params, whitening, settings, positions, jax.random.split(key, _num_chains(positions)))
    return last, jax.tree.map(lambda leaf: leaf[:, num_steps // 2:], draws), int(steps.sum())


class _Trials:
    """Step sizes tried on pooled states."""

    def __init__(self, builder, density, params, whitening, draws, key):
        self.base = builder
        fixed: dict[str, Any] = {}
        while isinstance(self.base, functools.partial):
            fixed = {**self.base.keywords, **fixed}
            self.base = self.base.func
        self.fixed, self.target, self.num_gradients = fixed, _TARGETS.get(self.base, 0.7), 0
        pooled = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), draws)
        size = jax.tree.leaves(pooled)[0].shape[0]
        pick = np.linspace(0, size - 1, min(_NUM_TRIALS, size)).astype(int)
        self.states = jax.tree.map(lambda leaf: leaf[pick], pooled)
        self.keys = jax.random.split(key, len(pick))

        @jax.jit
        def accept(params, whitening, settings, states, keys):
            kernel = builder(functools.partial(density, params), metric=whitening, **settings)

            def one(position, key):
                _, info = kernel.step(key, kernel.init(position))
                return info.acceptance_rate, jnp.asarray(getattr(info, "num_integration_steps", 1))

            rates, steps = jax.vmap(one)(states, keys)
            return jnp.mean(jnp.where(jnp.isfinite(rates), rates, 0)), jnp.sum(jnp.broadcast_to(steps, rates.shape))

        self.accept = functools.partial(accept, params, whitening)

    def candidates(self):
        """Settings to try, the boldest first."""
        if self.base is hmc and "num_integration_steps" not in self.fixed:
            for leapfrogs in _LEAPFROGS:
                yield {"step_size": 2 * math.sin(math.pi / (4 * leapfrogs)), "num_integration_steps": leapfrogs}
            step, leapfrogs = 2 * math.sin(math.pi / (4 * _LEAPFROGS[-1])), _LEAPFROGS[-1]
            for power in range(1, _MAX_CANDIDATES):
                yield {"step_size": step * 0.67**power, "num_integration_steps": leapfrogs}
            return
        bold = 1.0
        if self.base is hmc:
            bold = 2 * math.sin(math.pi / (4 * self.fixed["num_integration_steps"]))
        elif self.base in (nuts, random_walk):
            bold = 1.6
        for power in range(_MAX_CANDIDATES):
            yield {"step_size": bold * _SHRINK**power}

    def choose(self, notes: list[str]) -> tuple[dict, float]:
        """The boldest settings that meet the target, and their acceptance; a note if none does."""
        if "step_size" in self.fixed:
            return {}, self._acceptance({})
        best: tuple[dict, float] = ({}, -1.0)
        for settings in self.candidates():
            rate = self._acceptance(settings)
            if rate > best[1]:
                best = (settings, rate)
            if rate >= self.target:
                return settings, rate
        notes.append(f"no step size reached the target acceptance {self.target:.2f}; the best reached {best[1]:.2f}")
        return best

    def _acceptance(self, settings: dict) -> float:
        rate, cost = self.accept(settings, self.states, self.keys)
        self.num_gradients += int(cost)
        return float(rate)


def _pooled_covariance(draws: PyTree, previous: np.ndarray) -> np.ndarray:
    """The pooled covariance of all chains, shrunk a little towards the metric before it."""
    flat = _pooled(draws)
    # Draws are correlated: a fifth of them counts, against five pseudo-draws of the old metric. Shrinking towards the
    # diagonal instead would undo exactly the correlations that a dense metric is for.
    weight = (len(flat) / 5) / (len(flat) / 5 + 5)
    covariance = weight * np.atleast_2d(np.cov(flat, rowvar=False)) + (1 - weight) * previous
    floor = 1e-12 * (1 + flat.mean(axis=0) ** 2)
    return covariance + np.diag(np.maximum(floor - np.diag(covariance), 0))


def _pooled_mean(draws: PyTree) -> np.ndarray:
    return _pooled(draws).mean(axis=0)


def _pooled(draws: PyTree) -> np.ndarray:
    flat = np.asarray(jax.vmap(jax.vmap(lambda position: ravel_pytree(position)[0]))(draws), float)
    return flat.reshape(-1, flat.shape[-1])


def _num_chains(positions: PyTree) -> int:
    return jax.tree.leaves(positions)[0].shape[0]
