"""The kernels' half of the catalogue: one row per BlackJAX algorithm, and every row runs through the whole suite.

A row is an algorithm tuned by hand for the target below, which is small, correlated and not normal, on positions that
are a dict with a site called "position" (BlackJAX's states have a field of that name).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.integrators import isokinetic_velocity_verlet
from blackjax.mcmc.random_walk import normal
from jax.scipy.stats.norm import ppf

from partime_mcmc.engine.recipes import deer, jacobi, picard, quasi_deer, shooting
from partime_mcmc.kernels import Kernel, from_blackjax, gibbs
from partime_mcmc.kernels.coupling import draw_multishift_noise, multishift
from partime_mcmc.kernels.explicit_randomness import ExplicitRandomnessKernel, GradientState
from partime_mcmc.kernels.multishift_hmc import hmc_cycle, steered_hmc
from partime_mcmc.kernels.multishift_mala import coalescing_mala
from partime_mcmc.kernels.multishift_random_walk import coalescing_random_walk
from partime_mcmc.solvers import Solver


@dataclasses.dataclass(frozen=True)
class AlgorithmRow:
    """A BlackJAX algorithm.

    Attributes:
        name: For the test's name.
        algorithm: `(logdensity, dimension, dtype) -> SamplingAlgorithm`.
        solver: A recipe that suits it.
        decides: A step accepts or rejects, says so, and rejects some of the first steps on the target.
        margins: The uniform behind its decisions is `uniform(split(key)[1])`, or its info holds margins.
        discrete: Fields of its state that are not floating point.
        others: Floating-point fields of its state that are neither the position nor follow from it.
        float32: Runs in float32 too; False where another row has the same shape of state.
    """

    name: str
    algorithm: Callable[[Callable, int, Any], blackjax.SamplingAlgorithm]
    solver: Solver
    decides: bool = False
    margins: bool = False
    discrete: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    float32: bool = True

    def build(self, logdensity: Callable, dimension: int, dtype: Any) -> Kernel:
        """The algorithm as a kernel."""
        return from_blackjax(self.algorithm(logdensity, dimension, dtype), name=self.name)


def _mala(logdensity, dimension, dtype):
    del dimension, dtype
    return blackjax.mala(logdensity, 0.35)


def _hmc(logdensity, dimension, dtype):
    return blackjax.hmc(logdensity, 0.8, jnp.ones(dimension, dtype), 2)


def _multinomial_hmc(logdensity, dimension, dtype):
    return blackjax.multinomial_hmc(logdensity, 0.7, jnp.ones(dimension, dtype), 2)


def _nuts(logdensity, dimension, dtype):
    return blackjax.nuts(logdensity, 0.6, jnp.ones(dimension, dtype), max_num_doublings=3)


def _dynamic_hmc(logdensity, dimension, dtype):
    return blackjax.dynamic_hmc(
        logdensity,
        0.9,
        jnp.ones(dimension, dtype),
        integration_steps_fn=lambda key: jax.random.randint(key, (), 1, 4),
    )


def _ghmc(logdensity, dimension, dtype):
    return blackjax.ghmc(logdensity, 0.8, jnp.ones(dimension, dtype), 0.5, 0.3)


def _mclmc(logdensity, dimension, dtype):
    del dimension, dtype
    return blackjax.mclmc(logdensity, L=2.0, step_size=0.4, integrator=isokinetic_velocity_verlet)


def _barker(logdensity, dimension, dtype):
    del dimension, dtype
    return blackjax.barker(logdensity, 0.9)


def _elliptical_slice(logdensity, dimension, dtype):
    return blackjax.elliptical_slice(
        logdensity, mean=jnp.zeros(dimension, dtype), cov=jnp.ones(dimension, dtype)
    )


def _random_walk(logdensity, dimension, dtype):
    return blackjax.additive_step_random_walk(logdensity, normal(0.8 * jnp.ones(dimension, dtype)))


def _coalescing_mala(logdensity, dimension, dtype):
    del dimension, dtype
    return coalescing_mala(logdensity, 0.35)


def _steered_hmc(logdensity, dimension, dtype):
    del dimension, dtype
    return steered_hmc(logdensity, 0.8, 2, 0.85)


def _hmc_cycle(logdensity, dimension, dtype):
    del dimension, dtype
    return hmc_cycle(logdensity, 0.85, 9, 0.6, 3, 0.9)


def _coalescing_walk(logdensity, dimension, dtype):
    del dimension, dtype
    return coalescing_random_walk(logdensity, 0.8, 2)


def _gibbs(logdensity, dimension, dtype):
    """Two blocks, each drawn given the other; no density is asked."""
    del logdensity, dimension, dtype

    def position(state, uniform):
        return 0.4 * state["slope"] + 0.3 * state["position"][::-1] + 0.9 * ppf(uniform)

    def slope(state, uniform):
        return 0.5 * state["position"].sum() + 0.7 * ppf(uniform)

    return gibbs({"position": position, "slope": slope}).algorithm


KERNELS = [
    AlgorithmRow("mala", _mala, quasi_deer(num_probes=1), decides=True, margins=True),
    AlgorithmRow("hmc", _hmc, quasi_deer(damping=0.1), decides=True, margins=True),
    AlgorithmRow("multinomial hmc", _multinomial_hmc, deer(), float32=False),
    AlgorithmRow("nuts", _nuts, quasi_deer(num_probes=1), float32=False),
    AlgorithmRow(
        "dynamic hmc",
        _dynamic_hmc,
        quasi_deer(damping=0.1),
        decides=True,
        margins=True,
        discrete=("random_generator_arg",),
    ),
    AlgorithmRow("ghmc", _ghmc, jacobi(), decides=True, others=("momentum", "slice")),
    AlgorithmRow("mclmc", _mclmc, picard(), others=("momentum",)),
    AlgorithmRow("barker", _barker, picard(), decides=True, margins=True, float32=False),
    AlgorithmRow("elliptical slice", _elliptical_slice, jacobi()),
    AlgorithmRow("random walk", _random_walk, picard(), decides=True, margins=True),
    AlgorithmRow("coalescing mala", _coalescing_mala, jacobi(), decides=True, margins=True),
    AlgorithmRow(
        "steered hmc",
        _steered_hmc,
        quasi_deer(damping=0.1),
        decides=True,
        margins=True,
        float32=False,
    ),
    AlgorithmRow(
        "hmc cycle", _hmc_cycle, shooting(2), decides=True, margins=True, discrete=("phase",)
    ),
    AlgorithmRow(
        "coalescing walk", _coalescing_walk, jacobi(), decides=True, margins=True, float32=False
    ),
    AlgorithmRow("gibbs", _gibbs, deer()),
]

DIMENSION = 3


def logdensity_of(dtype) -> Callable:
    """A correlated normal density with a quartic wall."""
    precision = jnp.asarray(np.array([[1.5, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.8]]), dtype)

    def logdensity(position):
        x = jnp.append(position["position"], position["slope"])
        return -0.5 * x @ precision @ x - 0.05 * jnp.sum(x**4)

    return logdensity


def start_of(dtype) -> dict:
    """Where chains on it start."""
    return {"position": jnp.asarray([1.0, -0.5], dtype), "slope": jnp.asarray(0.3, dtype)}


def multishift_autoregression(memory: float) -> Kernel:
    """x' = ρ x + √(1 − ρ²) noise, which keeps N(0, 1), with multishift noise: its law after any number of steps is known."""

    def init(position, rng_key=None):
        return GradientState(position, -0.5 * jnp.sum(position**2), -position)

    def draw(key, state):
        return draw_multishift_noise(key, state.position.size, state.position.dtype)

    def step(randomness, state):
        scale = math.sqrt(1 - memory**2)
        return init(multishift(memory * state.position, scale, randomness.layers).value), ()

    return Kernel(ExplicitRandomnessKernel(init, draw, step))
