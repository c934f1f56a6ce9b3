"""Builders of tuned kernels: a log density, a step size and a metric in, a `Kernel` out; warm-up tunes kernels through them.

With a `Whitening` as the metric the kernel runs in whitened coordinates; what its user sees are positions. `coupling`
chooses how the noise is drawn: `CommonRandomNumbers()` is BlackJAX's own kernel with its own draws, `MultishiftCoupling()` a
kernel of the same law whose chains forget their past within some steps (`kernels.coupling`), and `coalescing_hmc` is the
cycle of both that suits most posteriors. `kernels.blackjax` makes kernels of BlackJAX's other algorithms.

Step sizes follow BlackJAX: MALA moves by `ε ∇log p + √(2ε) N(0, I)`, HMC's leapfrog by `ε` per step.
"""

import math
from typing import Any, Callable

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels.blackjax_without_backend import blackjax, normal
from partime_mcmc.kernels.coupling import (
    CommonRandomNumbers,
    Coupling,
    MultishiftCoupling,
    check_coupling,
)
from partime_mcmc.kernels.kernel import Kernel
from partime_mcmc.kernels.leapfrog import check_drift_fraction, leapfrogs, steps_for_angle
from partime_mcmc.kernels.multishift_hmc import hmc_cycle, steered_hmc
from partime_mcmc.kernels.multishift_mala import coalescing_mala
from partime_mcmc.kernels.multishift_random_walk import coalescing_random_walk
from partime_mcmc.kernels.whitening import Whitening, checked_root
from partime_mcmc.types import Array, ArrayLike, PyTree, Tracer
from partime_mcmc.validation import check_count, describe

# A quarter of the period of a standard normal's Hamiltonian flow: the path length that forgets the start best.
QUARTER_PERIOD = math.pi / 2


def mala(
    logdensity: Callable[[PyTree], Array],
    step_size: float,
    metric: Whitening | None = None,
    *,
    coupling: Coupling = CommonRandomNumbers(),
) -> Kernel:
    """The Metropolis-adjusted Langevin algorithm (Besag 1994; Roberts & Tweedie 1996).

    Args:
        logdensity: `position -> scalar`.
        step_size: BlackJAX's ε, positive.
        metric: Whitened coordinates; None uses the position's own.
        coupling: How the noise is drawn.

    Raises:
        ValueError: If the step size is not positive and finite.
        TypeError: If `coupling` is not one of the two couplings.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import mala, rollout
        >>> kernel = mala(lambda x: -0.5 * jnp.sum(x**2), 0.5)
        >>> state = kernel.init(jnp.ones(2))
        >>> tape = kernel.tape(jax.random.key(0), 100, state)
        >>> path = rollout(kernel.dynamics(), kernel.carry(state), tape)
        >>> path.shape
        (100, 2)
    """
    check_step_size(step_size)
    check_coupling(coupling)
    build = coalescing_mala if isinstance(coupling, MultishiftCoupling) else blackjax.mala
    noise = jnp.sqrt(2 * jnp.asarray(step_size))
    return _whitened(lambda density: build(density, step_size), logdensity, metric, noise, "mala")


def hmc(
    logdensity: Callable[[PyTree], Array],
    step_size: float,
    metric: Whitening | Array,
    num_integration_steps: int | None = None,
    *,
    drift_fraction: float = 1.0,
    coupling: Coupling = CommonRandomNumbers(),
) -> Kernel:
    """Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011).

    Args:
        logdensity: `position -> scalar`.
        step_size: The leapfrog's step, positive.
        metric: Whitened coordinates, or an inverse mass matrix of shape `(D,)` or `(D, D)` in BlackJAX's sense.
        num_integration_steps: Gradients per transition; None takes a path of a quarter period.
        drift_fraction: Drifts are shorter than kicks by this factor f in (0, 1]: steps of size h are exact on a standard
            normal with f = 1/(1 + h²/4), and turn it by 2 arctan(h/2) each.
        coupling: How momenta are drawn. `MultishiftCoupling()` wants a `Whitening`, because it aims momenta at the end that
            the trajectory would have on a standard normal, and a step size below 2/√f.

    Raises:
        ValueError: If the step size, a count or the metric is unusable.
        TypeError: If `coupling` is not one of the two couplings, or wants a `Whitening` and gets none.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import hmc, rollout
        >>> kernel = hmc(lambda x: -0.5 * jnp.sum(x**2), 0.5, jnp.ones(2))  # three leapfrog steps
        >>> state = kernel.init(jnp.ones(2))
        >>> tape = kernel.tape(jax.random.key(0), 100, state)
        >>> path = rollout(kernel.dynamics(), kernel.carry(state), tape)
        >>> path.shape
        (100, 2)
    """
    check_step_size(step_size)
    check_coupling(coupling)
    num_steps = _steps_of_path(step_size, num_integration_steps, drift_fraction)
    if isinstance(coupling, MultishiftCoupling):
        _check_whitening(metric, "a Whitening for hmc with MultishiftCoupling()")
        return _whitened(
            lambda density: steered_hmc(density, step_size, num_steps, drift_fraction),
            logdensity,
            metric,
            None,
            "hmc",
        )
    return _with_metric(
        lambda density, inverse_mass: _plain_hmc(
            density, step_size, inverse_mass, num_steps, drift_fraction
        ),
        logdensity,
        metric,
        "hmc",
    )


