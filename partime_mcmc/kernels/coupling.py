"""Coupling: how the noise of a kernel is drawn, which does not change its law but decides how fast chains forget.

With the same Gaussian noise two chains at different places only creep together. *Layered multishift coupling* (Wilson 2000,
"Layered multishift coupling for use in perfect sampling algorithms") draws the noise so that nearby chains land on the very
same number. Draw r ~ χ₃ and u ~ Uniform[0, 1) per coordinate; then for every centre c

    y(c) = w (k + u),     k = round(c / w − u),     w = 2 σ r                      y(c) ~ N(c, σ²), |y(c) − c| ≤ σ r

because r is the half-width of the Gaussian's density at a height uniform under its curve (r² = n² − 2 log(1 − v) with n
normal, v uniform), and a lattice of spacing w with a uniform offset has exactly one point, uniformly placed, within w/2 of c.
As a map of c it is a staircase: flat almost everywhere, with steps of width w ≈ 3.2 σ, so two chains at distance d agree with
probability 1 − E[d / w] or so, and to the last bit. Its derivative is 0.

Coordinates need layers of their own: tied layers leave correlations at zero but make the squares dependent. The noise must
not depend on the past, nor share bits with the uniform of an accept decision: detailed balance asks only that for each fixed
centre the noise has its law and is independent of that uniform.

Rounding: y is computed to within an ulp of c or of w, whichever is larger, as c + σ n would be; nothing is lost for
|c| ≫ σ as long as an ulp of c is small against σ (|c|/σ up to 1e6 in float32 and 1e15 in float64). Where c lies within an
ulp of the edge of a step two compilations may take different sides: `MultishiftDraw.margin` is the distance to that edge.
"""

import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from partime_mcmc.types import Array, Key

# P(χ₃ < 1e-5) = 3e-16: below that the law is changed, so that no width is ever zero.
_SMALLEST_RADIUS = 1e-5


@dataclasses.dataclass(frozen=True)
class CommonRandomNumbers:
    """The kernel's own Gaussian noise: for BlackJAX's kernels its draws, bit for bit.

    Examples:
        >>> from partime_mcmc import CommonRandomNumbers, mala
        >>> mala(lambda x: -0.5 * x**2, 0.5, coupling=CommonRandomNumbers()).name
        'mala'
    """


@dataclasses.dataclass(frozen=True)
class MultishiftCoupling:
    """Layered multishift noise: the same law, and chains that meet exactly within a few steps.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import MultishiftCoupling, mala, rollout
        >>> kernel = mala(lambda x: -0.5 * jnp.sum(x**2), 0.5, coupling=MultishiftCoupling())
        >>> tape = kernel.tape(jax.random.key(0), 50, kernel.init(jnp.zeros(2)))
        >>> ends = [rollout(kernel.dynamics(), x, tape)[-1] for x in (jnp.ones(2), -jnp.ones(2))]
        >>> bool((ends[0] == ends[1]).all())
        True
    """


Coupling: TypeAlias = CommonRandomNumbers | MultishiftCoupling


class MultishiftNoise(NamedTuple):
    """The random numbers of multishift noise, two per coordinate.

    Attributes:
        radius: r ~ χ₃, positive.
        offset: u ~ Uniform[0, 1).
    """

    radius: Array
    offset: Array


class MultishiftRandomness(NamedTuple):
    """The random numbers of a proposal with multishift noise and of its decision.

    Attributes:
        layers: Shape `(D,)` each.
        uniform: Uniform[0, 1), scalar.
    """

    layers: MultishiftNoise
    uniform: Array


class MultishiftDraw(NamedTuple):
    """A draw of multishift noise around a centre.

    Attributes:
        value: y, shape of the centre.
        margin: How far, in units of σ, the nearest coordinate of the centre is from the edge of a step; scalar.
    """

    value: Array
    margin: Array


def draw_multishift_noise(key: Key, size: int, dtype: Any) -> MultishiftRandomness:
    """Multishift noise for `size` coordinates, three uniforms each, and a uniform for an accept decision.

    Args:
        key: One key.
        size: D.
        dtype: float32 or float64.
    """
    # A single call: starting the generator costs more than a number, and compiling it more than a model.
    half = (size + 1) // 2
    uniforms = jax.random.uniform(key, (2 * (half + size) + 1,), dtype)
    heights, offsets = uniforms[2 * half : 2 * half + size], uniforms[2 * half + size : -1]
    radius = jnp.sqrt(
        _squares(uniforms[:half], uniforms[half : 2 * half])[:size] - 2 * jnp.log(1 - heights)
    )
    layers = MultishiftNoise(jnp.maximum(radius, _SMALLEST_RADIUS), offsets)
    return MultishiftRandomness(layers, uniforms[-1])


def _squares(lengths: Array, angles: Array) -> Array:
    """Squares of independent standard normals, two for each pair of uniforms (Box & Muller 1958); cheaper than normals are."""
    both, part = -2 * jnp.log(1 - lengths), 0.5 + 0.5 * jnp.cos(2 * jnp.pi * angles)
    return jnp.concatenate([both * part, both * (1 - part)])


def normal_of(uniforms: Array) -> Array:
    """Standard normal numbers from uniforms on [0, 1), by the inverse of their distribution function.

    As `jax.random.normal` makes them, save that the uniforms are drawn by the caller, together with others.
    """
    smallest = jnp.nextafter(jnp.asarray(-1, uniforms.dtype), jnp.zeros((), uniforms.dtype))
    return math.sqrt(2) * jax.lax.erf_inv(jnp.maximum(2 * uniforms - 1, smallest))


def multishift(center: Array, scale: Array | float, layers: MultishiftNoise) -> MultishiftDraw:
    """N(center, scale²) noise as a staircase of the centre.

    Args:
        center: c, shape `(D,)`.
        scale: σ, a positive scalar or shape `(D,)`.
        layers: Shape `(D,)` each.

    Returns:
        y(c), and how far c is from where y jumps.
    """
    width = 2 * scale * layers.radius
    place = center / width - layers.offset
    cell = jnp.round(place)
    margin = jnp.min((0.5 - jnp.abs(place - cell)) * 2 * layers.radius)
    return MultishiftDraw(width * (cell + layers.offset), margin)


def check_coupling(coupling: Any) -> None:
    """Refuse anything that is not one of the two couplings.

    Raises:
        TypeError: Naming what was given.
    """
    if not isinstance(coupling, (CommonRandomNumbers, MultishiftCoupling)):
        raise TypeError(
            f"coupling: got {coupling!r}, wanted CommonRandomNumbers() or MultishiftCoupling()"
        )
