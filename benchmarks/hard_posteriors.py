"""Posteriors that are hard on purpose, ours beside NUTS: `python -m benchmarks.hard_posteriors [NAME...] --out DIR`.

Hierarchies written the centred way, a sparse regression, a latent random walk, Neal's funnel as a bare log density; data are
simulated with fixed seeds, but for the eight schools. Four chains, 1,000 steps of warm-up allowed and 1,000 draws each, float64,
one run after another in one process: `CoalescingHMC` through `ParallelMCMC`, and NumPyro's NUTS with a diagonal and with a
dense mass matrix.

R-hat and effective draws are of the worst unconstrained coordinate, the smaller of means and of squared deviations, and are
counted against the gradients of sampling; those of warm-up stand beside them. Seconds are the whole run's, compilation included.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

from benchmarks.record import OUT, keep
from partime_mcmc import CoalescingHMC, ParallelMCMC
from partime_mcmc.diagnostics import mixing

CHAINS, STEPS = 4, 1000


def eight_schools():
    """Effects that hardly differ: a funnel."""
    y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def clinics():
    """30 clinics with 8 to 40 patients each and little difference between them."""
    rng = np.random.default_rng(1)
    size = rng.integers(8, 40, 30)
    healed = rng.binomial(size, 1 / (1 + np.exp(-0.4 - 0.15 * rng.normal(size=30))))
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    scale = numpyro.sample("scale", dist.HalfCauchy(1))
    with numpyro.plate("clinics", len(size)):
        effect = numpyro.sample("effect", dist.Normal(mu, scale))
    numpyro.sample("healed", dist.Binomial(size, logits=effect), obs=healed)


def counts_by_year():
    """A cubic trend of counts with an effect per year: effects and trend trade off, starts lie far off."""
    rng = np.random.default_rng(2)
    year = (np.arange(40) - 19.5) / 20
    rate = np.exp(3.5 + 1.2 * year - 0.3 * year**2 - 0.8 * year**3 + 0.08 * rng.normal(size=40))
    seen = rng.poisson(rate)
    level = numpyro.sample("level", dist.Uniform(-20, 20))
    slopes = numpyro.sample("slopes", dist.Uniform(-10, 10).expand([3]).to_event(1))
    scale = numpyro.sample("scale", dist.Uniform(0, 5))
    with numpyro.plate("years", 40):
        effect = numpyro.sample("effect", dist.Normal(0, scale))
    trend = level + jnp.stack([year, year**2, year**3], axis=1) @ slopes
    numpyro.sample("seen", dist.Poisson(jnp.exp(trend + effect)), obs=seen)


def crossed():
    """Means of two crossed groups, of which one hardly differs: a ridge and a funnel."""
    rng = np.random.default_rng(3)
    row, column = np.repeat(np.arange(6), 8), np.tile(np.arange(8), 6)
    y = 3 + 2 * rng.normal(size=6)[row] + 0.1 * rng.normal(size=8)[column] + rng.normal(size=48)
    noise = numpyro.sample("noise", dist.HalfNormal(2))
    places = numpyro.sample("places", dist.Normal(0, 10).expand([2]).to_event(1))
    scales = numpyro.sample("scales", dist.HalfNormal(5).expand([2]).to_event(1))
    with numpyro.plate("rows", 6):
        a = numpyro.sample("a", dist.Normal(places[0], scales[0]))
    with numpyro.plate("columns", 8):
        b = numpyro.sample("b", dist.Normal(places[1], scales[1]))
    numpyro.sample("y", dist.Normal(a[row] + b[column], noise), obs=y)


def volatility():
    """The log scale of 150 returns walks at random, its step is unknown."""
    rng = np.random.default_rng(4)
    returns = np.exp(-1 + np.cumsum(0.15 * rng.normal(size=150))) * rng.standard_t(8, 150)
    step = numpyro.sample("step", dist.Exponential(10))
    base = numpyro.sample("base", dist.Normal(0, 2))
    walk = numpyro.sample("walk", dist.GaussianRandomWalk(step, num_steps=150))
    numpyro.sample("returns", dist.StudentT(8, 0, jnp.exp(base + walk)), obs=returns)


def horseshoe():
    """A sparse regression, 3 of 20 coefficients not 0, non-centred: funnels in pairs and in the global scale."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(60, 20))
    y = x @ np.concatenate([[3.0, -2, 1], np.zeros(17)]) + rng.normal(size=60)
    overall = numpyro.sample("overall", dist.HalfCauchy(1))
    local = numpyro.sample("local", dist.HalfCauchy(1).expand([20]).to_event(1))
    raw = numpyro.sample("raw", dist.Normal(0, 1).expand([20]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(2))
    numpyro.sample("y", dist.Normal(x @ (overall * local * raw), noise), obs=y)


def funnel():
    """Neal's funnel of ten coordinates, as a log density of which no site's law tells."""
    depth = numpyro.sample("depth", dist.Normal(0, 3))
    x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (9,)))
    numpyro.factor("width", -0.5 * jnp.sum(x**2) * jnp.exp(-depth) - 4.5 * depth)


