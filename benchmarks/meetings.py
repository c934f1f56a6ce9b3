"""Meeting times of coupled chains: `python -m benchmarks.meetings --out DIR [--posteriors FOLDER]`.

For every model, in coordinates whitened by the covariance of a long run: steps until two chains with the same random
numbers, started from two posterior draws, are *the same floats* (and, for plain noise, equal to 1e-8), over 64 pairs in
each of some seeds; and the bulk effective sample size per 1,000 gradients, the worse of all coordinates and their
squares. Kernels of one model share the path length and step size chosen by acceptance on pooled draws, so rows differ in
their coupling and landing steps only.

`--posteriors` takes a folder with a `models.py` (`MODELS[name] = (model, prepare)`) and one JSON file with `data` per
name.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks.record import OUT, keep, module_at
from partime_mcmc import (
    Kernel,
    MultishiftCoupling,
    Target,
    Tolerance,
    coalescing_hmc,
    from_numpyro,
    hmc,
    mala,
    sample,
)
from partime_mcmc.diagnostics.arviz import ess_bulk
from partime_mcmc.forgetting import meeting_times
from partime_mcmc.kernels import Whitening, blackjax_loop
from partime_mcmc.models import MODELS

NUM_PAIRS, HORIZON = 64, 2000
CHAINS, DRAWS = 8, 4096
LEAPFROGS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)


def funnel() -> Target:
    """Neal's funnel: a log scale of standard deviation 3, and eight coordinates of that scale."""
    return Target(
        lambda x: -(x[0] ** 2) / 18 - 4 * x[0] - 0.5 * jnp.exp(-x[0]) * jnp.sum(x[1:] ** 2),
        lambda key: jax.random.normal(key, (9,)),
    )


def modes() -> Target:
    """Two unit normals in the plane, eight apart: no metric fits both."""
    return Target(
        lambda x: jnp.logaddexp(-0.5 * jnp.sum((x - 2.8) ** 2), -0.5 * jnp.sum((x + 2.8) ** 2)),
        lambda key: 4 * jax.random.normal(key, (2,)),
    )


def normal() -> Target:
    """A standard normal in 50 dimensions."""
    return Target(lambda x: -0.5 * jnp.sum(x**2), lambda key: jax.random.normal(key, (50,)))


def latent_process() -> Target:
    """Counts at eleven places, log rates a Gaussian process with unknown length and scale, non-centred."""
    places = jnp.linspace(-10, 10, 11)
    counts = jax.random.poisson(jax.random.key(7), jnp.exp(1.5 + 1.5 * jnp.sin(places / 3)))

    def logdensity(x):
        length, scale = jnp.exp(x[0]), jnp.exp(x[1])
        kernel = scale**2 * jnp.exp(
            -0.5 * ((places[:, None] - places) / length) ** 2
        ) + 1e-8 * jnp.eye(11)
        rates = jnp.linalg.cholesky(kernel) @ x[2:]
        prior = 25 * x[0] - 4 * length - scale**2 / 8 + x[1] - 0.5 * jnp.sum(x[2:] ** 2)
        return prior + jnp.sum(counts * rates - jnp.exp(rates))

    return Target(
        logdensity,
        lambda key: jnp.array([1.8, 0.0] + 11 * [0.0]) + 0.3 * jax.random.normal(key, (13,)),
    )


HARD = {
    "normal, 50 dimensions": normal,
    "funnel": funnel,
    "two modes, 8 apart": modes,
    "latent process, counts": latent_process,
}


def targets(folder: Path | None) -> dict[str, Callable[[], Target]]:
    """The built-in models, those of a folder of reference posteriors, and some that are hard on purpose."""
    found = {
        name: functools.partial(lambda model: model().make_target(jax.random.key(0)), model)
        for name, model in MODELS.items()
    }
    if folder is not None:
        for name, (model, prepare) in module_at(
            folder / "models.py", "reference_models"
        ).MODELS.items():
            found[name] = functools.partial(_of_reference, folder, name, model, prepare)
    return {**found, **HARD}


