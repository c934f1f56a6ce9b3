"""Posterior prediction, log likelihood and a check of the fit, from draws of `ParallelMCMC`, with NumPyro's and
ArviZ's own tools.

Counts of a rare event over sixty years: a Poisson regression is fitted, then `Predictive` draws new counts from it and
`log_likelihood` scores the old ones, both from `mcmc.get_samples()` as after any NumPyro run; a posterior predictive
p-value compares the fall from the first half to the second with that of replicated series. The data are the British
coal-mining disasters of 1851 to 1910 (Jarrett 1979), whose rate falls, so that a model without a trend must fail the
check and one with a trend should not.

    python examples/posterior_predictive.py
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Predictive, log_likelihood

from partime_mcmc import CoalescingHMC, ParallelMCMC

DISASTERS = np.array(
    [
        4,
        5,
        4,
        0,
        1,
        4,
        3,
        4,
        0,
        6,
        3,
        3,
        4,
        0,
        2,
        6,
        3,
        3,
        5,
        4,
        5,
        3,
        1,
        4,
        4,
        1,
        5,
        5,
        3,
        4,
        2,
        5,
        2,
        2,
        3,
        4,
        2,
        1,
        3,
        2,
        2,
        1,
        1,
        1,
        1,
        3,
        0,
        0,
        1,
        0,
        1,
        1,
        0,
        0,
        3,
        1,
        0,
        3,
        2,
        2,
    ]
)


def with_trend(years, counts=None):
    """Poisson counts whose log rate is a line in time."""
    level = numpyro.sample("level", dist.Normal(0, 2))
    trend = numpyro.sample("trend", dist.Normal(0, 2))
    with numpyro.plate("year", len(years)):
        numpyro.sample("counts", dist.Poisson(jnp.exp(level + trend * years)), obs=counts)


def constant(years, counts=None):
    """Poisson counts of one rate."""
    level = numpyro.sample("level", dist.Normal(0, 2))
    with numpyro.plate("year", len(years)):
        numpyro.sample("counts", dist.Poisson(jnp.exp(level) * jnp.ones_like(years)), obs=counts)


def check(model, years, num_samples, key):
    """Draws, replicated counts, log likelihood; prints and returns the share of replicates at least as spread out as the data."""
    mcmc = ParallelMCMC(
        CoalescingHMC(model), num_warmup=1000, num_samples=num_samples, num_chains=4
    )
    mcmc.run(key, years, counts=DISASTERS)
    draws = mcmc.or_raise().get_samples()
    replicated = np.asarray(Predictive(model, draws)(jax.random.key(1), years)["counts"])
    scores = np.asarray(log_likelihood(model, draws, years, counts=DISASTERS)["counts"])
    predictive = np.log(np.mean(np.exp(scores), axis=0)).sum()

    def fall(counts):
        """By how much the first half exceeds the second, per year."""
        half = counts.shape[-1] // 2
        return counts[..., :half].mean(axis=-1) - counts[..., half:].mean(axis=-1)

    share = float(np.mean(fall(replicated) >= fall(DISASTERS)))
    print(
        f"{model.__name__:>12}: log pointwise predictive density {predictive:.1f}; {share:.1%} of replicated series fall as "
        f"much as the data; {mcmc.report.level.name}, {mcmc.report.run.evaluations_per_sample:.2f} evaluations per draw"
    )
    return share, predictive, mcmc


def main(argv=None):
    """Fit and check both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=1000, help="draws per chain")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    years = np.linspace(-1, 1, len(DISASTERS))
    return {
        model.__name__: check(model, years, arguments.num_samples, jax.random.key(0))
        for model in (with_trend, constant)
    }


if __name__ == "__main__":
    main()