MODELS = {
    model.__name__: model
    for model in (eight_schools, clinics, counts_by_year, crossed, volatility, horseshoe, funnel)
}


def ours(model, key) -> tuple[dict, int, int, str]:
    """Positions `(C, T, ...)`, gradients of sampling and of warm-up, and the verdict."""
    mcmc = ParallelMCMC(
        CoalescingHMC(model),
        num_warmup=STEPS,
        num_samples=STEPS,
        num_chains=CHAINS,
        progress_bar=False,
    )
    mcmc.run(key)
    report = mcmc.report
    residual = float(np.max(np.asarray(report.certificate.max_residual)))
    said = f"{report.verdict.outcome.value}, residual {residual:.0e}"
    return mcmc.draws.positions, report.num_gradients, report.warmup.num_gradients, said


def nuts(model, key, dense_mass: bool) -> tuple[dict, int, int, str]:
    """The same by NumPyro."""
    mcmc = MCMC(
        NUTS(model, dense_mass=dense_mass),
        num_warmup=STEPS,
        num_samples=STEPS,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
        postprocess_fn=lambda position: position,
    )
    mcmc.warmup(key, extra_fields=("num_steps",), collect_warmup=True)
    before = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(mcmc.post_warmup_state.rng_key, extra_fields=("num_steps", "diverging"))
    fields = mcmc.get_extra_fields()
    said = f"{int(fields['diverging'].sum())} divergences"
    return mcmc.get_samples(group_by_chain=True), int(fields["num_steps"].sum()), before, said


METHODS = {
    "ours": ours,
    "NUTS": lambda model, key: nuts(model, key, False),
    "NUTS, dense": lambda model, key: nuts(model, key, True),
}


def measure(name: str, method: str, seed: int) -> dict:
    """One row."""
    begin = time.perf_counter()
    positions, gradients, warmup, said = METHODS[method](MODELS[name], jax.random.key(seed))
    seconds = time.perf_counter() - begin
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(positions)]
    x = np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)
    squares = (x - x.mean(axis=(0, 1))) ** 2
    ess = float(min(mixing.ess_bulk(x).min(), mixing.ess_bulk(squares).min()))
    return {
        "posterior": name,
        "method": method,
        "dimension": x.shape[2],
        "rhat": float(mixing.rank_rhat(x).max()),
        "ess": ess,
        "gradients": gradients,
        "warmup_gradients": warmup,
        "ess_per_1000_gradients": 1000 * ess / gradients,
        "seconds": seconds,
        "said": said,
    }


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    lines = [
        "| posterior (D) | method | R-hat | worst ESS | gradients | in warm-up | ESS per 1,000 gradients | seconds | says |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['posterior']} ({row['dimension']}) | {row['method']} | {row['rhat']:.3f} | {row['ess']:,.0f} | "
            f"{row['gradients']:,} | {row['warmup_gradients']:,} | {row['ess_per_1000_gradients']:.2f} | "
            f"{row['seconds']:.0f} | {row['said']} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.names:
        for method in METHODS:
            rows.append(measure(name, method, arguments.seed))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            keep(arguments.out / "hard-posteriors-cpu.json", {"rows": rows}, table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
