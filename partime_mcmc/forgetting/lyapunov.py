"""The largest Lyapunov exponent along a path: how fast nearby paths with the same drives part or come together.

    λ = lim 1/T log ‖J_T ⋯ J_1 v‖,    J_t = ∂f/∂x (x_{t-1}, u_t),   v a random direction

λ < 0: the system forgets its past, and solving it is well conditioned however long the path; λ > 0: chaos, and the
conditioning grows like exp(λ T) (Gonzalez et al. 2025, arXiv:2508.16817). The tangent is propagated by JVPs and brought
back to norm 1 after every step; λ is the mean logarithm of the norms (Benettin et al. 1980, Meccanica 15).

The path is cut into S segments, with a tangent each, propagated side by side: it starts in a random direction up to 128
steps before its segment, so that it has turned to the leading direction when counting begins. The S segment means give
the standard error (batch means). An exponent sees what smooth maps do to small differences, and nothing else. Left out:
the other exponents.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from partime_mcmc.engine import Dynamics, ravel
from partime_mcmc.engine.solution import nanaware_max
from partime_mcmc.engine.solve import check_step
from partime_mcmc.executions import run_jitted
from partime_mcmc.types import Array, Key, PyTree, pytree
from partime_mcmc.validation import check_count

_MAX_SEGMENTS, _MAX_SPIN_UP = 64, 128


@pytree()
class Lyapunov:
    """The largest Lyapunov exponent of a path.

    Attributes:
        exponent: Per step, a scalar. `-inf` if a tangent became exactly 0: the system forgets at once, or its map is
            piecewise constant and its derivative says nothing; judge by pilot pairs (`meeting_times`). NaN if a
            derivative was not finite.
        standard_error: From segment means, a scalar; NaN where the path is too short for two segments or the exponent
            is not finite.
        num_zero: Segments in which the tangent became exactly 0; an integer.
        num_nonfinite: Segments in which it became NaN or infinite; an integer.
    """

    exponent: Array
    standard_error: Array
    num_zero: Array
    num_nonfinite: Array


def lyapunov(
    dynamics: Dynamics,
    initial: PyTree,
    states: PyTree,
    drives: PyTree,
    *,
    key: Key,
    num_directions: int = 1,
) -> Lyapunov:
    """The largest Lyapunov exponent along a path, all segments of it side by side.

    Args:
        dynamics: The recurrence.
        initial: `x_0`.
        states: The path `x_1..x_T`, leaves with leading axis `T`, as a solve returns it.
        drives: `u_1..u_T`, leaves with leading axis `T`.
        key: For the random directions.
        num_directions: Tangents per segment, normalised together (their Frobenius norm is what grows): the more, the
            less likely that all start nearly orthogonal to the leading direction.

    Returns:
        The exponent with its standard error. Segment means are treated as independent, so on a path with a memory as
        long as a segment (T / 64 steps, or fewer) the error is too small.

    Raises:
        ValueError: If the path has fewer than 2 steps, lengths differ, or `num_directions` is not a positive integer.
    """
    check_count(num_directions, "num_directions", 1)
    initial, states, drives = (
        jax.tree.map(jnp.asarray, tree) for tree in (initial, states, drives)
    )
    leaves = jax.tree.leaves((states, drives))
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"states and drives: leading axes {sorted(map(str, lengths))}, wanted one common length T"
        )
    num_steps = leaves[0].shape[0]
    if num_steps < 2:
        raise ValueError(f"states: a path of {num_steps} steps, wanted at least 2")
    flat, start, _ = ravel(check_step(dynamics, initial, drives), initial)
    path = jax.vmap(lambda state: ravel_pytree(state)[0])(states)
    spin_up = min(_MAX_SPIN_UP, num_steps // 8)
    num_segments = min(_MAX_SEGMENTS, (num_steps - spin_up) // max(spin_up, 1))
    return run_jitted(
        _lyapunov, flat, start, path, drives, key, num_directions, spin_up, num_segments
    )


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _lyapunov(
    dynamics, initial, path, drives, key, num_directions, spin_up, num_segments
) -> Lyapunov:
    num_steps, dimension = path.shape
    length = (num_steps - spin_up) // num_segments
    # Steps that do not fill a segment are left out at the front, where they would be spin-up anyhow.
    begin = num_steps - num_segments * length - spin_up
    index = begin + jnp.arange(spin_up + length)[:, None] + length * jnp.arange(num_segments)
    previous = jnp.concatenate([initial[None], path[:-1]])[index]
    drives = jax.tree.map(lambda leaf: leaf[index], drives)

    def push(state, drive, tangents):
        step = lambda x: dynamics(x, drive)
        return jax.vmap(lambda tangent: jax.jvp(step, (state,), (tangent,))[1])(tangents)

    def advance(tangents, inputs):
        return _normalised(jax.vmap(push)(inputs[0], inputs[1], tangents))

    tangents, _ = _normalised(
        jax.random.normal(key, (num_segments, num_directions, dimension), path.dtype)
    )
    last, growth = lax.scan(advance, tangents, (previous, drives))
    means = growth[spin_up:].mean(axis=0)
    nonfinite = ~jnp.isfinite(last).all(axis=(1, 2))
    zero = ~nonfinite & (last == 0).all(axis=(1, 2))
    exponent = jnp.where(nonfinite.any(), jnp.nan, means.mean())
    error = jnp.nan if num_segments < 2 else means.std(ddof=1) / jnp.sqrt(num_segments)
    return Lyapunov(
        exponent, jnp.where(jnp.isfinite(exponent), error, jnp.nan), zero.sum(), nonfinite.sum()
    )


def _normalised(tangents):
    """Tangents of norm 1 in every segment, and the logarithms of the old norms; a tangent of 0 stays 0, with -inf."""
    # By the largest entry first: squares would overflow or vanish long before the entries do.
    scale = jax.vmap(nanaware_max)(jnp.abs(tangents))
    tangents = tangents / jnp.where(scale == 0, 1, scale)[:, None, None]
    norm = jnp.where(scale == 0, 1, jnp.sqrt(jnp.sum(tangents**2, axis=(1, 2))))
    return tangents / norm[:, None, None], jnp.log(scale) + jnp.log(norm)
