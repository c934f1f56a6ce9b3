"""Kernels with explicit randomness: `step(key, state)` is `step_with(draw(key, state), state)`.

Such a kernel is a BlackJAX sampling algorithm like any other, and runs in BlackJAX's loops. But because all random numbers of
a step are drawn at once from its key, a solver can draw those of many steps in one vectorised call, put numbers instead of
keys on the tape, and use no key inside a step: splitting keys costs more than a small log density.

A state may also hold counters that follow from time alone (`count`): they drive kernels that are cycles.
"""

import dataclasses
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.types import Array, Key, PyTree


@dataclasses.dataclass(frozen=True)
class ExplicitRandomnessKernel:
    """A sampling algorithm whose steps are deterministic functions of random numbers drawn beforehand.

    Attributes:
        init: `position -> state`.
        draw: `(key, state) -> randomness`; the state gives shapes only.
        step_with: `(randomness, state) -> (state, info)`.
        draw_many: `(keys (T,), state) -> randomness` for T steps from this state, with the same results of `step_with`; None
            calls `draw` for each key.
        count: `(discrete, num_steps) -> discrete leaves before each of so many steps`; None where the state has none.
    """

    init: Callable[[PyTree], NamedTuple]
    draw: Callable[[Key, NamedTuple], PyTree]
    step_with: Callable[[PyTree, NamedTuple], tuple[NamedTuple, NamedTuple]]
    draw_many: Callable[[Key, NamedTuple], PyTree] | None = None
    count: Callable[[dict, int], dict] | None = None

    def sample_randomness(self, keys: Key, state: NamedTuple) -> PyTree:
        """The random numbers of all steps from a state on, leading axis `T`."""
        many = jax.vmap(self.draw, in_axes=(0, None)) if self.draw_many is None else self.draw_many
        return many(keys, state)

    def step(self, rng_key: Key, state: NamedTuple) -> tuple[NamedTuple, NamedTuple]:
        """One transition."""
        return self.step_with(self.draw(rng_key, state), state)


class GradientState(NamedTuple):
    """The state of a kernel that needs no more than its position.

    Attributes:
        position: A pytree of arrays, D numbers in all.
        logdensity: Scalar.
        logdensity_grad: Like the position.
    """

    position: PyTree
    logdensity: Array
    logdensity_grad: PyTree


def initial_state(logdensity: Callable[[PyTree], Array]) -> Callable[..., GradientState]:
    """`position -> state`, with the density and its gradient evaluated there."""
    evaluate = jax.value_and_grad(logdensity)

    def init(position, rng_key=None):
        # BlackJAX passes a key.
        return GradientState(position, *evaluate(position))

    return init


class ProposalInfo(NamedTuple):
    """The info of a step with multishift noise, in BlackJAX's words.

    Attributes:
        acceptance_rate: Probability with which the proposal is accepted.
        is_accepted: Whether it was.
        decision_margin: |acceptance probability − uniform|.
        lattice_margin: Distance, in standard deviations of the noise, from the centre to the nearest edge of a lattice cell.
        proposal: The proposed state.
    """

    acceptance_rate: Array
    is_accepted: Array
    decision_margin: Array
    lattice_margin: Array
    proposal: Any


def decide(log_ratio: Array, uniform: Array) -> tuple[Array, Array, Array]:
    """A Metropolis decision.

    Args:
        log_ratio: Logarithm of the acceptance ratio; NaN is a rejection.
        uniform: Uniform on [0, 1).

    Returns:
        The acceptance probability, whether accepted, and |probability − uniform|.
    """
    rate = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), 0))
    return rate, uniform < rate, jnp.abs(rate - uniform)


def select(accepted: Array, proposal: PyTree, state: PyTree) -> PyTree:
    """The proposal where accepted, else the state."""
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposal, state)


@jax.custom_batching.custom_vmap
def anyone(flag: Array) -> Array:
    """Whether the flag is set in any lane: under `vmap` the answer has no lane of its own.

    `lax.cond(anyone(flag), ...)` stays a branch where `lax.cond(flag, ...)` becomes the work of both branches.
    """
    return flag


@anyone.def_vmap
def _(axis_size, in_batched, flag):
    return anyone(flag.any()), False


def when_anyone(flag: Array, work: Callable[[PyTree], PyTree], value: PyTree) -> PyTree:
    """`work(value)` where `flag`, else `value`; the work is skipped when no lane wants it."""
    return lax.cond(
        anyone(flag), lambda value: select(flag, work(value), value), lambda value: value, value
    )
