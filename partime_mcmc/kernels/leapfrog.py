"""Leapfrog steps, and those that are exact on a standard normal.

A step of size h is half a kick, a drift and half a kick, with f = 1 in every textbook:

    p ← p + (h/2) ∇log p(x),   x ← x + f h p,   p ← p + (h/2) ∇log p(x).

On a standard normal it is x → c x + s p with c = 1 − f h²/2 and s = f h: a turn by θ, cos θ = c, on an ellipse. Energy is kept on
circles only, s = sin θ, and three shears make a rotation:

    h = 2 tan(θ/2),   f = cos²(θ/2) = 1 / (1 + h²/4)

turn a normal by θ exactly, however large θ is. Where a posterior is nearly normal in the coordinates of a kernel one gradient then
does for a quarter period, and where it is not, such steps are still accepted oftener than plain ones of the same turn
(`benchmarks.integrators`). They preserve volume and are reversible whatever f is, so that HMC stays exact.

Splittings that are exact for a normal: Shahbaba, Lan, Johnson & Neal 2014; with weights that depend on the step size:
Fernández-Pendás, Akhmatskaya & Sanz-Serna 2016.
"""

import math
from typing import Any, Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from partime_mcmc.kernels.blackjax_without_backend import integrators
from partime_mcmc.types import Array, Tracer

# Up to so many steps are written out one after another: a loop costs more than a small gradient.
_UNROLLED = 8


def exact_drift(step_size: float) -> float:
    """f: by how much drifts must be shorter for steps of this size to be exact on a standard normal."""
    return 1 / (1 + step_size**2 / 4)


def exact_step(angle: float) -> float:
    """h: the size of a step that is exact on a standard normal and turns it by an angle, below π."""
    return 2 * math.tan(angle / 2)


def turned_angle(step_size: float, num_steps: int, drift_fraction: float = 1.0) -> float:
    """By how much a trajectory turns a standard normal; infinite where its steps are not stable."""
    half = math.sqrt(drift_fraction) * step_size / 2
    return 2 * num_steps * math.asin(half) if half < 1 else math.inf


def step_for_angle(angle: float, num_steps: int, drift_fraction: float = 1.0) -> float:
    """The step size with which so many steps turn a standard normal by an angle, at most π each."""
    return 2 * math.sin(angle / num_steps / 2) / math.sqrt(drift_fraction)


def steps_for_angle(angle: float, step_size: float, drift_fraction: float = 1.0) -> int:
    """How many steps, at least one, turn a standard normal by nearly an angle."""
    half = min(math.sqrt(drift_fraction) * step_size / 2, 1.0)
    return max(1, round(angle / (2 * math.asin(half))))


def row_of_trajectory(
    step_size: Any, num_steps: int | Array, drift_fraction: Any = 1.0
) -> tuple[Array, Array]:
    """(c, s): a trajectory takes a standard normal to c x + s p.

    One step is a rotation by θ with momenta scaled by χ, (cos θ, χ sin θ), and its powers are (cos Lθ, χ sin Lθ).
    """
    step = jnp.asarray(step_size)
    drift = drift_fraction * step
    once = jnp.arccos(1 - drift * step / 2)
    scale = drift / jnp.sin(once)
    return jnp.cos(num_steps * once), scale * jnp.sin(num_steps * once)


def check_drift_fraction(drift_fraction: Any) -> None:
    """Refuse what is no fraction; traced ones pass.

    Raises:
        ValueError: Naming the argument.
    """
    if isinstance(drift_fraction, Tracer):
        return
    value = np.asarray(drift_fraction)
    if value.dtype.kind not in "fiu" or value.ndim or not 0 < value <= 1:
        raise ValueError(f"drift_fraction: got {drift_fraction!r}, wanted a number in (0, 1]")


def leapfrogs(num_steps: int | Array, drift_fraction: float | Array = 1.0) -> Callable:
    """BlackJAX's velocity Verlet, `num_steps` times, as one of BlackJAX's integrators.

    A proposal is judged by the density at the trajectory's end. On the way only gradients are used, and the density's
    value is not handed from step to step, so that the compiler leaves it out: the softplus of a logistic regression costs
    more than its gradient.

    Args:
        num_steps: L, at least 1.
        drift_fraction: f.
    """
    step = integrators.generate_euclidean_integrator([0.5, drift_fraction, 0.5])

    def integrator(logdensity, kinetic_energy):
        one = step(logdensity, kinetic_energy)

        def steps(state, step_size):
            unknown: Any = jnp.zeros_like(state.logdensity)

            def begin(path):
                position, momentum, gradient = path
                return integrators.IntegratorState(position, momentum, unknown, gradient)

            def advance(_, path):
                new = one(begin(path), step_size)
                return new.position, new.momentum, new.logdensity_grad

            path = state.position, state.momentum, state.logdensity_grad
            if not isinstance(num_steps, Tracer) and num_steps <= _UNROLLED:
                for index in range(num_steps - 1):
                    path = advance(index, path)
            else:
                path = lax.fori_loop(0, num_steps - 1, advance, path)
            return one(begin(path), step_size)

        return steps

    return integrator
