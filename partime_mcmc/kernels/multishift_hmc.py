"""Hamiltonian Monte Carlo with multishift noise: in its momentum, or in a Langevin step of every k-th transition.

**Momentum.** In whitened coordinates the end point of a trajectory of a standard normal is c x + s p, as
`kernels.leapfrog` has it. Choose p so that this end point is multishift noise around c x:

    p(x) = (y(c x) − c x) / s,   y ~ N(c x, s²)                     still N(0, I) for every x,

and the end points of two nearby chains nearly coincide (exactly on a standard normal). `steered_hmc`.

**A cycle.** Quarter-period paths (L h ≈ π/2, c ≈ 0) bring nearly independent draws and contract; every k-th transition then makes
a MALA step around the exact gradient with multishift noise, which lands both chains on the same floats. Each transition is a
composition of kernels that keep p invariant, and which one it is follows from a counter, i.e. from time alone. `coalescing_hmc`.

Trajectories and energies are BlackJAX's; momenta and uniforms are drawn beforehand.
"""

import math
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels.blackjax_without_backend import hmc, integrators, metrics
from partime_mcmc.kernels.coupling import (
    MultishiftRandomness,
    draw_multishift_noise,
    multishift,
    normal_of,
)
from partime_mcmc.kernels.explicit_randomness import (
    ExplicitRandomnessKernel,
    GradientState,
    decide,
    initial_state,
    select,
    when_anyone,
)
from partime_mcmc.kernels.leapfrog import leapfrogs, row_of_trajectory, turned_angle
from partime_mcmc.kernels.multishift_mala import langevin_step
from partime_mcmc.types import Array, ArrayLike, PyTree, Tracer


class HamiltonianInfo(NamedTuple):
    """The info of a transition, in BlackJAX's words.

    Attributes:
        acceptance_rate: Of the trajectory.
        is_accepted: Whether the trajectory's end was accepted, or the Langevin step if there was one.
        is_divergent: Whether the energy rose by more than 1,000.
        energy: At the trajectory's end.
        num_integration_steps: Gradients of the trajectory.
        decision_margin: The smallest |acceptance probability − uniform| of the decisions.
        lattice_margin: As for `ProposalInfo`; infinite where no lattice was used.
        langevin_acceptance_rate: Of the Langevin step; NaN where there was none.
        proposal: The trajectory's end.
    """

    acceptance_rate: Array
    is_accepted: Array
    is_divergent: Array
    energy: Array
    num_integration_steps: int
    decision_margin: Array
    lattice_margin: Array
    langevin_acceptance_rate: Array
    proposal: PyTree


class CycleState(NamedTuple):
    """As `GradientState`, with `phase`: transitions since the last Langevin step, 0 to k − 1."""

    position: PyTree
    logdensity: Array
    logdensity_grad: PyTree
    phase: Array


class CycleRandomness(NamedTuple):
    """The random numbers of one transition.

    Attributes:
        momentum: Shape `(D,)`.
        uniform: Of the trajectory's decision.
        langevin: Of the Langevin step.
    """

    momentum: Array
    uniform: Array
    langevin: MultishiftRandomness


def steered_hmc(
    logdensity: Callable[[PyTree], Array],
    step_size: float,
    num_steps: int,
    drift_fraction: float | Array = 1.0,
) -> ExplicitRandomnessKernel:
    """HMC whose momentum is multishift noise at the trajectory's end, in whitened coordinates.

    Args:
        logdensity: `position -> scalar`, roughly standard normal.
        step_size: h, one with which leapfrogs are stable on a standard normal: below 2/√f.
        num_steps: L.
        drift_fraction: f.

    Raises:
        ValueError: If the step size is not stable.
    """
    known = not (isinstance(step_size, Tracer) or isinstance(drift_fraction, Tracer))
    if known and turned_angle(float(step_size), 1, float(drift_fraction)) == math.inf:
        raise ValueError(
            f"step_size: got {float(step_size)!r}, wanted one with which leapfrogs are stable on a standard normal: "
            f"below {2 / math.sqrt(drift_fraction):.3g}"
        )
    c, s = row_of_trajectory(step_size, num_steps, drift_fraction)
    init = initial_state(logdensity)
    propose = _trajectory(logdensity, step_size, num_steps, drift_fraction)

    def draw(key, state):
        flat = ravel_pytree(state.position)[0]
        return draw_multishift_noise(key, flat.size, flat.dtype)

    def apply(randomness, state):
        flat = ravel_pytree(state.position)[0]
        center, gain = (c * flat).astype(flat.dtype), s.astype(flat.dtype)
        aimed, lattice_margin = multishift(center, jnp.abs(gain), randomness.layers)
        new, info = propose(state, (aimed - center) / gain, randomness.uniform)
        return new, info._replace(lattice_margin=lattice_margin)

    return ExplicitRandomnessKernel(init, draw, apply)


