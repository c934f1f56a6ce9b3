"""BlackJAX kernels as dynamical systems.

`from_blackjax` wraps any BlackJAX sampling algorithm as it is, in its own coordinates. The builders `mala`, `hmc`, `nuts`
and `random_walk` make tuned kernels from a log density, a step size and a metric, in the shape that warm-up tunes; with a
`Whitening` as the metric the kernel runs in whitened coordinates and still speaks positions to its user.

Step sizes follow BlackJAX: MALA moves by `ε ∇log p + √(2ε) N(0, I)`, HMC's leapfrog by `ε` per step.
"""

from __future__ import annotations

import math
from typing import Callable

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.random_walk import normal
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels.certify import check_scale
from partime_mcmc.kernels.kernel import Kernel
from partime_mcmc.kernels.whiten import Whitening, checked_root
from partime_mcmc.types import Array, PyTree

# A quarter of the period of a standard normal's Hamiltonian flow: the path length that forgets the start best.
QUARTER_PERIOD = math.pi / 2


def from_blackjax(algorithm: blackjax.SamplingAlgorithm, *, noise_scale: Array | float | None = None,
                  name: str = "blackjax") -> Kernel:
    """A BlackJAX sampling algorithm as a kernel.

    Works for algorithms whose step is a pure function: MALA, HMC, multinomial and dynamic HMC, NUTS, GHMC, MCLMC, Barker,
    elliptical slice, random walks, and your own.

    Args:
        algorithm: As returned by `blackjax.mala(logdensity, step_size)` and the like.
        noise_scale: Standard deviation of the proposal's noise in flat coordinates, if known: certificates then report
            residuals in this unit, otherwise in standard deviations of the chain.
        name: For reports.

    Raises:
        TypeError: If it has no `init` and `step`.
        ValueError: If `noise_scale` is not positive and finite.
    """
    for method in ("init", "step"):
        if not callable(getattr(algorithm, method, None)):
            raise TypeError(f"algorithm: got {type(algorithm).__name__} without a function `{method}`, wanted a BlackJAX "
                            "SamplingAlgorithm such as blackjax.mala(logdensity, step_size)")
    if noise_scale is not None:
        check_scale(noise_scale, "noise_scale")
    return Kernel(algorithm, noise_scale=noise_scale, name=name)


def mala(logdensity: Callable[[PyTree], Array], step_size: float, metric: Whitening | None = None) -> Kernel:
    """The Metropolis-adjusted Langevin algorithm (Besag 1994; Roberts & Tweedie 1996).

    Args:
        logdensity: `position -> scalar`.
        step_size: BlackJAX's ε, positive.
        metric: Whitened coordinates; None uses the position's own.

    Raises:
        ValueError: If the step size is not positive and finite.
    """
    check_step_size(step_size)
    noise = jnp.sqrt(2 * jnp.asarray(step_size))
    return _whitened(lambda density: blackjax.mala(density, step_size), logdensity, metric, noise, "mala")


def hmc(logdensity: Callable[[PyTree], Array], step_size: float, metric: Whitening | Array,
        num_integration_steps: int | None = None) -> Kernel:
    """Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011).

    Args:
        logdensity: `position -> scalar`.
        step_size: The leapfrog's step, positive.
        metric: Whitened coordinates, or an inverse mass matrix of shape `(D,)` or `(D, D)` in BlackJAX's sense.
        num_integration_steps: Leapfrog steps per transition; None takes a path of a quarter period.

    Raises:
        ValueError: If the step size or the metric is unusable.
    """
    check_step_size(step_size)
    if num_integration_steps is None:
        num_integration_steps = quarter_period_steps(step_size)
    _check_positive_integer(num_integration_steps, "num_integration_steps")
    return _with_metric(lambda density, inverse_mass: blackjax.hmc(density, step_size, inverse_mass,
                                                                   num_integration_steps), logdensity, metric, "hmc")


