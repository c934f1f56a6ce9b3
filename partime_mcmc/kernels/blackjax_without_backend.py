"""BlackJAX, imported so that JAX's backend stays asleep.

BlackJAX computes log 2 by `jnp.log` while it is imported, which starts the backend: `numpyro.set_host_device_count`,
`jax.distributed.initialize` and `XLA_FLAGS` would come too late for a script that imports this package first. During the
import `math.log`, of the same number, stands for it.
"""

import math

import jax.numpy as jnp

_log, jnp.log = jnp.log, math.log
try:
    import blackjax
    from blackjax.mcmc import hmc, integrators, metrics
    from blackjax.mcmc.random_walk import normal
finally:
    jnp.log = _log

__all__ = ["blackjax", "hmc", "integrators", "metrics", "normal"]