def _plain_hmc(density, step_size, inverse_mass, num_steps, drift_fraction):
    """BlackJAX's HMC, which takes a whole trajectory as one step of its integrator."""
    path = leapfrogs(num_steps, drift_fraction)
    algorithm = blackjax.hmc(density, step_size, inverse_mass, 1, integrator=path)

    def step(rng_key, state):
        state, info = algorithm.step(rng_key, state)
        return state, info._replace(num_integration_steps=num_steps)

    return blackjax.SamplingAlgorithm(algorithm.init, step)


def coalescing_hmc(
    logdensity: Callable[[PyTree], Array],
    step_size: float,
    metric: Whitening,
    num_integration_steps: int | None = None,
    *,
    drift_fraction: float = 1.0,
    mala_step_size: float | None = None,
    every: int = 4,
) -> Kernel:
    """Quarter-period HMC with a coalescing MALA step after every `every`-th trajectory, in whitened coordinates.

    The trajectories bring nearly independent draws, and the MALA step takes chains with the same random numbers to the same
    floats: the kernel to choose where one long chain is to be solved in parallel over time.

    Args:
        logdensity: `position -> scalar`.
        step_size: The leapfrog's step, positive.
        metric: Whitened coordinates.
        num_integration_steps: Gradients per trajectory; None takes a path of a quarter period.
        drift_fraction: As for `hmc`.
        mala_step_size: BlackJAX's ε of the MALA step; None takes h²/2 with h = min(√2, 2.2 step_size).
        every: k, at least 1.

    Raises:
        ValueError: If a step size or a count is unusable.
        TypeError: If the metric is not a `Whitening`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import coalescing_hmc
        >>> from partime_mcmc.kernels import Whitening
        >>> metric = Whitening.of_covariance(jnp.zeros(2), jnp.array([5.0, 0.0]), 4 * jnp.eye(2))
        >>> kernel = coalescing_hmc(lambda x: -0.125 * jnp.sum((x - metric.center) ** 2), 0.5, metric)
        >>> print(kernel.init(jnp.array([9.0, 0.0])).position)  # in whitened coordinates
        [2. 0.]
    """
    check_step_size(step_size)
    num_steps = _steps_of_path(step_size, num_integration_steps, drift_fraction)
    langevin = mala_step_size
    if langevin is None:
        langevin = jnp.minimum(math.sqrt(2), 2.2 * jnp.asarray(step_size)) ** 2 / 2
    check_step_size(langevin)
    _check_positive_integer(every, "every")
    _check_whitening(metric, "a Whitening for coalescing_hmc")
    return _whitened(
        lambda density: hmc_cycle(density, step_size, num_steps, langevin, every, drift_fraction),
        logdensity,
        metric,
        None,
        "coalescing_hmc",
    )


def nuts(
    logdensity: Callable[[PyTree], Array],
    step_size: float,
    metric: Whitening | Array,
    max_num_doublings: int = 10,
) -> Kernel:
    """The No-U-Turn sampler (Hoffman & Gelman 2014; Betancourt 2017).

    Args:
        logdensity: `position -> scalar`.
        step_size: The leapfrog's step, positive.
        metric: As for `hmc`.
        max_num_doublings: Depth limit of the tree.

    Raises:
        ValueError: If the step size or the metric is unusable.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import nuts
        >>> kernel = nuts(lambda x: -0.5 * jnp.sum(x**2), 0.5, jnp.ones(2), max_num_doublings=3)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(2)))
        >>> state.position.shape
        (2,)
    """
    check_step_size(step_size)
    _check_positive_integer(max_num_doublings, "max_num_doublings")
    return _with_metric(
        lambda density, inverse_mass: blackjax.nuts(
            density, step_size, inverse_mass, max_num_doublings=max_num_doublings
        ),
        logdensity,
        metric,
        "nuts",
    )


