"""One chain by shooting against BlackJAX's own loop: `python -m benchmarks.shooting --out DIR`.

For every row the same chain is computed twice with the same keys: by `lax.scan` over the kernel's step with full
states and cached gradients (what a BlackJAX user runs, but that HMC's trajectories leave the density's value out on
the way), and by shooting with several numbers of segments. Runs are interleaved and medians are reported, compilation
apart. Beside every time stand the residual that the solver saw, evaluations of the step per draw, what `advise` would
have chosen and what that gained, and what an independent certificate of the whole path found (its own time is in the
JSON, not part of the ratio). The tolerance is that of `sample`.

Decisions that differ from those of the loop: both programs round differently in the last place, so a proposal whose
acceptance probability lies within that of its uniform may go either way; a forgetful chain is back on the other one's
path after its meeting time. About T times the mean difference of acceptance probabilities are expected: below one per
run in float64, a few in float32, where the certificate still shows that every decision is right under its own batched
evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import OUT, keep, timed
from partime_mcmc import (
    Dynamics,
    Kernel,
    Status,
    certify,
    hmc,
    mala,
    nuts,
    rollout,
    sample,
    shooting,
    solve,
)
from partime_mcmc.engine.dynamics import without_captures
from partime_mcmc.forgetting import advise
from partime_mcmc.models import MODELS
from partime_mcmc.sampling.plan import default_tolerance
from partime_mcmc.sampling.target import Target

SEGMENTS = (8, 16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    model: Callable[[], Target]
    builder: Callable
    kernel: Callable
    num_steps: int
    dtype: str = "float64"


def mixture() -> Target:
    """Two unit normals in the plane, three apart."""

    def logdensity(x):
        return jnp.logaddexp(-0.5 * jnp.sum((x - 1.5) ** 2), -0.5 * jnp.sum((x + 1.5) ** 2))

    return Target(logdensity, lambda key: jax.random.normal(key, (2,)))


def built_in(name: str) -> Callable[[], Target]:
    """A model that the package ships."""
    return lambda: MODELS[name]().make_target(jax.random.key(0))


def fixed_hmc(step_size: float, leapfrogs: int) -> tuple[Callable, Callable]:
    """HMC, warmed up for its metric, with given step size and leapfrogs in whitened coordinates."""
    return hmc, lambda logdensity, metric, settings: hmc(logdensity, step_size, metric, leapfrogs)


def raw_hmc(step_size: float, leapfrogs: int) -> tuple[Callable, Callable]:
    """HMC with a unit metric in the target's own coordinates."""
    return hmc, lambda logdensity, metric, settings: hmc(
        logdensity, step_size, jnp.ones_like(metric.center), leapfrogs
    )


def tuned(builder: Callable) -> tuple[Callable, Callable]:
    """A builder, and the kernel with the settings that warm-up chose for it."""
    return builder, lambda logdensity, metric, settings: builder(
        logdensity, metric=metric, **settings
    )


EIGHT_SCHOOLS, BANANA, LOGISTIC = (
    built_in(name) for name in ("eight_schools", "banana", "logistic")
)

ROWS = (
    Row("eight schools, MALA", EIGHT_SCHOOLS, *tuned(mala), 65_536),
    Row("eight schools, HMC 8×0.2", EIGHT_SCHOOLS, *fixed_hmc(0.2, 8), 65_536),
    Row("eight schools, HMC 4×0.4", EIGHT_SCHOOLS, *fixed_hmc(0.4, 4), 65_536),
    Row("eight schools, MALA", EIGHT_SCHOOLS, *tuned(mala), 65_536, "float32"),
    Row("eight schools, NUTS", EIGHT_SCHOOLS, *tuned(nuts), 65_536),
    Row("banana, HMC 8×0.5, unit metric", BANANA, *raw_hmc(0.5, 8), 65_536),
    Row("banana, HMC 8×0.2, whitened", BANANA, *fixed_hmc(0.2, 8), 32_768),
    Row("mixture of two normals, MALA", mixture, *tuned(mala), 65_536),
    Row("logistic regression 944×25, HMC 4×0.4", LOGISTIC, *fixed_hmc(0.4, 4), 65_536),
)


@functools.cache
def warmed_up(model: Callable, builder: Callable, num_warmup: int, dtype: str):
    """The warm-up of a model, shared by its rows of one `dtype`."""
    target = model()
    return target, sample(
        jax.random.key(1), target, builder, num_samples=1, num_warmup=num_warmup
    ).warmup


