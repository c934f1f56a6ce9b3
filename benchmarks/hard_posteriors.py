"""Posteriors that are hard on purpose, ours beside NUTS: `python -m benchmarks.hard_posteriors [NAME...] --out DIR`.

Hierarchies written the centred way, a sparse regression, a latent random walk, Neal's funnel as a bare log density; data are
simulated with fixed seeds, but for the eight schools. `--models FILE` takes others: a file with `MODELS`, by name, and
`load(name)`, which gives a NumPyro model and its keyword arguments; `references.json` beside it, if there, has
`{name: {"moments": {"site[1]": {"mean", "sd", "mcse_mean", "mcse_sd"}}}}` of sites' own values.

Four chains, 1,000 steps of warm-up allowed and 1,000 draws each, float64, every run in a process of its own:
`CoalescingHMC` through `ParallelMCMC`, and NumPyro's NUTS with a diagonal and with a dense mass matrix. A run goes on where the last
one into the same folder stopped.

R-hat and effective draws are of the worst unconstrained coordinate, effective draws the smaller of means and of squared
deviations; they are counted against the gradients of sampling, and those of warm-up stand beside them. NUTS is the one of both
that has more effective draws per gradient. |z| is the worst deviation of a mean or standard deviation from the reference, in
standard errors of both. `--methods "paths of 3;our NUTS"` runs other kernels after our warm-up, to see whether its choice of a path is
the right one. Seconds of whole runs, compilation included, are in the JSON; how long chains take beside the loop over the
same steps is for `benchmarks.posteriors`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

import partime_mcmc.numpyro
from benchmarks.record import OUT, figures, in_a_process, keep, module_at, rows_so_far
from partime_mcmc import CoalescingHMC, ParallelMCMC
from partime_mcmc.diagnostics import mixing

CHAINS, STEPS = 4, 1000
# What a run should reach in its worst coordinate.
MOST_RHAT, LEAST_ESS = 1.01, 400


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


def ours(model, data: dict, key, kernel=CoalescingHMC) -> tuple[dict, dict, dict]:
    """Positions and sites' values, leaves `(C, T, ...)`, and what else is known of the run."""
    mcmc = ParallelMCMC(
        kernel(model),
        num_warmup=STEPS,
        num_samples=STEPS,
        num_chains=CHAINS,
        progress_bar=False,
    )
    mcmc.run(key, **data)
    report = mcmc.report
    residual = float(np.max(np.asarray(report.certificate.max_residual)))
    return (
        mcmc.draws.positions,
        mcmc.get_samples(group_by_chain=True),
        {
            "gradients": report.num_gradients,
            "warmup_gradients": report.warmup.num_gradients,
            "evaluations_per_draw": report.run.evaluations_per_sample,
            "forgets_within": report.run.memory,
            "residual": residual,
            "said": report.verdict.outcome.value,
        },
    )


def nuts(model, data: dict, key, dense_mass: bool) -> tuple[dict, dict, dict]:
    """The same by NumPyro."""
    kernel = NUTS(model, dense_mass=dense_mass)
    mcmc = MCMC(
        kernel,
        num_warmup=STEPS,
        num_samples=STEPS,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
        postprocess_fn=lambda position: position,
    )
    mcmc.warmup(key, extra_fields=("num_steps",), collect_warmup=True, **data)
    before = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(mcmc.post_warmup_state.rng_key, extra_fields=("num_steps", "diverging"), **data)
    fields = mcmc.get_extra_fields()
    positions = mcmc.get_samples(group_by_chain=True)
    constrain = jax.jit(jax.vmap(jax.vmap(kernel.postprocess_fn((), data))))
    return (
        positions,
        constrain(positions) if positions else {},
        {
            "gradients": int(fields["num_steps"].sum()),
            "warmup_gradients": before,
            "said": f"{int(fields['diverging'].sum())} divergences",
        },
    )


METHODS = {
    "ours": ours,
    "NUTS": lambda *run: nuts(*run, dense_mass=False),
    "NUTS, dense": lambda *run: nuts(*run, dense_mass=True),
}
# Other kernels after our warm-up: is the default's path the right one?
OTHERS = {
    "paths of 3": lambda *run: ours(*run, partial(CoalescingHMC, trajectory_length=3.0)),
    "paths of 6": lambda *run: ours(*run, partial(CoalescingHMC, trajectory_length=6.0)),
    "our NUTS": lambda *run: ours(*run, partime_mcmc.numpyro.NUTS),
}