def hmc_cycle(
    logdensity: Callable[[PyTree], Array],
    step_size: float,
    num_steps: int,
    langevin_step_size: ArrayLike,
    every: int,
    drift_fraction: float | Array = 1.0,
) -> ExplicitRandomnessKernel:
    """HMC with plain momenta, and a coalescing Langevin step after every `every`-th trajectory.

    Args:
        logdensity: `position -> scalar`.
        step_size: h, positive.
        num_steps: L.
        langevin_step_size: BlackJAX's ε of the Langevin step, positive.
        every: k, at least 1.
        drift_fraction: f.
    """
    evaluate = initial_state(logdensity)
    propose = _trajectory(logdensity, step_size, num_steps, drift_fraction)

    def init(position, rng_key=None):
        return CycleState(*evaluate(position, rng_key), jnp.zeros((), jnp.int32))

    def momentum(key, flat):
        uniforms = jax.random.uniform(jax.random.split(key)[0], (flat.size + 1,), flat.dtype)
        return normal_of(uniforms[1:]), uniforms[0]

    def landing(key, flat):
        return draw_multishift_noise(jax.random.split(key)[1], flat.size, flat.dtype)

    def draw(key, state):
        flat = ravel_pytree(state.position)[0]
        return CycleRandomness(*momentum(key, flat), landing(key, flat))

    def draw_many(keys, state):
        # Multishift noise costs most, and only every k-th transition uses it: the others get the noise of the next that does.
        flat, num_steps = ravel_pytree(state.position)[0], keys.shape[0]
        count = -(-num_steps // every) + 1 if num_steps else 0
        when = jnp.minimum(every * (1 + jnp.arange(count)) - 1 - state.phase, num_steps - 1)
        layers = jax.vmap(landing, in_axes=(0, None))(keys[when], flat)

        def spread(leaf):
            # Not by indices: the compiler would then compute each of them `every` times.
            copies = jnp.broadcast_to(leaf[:, None], (count, every, *leaf.shape[1:]))
            return lax.dynamic_slice_in_dim(
                copies.reshape(-1, *leaf.shape[1:]), state.phase, num_steps
            )

        return CycleRandomness(
            *jax.vmap(momentum, in_axes=(0, None))(keys, flat), jax.tree.map(spread, layers)
        )

    def apply(randomness, state):
        phase = (state.phase + 1) % every
        inner, info = propose(GradientState(*state[:3]), randomness.momentum, randomness.uniform)

        def langevin(value):
            inner, info = value
            inner, of_step = langevin_step(evaluate, langevin_step_size, randomness.langevin, inner)
            return inner, info._replace(
                is_accepted=info.is_accepted | of_step.is_accepted,
                lattice_margin=of_step.lattice_margin,
                decision_margin=jnp.minimum(info.decision_margin, of_step.decision_margin),
                langevin_acceptance_rate=of_step.acceptance_rate,
            )

        inner, info = when_anyone(phase == 0, langevin, (inner, info))
        return CycleState(*inner, phase=phase), info

    def count(discrete, num_steps):
        return {"phase": (discrete["phase"] + jnp.arange(num_steps, dtype=jnp.int32)) % every}

    return ExplicitRandomnessKernel(init, draw, apply, draw_many, count)


def _trajectory(logdensity, step_size, num_steps, drift_fraction):
    """`(state, momentum (D,), uniform) -> (state, info)`: BlackJAX's trajectory with given random numbers."""
    kinetic = metrics.gaussian_euclidean

    def propose(state, momentum, uniform):
        flat, unravel = ravel_pytree(state.position)
        energy = kinetic(jnp.ones_like(flat)).kinetic_energy
        generate = hmc.hmc_proposal(
            leapfrogs(num_steps, drift_fraction)(logdensity, energy),
            energy,
            step_size,
            1,
            sample_proposal=_decided,
        )
        start = integrators.IntegratorState(
            state.position, unravel(momentum), state.logdensity, state.logdensity_grad
        )
        end, theirs, margin = generate(uniform, start)
        nothing = jnp.full((), jnp.inf, flat.dtype)
        info = HamiltonianInfo(
            theirs.acceptance_rate,
            theirs.is_accepted,
            theirs.is_divergent,
            theirs.energy,
            num_steps,
            margin,
            nothing,
            jnp.full((), jnp.nan, flat.dtype),
            GradientState(
                theirs.proposal.position,
                theirs.proposal.logdensity,
                theirs.proposal.logdensity_grad,
            ),
        )
        return GradientState(end.position, end.logdensity, end.logdensity_grad), info

    return propose


def _decided(uniform, log_ratio, state, proposal):
    """BlackJAX's place for a decision, with a uniform where it passes a key."""
    rate, accepted, margin = decide(log_ratio, uniform)
    return select(accepted, proposal, state), (accepted, rate, margin)
