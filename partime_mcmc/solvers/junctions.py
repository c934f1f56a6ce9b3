"""The joints between segments: how the ends of one pass become the starts of the next.

With F_c the map of segment c, from its start s_c to its end e_c = F_c(s_c), the joints obey a recurrence of their own,
s_{c+1} = F_c(s_c), with C steps instead of T. Handing ends over is Jacobi's iteration for it; a linearisation A_c of F_c
gives Newton's,

    δ_{c+1} = A_c δ_c + (e_c − s_{c+1}),   δ_0 = 0,      s_{c+1} ← e_c + A_c δ_c,

a prefix scan over segments. As for a single step, a joint whose past is right becomes right to the last bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.dynamics import Dynamics
from partime_mcmc.linearize import ZeroJacobian
from partime_mcmc.scan.time_axis import LocalTime
from partime_mcmc.solvers.base import replace_nonfinite_jacobians
from partime_mcmc.types import Array


def hand_over(initial: Array, ends: Array) -> Array:
    """Every segment starts where its predecessor ended.

    Args:
        initial: The starts of the chains, shape `(B, D)`.
        ends: The ends of all segments, shape `(B C, D)`, a chain's segments in a row.

    Returns:
        The starts of all segments, shape `(B C, D)`.
    """
    by_chain = ends.reshape(initial.shape[0], -1, initial.shape[1])
    return jnp.concatenate([initial[:, None], by_chain[:, :-1]], axis=1).reshape(ends.shape)


def corrector(enter, advance, leave, params, correction, key, drives, num_chains,
              initial):
    """The rule for new starts.

    Args:
        enter, advance, leave: The dynamics' memo.
        params: Their parameters.
        correction: What stands for the Jacobian of a segment.
        key: For corrections that estimate.
        drives: Drives by segment, leading axes `(L, n)`, lanes being chains × segments.
        num_chains: B.
        initial: The starts of the chains, shape `(B, D)`.

    Returns:
        A function `(starts (L, D), ends (L, D)) -> new starts (L, D)`.
    """

    if isinstance(correction, ZeroJacobian):
        return lambda starts, ends: hand_over(initial, ends)

    def segment(params, start, drives):
        def roll(memory, drive):
            return advance(params[1], memory, drive), None

        first = jax.tree.map(lambda leaf: leaf[0], drives)
        return leave(params[2], lax.scan(roll, enter(params[0], start, first), drives)[0])

    def newton(starts, ends):
        _, maps = correction(Dynamics(segment, params), starts, drives, key)
        maps, _ = replace_nonfinite_jacobians(maps)
        shape = num_chains, starts.shape[0] // num_chains
        by_chain = lambda leaf: leaf.reshape(*shape, *leaf.shape[1:])  # noqa: E731
        plain = hand_over(initial, ends)
        # The defect at joint c belongs to the step from start c to start c + 1; the end of a chain has no joint.
        defects = jnp.roll(plain - starts, -1, axis=0)
        defects = jnp.where(jnp.isfinite(defects), defects, 0)
        nothing = jnp.zeros_like(initial[0])
        changes = jax.vmap(lambda steps: LocalTime().prefix(steps, nothing))(
            jax.tree.map(by_chain, maps.with_shift(defects)))
        before = jnp.concatenate([jnp.zeros_like(changes[:, :1]), changes[:, :-1]], axis=1)
        moved = jax.vmap(jax.vmap(lambda step, delta: step.linear(delta)))(jax.tree.map(by_chain, maps), before)
        corrected = plain + jnp.roll(moved.reshape(starts.shape), 1, axis=0)
        first = (jnp.arange(starts.shape[0]) % shape[1] == 0)[:, None]
        return jnp.where(first | ~jnp.isfinite(corrected), plain, corrected)

    return newton