def measure(
    row: Row, repeats: int, num_warmup: int, scale: float, segments_tried: tuple[int, ...]
) -> dict:
    """Times, work and checks of one row."""
    target, warmup = warmed_up(row.model, row.builder, num_warmup, row.dtype)
    kernel = row.kernel(target.logdensity, metric=warmup.whitening, settings=warmup.settings)
    num_steps = max(256, int(row.num_steps * scale))
    state = kernel.init(jax.tree.map(lambda leaf: leaf[0], warmup.positions))
    tape = jax.jit(lambda key, state: kernel.tape(key, num_steps, state))(jax.random.key(2), state)
    initial = kernel.carry(state)
    dynamics = without_captures(
        kernel.dynamics(), initial, jax.tree.map(lambda leaf: leaf[0], tape)
    )
    tolerance = default_tolerance(kernel, jax.tree.leaves(initial)[0].dtype)
    pool = jax.vmap(lambda position: kernel.carry(kernel.init(position)))(warmup.pool)
    advice = advise(dynamics, initial, tape, starts=pool, num_steps=num_steps, tolerance=tolerance)
    runs = {"loop": (jax.jit(rollout), (dynamics, initial, tape))}
    for segments in sorted({*segments_tried, advice.num_segments} - {1}):
        if num_steps // segments >= 32:
            solve_it = functools.partial(solve, solver=shooting(segments), tolerance=tolerance)
            runs[segments] = (jax.jit(solve_it), (dynamics, initial, tape))
    found = timed(runs, repeats)
    result = {
        "name": row.name,
        "num_steps": num_steps,
        "dtype": row.dtype,
        "settings": {key: float(value) for key, value in warmup.settings.items()}
        if row.builder is not hmc
        else {},
        "loop_seconds": found["loop"]["seconds"],
        "loop_compile": found["loop"]["compile"],
        "loop_temp_bytes": found["loop"]["temp_bytes"],
        "segments": [],
    }
    reference = np.asarray(found["loop"]["value"])
    for segments in [key for key in runs if key != "loop"]:
        result["segments"].append(
            entry(segments, found[segments], found["loop"]["seconds"], reference)
        )
    best = fastest(result["segments"])
    result["advice"] = {
        "segments": advice.num_segments,
        "said": str(advice),
        "ratio": next(
            (
                item["ratio"]
                for item in result["segments"]
                if item["segments"] == advice.num_segments
            ),
            1.0,
        ),
    }
    result["best"] = {
        **best,
        **certified(kernel, initial, found[best["segments"]]["value"].states, tape, reference),
    }
    return result


def entry(segments: int, record: dict, loop_seconds: float, reference: np.ndarray) -> dict:
    """One number of segments."""
    solution = record["value"]
    distance = np.abs(np.asarray(solution.states) - reference).max()
    return {
        "segments": segments,
        "seconds": record["seconds"],
        "ratio": loop_seconds / record["seconds"],
        "compile": record["compile"],
        "temp_bytes": record["temp_bytes"],
        "status": Status(int(solution.status)).name,
        "evaluations": float(solution.stats.evaluations),
        "depth": int(solution.stats.depth),
        "passes": int(solution.iterations) + 1,
        "residual": float(solution.residual),
        "distance": float(distance),
    }


def certified(kernel: Kernel, initial, states, tape, reference: np.ndarray) -> dict:
    """An independent certificate, and how the path compares with the separately compiled loop."""
    certificate = jax.block_until_ready(certify(kernel, initial, states, tape))
    begin = time.perf_counter()
    certificate = jax.block_until_ready(certify(kernel, initial, states, tape))
    seconds = time.perf_counter() - begin
    theirs = certify(kernel, initial, jnp.asarray(reference), tape)
    return {
        "certified": bool(certificate.certified),
        "certify_seconds": seconds,
        "certificate_residual": float(certificate.max_residual),
        "rejected": int(certificate.num_rejected),
        "decisions_that_differ": int(
            np.sum(np.asarray(certificate.accepted) != np.asarray(theirs.accepted))
        ),
        "bitwise_equal_steps": float(np.mean((np.asarray(states) == reference).all(axis=-1))),
    }