def known(models: Path | None) -> dict:
    """Posteriors by name, of a file or of this one."""
    return MODELS if models is None else module_at(models, "models_of_the_benchmark").MODELS


def model_and_data(name: str, models: Path | None) -> tuple:
    """A model and its keyword arguments."""
    if models is None:
        return MODELS[name], {}
    return module_at(models, "models_of_the_benchmark").load(name)


def measure(name: str, method: str, seed: int, models: Path | None) -> dict:
    """One row, in this process."""
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    model, data = model_and_data(name, models)
    begin = time.perf_counter()
    positions, values, known_of_run = (METHODS | OTHERS)[method](model, data, jax.random.key(seed))
    row = {"posterior": name, "method": method, "seconds": time.perf_counter() - begin}
    leaves = [np.asarray(leaf, float).reshape(CHAINS, STEPS, -1) for leaf in positions.values()]
    x = np.concatenate([*leaves, np.zeros((CHAINS, STEPS, 0))], axis=2)
    row |= {"dimension": x.shape[2]} | known_of_run
    if x.shape[2]:
        # A chain that never moves tells nothing about itself.
        row["rhat"] = float(np.nan_to_num(mixing.rank_rhat(x), nan=np.inf).max())
        row["ess"] = float(np.nan_to_num(mixing.ess_mean_and_square(x)).min())
        row["ess_per_1000_gradients"] = 1000 * row["ess"] / row["gradients"]
    references = None if models is None else models.with_name("references.json")
    if references is not None and references.exists():
        reference = json.loads(references.read_text()).get(name, {"moments": {}})
        row |= deviation(values, reference["moments"])
    return row


def deviation(values: dict[str, np.ndarray], moments: dict[str, dict]) -> dict:
    """Worst |z| of means and standard deviations against a reference, `{}` where there is none."""
    worst = []
    for name, wanted in moments.items():
        site, _, indices = name.removesuffix("]").partition("[")
        x = np.asarray(values[site], float)
        place = [int(index) - 1 for index in indices.split(",")] if indices else []
        one = x[:, :, *place].reshape(*x.shape[:2], 1)
        squares = (one - one.mean()) ** 2
        mean, sd = float(one.mean()), float(one.std())
        errors = {
            "mean": sd / np.sqrt(mixing.ess_mean(one)[0]),
            "sd": squares.std() / np.sqrt(mixing.ess_mean(squares)[0]) / (2 * sd),
        }
        for moment, found in (("mean", mean), ("sd", sd)):
            if wanted.get(moment) is not None:
                error = np.hypot(errors[moment], wanted["mcse_" + moment])
                worst.append(abs(found - wanted[moment]) / error)
    return {"z": float(max(worst))} if worst else {}


def best_nuts(rows: dict[str, dict]) -> dict:
    """Of one posterior's rows by method, NUTS' with most effective draws per gradient; `{}` if it has none."""
    found = [row for method, row in rows.items() if method.startswith("NUTS") and "ess" in row]
    return max(found, key=lambda row: row["ess_per_1000_gradients"], default={})


