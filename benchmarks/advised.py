"""What the advice gains, and never loses: `python -m benchmarks.advised --out DIR`.

Two tables. *Side by side*: C chains at once, the vmapped loop over them against the plan that `advise` chooses for C
chains (segments for each, or the loop itself). *Chains that do not forget*: `sample` with `solver=None` against
`sample` with `solver=sequential()`, run time of four chains, with what the advice said and what it and compilation
cost, apart. Runs are interleaved, medians reported. A ratio below 1 is a loss; where the advice is to stay sequential
it is noise.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import OUT, keep, timed
from benchmarks.shooting import EIGHT_SCHOOLS, ROWS, mixture, warmed_up
from partime_mcmc import (
    Status,
    Target,
    from_blackjax,
    hmc,
    random_walk,
    rollout,
    sample,
    sequential,
    solve,
)
from partime_mcmc.dynamics import without_captures
from partime_mcmc.sampling.sample import default_tolerance
from partime_mcmc.predict import advise

# All draws of a run together.
_DRAWS = 65_536
_ONE_OF = {
    "eight schools, MALA": 0,
    "eight schools, HMC 4×0.4": 2,
    "banana, HMC 8×0.5, unit metric": 5,
    "mixture of two normals, MALA": 7,
    "logistic regression 944×25, HMC 4×0.4": 8,
}


def side_by_side(name: str, counts: tuple[int, ...], repeats: int, scale: float) -> list[dict]:
    """One row of `benchmarks.shooting` for several numbers of chains."""
    row = ROWS[_ONE_OF[name]]
    target, warmup = warmed_up(row.model, row.builder, 1000, row.dtype)
    kernel = row.kernel(target.logdensity, metric=warmup.whitening, settings=warmup.settings)
    pool = jax.vmap(lambda position: kernel.carry(kernel.init(position)))(warmup.pool)
    found = []
    for count in counts:
        num_steps = max(1024, int(scale * min(row.num_steps, _DRAWS // count)))
        initial = jax.tree.map(lambda leaf: leaf[jnp.arange(count) % leaf.shape[0]], pool)
        tape = jax.jit(jax.vmap(lambda key: kernel.tape(key, num_steps, None)))(
            jax.random.split(jax.random.key(2), count)
        )
        first = jax.tree.map(lambda leaf: leaf[0], (initial, tape))
        dynamics = without_captures(
            kernel.dynamics(), first[0], jax.tree.map(lambda leaf: leaf[0], first[1])
        )
        tolerance = default_tolerance(kernel, pool.dtype)
        begin = time.perf_counter()
        advice = advise(
            dynamics,
            *first,
            starts=pool,
            num_steps=num_steps,
            num_chains=count,
            tolerance=tolerance,
        )
        seconds = time.perf_counter() - begin
        run = functools.partial(
            solve, solver=advice.solver, schedule=advice.schedule, tolerance=tolerance
        )
        times = timed(
            {
                "loop": (
                    jax.jit(jax.vmap(rollout, in_axes=(None, 0, 0))),
                    (dynamics, initial, tape),
                ),
                "plan": (jax.jit(jax.vmap(run, in_axes=(None, 0, 0))), (dynamics, initial, tape)),
            },
            repeats,
        )
        solution = times["plan"]["value"]
        found.append(
            {
                "name": name,
                "chains": count,
                "num_steps": num_steps,
                "segments": advice.num_segments,
                "expected": advice.speedup,
                "ratio": times["loop"]["seconds"] / times["plan"]["seconds"],
                "loop_seconds": times["loop"]["seconds"],
                "evaluations": float(solution.stats.evaluations.mean()),
                "residual": float(solution.residual.max()),
                "advice_seconds": seconds,
                "compile": times["plan"]["compile"],
                "temp_bytes": times["plan"]["temp_bytes"],
                "status": Status(int(np.max(np.asarray(solution.status)))).name,
            }
        )
        print(found[-1], flush=True)
    return found


def rosenbrock(x):
    """Rosenbrock's valley, tempered by 20."""
    return -((1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2) / 20


def funnel(x):
    """Neal's funnel in five dimensions."""
    return -(x[0] ** 2) / 18 - 0.5 * jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) - 0.5 * x[1:].size * x[0]


def normal(dimension: int) -> Target:
    """A standard normal."""
    return Target(lambda x: -0.5 * jnp.sum(x**2), lambda key: jax.random.normal(key, (dimension,)))


def plane(logdensity, dimension: int) -> Target:
    """A target with normal starts."""
    return Target(logdensity, lambda key: jax.random.normal(key, (dimension,)))