def _of_reference(folder, name, model, prepare):
    return from_numpyro(
        model,
        key=jax.random.key(0),
        **prepare(json.loads((folder / f"{name}.json").read_text())["data"]),
    )


def whitened(target: Target) -> tuple[Whitening, jax.Array]:
    """Coordinates whitened by the covariance of a run, and draws of it in these coordinates, shape `(K, D)`."""
    draws = sample(
        jax.random.key(1),
        target,
        hmc,
        num_samples=DRAWS,
        num_chains=4,
        num_warmup=1000,
        progress=False,
    )
    flat = jax.vmap(jax.vmap(lambda position: ravel_pytree(position)[0]))(draws.positions)
    flat = flat.reshape(-1, flat.shape[-1])
    example = jax.tree.map(lambda leaf: leaf[0, 0], draws.positions)
    metric = Whitening.of_covariance(
        example, flat.mean(axis=0), jnp.cov(flat, rowvar=False).reshape(flat.shape[1], -1)
    )
    pool = jax.random.permutation(jax.random.key(2), flat)[:1024]
    return metric, jax.vmap(lambda one: metric.enter(ravel_pytree(example)[1](one)))(pool)


def acceptance(kernel: Kernel, pool: jax.Array) -> float:
    """Mean acceptance probability of one step from each of 128 posterior draws."""

    def one(z, key):
        return kernel.step(key, kernel.algorithm.init(z))[1].acceptance_rate

    return float(
        jnp.mean(jax.jit(jax.vmap(one))(pool[:128], jax.random.split(jax.random.key(3), 128)))
    )


def tuned(density: Callable, metric: Whitening, pool: jax.Array) -> dict:
    """Fewest leapfrogs of a quarter period accepted at 0.8, and the largest landing step accepted at 0.6."""
    for leapfrogs in LEAPFROGS:
        step = 2 * np.sin(np.pi / (4 * leapfrogs))
        if acceptance(hmc(density, step, metric, leapfrogs), pool) >= 0.8:
            break
    landing = min(np.sqrt(2), 2.2 * step)
    while (
        acceptance(mala(density, landing**2 / 2, metric, coupling=MultishiftCoupling()), pool) < 0.6
        and landing > 0.02
    ):
        landing /= 1.25
    return {
        "num_integration_steps": leapfrogs,
        "step_size": float(step),
        "mala_step_size": float(landing**2 / 2),
    }


def kernels(
    density: Callable, metric: Whitening, settings: dict
) -> dict[str, tuple[Kernel, float]]:
    """Kernels to compare, and gradients per step of each."""
    leapfrogs, step, langevin = (
        settings["num_integration_steps"],
        settings["step_size"],
        settings["mala_step_size"],
    )
    found = {
        "mala, plain": (mala(density, langevin, metric), 1),
        "mala, coalescing": (mala(density, langevin, metric, coupling=MultishiftCoupling()), 1),
        "hmc, plain": (hmc(density, step, metric, leapfrogs), leapfrogs),
        # A path of 1.2, shorter than a quarter period: aimed momenta then meet soonest.
        "hmc, coalescing": (
            hmc(density, 1.2 / leapfrogs, metric, leapfrogs, coupling=MultishiftCoupling()),
            leapfrogs,
        ),
    }
    for every in (1, 2, 4):
        found[f"coalescing_hmc, every {every}"] = (
            coalescing_hmc(density, step, metric, leapfrogs, mala_step_size=langevin, every=every),
            leapfrogs + 1 / every,
        )
    return found


