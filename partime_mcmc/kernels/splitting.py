"""Integrators of Hamilton's equations that get more out of a gradient than the leapfrog where a posterior is roughly normal.

A leapfrog step of size h is half a kick, a drift and half a kick, p ← p + (h/2) ∇log p(x), x ← x + h p, p ← p + (h/2) ∇log p(x).
An integration step of s *stages* is s of them with other weights, the same backwards as forwards:

    kick b, drift 1/2, kick 1 − 2b, drift 1/2, kick b                                         s = 2,  b = 0.2118
    kick b, drift a, kick 1/2 − b, drift 1 − 2a, kick 1/2 − b, drift a, kick b                s = 3,  b = 0.1189, a = 0.2962

in units of s h, with the weights of Blanes, Casas & Sanz-Serna 2014 (SIAM J. Sci. Comput. 36, A1556), who chose them for the
smallest error of the energy at the step sizes that HMC takes, not for step sizes near zero.

A standard normal's trajectories are rotations, and three shears make a rotation: with kicks h = 2 tan(θ/2) and drifts sin θ = f h,
f = cos²(θ/2), a leapfrog turns it by θ exactly, however large θ is. Where a posterior is nearly normal in the coordinates of a kernel one
gradient then does for a quarter period. (Splittings that are exact for a normal: Shahbaba, Lan, Johnson & Neal 2014; Fernández-Pendás,
Akhmatskaya & Sanz-Serna 2016 choose weights by the step size.)

All of these preserve volume and are reversible, so that HMC stays exact, and cost a gradient per stage. At a quarter period in 100
dimensions two gradients of two stages are accepted at 0.89, where four leapfrogs are at 0.84. Two and three stages are stable for less long than
leapfrogs: where a posterior is stiff in places, these may be better.
"""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from partime_mcmc.types import AnyArray, Array, Tracer
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


class Splitting(NamedTuple):
    """How a trajectory is put together of kicks and drifts; the default is the leapfrog.

    Attributes:
        num_stages: s, gradients per integration step, 1 to 3.
        drift_fraction: f: drifts are so much shorter than their weights say; in (0, 1].
    """

    num_stages: int | AnyArray = 1
    drift_fraction: float | AnyArray = 1.0

    @property
    def is_known(self) -> bool:
        """Whether nothing of it is traced."""
        return not any(isinstance(one, Tracer) for one in self)

    def weights(self, dtype: Any) -> Any:
        """`index -> (half-kick, drift, half-kick)`: in units of h, the weights of a trajectory's stages, counted from 0.

        Args:
            dtype: Of traced weights.
        """
        if self.is_known:
            rows = _WEIGHTS[int(self.num_stages) - 1]
            rows = [(a, b * float(self.drift_fraction), c) for a, b, c in rows]
            if len(rows) == 1:
                return lambda index: rows[0]
            table = jnp.asarray(rows, dtype)
        else:
            fractions = jnp.stack([jnp.ones((), dtype), self.drift_fraction, jnp.ones((), dtype)])
            table = jnp.asarray(_TABLE, dtype)[self.num_stages - 1] * fractions.astype(dtype)
        return lambda index: tuple(table[index % self.num_stages])


LEAPFROG = Splitting()


def check_splitting(num_steps: Any, splitting: Splitting) -> None:
    """Refuse stages that there are not, gradients that are no multiple of them, and drifts that are no fraction; traced ones pass.

    Args:
        num_steps: Gradients of a path; None if they are to be chosen.
        splitting: The integrator.

    Raises:
        TypeError, ValueError: Naming the argument.
    """
    num_stages, fraction = splitting
    # As numbers of the host: arithmetic on the device would be a program of its own.
    counts = [
        None if one is None or isinstance(one, Tracer) else check_count(one, name, 1)
        for one, name in ((num_steps, "num_integration_steps"), (num_stages, "num_stages"))
    ]
    steps, stages = counts
    if stages is not None and stages > MOST_STAGES:
        raise ValueError(f"num_stages: got {stages}, wanted 1, 2 or 3")
    if not isinstance(fraction, Tracer):
        value = np.asarray(fraction)
        if value.dtype.kind not in "fiu" or value.ndim or not 0 < value <= 1:
            raise ValueError(f"drift_fraction: got {fraction!r}, wanted a number in (0, 1]")
    if steps is not None and stages is not None and steps % stages:
        raise ValueError(
            f"num_integration_steps: got {steps}, wanted a multiple of num_stages={stages}"
        )