def unforgetting() -> list[tuple[str, Target, object]]:
    """Name, target and kernel of chains that keep their starts in mind."""
    two = mixture().logdensity
    return [
        (
            "normal in 5 dimensions, random walk 0.8",
            normal(5),
            random_walk(normal(5).logdensity, 0.8),
        ),
        (
            "eight schools, random walk 0.5",
            EIGHT_SCHOOLS(),
            random_walk(EIGHT_SCHOOLS().logdensity, 0.5),
        ),
        (
            "normal in 5 dimensions, Barker 1.0",
            normal(5),
            from_blackjax(blackjax.barker(normal(5).logdensity, 1.0)),
        ),
        ("Rosenbrock, HMC 40×0.1", plane(rosenbrock, 2), hmc(rosenbrock, 0.1, jnp.ones(2), 40)),
        ("mixture of two normals, HMC 40×0.3", plane(two, 2), hmc(two, 0.3, jnp.ones(2), 40)),
        ("Neal's funnel, HMC 8×0.2", plane(funnel, 5), hmc(funnel, 0.2, jnp.ones(5), 8)),
    ]


def stays_sequential(name: str, target: Target, kernel, num_samples: int, repeats: int) -> dict:
    """`solver=None` against the sequential solver."""
    runs = {"advised": [], "sequential": []}
    for _ in range(repeats):
        for label, solver in (("advised", None), ("sequential", sequential())):
            runs[label].append(
                sample(
                    jax.random.key(0),
                    target,
                    kernel,
                    num_samples=num_samples,
                    solver=solver,
                    progress=False,
                )
            )
    seconds = {
        label: statistics.median(draws.report.seconds_run for draws in found)
        for label, found in runs.items()
    }
    draws = runs["advised"][0]
    return {
        "name": name,
        "num_steps": num_samples,
        "ratio": seconds["sequential"] / seconds["advised"],
        "run_seconds": seconds["advised"],
        "loop_seconds": seconds["sequential"],
        "residual": float(np.max(np.asarray(draws.certificate.max_residual))),
        "advice_seconds": runs["advised"][0].report.seconds_advise,
        "advice_again_seconds": min(one.report.seconds_advise for one in runs["advised"]),
        "compile_seconds": draws.report.seconds_compile,
        "parallel": bool(draws.advice.parallel),
        "certified": bool(np.asarray(draws.certificate.certified).all()),
        "reason": draws.advice.reason,
        "fallbacks": len(draws.report.fallbacks),
        "sequential_draws": float(draws.report.num_sequential.mean()),
    }


def tables(chains: list[dict], forgetless: list[dict]) -> str:
    """Both tables as Markdown."""
    lines = [
        "| target, kernel | chains | T | segments per chain | expected | measured | evaluations per draw | residual |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in chains:
        lines.append(
            f"| {row['name']} | {row['chains']} | {row['num_steps']:,} | {row['segments']} | "
            f"{row['expected']:.1f}× | **{row['ratio']:.2f}×** | {row['evaluations']:.2f} | "
            f"{row['residual']:.0e} |"
        )
    lines += [
        "",
        "| target, kernel, 4 chains | run time, sequential / `solver=None` | residual, noise units | "
        "advice, s (again) | compile, s | in parallel | what it said |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in forgetless:
        lines.append(
            f"| {row['name']} | **{row['ratio']:.2f}×** = {row['ratio'] * row['run_seconds']:.2f} / "
            f"{row['run_seconds']:.2f} s | {_residual(row)} | "
            f"{row['advice_seconds']:.1f} ({row['advice_again_seconds']:.1f}) | {row['compile_seconds']:.1f} | "
            f"{'yes' if row['parallel'] else 'no'} | {row['reason']} |"
        )
    return "\n".join(lines) + "\n"


def _residual(row: dict) -> str:
    """As a number; rows of older records have none."""
    return f"{row['residual']:.0e}" if "residual" in row else "not recorded"


def main(argv: list[str] | None = None) -> None:
    """Measure and write `shooting-advised-cpu.json` and `.md`, named by the platform; float64 throughout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chains", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument(
        "--num-samples", type=int, default=16_384, help="draws of chains that do not forget"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of every T")
    parser.add_argument(
        "--only", default="", help="rows whose name contains this; others keep their stored results"
    )
    arguments = parser.parse_args(argv)
    stored = arguments.out / f"shooting-advised-{jax.default_backend()}.json"
    old = json.loads(stored.read_text()) if stored.exists() else {"chains": [], "forgetless": []}
    chains, forgetless = (
        {row["name"]: [] for row in old[part]} for part in ("chains", "forgetless")
    )
    for part, into in (("chains", chains), ("forgetless", forgetless)):
        for row in old[part]:
            into[row["name"]].append(row)
    with jax.enable_x64(True):
        for name in _ONE_OF:
            if arguments.only in name:
                chains[name] = side_by_side(
                    name, tuple(arguments.chains), arguments.repeats, arguments.scale
                )
        for name, target, kernel in unforgetting():
            if arguments.only in name:
                forgetless[name] = [
                    stays_sequential(name, target, kernel, arguments.num_samples, arguments.repeats)
                ]
                print(forgetless[name], flush=True)
    rows = {
        "chains": [row for name in _ONE_OF for row in chains.get(name, [])],
        "forgetless": [row for name, *_ in unforgetting() for row in forgetless.get(name, [])],
    }
    keep(stored, rows, tables(rows["chains"], rows["forgetless"]))
    print(tables(rows["chains"], rows["forgetless"]))


if __name__ == "__main__":
    main()