def nuts(logdensity: Callable[[PyTree], Array], step_size: float, metric: Whitening | Array,
         max_num_doublings: int = 10) -> Kernel:
    """The No-U-Turn sampler (Hoffman & Gelman 2014; Betancourt 2017).

    Args:
        logdensity: `position -> scalar`.
        step_size: The leapfrog's step, positive.
        metric: As for `hmc`.
        max_num_doublings: Depth limit of the tree.

    Raises:
        ValueError: If the step size or the metric is unusable.
    """
    check_step_size(step_size)
    _check_positive_integer(max_num_doublings, "max_num_doublings")
    return _with_metric(lambda density, inverse_mass: blackjax.nuts(
        density, step_size, inverse_mass, max_num_doublings=max_num_doublings), logdensity, metric, "nuts")


def random_walk(logdensity: Callable[[PyTree], Array], step_size: float, metric: Whitening | None = None) -> Kernel:
    """Random-walk Metropolis with Gaussian increments of standard deviation `step_size` in each coordinate.

    Chains with the same dice do not forget their starts here: expect to be told to stay sequential.
    """
    check_step_size(step_size)

    def build(density):
        return blackjax.additive_step_random_walk(density, _gaussian_step(step_size))

    return _whitened(build, logdensity, metric, jnp.asarray(step_size), "random_walk")


def quarter_period_steps(step_size: float) -> int:
    """The number of leapfrog steps nearest to a quarter period: `h = 2 sin(π / 4L)` solved for L."""
    return max(1, round(QUARTER_PERIOD / (2 * math.asin(min(float(step_size), math.sqrt(2)) / 2))))


def check_step_size(step_size: float) -> None:
    """Refuse a step size with which every proposal would silently be rejected.

    Raises:
        ValueError: If a concrete step size is not a positive finite number (traced ones pass).
    """
    try:
        value = np.asarray(step_size, float)
    except Exception:  # traced: its value is not known here
        return
    if value.ndim != 0 or not np.isfinite(value) or value <= 0:
        raise ValueError(f"step_size: got {step_size!r}, wanted one positive finite number")


def _check_positive_integer(value, name: str) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}: got {value!r}, wanted an integer of at least 1")


def _gaussian_step(step_size):
    def draw(key, position):
        return normal(step_size * jnp.ones_like(ravel_pytree(position)[0]))(key, position)

    return draw


def _whitened(build: Callable, logdensity: Callable, metric: Whitening | None, noise: Array, name: str) -> Kernel:
    if metric is None:
        return Kernel(build(logdensity), noise_scale=noise, name=name)
    if not isinstance(metric, Whitening):
        raise TypeError(f"metric: got {type(metric).__name__}, wanted a Whitening or None; use "
                        "Whitening.of_covariance(position, center, covariance)")
    return Kernel(build(lambda z: logdensity(metric.leave(z))), metric.enter, metric.leave, noise, name)


def _with_metric(build: Callable, logdensity: Callable, metric: Whitening | Array, name: str) -> Kernel:
    if isinstance(metric, Whitening):
        ones = jnp.ones_like(metric.center)
        return Kernel(build(lambda z: logdensity(metric.leave(z)), ones), metric.enter, metric.leave, None, name)
    metric = jnp.asarray(metric)
    if metric.ndim not in (1, 2):
        raise ValueError(f"metric: shape {metric.shape}, wanted an inverse mass matrix of shape (D,) or (D, D)")
    checked_root(metric, metric.shape[0], "metric")
    algorithm = build(logdensity, metric)

    def init(position, rng_key=None):
        size = ravel_pytree(position)[0].size
        if size != metric.shape[0]:
            raise ValueError(f"metric: shape {metric.shape}, but the position has {size} numbers")
        return algorithm.init(position, rng_key)

    return Kernel(blackjax.SamplingAlgorithm(init, algorithm.step), name=name)
