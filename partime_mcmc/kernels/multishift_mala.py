"""MALA with multishift noise around the exact gradient step.

    c(x) = x + ε ∇log p(x),   y = c(x) + √(2ε) noise,   accepted with probability min(1, p(y) q(y → x) / p(x) q(x → y)),

    log q(x → y) = −|y − c(x)|² / 4ε

(Besag 1994; Roberts & Tweedie 1996; BlackJAX's step size ε). The noise is multishift noise (`coupling`): still N(c, 2ε) for each
x, but nearby chains propose the same point, and if both accept they are one chain from then on. That is why the gradient has to
be exact: two centres that agree to the width of a lattice cell give the same proposal.
"""

from typing import Callable, NamedTuple

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels.coupling import MultishiftNoise, draw_multishift_noise, multishift
from partime_mcmc.kernels.explicit_randomness import (
    ExplicitRandomnessKernel,
    GradientState,
    ProposalInfo,
    decide,
    flat_of,
    initial_state,
    select,
)
from partime_mcmc.types import Array, ArrayLike, Key, PyTree


class LangevinRandomness(NamedTuple):
    """The random numbers of one step.

    Attributes:
        layers: Shape `(D,)` each.
        uniform: For the decision, scalar.
    """

    layers: MultishiftNoise
    uniform: Array


def coalescing_mala(
    logdensity: Callable[[PyTree], Array], step_size: float
) -> ExplicitRandomnessKernel:
    """MALA with multishift noise as a sampling algorithm, in the position's own coordinates.

    Args:
        logdensity: `position -> scalar`.
        step_size: BlackJAX's ε, positive.
    """
    init = initial_state(logdensity)

    def draw(key, state):
        return draw_langevin(key, flat_of(state.position))

    def apply(randomness, state):
        return langevin_step(init, step_size, randomness, state)

    return ExplicitRandomnessKernel(init, draw, apply)


def draw_langevin(key: Key, flat: Array) -> LangevinRandomness:
    """The random numbers of a step from a position of which only shape and type are used, `(D,)`."""
    return LangevinRandomness(*draw_multishift_noise(key, flat.size, flat.dtype))


def langevin_step(
    init: Callable, step_size: ArrayLike, randomness: LangevinRandomness, state: GradientState
) -> tuple[GradientState, ProposalInfo]:
    """One MALA step.

    Args:
        init: `position -> state` with the same fields as `state`.
        step_size: ε.
        coupling: Of this step.
        state: A named tuple with `position`, `logdensity` and `logdensity_grad`.

    Returns:
        The new state and what happened.
    """
    flat, unravel = ravel_pytree(state.position)
    center = flat + step_size * flat_of(state.logdensity_grad)
    proposed, lattice_margin = multishift(
        center, jnp.sqrt(2 * jnp.asarray(step_size, flat.dtype)), randomness.layers
    )
    proposal = init(unravel(proposed))
    back = flat - proposed - step_size * flat_of(proposal.logdensity_grad)
    forth = proposed - center
    log_ratio = (
        proposal.logdensity - state.logdensity + (forth @ forth - back @ back) / (4 * step_size)
    )
    rate, accepted, margin = decide(log_ratio, randomness.uniform)
    return select(accepted, proposal, state), ProposalInfo(
        rate, accepted, margin, lattice_margin, proposal
    )
