"""What a kernel reports of each step, whatever its info is called.

BlackJAX's infos share names (`acceptance_rate`, `is_accepted`, `is_divergent`, `energy`, `num_integration_steps`, `proposal`)
and none has all of them. `Records` holds those that a kernel has.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from partime_mcmc.types import Array, PyTree, pytree


@pytree()
class Records:
    """What a kernel reports of each step, shape `(T,)` each; None where it does not.

    Attributes:
        accepted: Whether the proposal was accepted.
        acceptance_rate: Its acceptance probability.
        diverging: Whether the trajectory diverged.
        energy: The Hamiltonian's value.
        num_steps: Leapfrog steps.
        logdensity: Log density of the new state.
        nonfinite: Whether the proposal's log density or energy was not finite.
        held: Whether the kernel returned the very state it was given.
        decision_margin: |acceptance probability − uniform|, the smallest of the step's decisions.
        lattice_margin: How far the centre of multishift noise was from where it jumps, in standard deviations of the noise.
    """

    accepted: Array | None
    acceptance_rate: Array | None
    diverging: Array | None
    energy: Array | None
    num_steps: Array | None
    logdensity: Array | None
    nonfinite: Array
    held: Array | None
    decision_margin: Array | None
    lattice_margin: Array | None


def record(state: Any, info: Any) -> Records:
    """The record of one step from a BlackJAX-like info and the new state; the caller that compares states fills in `held`."""

    def of(name, source=info):
        value = getattr(source, name, None)
        return None if value is None else jnp.asarray(value)

    energy, rate, proposal = of("energy"), of("acceptance_rate"), getattr(info, "proposal", None)
    judged = [
        value
        for value in (energy, rate, of("logdensity", proposal), of("logdensity", state))
        if value is not None
    ]
    nonfinite = functools.reduce(
        jnp.logical_or, [~jnp.isfinite(value) for value in judged], jnp.zeros((), bool)
    )
    if energy is None and rate is not None:
        # MALA does not show its proposal, and a random walk shows the state that it returned; BlackJAX turns a proposal
        # that is not finite into probability exactly 0. A proposal that is shown was tested above.
        position = getattr(state, "position", state)
        shown = getattr(proposal, "position", position)
        pairs = zip(jax.tree.leaves(shown), jax.tree.leaves(position))
        hidden = functools.reduce(
            jnp.logical_and, [jnp.all(a == b) for a, b in pairs], jnp.ones((), bool)
        )
        nonfinite = nonfinite | ((rate == 0) & hidden)
    return Records(
        of("is_accepted"),
        rate,
        of("is_divergent"),
        energy,
        of("num_integration_steps"),
        of("logdensity", state),
        nonfinite,
        jnp.zeros((), bool),
        of("decision_margin"),
        of("lattice_margin"),
    )


@pytree()
class StepRecord:
    """The record of one step, made with the step.

    Attributes:
        records: What the kernel reports; `held` is left out, because the path shows it.
        uniform: The uniform behind its decision, where that is known.
        consistent: Whether the discrete leaves of the state before it are those on the tape.
    """

    records: Records
    uniform: Array | None
    consistent: Array

    def packed(self, dtype: Any) -> Array:
        """As numbers of one type, shape `(R,)`; counts are below 2²⁴ and flags 0 or 1, so nothing is lost."""
        return jnp.stack([jnp.asarray(leaf, dtype).reshape(()) for leaf in jax.tree.leaves(self)])


def unpacked(notes: Array, example: StepRecord) -> StepRecord:
    """The records of steps, fields `(...)`, from their packed numbers `(..., R)`.

    Args:
        notes: From `StepRecord.packed`.
        example: One of them; only structure and types matter.
    """
    leaves, structure = jax.tree.flatten(example)
    back = [
        notes[..., k] != 0 if leaf.dtype == bool else notes[..., k].astype(leaf.dtype)
        for k, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, back)


_INFO = ("accepted", "acceptance_rate", "diverging", "energy", "num_steps", "logdensity")


def info_dict(records: Records, shape: tuple[int, ...]) -> dict[str, Array]:
    """The results of each step that users read, by name, as far as the kernel reports them, every value of `shape`."""
    return {
        name: jnp.broadcast_to(getattr(records, name), shape)
        for name in _INFO
        if getattr(records, name) is not None
    }


def decision_uniform(randomness: PyTree, info: Any) -> Array | None:
    """The uniform behind an accept decision, if it is drawn as BlackJAX's MALA and HMC do; checked against decisions."""
    rate = getattr(info, "acceptance_rate", None)
    if (
        rate is None
        or getattr(info, "is_accepted", None) is None
        or hasattr(info, "decision_margin")
    ):
        return None
    return jax.random.uniform(
        jax.random.split(randomness)[1], jnp.shape(rate), jnp.result_type(rate)
    )
