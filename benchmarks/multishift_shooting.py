"""One chain with multishift coupling, by shooting: `python -m benchmarks.multishift_shooting --out DIR`.

Eight schools in whitened coordinates. The reference is BlackJAX's own `lax.scan` loop of the kernel with plain noise
(MALA, or HMC with the same path); beside it stands the loop of our kernel with the random numbers on its tape. Times of
shooting include drawing the random numbers of the whole chain, in bulk, and leave out compilation and the certificate; runs are interleaved, medians reported. A segment has met its stored path when they agree to 128 ulp, and
mostly they are then equal; whether the path is the sequential one to the last bit is a column. Also: passes that
Jacobi needs alone, the work of a chain of 10^6 steps, and how many of 10^9 numbers of multishift noise are not
finite.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks.record import OUT, keep, timed
from partime_mcmc import (
    Kernel,
    MultishiftCoupling,
    Status,
    Tolerance,
    certify,
    coalescing_hmc,
    hmc,
    jacobi,
    mala,
    rollout,
    sample,
    shooting,
    solve,
)
from partime_mcmc.engine.dynamics import without_captures
from partime_mcmc.kernels import Whitening, blackjax_loop
from partime_mcmc.kernels.coupling import draw_multishift_noise, multishift
from partime_mcmc.models import MODELS

SEGMENTS = (64, 128, 256, 512, 1024)
CLOSE = Tolerance()


def setting():
    """The density, whitened coordinates, and a start."""
    target = MODELS["eight_schools"]().make_target(jax.random.key(0))
    draws = sample(jax.random.key(1), target, hmc, num_samples=4096, num_chains=4, progress=False)
    flat = jax.vmap(jax.vmap(lambda position: ravel_pytree(position)[0]))(draws.positions).reshape(
        -1, 10
    )
    start = jax.tree.map(lambda leaf: leaf[0, -1], draws.positions)
    return (
        target.logdensity,
        Whitening.of_covariance(start, flat.mean(axis=0), jnp.cov(flat, rowvar=False)),
        start,
    )


def pairs(density, metric) -> dict[str, tuple[Kernel, Kernel]]:
    """Kernels with multishift coupling, each with the plain one whose BlackJAX loop it is measured against."""
    # Accepted with probability 0.65, which suits this coupling best: bolder steps meet less often, shorter ones later.
    return {
        "MALA": (
            mala(density, 0.35, metric, coupling=MultishiftCoupling()),
            mala(density, 0.35, metric),
        ),
        "coalescing HMC, 3 leapfrogs, every 4th": (
            coalescing_hmc(density, 0.5176, metric, 3, mala_step_size=0.5),
            hmc(density, 0.5176, metric, 3),
        ),
    }


def measure(kernel: Kernel, plain: Kernel, start, num_steps: int, repeats: int) -> dict:
    """Times, work and bits of one kernel."""
    key, state, ours = jax.random.key(2), plain.init(start), kernel.init(start)
    initial = kernel.carry(ours)
    tape = jax.jit(lambda key, state: kernel.tape(key, num_steps, state))(key, ours)
    dynamics = without_captures(
        kernel.dynamics(), initial, jax.tree.map(lambda leaf: leaf[0], tape)
    )
    runs = {
        "BlackJAX": (
            lambda key: blackjax_loop(plain, state, jax.random.split(key, num_steps))[0],
            (key,),
        ),
        "tape": (lambda key: kernel.tape(key, num_steps, ours), (key,)),
        "loop": (rollout, (dynamics, initial, tape)),
    }
    for num_segments in SEGMENTS:
        runs[num_segments] = (
            functools.partial(solve, solver=shooting(num_segments), tolerance=CLOSE),
            (dynamics, initial, tape),
        )
    found = timed(
        {name: (jax.jit(function), args) for name, (function, args) in runs.items()}, repeats
    )
    drawing, reference = found["tape"]["seconds"], found["BlackJAX"]["seconds"]
    path, rows = np.asarray(found["loop"]["value"]), []
    for num_segments in SEGMENTS:
        solution, seconds = found[num_segments]["value"], found[num_segments]["seconds"] + drawing
        rows.append(
            {
                "segments": num_segments,
                "seconds_with_tape": seconds,
                "ratio": reference / seconds,
                "evaluations": float(solution.stats.evaluations),
                "depth": int(solution.stats.depth),
                "status": Status(int(solution.status)).name,
                "residual": float(solution.residual),
                "compile": found[num_segments]["compile"],
                "temp_bytes": found[num_segments]["temp_bytes"],
                "equal_bits": float((np.asarray(solution.states) == path).all(axis=1).mean()),
            }
        )
    best = max(rows, key=lambda row: row["ratio"])
    certificate = certify(kernel, initial, found[best["segments"]]["value"].states, tape)
    return {
        "num_steps": num_steps,
        "blackjax_seconds": reference,
        "loop_seconds": found["loop"]["seconds"],
        "tape_seconds": drawing,
        "segments": rows,
        "best": best,
        "certified": bool(certificate.certified),
        "rejected": int(certificate.num_rejected),
        "min_margin": float(certificate.min_margin),
        "min_lattice_margin": float(certificate.min_lattice_margin),
    }


def work(kernel: Kernel, start, num_steps: int, solver, seed: int = 3) -> dict:
    """What one solve of a chain takes, times apart."""
    state = kernel.init(start)
    tape = jax.jit(lambda key: kernel.tape(key, num_steps, state))(jax.random.key(seed))
    solution = jax.jit(
        functools.partial(solve, solver=solver, tolerance=CLOSE, max_iterations=400)
    )(kernel.dynamics(), kernel.carry(state), tape)
    return {
        "num_steps": num_steps,
        "status": Status(int(solution.status)).name,
        "iterations": int(solution.iterations),
        "evaluations": float(solution.stats.evaluations),
        "depth": int(solution.stats.depth),
        "residual": float(solution.residual),
    }


def not_finite(num_numbers: int, dtype) -> int:
    """How many numbers of multishift noise are NaN or infinite."""
    width, height = 1000, 1000

    @jax.jit
    def count(key):
        layers = jax.vmap(lambda one: draw_multishift_noise(one, width, dtype)[0])(
            jax.random.split(key, height)
        )
        return jnp.sum(~jnp.isfinite(multishift(jnp.full(width, 0.3, dtype), 0.7, layers).value))

    return int(
        sum(
            count(key)
            for key in jax.random.split(jax.random.key(5), -(-num_numbers // (width * height)))
        )
    )


def table(results: dict) -> str:
    """The Markdown table."""
    lines = [
        "| kernel | T | BlackJAX's loop, ms | our loop, ms | random numbers, ms | segments | shooting with these, ms | ratio | "
        "evaluations per draw | depth | residual | steps equal to the last bit |",
        "|---" * 12 + "|",
    ]
    for name, found in results["kernels"].items():
        for row in found["segments"]:
            ratio = f"**{row['ratio']:.1f}×**" if row is found["best"] else f"{row['ratio']:.1f}×"
            lines.append(
                f"| {name} | {found['num_steps']:,} | {1e3 * found['blackjax_seconds']:.0f} | "
                f"{1e3 * found['loop_seconds']:.0f} | {1e3 * found['tape_seconds']:.0f} | "
                f"{row['segments']} | {1e3 * row['seconds_with_tape']:.0f} | "
                f"{ratio} | {row['evaluations']:.2f} | {row['depth']} | {row['residual']:.0e} | "
                f"{100 * row['equal_bits']:.2f}% |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure and write `dice-shooting.json` and `dice-shooting.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--num-steps", type=int, default=65_536)
    parser.add_argument(
        "--num-numbers",
        type=int,
        default=10**9,
        help="of noise, to look for numbers that are not finite",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "float64"), default=("float32", "float64")
    )
    arguments = parser.parse_args(argv)
    results = {"kernels": {}}
    for dtype in arguments.dtypes:
        with jax.enable_x64(dtype == "float64"):
            density, metric, start = setting()
            for name, (kernel, plain) in pairs(density, metric).items():
                row = measure(kernel, plain, start, arguments.num_steps, arguments.repeats)
                results["kernels"][f"{name}, {dtype}"] = row
                print(table({"kernels": {name: row}}), flush=True)
            langevin = pairs(density, metric)["MALA"][0]
            results[f"jacobi, {dtype}"] = [
                work(langevin, start, arguments.num_steps, jacobi(), seed) for seed in (3, 4, 5)
            ]
            results[f"million, {dtype}"] = work(langevin, start, 2**20, shooting(4096))
            results[f"not finite of {arguments.num_numbers}, {dtype}"] = not_finite(
                arguments.num_numbers, jnp.dtype(dtype)
            )
    print({key: value for key, value in results.items() if key != "kernels"})
    keep(arguments.out / "dice-shooting.json", results, table(results))


if __name__ == "__main__":
    main()
