"""Gibbs sampling as a recurrence: every block of the position drawn from its conditional law by inversion.

One sweep replaces block after block by a draw from its law given all others, each from uniforms fixed beforehand:

    x_b ← Q_b(u_b | x_{−b}),    Q_b the quantiles (inverse distribution function) of block b's conditional law

With u given, a sweep is a function of the position that is as smooth as the quantiles are, and nothing is ever rejected
(Zoltowski et al. 2025, arXiv:2508.18413; Geman & Geman 1984). For location-scale families Q(u) is a moved and scaled
standard quantile, which depends on u alone, so that solvers compute it once for all steps.

The quantiles of normal, logistic and other laws are `ppf` of `jax.scipy.stats`; those of the Gamma law are here. Left out:
discrete blocks, which have no place in a state that is solved for.
"""

from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import gammainc, gammaln

from partime_mcmc.kernels.explicit_randomness import ExplicitRandomnessKernel
from partime_mcmc.kernels.kernel import Kernel
from partime_mcmc.types import Array, ArrayLike, PyTree
from partime_mcmc.validation import check_like, describe


class SweepState(NamedTuple):
    """The position, a dict of arrays."""

    position: PyTree


class SweepInfo(NamedTuple):
    """The info of a sweep: nothing is proposed, so that there is nothing to report."""


def gibbs(blocks: Mapping[str, Callable[[dict, Array], Array]]) -> Kernel:
    """A systematic-scan Gibbs sampler.

    Args:
        blocks: In the order of the sweep, by name of a field of the position: `(position, uniform) -> new value`, with
            `uniform` of the field's shape and type, independent on (0, 1). A block sees the fields before it already drawn.
            Its law must be the conditional one: nothing checks that.

    Returns:
        A kernel on positions that are dicts of floating-point arrays; fields without a block stay as they are.

    Raises:
        TypeError: If `blocks` is not a mapping of functions; at the first step, if the position is no dict, lacks a field
            that has a block, or a block returns another shape or type.
        ValueError: If there are no blocks.

    Examples:
        >>> import jax
        >>> from jax.scipy.special import ndtri
        >>> from partime_mcmc import gibbs, rollout
        >>> kernel = gibbs(
        ...     {
        ...         "x": lambda at, uniform: 0.8 * at["y"] + 0.6 * ndtri(uniform),
        ...         "y": lambda at, uniform: 0.8 * at["x"] + 0.6 * ndtri(uniform),
        ...     }
        ... )
        >>> state = kernel.init({"x": jax.numpy.zeros(()), "y": jax.numpy.zeros(())})
        >>> tape = kernel.tape(jax.random.key(0), 100, state)
        >>> rollout(kernel.dynamics(), kernel.carry(state), tape)["x"].shape
        (100,)
    """
    if not isinstance(blocks, Mapping) or not all(map(callable, blocks.values())):
        raise TypeError(
            f"blocks: got {describe(blocks)}, wanted functions (position, uniform) -> value by name of a field"
        )
    if not blocks:
        raise ValueError("blocks: none, wanted at least one field to draw")
    sweep = tuple(blocks.items())

    def init(position, rng_key=None):
        # BlackJAX passes a key.
        missing = [name for name, _ in sweep if name not in _fields(position)]
        if missing:
            raise TypeError(
                f"position: no field {missing[0]!r}, wanted one for every block; it has {sorted(position)}"
            )
        return SweepState(position)

    def draw(key, state):
        keys = jax.random.split(key, len(sweep))

        def uniform(key, value):
            value = jnp.asarray(value)
            # 0 would be mapped to minus infinity by most quantiles.
            least = jnp.finfo(value.dtype).tiny
            return jax.random.uniform(key, value.shape, value.dtype, minval=least)

        return {name: uniform(key, state.position[name]) for key, (name, _) in zip(keys, sweep)}

    def step_with(randomness, state):
        position = dict(state.position)
        for name, block in sweep:
            new = block(dict(position), randomness[name])
            check_like(f"blocks: {name!r} returns", new, position[name], f"position[{name!r}]")
            position[name] = new
        return SweepState(position), SweepInfo()

    return Kernel(ExplicitRandomnessKernel(init, draw, step_with), name="gibbs")


def _fields(position: Any) -> dict:
    if not isinstance(position, dict):
        raise TypeError(f"position: got {describe(position)}, wanted a dict of arrays by name")
    return position


def gamma_quantile(shape: ArrayLike, uniform: Array) -> Array:
    """The quantiles of the Gamma law with rate 1: x with P(shape, x) = uniform, P the regularised incomplete Gamma function.

    Bisection in log x between bounds that hold for every shape, then two steps of Newton's method, through which derivatives
    in both arguments go.

        (log u + log Γ(a + 1)) / a  ≤  log x  ≤  log(a + √(2 a L) + L),     L = −log(1 − u)

    The first is P(a, x) ≤ x^a / Γ(a + 1), the second the tail of a sub-gamma variable (Boucheron, Lugosi & Massart 2013, §2.4).

    Args:
        shape: a > 0; broadcasts against `uniform`.
        uniform: u in (0, 1), any shape.

    Returns:
        x > 0, with the shape that both broadcast to; NaN outside of these domains. Its error is that of P: where u is near 1
        only its distance from 1 counts, which has few digits.
    """
    a, u = jnp.broadcast_arrays(jnp.asarray(shape, uniform.dtype), uniform)
    a0, u0 = lax.stop_gradient((a, u))
    below = -jnp.log1p(-u0)
    low = (jnp.log(u0) + gammaln(a0 + 1)) / a0
    high = jnp.log(a0 + jnp.sqrt(2 * a0 * below) + below)

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        short = gammainc(a0, jnp.exp(middle)) < u0
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    low, high = lax.fori_loop(0, 24, halve, (low, jnp.maximum(low, high)))
    t = 0.5 * (low + high)
    for _ in range(2):
        # dP/dt at x = exp(t). The point is held fixed, so that the last step carries the derivatives of the implicit function.
        t = lax.stop_gradient(t)
        slope = jnp.exp(a * t - jnp.exp(t) - gammaln(a))
        t = t - jnp.where(slope > 0, (gammainc(a, jnp.exp(t)) - u) / slope, 0)
    return jnp.where((a > 0) & (u > 0) & (u < 1), jnp.exp(t), jnp.nan)