def network(repeats: int, scale: float) -> dict:
    """A tanh network of 64 units driven by noise, float32: the same engine without a kernel."""
    num_steps, width = max(256, int(32_768 * scale)), 64
    weights = 0.7 * jax.random.normal(jax.random.key(3), (width, width)) / np.sqrt(width)
    drives = jax.random.normal(jax.random.key(4), (num_steps, width), jnp.float32)
    dynamics = Dynamics(lambda w, x, u: jnp.tanh(w @ x + u), weights.astype(jnp.float32))
    initial = jnp.zeros(width, jnp.float32)
    runs = {"loop": (jax.jit(rollout), (dynamics, initial, drives))}
    for segments in SEGMENTS:
        runs[segments] = (
            jax.jit(functools.partial(solve, solver=shooting(segments))),
            (dynamics, initial, drives),
        )
    found = timed(runs, repeats)
    reference = np.asarray(found["loop"]["value"])
    items = [
        entry(key, found[key], found["loop"]["seconds"], reference) for key in runs if key != "loop"
    ]
    return {
        "name": "tanh network, 64 units",
        "num_steps": num_steps,
        "dtype": "float32",
        "settings": {},
        "loop_seconds": found["loop"]["seconds"],
        "loop_compile": found["loop"]["compile"],
        "segments": items,
        "best": fastest(items),
    }


def fastest(items: list[dict]) -> dict:
    """The fastest number of segments that solved the chain, or the fastest of all if none did."""
    return max(items, key=lambda item: (item["status"] == "CONVERGED", item["ratio"]))


def counted(rejected: int) -> str:
    """How many proposals were rejected, where a kernel rejects."""
    return f"{rejected} rejections" if rejected >= 0 else "no accept decisions"


def gain(best: dict) -> str:
    """The ratio of times, or that there is none."""
    return (
        f"**{best['ratio']:.1f}×**"
        if best["status"] == "CONVERGED"
        else f"not solved: {best['status']}"
    )


def table(results: list[dict]) -> str:
    """The Markdown table."""
    lines = [
        "| target, kernel | T | loop, µs/step | shooting | segments | advised: segments, ratio | "
        "evaluations per draw | residual | certified, decisions that differ | compile loop / shooting, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        best = result["best"]
        check = (
            "—"
            if "certified" not in best
            else (
                f"{'yes' if best['certified'] else 'no'} ({best['certificate_residual']:.0e} noise units, "
                f"{counted(best['rejected'])}), {best['decisions_that_differ']}"
            )
        )
        advice = result.get("advice")
        advised = (
            "—"
            if advice is None
            else "the loop"
            if advice["segments"] == 1
            else (f"{advice['segments']}, {advice['ratio']:.1f}×")
        )
        lines.append(
            f"| {result['name']}, {result['dtype']} | {result['num_steps']:,} | "
            f"{1e6 * result['loop_seconds'] / result['num_steps']:.2f} | {gain(best)} | {best['segments']} | {advised} | "
            f"{best['evaluations']:.2f} | {best['residual']:.0e} | {check} | "
            f"{result['loop_compile']:.1f} / {best['compile']:.1f} |"
        )
    return "\n".join(lines) + "\n\n" + NOTE + "\n"


NOTE = (
    "Decisions that differ from the loop's: two compiled programs round differently, so a proposal whose acceptance "
    "probability is within rounding of its uniform may go either way, and a forgetful chain is back on the same path "
    "soon after. Expected are T times the mean difference of acceptance probabilities: 1e-9 per run in float64, up to a "
    "few in float32, where every decision is still right under the batched step that the certificate evaluates."
)


def main(argv: list[str] | None = None) -> None:
    """Measure every row and write `shooting-cpu.json` and `shooting-cpu.md`, named by the platform."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-warmup", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of every T")
    parser.add_argument(
        "--segments",
        type=int,
        nargs="+",
        default=SEGMENTS,
        help="numbers tried beside the advised one",
    )
    parser.add_argument(
        "--only", default="", help="rows whose name contains this; others keep their stored results"
    )
    arguments = parser.parse_args(argv)
    results = []
    for row in ROWS:
        if arguments.only in row.name:
            with jax.enable_x64(row.dtype == "float64"):
                results.append(
                    measure(
                        row,
                        arguments.repeats,
                        arguments.num_warmup,
                        arguments.scale,
                        tuple(arguments.segments),
                    )
                )
            print(table(results[-1:]).splitlines()[2], flush=True)
    if arguments.only in "tanh network, 64 units":
        results.append(network(arguments.repeats, arguments.scale))
    stored = arguments.out / f"shooting-{jax.default_backend()}.json"
    if arguments.only and stored.exists():
        results = merged(json.loads(stored.read_text())["rows"], results)
    keep(
        stored,
        {"repeats": arguments.repeats, "scale": arguments.scale, "rows": results},
        table(results),
    )
    print(table(results))


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """Old rows with new ones in their place, in the order of `ROWS`, others at the end."""
    found = {(row["name"], row["dtype"]): row for row in (*old, *new)}
    order = {(row.name, row.dtype): place for place, row in enumerate(ROWS)}
    return [found[key] for key in sorted(found, key=lambda key: order.get(key, len(order)))]


if __name__ == "__main__":
    main()
