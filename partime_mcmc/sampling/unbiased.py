"""Estimates without bias from short chains, by lagged pairs: independent copies to be averaged, on as many machines as there are.

A pair of chains X, Y as in `lag_coupling`, X ahead by L steps until X_{s+L} = Y_s at s = m*, gives of a function h

    H = 1/(m − k + 1) Σ_{t=k}^{m} h(X_t)  +  Σ_{s ≥ k} v(s + L) / (m − k + 1) · (h(X_{s+L}) − h(Y_s)),

    v(t) = ⌊(t − k)/L⌋ − ⌈max(L, t − m)/L⌉ + 1,

whose expectation is h's under the posterior, for every k ≤ m, from wherever the chains start: the first sum is what an ordinary
chain says after k steps, the second corrects what it still knows of its start, and is finite because pairs meet (Glynn & Rhee
2014; Jacob, O'Leary & Atchadé 2020, arXiv:1708.03625, section 2; with a lag Biswas, Jacob & Vanetti 2019,
arXiv:1905.09971). Copies are independent, so their standard error is that of a mean, with no autocorrelation to estimate.

What it costs in efficiency is measured: the variance of H times the steps of a pair, against the asymptotic variance of one
long chain, which is what that chain has per step. A large k makes the correction rare, a large m makes the burn-in cheap.
"""

import dataclasses
import functools
import math
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.diagnostics import mixing
from partime_mcmc.kernels import Kernel
from partime_mcmc.sampling.lag_coupling import FinishedRun, lagged_pairs, target_and_kernel
from partime_mcmc.sampling.target import Target
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Array, Key, PyTree
from partime_mcmc.validation import check_count
from partime_mcmc.warmup.warmup import Warmup

# By default the average ends at so many times its begin: a tenth of a pair's steps is burn-in.
_LAST = 10
_FEWEST_DRAWS = 40


@dataclasses.dataclass(frozen=True)
class Unbiased:
    """Independent unbiased estimates of an expectation.

    Attributes:
        estimates: H of each pair, shape `(K, ...)` with the shape of the function's values; NaN where a pair did not meet.
        first, last: k and m, the steps between which X is averaged.
        lag: L.
        steps: Steps until each pair had met, shape `(K,)`.
        met: Whether it met, shape `(K,)`.
        num_steps: Transitions of the kernel that each pair needed, shape `(K,)`.
        num_gradients: Gradients computed in all, pilots included.
        chain_variance: Asymptotic variance of the average of one long chain, times its length, shape `(...)`: from the X of
            all pairs between k and m; NaN where these are fewer than 40 steps.

    Examples:
        >>> import jax
        >>> from partime_mcmc import MultishiftCoupling, Target, mala, unbiased
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jax.random.normal)
        >>> kernel = mala(target.logdensity, 0.5, coupling=MultishiftCoupling())
        >>> found = unbiased(jax.random.key(0), target, kernel, lambda x: x, num_pairs=32)
        >>> found.estimates.shape, found.num_unmet
        ((32,), 0)
    """

    estimates: np.ndarray
    first: int
    last: int
    lag: int
    steps: np.ndarray
    met: np.ndarray
    num_steps: np.ndarray
    num_gradients: int
    chain_variance: np.ndarray

    @property
    def num_unmet(self) -> int:
        """Pairs that did not meet in the steps allowed. If there are any, there is no unbiased estimate."""
        return int((~self.met).sum())

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """The estimate, shape `(...)`; NaN if a pair did not meet: those that did are not a fair sample."""
        return self.estimates.mean(axis=0)

    @functools.cached_property
    def standard_error(self) -> np.ndarray:
        """Its standard error, shape `(...)`."""
        return self.estimates.std(axis=0, ddof=1) / math.sqrt(len(self.met))

    @property
    def inefficiency(self) -> np.ndarray:
        """Variance of H times the mean number of steps of a pair, over a long chain's; 1 would be as good as that chain."""
        variance = self.estimates.var(axis=0, ddof=1)
        return variance * self.num_steps.mean() / self.chain_variance

    def __str__(self) -> str:
        count = len(self.met)
        if self.num_unmet:
            return (
                f"{self.num_unmet} OF {count} PAIRS OF CHAINS DID NOT MEET in {self.steps.max():,} steps: there is no unbiased "
                "estimate. Look for modes and funnels, or take a kernel whose chains forget, such as coalescing_hmc."
            )
        values = [
            f"{mean:.4g} ± {error:.2g}"
            for mean, error in zip(self.mean.ravel()[:4], self.standard_error.ravel())
        ]
        more = ", ..." if self.mean.size > 4 else ""
        return (
            f"Unbiased: {', '.join(values)}{more}, from {count} pairs of {self.num_steps.mean():,.0f} steps (k {self.first}, "
            f"m {self.last}, lag {self.lag}), {self.num_gradients:,} gradients; variance times steps at most "
            f"{np.max(self.inefficiency):.2f} times a long chain's."
        )


