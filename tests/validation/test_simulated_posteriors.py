"""Posteriors that the reference folder lacks, on simulated data, against NumPyro's own NUTS with a dense mass matrix.

A GARCH(1, 1) series (a recurrence inside the density), an autoregression of order two, and a logistic regression of 1,000
rows and 25 columns. NUTS gives the moments and quantiles with their MCSEs that `reference.judge` holds our draws against.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import reference
from numpyro.infer import MCMC, NUTS

from partime_mcmc.diagnostics import arviz
from partime_mcmc.diagnostics.report import Level
from partime_mcmc.diagnostics.values import coordinates
from partime_mcmc.numpyro import CoalescingHMC, ParallelMCMC

NUM_REFERENCE, NUM_SAMPLES = 2500, 2000


def garch(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    omega = numpyro.sample("omega", dist.HalfNormal(1))
    share = numpyro.sample(
        "share", dist.Dirichlet(jnp.ones(3))
    )  # of alpha, beta, and what is left to 1

    def advance(variance, value):
        new = omega + share[0] * (value - mu) ** 2 + share[1] * variance
        return new, variance

    variances = jax.lax.scan(advance, jnp.var(y), y)[1]
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variances)), obs=y)


def autoregression(y):
    intercept = numpyro.sample("intercept", dist.Normal(0, 2))
    phi = numpyro.sample("phi", dist.Normal(0, 1).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2))
    numpyro.sample(
        "y", dist.Normal(intercept + phi[0] * y[1:-1] + phi[1] * y[:-2], sigma), obs=y[2:]
    )


def logistic(x, y):
    intercept = numpyro.sample("intercept", dist.Normal(0, 2))
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ beta), obs=y)


def series(num_steps, step):
    rng, values = np.random.default_rng(3), [0.0, 0.0]
    for _ in range(num_steps):
        values.append(step(rng, values))
    return {"y": np.array(values[2:])}


def garch_data():
    variance = [0.5]

    def step(rng, values):
        variance[0] = 0.1 + 0.2 * (values[-1] - 0.3) ** 2 + 0.6 * variance[0]
        return 0.3 + np.sqrt(variance[0]) * rng.normal()

    return series(300, step)


def logistic_data():
    rng = np.random.default_rng(4)
    x, beta = rng.normal(size=(1000, 25)), rng.normal(size=25) / 3
    return {"x": x, "y": (rng.uniform(size=1000) < 1 / (1 + np.exp(-x @ beta))).astype(float)}


CASES = {
    "garch": (garch, garch_data),
    "autoregression": (
        autoregression,
        lambda: series(200, lambda rng, v: 0.5 + 0.6 * v[-1] - 0.2 * v[-2] + rng.normal()),
    ),
    "logistic": (logistic, logistic_data),
}


def described(draws):
    """What `reference.judge` wants to know of draws that it takes for the truth, with their own errors."""
    found = {}
    for name, x in draws.items():
        found[name] = {
            "mean": x.mean(),
            "mcse_mean": arviz.mcse_mean(x),
            "sd": x.std(ddof=1),
            "mcse_sd": arviz.mcse_sd(x),
            "ess_bulk": arviz.ess_bulk(x),
        }
        for quantity, q in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
            found[name] |= {
                quantity: np.quantile(x, q),
                f"mcse_{quantity}": arviz.mcse_quantile(x, q),
            }
    return found


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_numpyros_nuts(name, capsys):
    model, make = CASES[name]
    data = {key: jnp.asarray(value) for key, value in make().items()}
    theirs = MCMC(
        NUTS(model, dense_mass=True),
        num_warmup=1000,
        num_samples=NUM_REFERENCE,
        num_chains=4,
        chain_method="sequential",
        progress_bar=False,
    )
    theirs.run(jax.random.key(5), **data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = ParallelMCMC(
            CoalescingHMC(model), num_warmup=1000, num_samples=NUM_SAMPLES, num_chains=4
        )
        ours.run(jax.random.key(6), **data)
    report, draws = ours.or_raise().report, dict(coordinates(ours.get_samples(group_by_chain=True)))
    wanted = described(dict(coordinates(theirs.get_samples(group_by_chain=True))))
    verdict = reference.judge(draws, wanted)
    with capsys.disabled():
        print(f"\n{name}, {report.run.dtype}: {verdict}; {report.run}")
    assert report.level == Level.CERTIFIED_PATH and report.parallel, report.run.fallbacks
    assert verdict.ok, verdict
    assert verdict.detectable < 0.4
    # Draws that are off by what is called detectable do fail.
    moved = {key: x + verdict.detectable * x.std() for key, x in draws.items()}
    assert not reference.judge(moved, wanted).ok