def meetings(kernel: Kernel, pool: jax.Array, num_seeds: int, tolerance: Tolerance) -> np.ndarray:
    """Steps until pairs of posterior draws meet, 64 for each seed; infinity for those that do not within the horizon."""
    pick = jnp.concatenate(
        [
            jax.random.choice(jax.random.key(seed), len(pool), (2, NUM_PAIRS), replace=False)
            for seed in range(num_seeds)
        ],
        axis=1,
    )
    keys = jnp.concatenate(
        [jax.random.split(jax.random.key(100 + seed), NUM_PAIRS) for seed in range(num_seeds)]
    )
    state = kernel.algorithm.init(pool[0])
    tapes = jax.jit(jax.vmap(lambda key: kernel.tape(key, HORIZON, state)))(keys)
    found = meeting_times(
        kernel.dynamics(), pool[pick[0]], pool[pick[1]], tapes, tolerance=tolerance
    )
    return np.where(np.asarray(found.met), np.asarray(found.steps), np.inf)


def ess_per_kilogradient(kernel: Kernel, pool: jax.Array, gradients: float) -> float:
    """Bulk ESS of the worst coordinate or square, per 1,000 gradients, of chains that start from posterior draws."""

    def run(z, key):
        return blackjax_loop(kernel, kernel.algorithm.init(z), jax.random.split(key, DRAWS))[0]

    draws = np.asarray(
        jax.jit(jax.vmap(run))(pool[:CHAINS], jax.random.split(jax.random.key(4), CHAINS))
    )
    worst = min(
        ess_bulk(values[..., d]) for values in (draws, draws**2) for d in range(draws.shape[-1])
    )
    return 1000 * worst / (CHAINS * DRAWS * gradients)


def measure(target: Target, num_seeds: int) -> dict:
    """All kernels on one target."""
    metric, pool = whitened(target)
    settings = tuned(target.logdensity, metric, pool)
    rows = {}
    for name, (kernel, gradients) in kernels(target.logdensity, metric, settings).items():
        plain_or_steered = name.startswith("hmc") or name.endswith("plain")
        tolerance = Tolerance(0.0, 1e-8) if plain_or_steered else Tolerance(0.0, 0.0)
        steps = meetings(kernel, pool, num_seeds, tolerance)
        rows[name] = {
            "distance": 1e-8 if plain_or_steered else 0.0,
            "median": float(np.median(steps)),
            "ninety_percent": float(np.quantile(steps, 0.9, method="higher")),
            "worst": float(steps.max()),
            "unmet": int(np.isinf(steps).sum()),
            "pairs": len(steps),
            "ess_per_kilogradient": ess_per_kilogradient(kernel, pool, gradients),
        }
    return {"dimension": int(pool.shape[1]), "settings": settings, "kernels": rows}


def table(results: dict) -> str:
    """The Markdown table: median / 90% / worst meeting time, and ESS per 1,000 gradients."""
    names = list(next(iter(results.values()))["kernels"])
    lines = ["| model (D; L) | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for model, found in results.items():
        cells = []
        for name in names:
            row = found["kernels"][name]
            unmet = f", {row['unmet']} of {row['pairs']} unmet" if row["unmet"] else ""
            cells.append(
                f"{row['median']:.0f} / {row['ninety_percent']:.0f} / {row['worst']:.0f}{unmet}; "
                f"{row['ess_per_kilogradient']:.0f}"
            )
        lines.append(
            f"| {model} ({found['dimension']}; {found['settings']['num_integration_steps']}) | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure and write `dice-meetings.json` and `dice-meetings.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--posteriors", type=Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--only",
        default="",
        help="models whose name contains this; others keep their stored results",
    )
    arguments = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    results = {}
    for name, make in targets(arguments.posteriors).items():
        if arguments.only in name:
            results[name] = measure(make(), arguments.seeds)
            print(table({name: results[name]}), file=sys.stderr, flush=True)
    stored = arguments.out / "dice-meetings.json"
    if arguments.only and stored.exists():
        results = {**json.loads(stored.read_text())["models"], **results}
    keep(stored, {"models": results}, table(results))
    print(table(results))


if __name__ == "__main__":
    main()