def exact_leapfrog(angle: float, num_steps: int) -> Splitting:
    """The splitting with which so many leapfrogs turn a standard normal by an angle and keep its energy."""
    return Splitting(1, math.cos(angle / (2 * num_steps)) ** 2)


def stages_to_try(num_steps: int) -> tuple[int, ...]:
    """The stages of which a path of so many gradients may consist, in the order in which they are tried.

    Posteriors on which a quarter period takes more than eight gradients are stiff in places; leapfrogs are as good there, and stable for
    longer. Below, more stages are accepted oftener than plain leapfrogs, and exact leapfrogs mostly oftener still (`benchmarks.integrators`).
    """
    if num_steps > _LONGEST_OF_MORE:
        return (1,)
    more = [stages for stages in (3, 2) if num_steps % stages == 0]
    return (*more[:1], 1)


def rotation(step_size: Any, num_stages: int, drift_fraction: Any = 1.0) -> tuple[Any, Any]:
    """(c, s): where one integration step takes a standard normal, x → c x + s p.

    Args:
        step_size: h per stage; a number, or an array for which this is traced.
        num_stages: Of the integration step.
        drift_fraction: As for `Splitting`.
    """
    rows = [(1.0, 0.0), (0.0, 1.0)]
    for before, drift, after in _WEIGHTS[num_stages - 1]:
        moved = []
        for x, p in rows:
            p = p - before * step_size * x
            x = x + drift * drift_fraction * step_size * p
            moved.append((x, p - after * step_size * x))
        rows = moved
    return rows[0][0], rows[1][0]


def turned_angle(step_size: float, num_steps: int, splitting: Splitting = LEAPFROG) -> float:
    """By how much a trajectory turns a standard normal; infinite where its steps are not stable."""
    stages, fraction = int(splitting.num_stages), float(splitting.drift_fraction)
    if step_size * math.sqrt(fraction) >= _STABLE[stages - 1]:
        return math.inf
    c, s = rotation(step_size, stages, fraction)
    once = math.acos(max(-1.0, min(c, 1.0)))
    return num_steps / stages * (once if s >= 0 else 2 * math.pi - once)


@functools.cache
def step_for_angle(angle: float, num_steps: int, splitting: Splitting = LEAPFROG) -> float:
    """The step size with which a trajectory turns a standard normal by an angle."""
    below, above = 0.0, _STABLE[splitting.num_stages - 1] / math.sqrt(splitting.drift_fraction)
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        if turned_angle(middle, num_steps, splitting) < angle:
            below = middle
        else:
            above = middle
    return above


def row_of_trajectory(
    step_size: Any, num_steps: int | Array, splitting: Splitting = LEAPFROG
) -> tuple[Array, Array]:
    """(c, s): a trajectory takes a standard normal to c x + s p.

    One integration step is a rotation by θ with momenta scaled by χ, (cos θ, χ sin θ), and its powers are (cos nθ, χ sin nθ).
    """
    step, (stages, fraction) = jnp.asarray(step_size), splitting
    rows = [rotation(step, s, fraction) for s in range(1, MOST_STAGES + 1)]
    c, s = (jnp.stack(part)[stages - 1] for part in zip(*rows))
    once = jnp.arccos(c)
    angle = num_steps // stages * once
    return jnp.cos(angle), jnp.sin(angle) * s / jnp.sin(once)