def unbiased(
    key: Key,
    target: Target | FinishedRun,
    kernel: Kernel | Warmup | None = None,
    function: Callable[[PyTree], Array] | None = None,
    *,
    num_pairs: int = 256,
    first: int | None = None,
    last: int | None = None,
    lag: int | None = None,
    max_steps: int = 10_000,
) -> Unbiased:
    """Estimate an expectation under the posterior without bias, by independent pairs of chains.

    Args:
        key: One key.
        target: What is sampled, for its starts; or a finished `ParallelMCMC`, which knows target and kernel.
        kernel: A tuned kernel of the target whose chains meet, or the warm-up of a run; None with a finished run.
        function: h, from a draw as `sample` reports it (the named values of a target that has `constrain`, the position of
            one that has not) to an array.
        num_pairs: K, at least 2.
        first: k, the step at which the average of X begins; None is the lag.
        last: m, the step at which it ends; None is ten times `first`.
        lag: L, a multiple of the length of the kernel's cycle; None is chosen by pilot pairs.
        max_steps: Steps until a pair is given up.

    Returns:
        The estimates, with standard error and cost.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a count is too small, `last` lies before `first`, or as for `convergence`.

    Examples:
        >>> import jax
        >>> from partime_mcmc import MultishiftCoupling, Target, mala, unbiased
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jax.random.normal)
        >>> kernel = mala(target.logdensity, 0.5, coupling=MultishiftCoupling())
        >>> square = unbiased(jax.random.key(0), target, kernel, lambda x: x**2, num_pairs=32)
        >>> bool(abs(square.mean - 1) < 4 * square.standard_error)
        True
    """
    if not callable(function):
        raise TypeError(f"function: got {function!r}, wanted a function of a draw")
    target, kernel = target_and_kernel(target, kernel)
    if last is not None and check_count(last, "last", 0) < (first or 0):
        raise ValueError(f"last: got {last}, wanted at least first, {first}")
    observe = _Values(function, target.constrain)
    shape = jax.eval_shape(observe.of_one, target.example()).shape
    pairs, lag, cost = lagged_pairs(key, target, kernel, num_pairs, lag, max_steps, observe, None)
    first = lag if first is None else check_count(first, "first", 0)
    last = max(_LAST * first, first) if last is None else last
    alone = pairs.lead(lag)
    both = pairs.follow(alone.states, max_steps)
    work, leader = cost + alone.num_gradients + both.num_gradients, alone.seen
    if last >= lag:
        later = pairs.go_on(alone.states, last + 1 - lag)
        leader, work = np.concatenate([leader, later.seen], axis=1), work + later.num_gradients
    averaged = leader[:, first : last + 1, 0]
    correction = _weighted(both.seen[:, :, 0] - both.seen[:, :, 1], first, last, lag)
    estimates = averaged.mean(axis=1) + correction
    estimates = np.where(both.met[:, None], estimates, np.nan)
    # X has to go on to m at least.
    num_steps = both.steps + np.maximum(last, lag + both.steps)
    return Unbiased(
        estimates.reshape(-1, *shape),
        first,
        last,
        lag,
        both.steps,
        both.met,
        num_steps,
        work,
        _chain_variance(averaged).reshape(shape),
    )


def _weighted(differences: np.ndarray, first: int, last: int, lag: int) -> np.ndarray:
    """The correction of each pair, `(K, S, F)` → `(K, F)`."""
    time = np.arange(differences.shape[1]) + lag
    count = (time - first) // lag - np.ceil(np.maximum(lag, time - last) / lag) + 1
    weight = np.where(time >= first + lag, count, 0) / (last - first + 1)
    return np.einsum("s,ksf->kf", weight, differences)


def _chain_variance(values: np.ndarray) -> np.ndarray:
    """Asymptotic variance times length of the mean of a long chain, from chains `(K, T, F)`."""
    if values.shape[1] < _FEWEST_DRAWS:
        return np.full(values.shape[2], np.nan)
    size = values.shape[0] * values.shape[1]
    return values.var(axis=(0, 1)) * size / mixing.ess_mean(values)


class _Values(HashableFunction):
    """Values of a function of draws, flat, of positions `(S, ...)`; parts: the function, and what makes a draw of a position."""

    def of_one(self, position: PyTree) -> Array:
        """The value at one position."""
        function, constrain = self.parts
        return jnp.asarray(function(position if constrain is None else constrain(position)))

    def __call__(self, numbers: None, positions: PyTree) -> Array:
        values = jax.vmap(self.of_one)(positions)
        return values.reshape(values.shape[0], -1).astype(jnp.result_type(float))
