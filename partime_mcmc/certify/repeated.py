"""Whether a kernel's step is a function: some steps of a path are evaluated twice, and must give the same bits.

A path can be certified only where x_t = f(x_{t-1}, k_t) means one number. A compiled program is a function of its arguments
unless it asks somebody else: Python on the host, a library of the user's, a random number generator of the device. The check
before a run sees one position only, and what was recorded while a path was rolled agrees with itself whatever the density
is. So where a step makes such calls, up to 256 steps of a path are evaluated twice by one and the same program,

    64 accepted and 64 rejected ones all along the path, and the 128 that begin farthest from the start,

and any bit of the new state, the decision or what the kernel reports that differs means that nothing is certified. There is
no tolerance, hence no false alarm: what rounds differently in another program is never compared. Steps without such calls
cost nothing. Left out: a density that changes seldom enough to answer twice alike.
"""

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp

from partime_mcmc.certify.certificate import Certificate, before_steps, flat_steps
from partime_mcmc.tracing import primitives_of
from partime_mcmc.types import AnyArray, Array, PyTree

_EVENLY, _FARTHEST = 64, 128
# Operations whose results their arguments need not determine.
_NOT_FUNCTIONS = {"pure_callback", "io_callback", "ffi_call", "call_tf", "rng_uniform"}


def may_be_random(jaxpr: Any) -> bool:
    """Whether a traced function asks somebody whose answers its arguments need not determine."""
    return bool(primitives_of(jaxpr) & _NOT_FUNCTIONS)


def refuse_random_steps(
    certificate: Certificate,
    evaluate: Callable[[PyTree, PyTree], PyTree],
    initial: PyTree,
    states: PyTree,
    drives: PyTree,
) -> Certificate:
    """The certificate of a path of a step that `may_be_random`: not certified where a step has two answers.

    Args:
        certificate: Of the path.
        evaluate: One step, `(carry, drive) -> results`.
        initial: The carry before the first step.
        states: The path, leading axis `T`.
        drives: The tape.

    Returns:
        The certificate; steps with two answers have an infinite residual.
    """
    if not certificate.residual.size:
        return certificate
    before = before_steps(initial, states)
    chosen = jnp.concatenate(
        [
            _evenly(certificate.accepted),
            _evenly(~certificate.accepted),
            _farthest(flat_steps(before)),
        ]
    )

    def answers(places):
        some = jax.tree.map(lambda leaf: leaf[places], (before, drives))
        return jax.vmap(evaluate)(*some)

    # A loop, so that both answers come from one piece of code; the barrier keeps the compiler from seeing that they are one.
    twice = jax.lax.map(answers, jnp.stack([chosen, jax.lax.optimization_barrier(chosen)]))
    differs = jnp.zeros(chosen.shape, bool)
    for one, other in (_numbers(leaf) for leaf in jax.tree.leaves(twice)):
        unlike = (one != other) & ~((one != one) & (other != other))
        differs |= unlike.reshape(unlike.shape[0], -1).any(axis=1)
    random = jnp.zeros(certificate.residual.shape, bool).at[chosen].max(differs)
    return dataclasses.replace(
        certificate,
        certified=certificate.certified & ~random.any(),
        max_residual=jnp.where(random.any(), jnp.inf, certificate.max_residual),
        worst_step=jnp.where(random.any(), jnp.argmax(random), certificate.worst_step),
        residual=jnp.where(random, jnp.inf, certificate.residual),
    )


def _evenly(flags: AnyArray) -> Array:
    """The places of some steps that are flagged, all along the path; the last step where none is."""
    rank = jnp.cumsum(flags)
    wanted = 1 + (jnp.arange(_EVENLY) * jnp.maximum(rank[-1], 1)) // _EVENLY
    return jnp.minimum(jnp.searchsorted(rank, wanted), flags.shape[0] - 1)


def _farthest(path: Array) -> Array:
    """The places of the states `(T, D)` that are farthest from the first one, by the coordinate that has gone farthest in
    units of its own range."""
    apart = jnp.abs(path - path[0])
    widest = apart.max(axis=0)
    apart = (apart / jnp.where(widest > 0, widest, 1)).max(axis=1, initial=0)
    return jax.lax.top_k(apart, min(_FARTHEST, path.shape[0]))[1]


def _numbers(leaf: Array) -> Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
