"""Warm-up: from dispersed starts to a tuned kernel and one state per chain.

Three stages, all chains side by side, each step one after another:

    1  every chain runs BlackJAX's window adaptation (NUTS, dense metric) to find the typical set
    2  twice: all draws so far are pooled into one metric Σ; the kernel under tuning gets a step size for the whitened
       coordinates x = μ + L z, LLᵀ = Σ, and runs a while
    3  once more a metric from all draws and a step size; freeze; the report says what was chosen and what it cost

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

from partime_mcmc.closures import explicit
from partime_mcmc.kernels import Kernel, Whitening, hmc, mala, nuts, random_walk
from partime_mcmc.mcmc.metric import pooled_metric
from partime_mcmc.types import Array, Key, PyTree

Builder = Callable[..., Kernel]

_LEAPFROGS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_NUM_TRIALS = 128
_NUM_POOL = 33
_SHRINK = 0.85
_MAX_CANDIDATES = 60
# Above what each kernel's own theory asks for (MALA's optimum 0.574 is flat): where one of two chains rejects, their
# coupling is lost, and passes and meeting times grow with the rate of rejections.
_TARGETS = {mala: 0.8, hmc: 0.8, nuts: 0.8, random_walk: 0.3}


@dataclasses.dataclass(frozen=True)
class Warmup:
    """What warm-up chose and what it cost.

    Attributes:
        kernel: The tuned kernel.
        positions: One position per chain to go on from, leaves `(C, ...)`.
        pool: Some of the draws of all chains, leaves `(K, ...)`: far-apart starts for pilot chains.
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
    pool: PyTree
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
    first = num_warmup // 2
    rest = (num_warmup - first) // 2, num_warmup - first - (num_warmup - first) // 2
    positions, draws, metric, num_gradients = _adapt(density, params, starts, keys[0], first)
    advance(first)
    tuner = _Tuner(builder, density, params)
    for number, steps in enumerate((*rest, 0)):
        center, metric = pooled_metric(density, params, draws, metric)
        whitening = Whitening.of_covariance(example, center, metric)
        settings, acceptance = tuner.choose(whitening, draws, keys[1 + number])
        if steps:
            positions, new = tuner.run(whitening, settings, positions, keys[4 + number], steps)
            draws = jax.tree.map(lambda old, fresh: jnp.concatenate([old, fresh], axis=1), draws, new)
            advance(steps)
    notes = () if acceptance >= tuner.target else (
        f"no step size reached the target acceptance {tuner.target:.2f}; the best reached {acceptance:.2f}",)
    kernel = builder(logdensity, metric=whitening, **settings)
    return Warmup(kernel, positions, _some(draws, _NUM_POOL), settings, whitening, acceptance, tuner.target, num_warmup,
                  num_gradients + tuner.num_gradients, time.perf_counter() - begin, notes)


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


class _Tuner:
    """Trials and runs of a kernel under tuning; compiled once, metrics and step sizes are arguments."""

    def __init__(self, builder: Builder, density: Callable, params: PyTree):
        self.base, self.fixed = builder, {}
        while isinstance(self.base, functools.partial):
            self.fixed = {**self.base.keywords, **self.fixed}
            self.base = self.base.func
        self.target, self.num_gradients = _TARGETS.get(self.base, 0.7), 0

        def build(params, whitening, settings):
            return builder(functools.partial(density, params), metric=whitening, **settings)

        @jax.jit
        def accept(params, whitening, settings, states, keys):
            kernel = build(params, whitening, settings)

            def one(position, key):
                _, info = kernel.step(key, kernel.init(position))
                return info.acceptance_rate, _leapfrogs(info)

            rates, steps = jax.vmap(one)(states, keys)
            return jnp.mean(jnp.where(jnp.isfinite(rates), rates, 0)), jnp.sum(steps)

        @functools.partial(jax.jit, static_argnames="num_steps")
        def run(params, whitening, settings, positions, keys, num_steps):
            kernel = build(params, whitening, settings)

            def chain(position, key):
                def advance(state, key):
                    state, info = kernel.step(key, state)
                    return state, (kernel.position(kernel.carry(state)), _leapfrogs(info))

                state, (draws, steps) = jax.lax.scan(advance, kernel.init(position), jax.random.split(key, num_steps))
                return kernel.position(kernel.carry(state)), draws, jnp.sum(steps)

            return jax.vmap(chain)(positions, keys)

        self._accept, self._run = functools.partial(accept, params), functools.partial(run, params)

    def run(self, whitening: Whitening, settings: dict, positions: PyTree, key: Key, num_steps: int):
        """One step after another: last positions and draws `(C, num_steps, ...)`."""
        keys = jax.random.split(key, _num_chains(positions))
        last, draws, steps = self._run(whitening, settings, positions, keys, num_steps=num_steps)
        self.num_gradients += int(steps.sum())
        return last, draws

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

    def choose(self, whitening: Whitening, draws: PyTree, key: Key) -> tuple[dict, float]:
        """The boldest settings that meet the target in one trial from each of some draws, and their acceptance."""
        states = _some(draws, _NUM_TRIALS)
        keys = jax.random.split(key, _num_chains(states))
        trial = functools.partial(self._acceptance, whitening, states, keys)
        if "step_size" in self.fixed:
            return {}, trial({})
        best: tuple[dict, float] = ({}, -1.0)
        for settings in self.candidates():
            rate = trial(settings)
            if rate > best[1]:
                best = (settings, rate)
            if rate >= self.target:
                return settings, rate
        return best

    def _acceptance(self, whitening, states, keys, settings: dict) -> float:
        rate, cost = self._accept(whitening, settings, states, keys)
        self.num_gradients += int(cost)
        return float(rate)


def _leapfrogs(info) -> Array:
    """Gradients of one transition."""
    return jnp.asarray(getattr(info, "num_integration_steps", 1))


def _some(draws: PyTree, count: int) -> PyTree:
    """Up to `count` of the draws of all chains, evenly spread: leaves `(C, n, ...)` → `(count, ...)`."""
    pooled = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), draws)
    size = _num_chains(pooled)
    pick = np.linspace(0, size - 1, min(count, size)).astype(int)
    return jax.tree.map(lambda leaf: leaf[pick], pooled)


def _num_chains(positions: PyTree) -> int:
    return jax.tree.leaves(positions)[0].shape[0]
