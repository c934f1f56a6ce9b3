"""A hierarchical regression on real data: diabetes progression on body-mass index, by age and sex, partially pooled.

The data are scikit-learn's 442 patients (Efron, Hastie, Johnstone & Tibshirani 2004). Intercepts and slopes vary by
decade of age and sex, twelve groups of 8 to 66 patients, and are drawn towards their common mean as far as the data
ask for it, in non-centred form. Varying slopes are what makes such posteriors awkward: 30 parameters of very different
widths.

What one sees: warm-up whitens them with one dense metric from eight pooled chains; the summary of intercepts and
slopes by group, R-hat and effective sample sizes; and the report: certified chains, evaluations per draw, what warm-up
chose and why.

    pip install scikit-learn && python examples/hierarchical_regression.py --num-samples 2000
"""

import argparse

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

from partime_mcmc import CoalescingHMC, ParallelMCMC
from partime_mcmc.diagnostics.arviz import summary_table


def patients():
    """Standardised index and progression, and the group of each patient: decade of age (six) and sex."""
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)
    column = {name: table.data[:, index] for index, name in enumerate(table.feature_names)}
    decade = np.clip(column["age"] // 10, 2, 7).astype(int) - 2
    index, progression = ((x - x.mean()) / x.std() for x in (column["bmi"], table.target))
    return {
        "index": index,
        "group": decade + 6 * (column["sex"] > 1).astype(int),
        "progression": progression,
    }


def model(index, group, progression=None, num_groups=12):
    """Intercepts and slopes by group around common ones."""
    level = numpyro.sample("level", dist.Normal(0, 1))
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    spread = numpyro.sample("spread", dist.HalfNormal(0.5).expand([2]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("groups", num_groups):
        away = numpyro.sample("away", dist.Normal(0, 1).expand([2]).to_event(1))
    levels = numpyro.deterministic("levels", level + spread[0] * away[:, 0])
    slopes = numpyro.deterministic("slopes", slope + spread[1] * away[:, 1])
    with numpyro.plate("patients", len(index)):
        numpyro.sample(
            "y", dist.Normal(levels[group] + slopes[group] * index, noise), obs=progression
        )


def main(argv=None):
    """Sample and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=2000, help="draws per chain")
    parser.add_argument("--num-chains", type=int, default=4)
    arguments = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    mcmc = ParallelMCMC(
        CoalescingHMC(model),
        num_warmup=1000,
        num_samples=arguments.num_samples,
        num_chains=arguments.num_chains,
    )
    mcmc.run(jax.random.key(0), **patients())
    rows = {row["name"]: row for row in summary_table(mcmc.or_raise().draws)}
    for name in (
        "level",
        "slope",
        "spread[0]",
        "spread[1]",
        "noise",
        *(f"slopes[{group}]" for group in range(12)),
    ):
        row = rows[name]
        print(
            f"{name:>10}  mean {row['mean']:6.2f}  sd {row['sd']:5.2f}  ESS {row['ess_bulk']:6.0f}  R-hat {row['r_hat']:.3f}"
        )
    print(mcmc.report)
    return mcmc, rows


if __name__ == "__main__":
    main()