def table(rows: list[dict]) -> str:
    """The Markdown table and what it adds up to."""
    posteriors: dict[str, dict[str, dict]] = {}
    for row in rows:
        posteriors.setdefault(row["posterior"], {})[row["method"]] = row
    lines = [
        "| posterior (D) | R-hat, ours / NUTS | ESS, ours / NUTS | ESS per 1,000 gradients, ours / NUTS | times | "
        "gradients of warm-up, ours / NUTS | \\|z\\|, ours / NUTS | evaluations a draw | forgets within | residual | says |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    both = []
    for name, of_posterior in posteriors.items():
        one, other = of_posterior.get("ours", {}), best_nuts(of_posterior)
        if "ess" in one and "ess" in other:
            both.append((one, other))
        lines.append(_line(name, one, other))
    ratios = [
        ratio for one, other in both if (ratio := _ratio(one, other, "ess_per_1000_gradients"))
    ]
    warmups = [ratio for one, other in both if (ratio := _ratio(one, other, "warmup_gradients"))]
    lines.append("")
    for whose, of_method in (
        ("Ours", [rows.get("ours", {}) for rows in posteriors.values()]),
        ("NUTS", list(map(best_nuts, posteriors.values()))),
    ):
        ran = [row for row in of_method if "ess" in row]
        good = [row for row in ran if row["rhat"] <= MOST_RHAT and row["ess"] >= LEAST_ESS]
        lines.append(
            f"{whose}: R-hat at most {MOST_RHAT} and ESS at least {LEAST_ESS} on {len(good)} of {len(ran)}."
        )
    if ratios:
        lines.append(
            f"Effective draws per gradient at least NUTS' on {sum(ratio >= 1 for ratio in ratios)} of {len(ratios)}, "
            f"median {statistics.median(ratios):.1f} times; gradients of warm-up: median {statistics.median(warmups):.2f} times."
        )
    lines += others(posteriors)
    failed = [row for row in rows if "failed" in row]
    lines += [
        "",
        *(f"{row['posterior']}, {row['method']}: {row['failed']}.\n" for row in failed),
    ]
    return "\n".join(lines).rstrip() + "\n"


def others(posteriors: dict[str, dict[str, dict]]) -> list[str]:
    """Lines on what other kernels gave after the same warm-up, none where none was run."""
    with_others = {name: rows for name, rows in posteriors.items() if OTHERS.keys() & rows.keys()}
    if not with_others:
        return []
    kernels = ["ours", *OTHERS]
    lines = [
        "",
        "The same warm-up with other kernels, effective draws per 1,000 gradients (of all draws; evaluations a draw):",
        "",
        f"| posterior | {' | '.join(kernels)} |",
        "|---" * (1 + len(kernels)) + "|",
    ]
    for name, rows in with_others.items():
        cells = (
            f"{row['ess_per_1000_gradients']:.3g} ({row['ess']:,.0f}; {row['evaluations_per_draw']:.1f})"
            if "ess" in (row := rows.get(kernel, {}))
            else "–"
            for kernel in kernels
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _ratio(one: dict, other: dict, name: str) -> float | None:
    """A figure of ours over NUTS', None where NUTS' is 0."""
    return one[name] / other[name] if other[name] else None


def _line(name: str, one: dict, other: dict) -> str:
    """A posterior's line; a dash stands for what is not known."""

    figure = "ess_per_1000_gradients"
    ratio = _ratio(one, other, figure) if figure in one and figure in other else None
    return " | ".join(
        (
            f"| {name} ({one.get('dimension', other.get('dimension', '–'))})",
            figures([one, other], "rhat", ".3f"),
            figures([one, other], "ess", ",.0f"),
            figures([one, other], figure, ".3g"),
            "–" if ratio is None else f"{ratio:.1f}×",
            figures([one, other], "warmup_gradients", ",d"),
            figures([one, other], "z", ".1f"),
            figures([one], "evaluations_per_draw", ".2f"),
            figures([one], "forgets_within", "d"),
            figures([one], "residual", ".0e"),
            f"{one.get('said', 'failed' if 'failed' in one else '–')} |",
        )
    )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them by default")
    parser.add_argument("--models", type=Path, help="a file with MODELS and load(name)")
    parser.add_argument("--methods", default=";".join(METHODS), help="semicolons between them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=900, help="seconds for a run")
    parser.add_argument("--record", default="hard-posteriors-cpu", help="name of the record")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        name, method, seed, models = json.loads(arguments.one)
        print(json.dumps(measure(name, method, seed, None if models is None else Path(models))))
        return 0
    models = None if arguments.models is None else arguments.models.resolve()
    names, methods = arguments.names or list(known(models)), arguments.methods.split(";")
    if unknown := [name for name in names if name not in known(models)]:
        parser.error(f"NAME: got {', '.join(unknown)}, wanted some of {', '.join(known(models))}")
    every = METHODS | OTHERS
    if unknown := [method for method in methods if method not in every]:
        parser.error(f"--methods: got {'; '.join(unknown)}, wanted some of {'; '.join(every)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    stored = arguments.out / f"{arguments.record}.jsonl"
    rows = rows_so_far(stored, "posterior", "method")
    for method in methods:
        for name in names:
            if (name, method) in rows:
                continue
            of_run = [name, method, arguments.seed, None if models is None else str(models)]
            found = in_a_process("benchmarks.hard_posteriors", of_run, arguments.limit)
            row = rows[name, method] = {"posterior": name, "method": method} | found
            print(json.dumps(row), flush=True)
            with open(stored, "a") as file:
                file.write(json.dumps(row) + "\n")
    shown = [rows[name, method] for name in names for method in every if (name, method) in rows]
    keep(arguments.out / f"{arguments.record}.json", {"rows": shown}, table(shown))
    print(table(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
