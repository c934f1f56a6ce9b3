"""NumPyro's own NUTS on a `Target`, one step after another: what a run is compared with."""

import jax
from numpyro.infer import MCMC, NUTS

from partime_mcmc.sampling.target import Target
from partime_mcmc.types import Key, PyTree


def nuts_positions(
    target: Target, key: Key, num_warmup: int, num_samples: int, num_chains: int
) -> PyTree:
    """Draws of NumPyro's NUTS with default settings, chains vectorized.

    Args:
        target: What to sample.
        key: PRNG key, shape ().
        num_warmup: Steps of warm-up per chain.
        num_samples: T.
        num_chains: C.

    Returns:
        Unconstrained positions, leaves `(C, T, ...)`, ready.
    """
    starts = target.starts(jax.random.split(key, num_chains))
    if num_chains == 1:
        starts = jax.tree.map(lambda leaf: leaf[0], starts)
    mcmc = MCMC(
        NUTS(potential_fn=lambda position: -target.logdensity(position)),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, init_params=starts)
    return jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
