"""MALA with multishift noise around the exact gradient step.

    c(x) = x + ε ∇log p(x),   y = c(x) + √(2ε) noise,   accepted with probability min(1, p(y) q(y → x) / p(x) q(x → y)),

    log q(x → y) = −|y − c(x)|² / 4ε

(Besag 1994; Roberts & Tweedie 1996; BlackJAX's step size ε). The noise is multishift noise (`coupling`): still N(c, 2ε) for each
x, but nearby chains propose the same point, and if both accept they are one chain from then on. That is why the gradient has to
be exact: two centres that agree to the width of a lattice cell give the same proposal.
"""

from typing import Callable

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels.coupling import MultishiftRandomness, draw_multishift_noise, multishift
from partime_mcmc.kernels.explicit_randomness import (
    ExplicitRandomnessKernel,
    GradientState,
    ProposalInfo,
    decide,
    initial_state,
    select,
)
from partime_mcmc.types import Array, ArrayLike, PyTree


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
        flat = ravel_pytree(state.position)[0]
        return draw_multishift_noise(key, flat.size, flat.dtype)

    def apply(randomness, state):
        return langevin_step(init, step_size, randomness, state)

    return ExplicitRandomnessKernel(init, draw, apply)


def langevin_step(
    init: Callable, step_size: ArrayLike, randomness: MultishiftRandomness, state: GradientState
) -> tuple[GradientState, ProposalInfo]:
    """One MALA step.

    Args:
        init: `position -> state` with the same fields as `state`.
        step_size: ε.
        randomness: Of this step.
        state: A named tuple with `position`, `logdensity` and `logdensity_grad`.

    Returns:
        The new state and what happened.
    """
    flat, unravel = ravel_pytree(state.position)
    center = flat + step_size * ravel_pytree(state.logdensity_grad)[0]
    proposed, lattice_margin = multishift(
        center, jnp.sqrt(2 * jnp.asarray(step_size, flat.dtype)), randomness.layers
    )
    proposal = init(unravel(proposed))
    back = flat - proposed - step_size * ravel_pytree(proposal.logdensity_grad)[0]
    forth = proposed - center
    log_ratio = (
        proposal.logdensity - state.logdensity + (forth @ forth - back @ back) / (4 * step_size)
    )
    rate, accepted, margin = decide(log_ratio, randomness.uniform)
    return select(accepted, proposal, state), ProposalInfo(
        rate, accepted, margin, lattice_margin, proposal
    )
