"""Integrators of Hamilton's equations that get more out of a gradient than the leapfrog: palindromes of two or three stages.

A leapfrog step of size h is half a kick, a drift and half a kick, p ← p + (h/2) ∇log p(x), x ← x + h p, p ← p + (h/2) ∇log p(x).
An integration step of s *stages* is s of them with other weights, the same backwards as forwards:

    kick b, drift 1/2, kick 1 − 2b, drift 1/2, kick b                                         s = 2,  b = 0.2118
    kick b, drift a, kick 1/2 − b, drift 1 − 2a, kick 1/2 − b, drift a, kick b                s = 3,  b = 0.1189, a = 0.2962

in units of s h. It preserves volume and is reversible, so that HMC stays exact, and costs a gradient per stage. The weights
are those of Blanes, Casas & Sanz-Serna 2014 (SIAM J. Sci. Comput. 36, A1556), who chose them for the smallest error of the
energy at the step sizes that HMC takes, not for step sizes near zero: at a quarter period in 100 dimensions two gradients are
accepted at 0.89, where four leapfrogs are at 0.84. Their stability ends sooner: where a posterior is stiff in places, leapfrogs
may be better.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from partime_mcmc.types import Array, Tracer
from partime_mcmc.validation import check_count

MOST_STAGES = 3
# Below these step sizes the trajectories of a standard normal stay bounded.
_STABLE = (2.0, 2.634 / 2, 4.661 / 3)
_HALVINGS = 50
_LONGEST_OF_MORE = 8
_TWO = 0.21178
_THREE, _THREE_DRIFT = 0.11888010966548, 0.29619504261126
_MIDDLE = (1 - 2 * _TWO, 1.0, 2 * _TWO)
_INNER = 0.75 - 1.5 * _THREE
# Of each number of stages and each stage, in units of h: half-kick before, drift, half-kick after.
_WEIGHTS = (
    ((0.5, 1.0, 0.5),),
    (_MIDDLE[::-1], _MIDDLE),
    (
        (3 * _THREE, 3 * _THREE_DRIFT, _INNER),
        (_INNER, 3 - 6 * _THREE_DRIFT, _INNER),
        (_INNER, 3 * _THREE_DRIFT, 3 * _THREE),
    ),
)
_TABLE = np.array([(row + row[-1:] * 2)[:MOST_STAGES] for row in _WEIGHTS])


def check_stages(num_steps: Any, num_stages: Any) -> None:
    """Refuse stages that there are not, or gradients that are no multiple of them; traced ones pass.

    Args:
        num_steps: Gradients of a path; None if they are to be chosen.
        num_stages: Of an integration step.

    Raises:
        TypeError, ValueError: If either is no count, or they do not fit.
    """
    # As numbers of the host: arithmetic on the device would be a program of its own.
    counts = [
        None if one is None or isinstance(one, Tracer) else check_count(one, name, 1)
        for one, name in ((num_steps, "num_integration_steps"), (num_stages, "num_stages"))
    ]
    steps, stages = counts
    if stages is not None and stages > MOST_STAGES:
        raise ValueError(f"num_stages: got {stages}, wanted 1, 2 or 3")
    if steps is not None and stages is not None and steps % stages:
        raise ValueError(
            f"num_integration_steps: got {steps}, wanted a multiple of num_stages={stages}"
        )


def stages_to_try(num_steps: int) -> tuple[int, ...]:
    """The stages of which a path of so many gradients may consist, those that suit most posteriors first.

    By `benchmarks.integrators`. Posteriors on which a quarter period takes more than eight gradients are stiff in places; leapfrogs are as
    good there, and stable for longer.
    """
    if num_steps > _LONGEST_OF_MORE:
        return (1,)
    more = [stages for stages in (3, 2) if num_steps % stages == 0]
    return (*more[:1], 1)


def stage_weights(num_stages: int | Array, dtype: Any) -> Any:
    """`index -> (half-kick, drift, half-kick)`: the weights of a trajectory's stages, counted from 0.

    Args:
        num_stages: Of an integration step, 1 to 3; may be traced.
        dtype: Of traced weights.
    """
    if not isinstance(num_stages, Tracer):
        rows = _WEIGHTS[int(num_stages) - 1]
        if len(rows) == 1:
            return lambda index: rows[0]
        table = jnp.asarray(rows, dtype)
    else:
        table = jnp.asarray(_TABLE, dtype)[num_stages - 1]
    return lambda index: tuple(table[index % num_stages])


def rotation(step_size: Any, num_stages: int) -> tuple[Any, Any]:
    """(c, s): where one integration step takes a standard normal, x → c x + s p.

    Args:
        step_size: h per stage; a number, or an array for which this is traced.
        num_stages: Of the integration step.
    """
    rows = [(1.0, 0.0), (0.0, 1.0)]
    for before, drift, after in _WEIGHTS[num_stages - 1]:
        moved = []
        for x, p in rows:
            p = p - before * step_size * x
            x = x + drift * step_size * p
            moved.append((x, p - after * step_size * x))
        rows = moved
    return rows[0][0], rows[1][0]


def turned_angle(step_size: float, num_steps: int, num_stages: int) -> float:
    """By how much a trajectory turns a standard normal; infinite where its steps are not stable."""
    if step_size >= _STABLE[num_stages - 1]:
        return math.inf
    c, s = rotation(step_size, num_stages)
    once = math.acos(max(-1.0, min(c, 1.0)))
    return num_steps / num_stages * (once if s >= 0 else 2 * math.pi - once)


@functools.cache
def step_for_angle(angle: float, num_steps: int, num_stages: int) -> float:
    """The step size with which a trajectory turns a standard normal by an angle."""
    # It turns by a little more than its length.
    below, above = 0.0, angle / num_steps
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        if turned_angle(middle, num_steps, num_stages) < angle:
            below = middle
        else:
            above = middle
    return above


def row_of_trajectory(
    step_size: Any, num_steps: int | Array, num_stages: int | Array
) -> tuple[Array, Array]:
    """(c, s): a trajectory takes a standard normal to c x + s p.

    One integration step is a rotation by θ with momenta scaled by χ, (cos θ, χ sin θ), and its powers are (cos nθ, χ sin nθ).
    """
    rows = [rotation(jnp.asarray(step_size), s) for s in range(1, MOST_STAGES + 1)]
    c, s = (jnp.stack(part)[num_stages - 1] for part in zip(*rows))
    once = jnp.arccos(c)
    angle = num_steps // num_stages * once
    return jnp.cos(angle), jnp.sin(angle) * s / jnp.sin(once)
