"""What the rule for the number of segments loses: `python -m benchmarks.advised --out DIR`.

Two tables. *The rule*: C chains of T steps each, by the vmapped loop over them, by shooting with 64 to 1,024 lanes
(chains × segments) and by what `advise` chooses for them. A row's loss is the time of that choice over the least time of
all that solved the chains, minus one. *Chains that do not forget*: `sample` with `solver=None` against `sample` with
`solver=sequential()`, run time of four chains, compilation apart; the advice of pilot chains and its seconds, which are no
part of a run, stand beside it. Runs are interleaved and medians reported; every row's sequential time is of the same
process.
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
from benchmarks.shooting import (
    BANANA,
    EIGHT_SCHOOLS,
    LOGISTIC,
    fixed_hmc,
    mixture,
    raw_hmc,
    tuned,
    warmed_up,
)
from partime_mcmc import (
    Dynamics,
    Status,
    Target,
    coalescing_hmc,
    from_blackjax,
    hmc,
    mala,
    random_walk,
    rollout,
    sample,
    sequential,
    shooting,
    solve,
)
from partime_mcmc.engine.dynamics import without_captures
from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.forgetting import advise
from partime_mcmc.rnn import gru, gru_params
from partime_mcmc.sampling.plan import default_tolerance

# Lanes that are tried, and the steps of all chains of a row together.
LANES, _STEPS = (64, 128, 256, 512, 1024), 65_536
# Model, builder and kernel by name.
_KERNELS = {
    "eight schools, MALA": (EIGHT_SCHOOLS, *tuned(mala)),
    "eight schools, HMC 4×0.4": (EIGHT_SCHOOLS, *fixed_hmc(0.4, 4)),
    "eight schools, coalescing HMC": (EIGHT_SCHOOLS, *tuned(coalescing_hmc)),
    "banana, HMC 8×0.5, unit metric": (BANANA, *raw_hmc(0.5, 8)),
    "banana, coalescing HMC": (BANANA, *tuned(coalescing_hmc)),
    "mixture of two normals, MALA": (mixture, *tuned(mala)),
    "mixture of two normals, coalescing HMC": (mixture, *tuned(coalescing_hmc)),
    "logistic regression 944×25, HMC 4×0.4": (LOGISTIC, *fixed_hmc(0.4, 4)),
}
_NETWORK = "GRU, 32 units, float32"


def chains_of(name: str, num_chains: int, num_steps: int):
    """Dynamics, starts `(C, ...)`, drives `(C, T, ...)`, states to forget, and the tolerance of `sample`."""
    model, builder, make = _KERNELS[name]
    target, warmup = warmed_up(model, builder, 1000, "float64")
    kernel = make(target.logdensity, metric=warmup.whitening, settings=warmup.settings)
    pool = jax.vmap(lambda position: kernel.carry(kernel.init(position)))(warmup.pool)
    initial = jax.tree.map(lambda leaf: leaf[jnp.arange(num_chains) % leaf.shape[0]], pool)
    state = kernel.init(jax.tree.map(lambda leaf: leaf[0], warmup.positions))
    tape = jax.jit(jax.vmap(lambda key: kernel.tape(key, num_steps, state)))(
        jax.random.split(jax.random.key(2), num_chains)
    )
    first = jax.tree.map(lambda leaf: leaf[0], initial)
    drive = jax.tree.map(lambda leaf: leaf[0, 0], tape)
    dynamics = without_captures(kernel.dynamics(), first, drive)
    return dynamics, initial, tape, pool, default_tolerance(kernel, pool.dtype)


def networks_of(num_chains: int, num_steps: int):
    """The same of a network driven by noise."""
    params = gru_params(jax.random.key(3), 32, 32, jnp.float32)
    dynamics = Dynamics(lambda params, state, drive: gru(params, state, drive)[0], params)
    drives = jax.random.normal(jax.random.key(4), (num_chains, num_steps, 32), jnp.float32)
    pool = jnp.tanh(jax.random.normal(jax.random.key(5), (8, 32), jnp.float32))
    return dynamics, jnp.zeros((num_chains, 32), jnp.float32), drives, pool, Tolerance()


def measure(name: str, num_chains: int, repeats: int, scale: float) -> dict:
    """One row: the loop, several numbers of segments, and what the advice chooses."""
    num_steps = max(1024, int(scale * _STEPS / num_chains))
    make = networks_of if name == _NETWORK else functools.partial(chains_of, name)
    dynamics, initial, drives, pool, tolerance = make(num_chains, num_steps)
    begin = time.perf_counter()
    advice = advise(
        dynamics,
        *jax.tree.map(lambda leaf: leaf[0], (initial, drives)),
        starts=pool,
        num_steps=num_steps,
        num_chains=num_chains,
        tolerance=tolerance,
    )
    seconds = time.perf_counter() - begin
    tried = {lanes // num_chains for lanes in LANES} | {advice.num_segments}
    runs = {1: jax.jit(jax.vmap(rollout, in_axes=(None, 0, 0)))}
    for segments in sorted(tried - {0, 1}):
        run = functools.partial(solve, solver=shooting(segments), tolerance=tolerance)
        runs[segments] = jax.jit(jax.vmap(run, in_axes=(None, 0, 0)))
    found = timed({key: (run, (dynamics, initial, drives)) for key, run in runs.items()}, repeats)
    entries = [entry(key, found[key]) for key in runs]
    chosen = next(item for item in entries if item["segments"] == advice.num_segments)
    best = min(
        (item for item in entries if item["status"] == "CONVERGED"),
        key=lambda item: item["seconds"],
    )
    return {
        "name": name,
        "chains": num_chains,
        "num_steps": num_steps,
        "meeting": advice.meeting._asdict(),
        "advice_seconds": seconds,
        "expected_evaluations": advice.evaluations_per_step,
        "reason": advice.reason,
        "loop_seconds": found[1]["seconds"],
        "ratio": found[1]["seconds"] / chosen["seconds"],
        "loss": chosen["seconds"] / best["seconds"] - 1,
        "chosen": chosen,
        "best": best,
        "tried": entries,
    }


def entry(segments: int, found: dict) -> dict:
    """Time, residual and work of one number of segments per chain; one is the loop."""
    common = {key: found[key] for key in ("seconds", "compile", "temp_bytes")}
    if segments == 1:
        # The loop's path obeys the recurrence as it was evaluated.
        return {
            "segments": 1,
            **common,
            "status": "CONVERGED",
            "evaluations": 1.0,
            "residual": 0.0,
        }
    solution = found["value"]
    return {
        "segments": segments,
        **common,
        "status": Status(int(np.max(np.asarray(solution.status)))).name,
        "evaluations": float(solution.stats.evaluations.mean()),
        "residual": float(solution.residual.max()),
    }


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
    runs = {"default": [], "sequential": []}
    for _ in range(repeats):
        for label, solver in (("default", None), ("sequential", sequential())):
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
    draws = runs["default"][0]
    advice, *seconds_advise = pilots(runs["default"])
    return {
        "name": name,
        "num_steps": num_samples,
        "ratio": seconds["sequential"] / seconds["default"],
        "run_seconds": seconds["default"],
        "loop_seconds": seconds["sequential"],
        "residual": float(np.max(np.asarray(draws.certificate.max_residual))),
        "advice_seconds": seconds_advise[0],
        "advice_again_seconds": min(seconds_advise),
        "compile_seconds": draws.report.seconds_compile,
        "parallel": bool(advice.parallel),
        "certified": bool(np.asarray(draws.certificate.certified).all()),
        "reason": advice.reason,
        "fallbacks": len(draws.report.fallbacks),
        "sequential_draws": float(draws.report.num_sequential.mean()),
    }


def pilots(runs: list) -> tuple:
    """The advice of pilot chains, the same for all of these runs, and the seconds of each; the first one compiles."""
    seconds = []
    for draws in runs:
        begin = time.perf_counter()
        advice = draws.advice
        seconds.append(time.perf_counter() - begin)
    return advice, *seconds


def tables(chains: list[dict], forgetless: list[dict]) -> str:
    """Both tables as Markdown."""
    lines = [
        "| target, kernel | chains | T | meeting: median, worst | loop, s | segments per chain: s | rule: segments, s, "
        "residual | best: segments, s | loop / rule | loss of the rule |",
        "|---" * 10 + "|",
    ]
    for row in chains:
        tried = ", ".join(
            f"{item['segments']}: {item['seconds']:.4f}"
            + ("" if item["status"] == "CONVERGED" else " (not solved)")
            for item in row["tried"]
            if item["segments"] > 1
        )
        chosen, best, meeting = row["chosen"], row["best"], row["meeting"]
        lines.append(
            f"| {row['name']} | {row['chains']} | {row['num_steps']:,} | {meeting['median']:.0f}, {meeting['worst']} | "
            f"{row['loop_seconds']:.4f} | {tried} | {chosen['segments']}, {chosen['seconds']:.4f}, "
            f"{chosen['residual']:.0e} | {best['segments']}, {best['seconds']:.4f} | **{row['ratio']:.2f}×** | "
            f"**{row['loss']:.0%}** |"
        )
    lines += [
        "",
        "| target, kernel, 4 chains | run time, sequential / `solver=None` | residual, noise units | "
        "advice, s (again) | compile, s | in parallel | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in forgetless:
        lines.append(
            f"| {row['name']} | **{row['ratio']:.2f}×** = {row['loop_seconds']:.2f} / {row['run_seconds']:.2f} s | "
            f"{row['residual']:.0e} | {row['advice_seconds']:.1f} ({row['advice_again_seconds']:.1f}) | "
            f"{row['compile_seconds']:.1f} | {'yes' if row['parallel'] else 'no'} | {row['reason']} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure and write `shooting-advised-cpu.json` and `.md`, named by the platform; float64 but for the network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chains", type=int, nargs="*", default=[1, 4, 16])
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
    chains = {(row["name"], row["chains"]): row for row in old["chains"]}
    forgetless = {row["name"]: row for row in old["forgetless"]}
    names, unforgettable = [*_KERNELS, _NETWORK], unforgetting()

    def save():
        order = sorted(chains, key=lambda key: (names.index(key[0]), key[1]))
        rows = {
            "chains": [chains[key] for key in order],
            "forgetless": [forgetless[name] for name, *_ in unforgettable if name in forgetless],
        }
        keep(stored, rows, tables(rows["chains"], rows["forgetless"]))

    with jax.enable_x64(True):
        for name in names:
            for count in arguments.chains if arguments.only in name else ():
                chains[name, count] = measure(name, count, arguments.repeats, arguments.scale)
                print(tables([chains[name, count]], []).splitlines()[2], flush=True)
                save()
        for name, target, kernel in unforgettable:
            if arguments.only in name:
                forgetless[name] = stays_sequential(
                    name, target, kernel, arguments.num_samples, arguments.repeats
                )
                print(forgetless[name], flush=True)
                save()


if __name__ == "__main__":
    main()
