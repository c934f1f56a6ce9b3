"""Plain leapfrogs, or those that are exact on a standard normal: `python -m benchmarks.integrators [NAME...] --out DIR`.

After the library's own warm-up, paths of the angle that it found (the coordinates and the metric are its own too) are tried from 256
states of its chains, with 1 to 16 gradients and the same momenta (`kernels.leapfrog`). The table has the mean acceptance of both
kinds, and the number of gradients that warm-up chose. Posteriors are those of `benchmarks.hard_posteriors`, or of a file, `--models FILE`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hard_posteriors import known, model_and_data
from benchmarks.record import OUT, keep, rows_so_far
from partime_mcmc import coalescing_hmc, hmc, sample
from partime_mcmc.kernels.kernel_program import KernelParams, KernelProgram
from partime_mcmc.kernels.leapfrog import exact_drift, exact_step, step_for_angle, turned_angle
from partime_mcmc.numpyro import from_numpyro

CHAINS, STATES = 4, 64
NAMES = ("step_size", "num_integration_steps", "drift_fraction")
GRADIENTS = (1, 2, 3, 4, 6, 8, 10, 12, 16)


def measure(name: str, seed: int, models: Path | None) -> dict:
    """One row."""
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    model, data = model_and_data(name, models)
    target = from_numpyro(model, key=jax.random.key(seed), **data)
    key = jax.random.key(seed)
    draws = sample(
        key, target, coalescing_hmc, num_samples=8 * STATES, num_chains=CHAINS, progress=False
    )
    kernel, settings = draws.warmup.kernel, draws.warmup.settings
    angle = turned_angle(*(settings[name] for name in NAMES))
    family = KernelProgram(kernel.family.density, hmc)
    states = jax.tree.map(
        lambda leaf: leaf[:, ::8].reshape(CHAINS * STATES, *leaf.shape[2:]), draws.positions
    )

    @jax.jit
    def rates(numbers, states, keys):
        one = family.kernel(numbers)
        return jax.vmap(lambda key, x: one.step(key, one.init(x))[1].acceptance_rate)(keys, states)

    keys, row = jax.random.split(jax.random.key(seed + 1), CHAINS * STATES), {}
    for num_steps in GRADIENTS:
        exact = exact_step(angle / num_steps)
        kinds = {
            "plain": (step_for_angle(angle, num_steps), 1.0),
            "exact": (exact, exact_drift(exact)),
        }
        for kind, (step, drift) in kinds.items():
            sizes = dict(zip(NAMES, (jnp.asarray(step), jnp.int32(num_steps), jnp.asarray(drift))))
            numbers = KernelParams(kernel.numbers.data, kernel.numbers.whitening, sizes)
            found = np.nan_to_num(np.asarray(rates(numbers, states, keys)))
            row[f"{num_steps}, {kind}"] = float(found.mean())
    return {
        "posterior": name,
        "dimension": int(kernel.numbers.whitening.center.size),
        "angle": angle,
        "chosen": settings["num_integration_steps"],
        "rates": row,
    }


def table(rows: list[dict]) -> str:
    """The Markdown table and what it adds up to."""
    lines = [
        f"| posterior (D) | angle | chosen | {' | '.join(f'{one}' for one in GRADIENTS)} |",
        "|---" * (3 + len(GRADIENTS)) + "|",
    ]

    def rates(row, one):
        return [row["rates"][f"{one}, {kind}"] for kind in ("plain", "exact")]

    for row in rows:
        cells = (" / ".join(f"{rate:.2f}" for rate in rates(row, one)) for one in GRADIENTS)
        lines.append(
            f"| {row['posterior']} ({row['dimension']}) | {row['angle']:.2f} | {row['chosen']} | {' | '.join(cells)} |"
        )
    lines += ["", "Acceptance by gradients: plain / exact leapfrogs.", ""]
    for one in GRADIENTS:
        # Paths that are hardly accepted, or always, tell nothing.
        telling = [
            found for row in rows if max(found := rates(row, one)) > 0.3 and min(found) < 0.98
        ]
        if not telling:
            continue
        plain, exact = np.median(np.reshape(telling, (-1, 2)), axis=0)
        best = np.mean([found[1] > found[0] for found in telling])
        lines.append(
            f"{one} gradients, {len(telling)} posteriors: medians {plain:.2f} / {exact:.2f}; exact ones better on {best:.0%}.\n"
        )
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them by default")
    parser.add_argument("--models", type=Path, help="a file with MODELS and load(name)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    models = None if arguments.models is None else arguments.models.resolve()
    names = arguments.names or list(known(models))
    if unknown := [name for name in names if name not in known(models)]:
        parser.error(f"NAME: got {', '.join(unknown)}, wanted some of {', '.join(known(models))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    stored = arguments.out / "integrators-cpu.jsonl"
    rows = rows_so_far(stored, "posterior")
    for name in names:
        if (name,) not in rows:
            row = rows[name,] = measure(name, arguments.seed, models)
            with open(stored, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    shown = [rows[name,] for name in names]
    keep(stored.with_suffix(".json"), {"rows": shown}, table(shown))
    print(table(shown))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
