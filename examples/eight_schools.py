"""Eight schools in NumPyro: the same chains drawn parallel over time and one step after another, and compared.

What one sees: a NumPyro model becomes a target; the first run warms up (step size, dense metric) and solves four HMC
chains parallel over time; the second goes on from the very same warm-up with the same random numbers, step by step, as BlackJAX's
own loop would. `compare` then decides whether the two are one path: CERTIFIED_PATH or better means that every step of the
parallel chains obeys the kernel, that every accept decision is the same, and that the states agree. So ESS and R-hat
are those of the sequential sampler; only the way to the draws differs.

What it costs: the sequential loop evaluates the kernel once per draw, one after another. Asked for no solver, `sample` takes
shooting: segments of the chains are rolled side by side until they coalesce, here with 1 to 2 evaluations per draw, of which only `depth` wait for each other. Both times are printed.

Why float64: in float32 the log density of this model is too coarse for HMC. The library never touches JAX's settings, a
script may. Why the non-centred form: given mu and tau, theta_trans is standard normal a priori, so there is no funnel.

    python examples/eight_schools.py --num-samples 4096
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from partime_mcmc import compare, from_numpyro, hmc, sample, sequential, shooting
from partime_mcmc.diagnostics.arviz import summary_table
from partime_mcmc.sampling.progress import progress_line

EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(y, sigma):
    """Rubin's (1981) eight coaching programmes, effects partially pooled."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(y)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * theta_trans)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def main(argv=None):
    """Sample twice, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=4096, help="draws per chain")
    parser.add_argument("--num-chains", type=int, default=4)
    parser.add_argument("--num-warmup", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)

    model_key, key = jax.random.split(jax.random.key(args.seed))
    target = from_numpyro(model, jnp.asarray(EFFECT), jnp.asarray(STANDARD_ERROR), key=model_key)

    shape = dict(
        num_samples=args.num_samples, num_chains=args.num_chains, num_warmup=args.num_warmup
    )
    parallel = sample(key, target, hmc, **shape, solver=shooting(), progress=progress_line)
    # A warm-up is a tuned kernel and one state per chain. With the same key the second run draws the same random numbers.
    stepwise = sample(
        key, target, parallel.warmup, **shape, solver=sequential(), progress=progress_line
    )

    settings = ", ".join(f"{name} {value:.3g}" for name, value in parallel.warmup.settings.items())
    print(f"warm-up: {settings} (whitened), acceptance {parallel.warmup.acceptance:.2f}")
    for name, draws in (("parallel", parallel), ("sequential", stepwise)):
        report, certificate = draws.report, draws.certificate
        print(
            f"{name:>10}: {report.seconds_run:.2f} s (compilation {report.seconds_compile:.1f} s apart), "
            f"largest residual {np.max(certificate.max_residual):.1e}, "
            f"{int(np.sum(certificate.certified))} of {args.num_chains} chains certified, "
            f"{report.evaluations_per_sample:.1f} evaluations and {report.jvps_per_sample:.1f} JVPs per draw, "
            f"{np.max(report.iterations)} iterations, depth {report.depth}, {len(report.fallbacks)} fallbacks"
        )

    finding = compare(parallel, stepwise)
    print(f"compare: {finding.verdict}")
    print(f"{'':>14} {'mean':>7} {'sd':>6} {'5%':>7} {'95%':>6} {'ESS':>6} {'R-hat':>6}")
    for row in summary_table(parallel):
        if not row["name"].startswith("theta_trans"):
            print(
                f"{row['name']:>14} {row['mean']:7.2f} {row['sd']:6.2f} {row['q05']:7.2f} {row['q95']:6.2f} "
                f"{row['ess_bulk']:6.0f} {row['r_hat']:6.3f}"
            )
    return parallel, stepwise, finding


if __name__ == "__main__":
    main()
