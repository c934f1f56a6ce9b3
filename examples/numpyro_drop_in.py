"""A script from NumPyro's documentation, twice: as it is there, and with one line changed.

The model is the README's of NumPyro: eight schools in non-centred form. The diff is

    - mcmc = MCMC(NUTS(model), num_warmup=1000, num_samples=..., num_chains=4)
    + mcmc = ParallelMCMC(CoalescingHMC(model), num_warmup=1000, num_samples=..., num_chains=4)

and everything after it (`run`, `print_summary`, `get_samples`, `get_extra_fields`) stays. `ParallelMCMC(NUTS(model), ...)` with
NumPyro's own `NUTS` runs as well: then the name of one class is all that changes. What one sees: the same
posterior within its Monte Carlo error, the report of the parallel run (certificate, work, what warm-up chose), and
both times of a second run.

    python examples/numpyro_drop_in.py --num-samples 2000
"""

import argparse
import time

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import TransformReparam

from partime_mcmc import CoalescingHMC, ParallelMCMC

J = 8
Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools_noncentered(J, sigma, y=None):
    """As in NumPyro's README."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("J", J):
        with numpyro.handlers.reparam(config={"theta": TransformReparam()}):
            theta = numpyro.sample(
                "theta",
                dist.TransformedDistribution(
                    dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(mu, tau)
                ),
            )
        numpyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def fit(mcmc, key):
    """What the script does with `mcmc`, whichever it is; returns draws and the seconds of a second run."""
    mcmc.run(key, J, SIGMA, y=Y, extra_fields=("potential_energy",))
    begin = time.perf_counter()
    mcmc.run(key, J, SIGMA, y=Y, extra_fields=("potential_energy",))
    draws = jax.block_until_ready(mcmc.get_samples())
    seconds = time.perf_counter() - begin
    mcmc.print_summary()
    print(
        f"Expected log joint density: {-np.mean(mcmc.get_extra_fields()['potential_energy']):.2f}; "
        f"second run {seconds:.2f} s\n"
    )
    return draws, seconds


def main(argv=None):
    """Run both, print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=2000)
    arguments = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    counts = {
        "num_warmup": 1000,
        "num_samples": arguments.num_samples,
        "num_chains": 4,
        "progress_bar": False,
    }
    theirs = MCMC(NUTS(eight_schools_noncentered), chain_method="vectorized", **counts)
    ours = ParallelMCMC(CoalescingHMC(eight_schools_noncentered), **counts)
    found = {
        "NumPyro": fit(theirs, jax.random.key(0)),
        "parallel in time": fit(ours, jax.random.key(0)),
    }
    print(ours.or_raise().report)
    return {
        name: (np.mean(draws["mu"]), np.mean(np.log(draws["tau"])), seconds)
        for name, (draws, seconds) in found.items()
    }, ours


if __name__ == "__main__":
    main()