def random_walk(
    logdensity: Callable[[PyTree], Array],
    step_size: float,
    metric: Whitening | None = None,
    *,
    coupling: Coupling = CommonRandomNumbers(),
    block: int | None = None,
) -> Kernel:
    """Random-walk Metropolis with Gaussian increments of standard deviation `step_size` in each coordinate.

    With common random numbers chains never forget their starts, and no solver is faster than the sequential loop. With
    multishift coupling they forget them, in up to some ten coordinates or in blocks of coordinates.

    Args:
        logdensity: `position -> scalar`.
        step_size: Standard deviation, positive.
        metric: Whitened coordinates; None uses the position's own.
        coupling: How the noise is drawn.
        block: With multishift coupling, how many coordinates move in a step, chosen at random; None moves all.

    Raises:
        ValueError: If the step size is not positive and finite, or `block` is no count or given with common random numbers.
        TypeError: If `coupling` is not one of the two couplings.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import random_walk, rollout
        >>> kernel = random_walk(lambda x: -0.5 * jnp.sum(x**2), 0.5)
        >>> state = kernel.init(jnp.ones(2))
        >>> tape = kernel.tape(jax.random.key(0), 100, state)
        >>> path = rollout(kernel.dynamics(), kernel.carry(state), tape)
        >>> path.shape
        (100, 2)
    """
    check_step_size(step_size)
    check_coupling(coupling)
    if block is not None:
        _check_positive_integer(block, "block")
    if isinstance(coupling, MultishiftCoupling):
        return _whitened(
            lambda density: coalescing_random_walk(density, step_size, block),
            logdensity,
            metric,
            jnp.asarray(step_size),
            "random_walk",
        )
    if block is not None:
        raise ValueError(
            f"block: got {block} with {coupling!r}, wanted None: blocks are moved with MultishiftCoupling() only"
        )

    def draw(key, position):
        return normal(step_size * jnp.ones_like(ravel_pytree(position)[0]))(key, position)

    return _whitened(
        lambda density: blackjax.additive_step_random_walk(density, draw),
        logdensity,
        metric,
        jnp.asarray(step_size),
        "random_walk",
    )


def _steps_of_path(step_size, num_steps: Any, drift_fraction) -> Any:
    """The gradients of a path; where none are given those of a quarter period."""
    check_drift_fraction(drift_fraction)
    if num_steps is None:
        # Steps that are traced leave nothing to choose: with them the number of gradients is given.
        return steps_for_angle(QUARTER_PERIOD, float(step_size), float(drift_fraction))
    _check_positive_integer(num_steps, "num_integration_steps")
    return num_steps


def check_step_size(step_size: ArrayLike) -> None:
    """Refuse a step size with which every proposal would silently be rejected.

    Raises:
        ValueError: If a concrete step size is not a positive finite number (traced ones pass).
    """
    if isinstance(step_size, Tracer):  # its value is not known here
        return
    try:
        value = np.asarray(step_size)
    except Exception as error:
        raise TypeError(
            f"step_size: got {describe(step_size)}, wanted one positive finite number"
        ) from error
    # "fiu": floats and integers, signed or not; JAX's short floats are of no kind that NumPy knows.
    is_number = value.dtype.kind in "fiu" or jnp.issubdtype(value.dtype, jnp.floating)
    if not is_number or value.ndim != 0 or not np.isfinite(value) or value <= 0:
        raise ValueError(f"step_size: got {step_size!r}, wanted one positive finite number")


def _check_positive_integer(value, name: str) -> None:
    if not isinstance(value, Tracer):
        check_count(value, name, 1)


def _check_whitening(metric, wanted: str) -> None:
    if not isinstance(metric, Whitening):
        raise TypeError(
            f"metric: got {type(metric).__name__}, wanted {wanted}; use "
            "Whitening.of_covariance(position, center, covariance)"
        )


def _whitened(
    build: Callable, logdensity: Callable, metric: Any, noise: Array | None, name: str
) -> Kernel:
    if metric is None:
        return Kernel(build(logdensity), noise_scale=noise, name=name)
    _check_whitening(metric, "a Whitening or None")
    return Kernel(build(metric.density(logdensity)), metric.enter, metric.leave, noise, name)


def _with_metric(
    build: Callable, logdensity: Callable, metric: Whitening | Array, name: str
) -> Kernel:
    if isinstance(metric, Whitening):
        ones = jnp.ones_like(metric.center)
        return _whitened(lambda density: build(density, ones), logdensity, metric, None, name)
    metric = jnp.asarray(metric)
    if metric.ndim not in (1, 2):
        raise ValueError(
            f"metric: shape {metric.shape}, wanted an inverse mass matrix of shape (D,) or (D, D)"
        )
    checked_root(metric, metric.shape[0], "metric")
    algorithm = build(logdensity, metric)

    def init(position, rng_key=None):
        size = ravel_pytree(position)[0].size
        if size != metric.shape[0]:
            raise ValueError(f"metric: shape {metric.shape}, but the position has {size} numbers")
        return algorithm.init(position, rng_key)

    return Kernel(blackjax.SamplingAlgorithm(init, algorithm.step), name=name)
