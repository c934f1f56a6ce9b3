"""The banana: a bent normal density whose moments are known exactly; D = 2.

    x_1 ~ N(0, s²),   x_2 | x_1 ~ N(b (x_1² - s²), 1),     s = `SCALE` = 10,  b = `CURVATURE` = 0.03.

So exactly E x_1 = E x_2 = 0, Var x_1 = s² = 100, Var x_2 = 1 + 2 b² s⁴ = 19, Cov(x_1, x_2) = 0, and
E x_1² x_2 = 2 b s⁴ = 600: uncorrelated, far from independent. It resembles Rosenbrock's valley but is normalised.

A bare log density, no NumPyro. Source: Haario, Saksman and Tamminen, "Adaptive proposal distribution for random walk
Metropolis algorithm", Computational Statistics 14, 1999; with these constants it is the banana of TensorFlow
Probability's Inference Gym.
"""

import jax
import jax.numpy as jnp

from partime_mcmc.sampling.target import Target
from partime_mcmc.types import Array, Key

SCALE = 10.0
"""Standard deviation s of x_1."""
CURVATURE = 0.03
"""Bend b of the valley."""


def logdensity(position: Array) -> Array:
    """Log density up to a constant.

    Args:
        position: (x_1, x_2), shape (2,).

    Returns:
        A scalar, shape ().
    """
    x1, x2 = position
    return -0.5 * (x1 / SCALE) ** 2 - 0.5 * (x2 - CURVATURE * (x1**2 - SCALE**2)) ** 2


def exact_draws(key: Key, num_samples: int) -> Array:
    """Independent exact draws, shape (num_samples, 2)."""
    noise = jax.random.normal(key, (num_samples, 2))
    x1 = SCALE * noise[:, 0]
    return jnp.stack([x1, CURVATURE * (x1**2 - SCALE**2) + noise[:, 1]], axis=1)


def make_target(key: Key) -> Target:
    """The banana as a target; starts are uniform on (-2, 2)², as NumPyro's are.

    Args:
        key: Not needed: there is nothing to trace. It keeps the built-in models alike.

    Returns:
        A target on positions of shape (2,), reported as `x1` and `x2`.
    """
    return Target(logdensity, _uniform_start, constrain=_coordinates)


def _uniform_start(key: Key) -> Array:
    return jax.random.uniform(key, (2,), minval=-2.0, maxval=2.0)


def _coordinates(position: Array) -> dict[str, Array]:
    return {"x1": position[0], "x2": position[1]}
