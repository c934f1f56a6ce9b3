"""Random-walk Metropolis with multishift noise, in all coordinates or in blocks of them.

    y = x + σ noise,   accepted with probability min(1, p(y) / p(x)),   noise ~ N(0, 1) for each x.

With common random numbers two chains keep their distance for ever: x and x' move by the same increments. With multishift noise they
propose the same point whenever x and x' lie in one lattice cell in every coordinate, which takes no gradient at all: a
random walk on a black box becomes parallel in time. The chance that *all* coordinates agree falls geometrically with D,
so from about ten coordinates on move a block of them per step, chosen at random: block b of the cyclic order starts at a
uniformly random coordinate, independent of x, and each step keeps p invariant.
"""

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels.coupling import MultishiftNoise, draw_multishift_noise, multishift
from partime_mcmc.kernels.explicit_randomness import (
    ExplicitRandomnessKernel,
    ProposalInfo,
    decide,
    select,
)
from partime_mcmc.types import Array, PyTree


class WalkState(NamedTuple):
    """Position (a pytree, D numbers) and log density (scalar)."""

    position: PyTree
    logdensity: Array


class WalkRandomness(NamedTuple):
    """The random numbers of one step.

    Attributes:
        layers: Shape `(D,)` each.
        uniform: For the decision, scalar.
        first: First coordinate of the block, integer scalar.
    """

    layers: MultishiftNoise
    uniform: Array
    first: Array


def coalescing_random_walk(
    logdensity: Callable[[PyTree], Array], scale: float, block: int | None
) -> ExplicitRandomnessKernel:
    """Random-walk Metropolis with multishift noise as a sampling algorithm.

    Args:
        logdensity: `position -> scalar`; no derivative is taken.
        scale: σ, positive.
        block: Coordinates moved per step; None moves all.
    """

    def init(position, rng_key=None):
        # BlackJAX passes a key.
        return WalkState(position, logdensity(position))

    def draw(key, state):
        flat = ravel_pytree(state.position)[0]
        layers_key, block_key = jax.random.split(key)
        layers, uniform = draw_multishift_noise(layers_key, flat.size, flat.dtype)
        first = (
            jnp.zeros((), jnp.int32)
            if block is None
            else jax.random.randint(block_key, (), 0, flat.size)
        )
        return WalkRandomness(layers, uniform, first)

    def apply(randomness, state):
        flat, unravel = ravel_pytree(state.position)
        proposed, lattice_margin = multishift(
            flat, jnp.asarray(scale, flat.dtype), randomness.layers
        )
        if block is not None:
            proposed = jnp.where(
                (jnp.arange(flat.size) - randomness.first) % flat.size < block, proposed, flat
            )
        proposal = init(unravel(proposed))
        rate, accepted, margin = decide(proposal.logdensity - state.logdensity, randomness.uniform)
        return select(accepted, proposal, state), ProposalInfo(
            rate, accepted, margin, lattice_margin, proposal
        )

    return ExplicitRandomnessKernel(init, draw, apply)
