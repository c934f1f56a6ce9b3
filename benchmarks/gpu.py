"""Chains on an accelerator against BlackJAX's loop on the same device: `python -m benchmarks.gpu --out DIR`.

Rows are kernel × T × chains, float32. The loop is `lax.scan` with cached gradients over all chains at once; beyond
`--loop-steps` steps (NUTS: `--nuts-loop-steps`, each of its steps being a loop of loops) it is timed for that many
and scaled, and the table marks it so with the number. Against it: shooting with several numbers of segments, of which
the fastest counts, without the certificate; residual, evaluations and depth of the very run stand beside it, and what
an independent certificate found. Warm-up runs on the host. A row that would begin after `--budget` seconds is left out
and listed, and so is one with more draws than memory holds.

The second table comes first in time. It counts accept decisions that change when matrix products of the solve are
taken in a lower precision (TF32 on NVIDIA's), with the time of the solve in each; the certificate that counts them
takes the highest.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import OUT, keep, timed
from benchmarks.shooting import EIGHT_SCHOOLS, LOGISTIC, fixed_hmc, gain, tuned
from partime_mcmc import (
    Status,
    Tolerance,
    certify,
    coalescing_hmc,
    mala,
    nuts,
    rollout,
    sample,
    shooting,
    solve,
)
from partime_mcmc.engine.dynamics import without_captures
from partime_mcmc.sampling.plan import default_tolerance

CASES = {
    "eight schools, HMC 4×0.4": (EIGHT_SCHOOLS, *fixed_hmc(0.4, 4)),
    "eight schools, coalescing HMC": (EIGHT_SCHOOLS, *tuned(coalescing_hmc)),
    "eight schools, NUTS": (EIGHT_SCHOOLS, *tuned(nuts)),
    "logistic regression, MALA": (LOGISTIC, *tuned(mala)),
    "logistic regression, HMC 4×0.4": (LOGISTIC, *fixed_hmc(0.4, 4)),
}
LENGTHS, CHAINS, LANES = (10_000, 100_000, 1_000_000), (1, 4, 64), (512, 2048, 8192)
# A path of 10⁷ draws takes some gigabytes with its random numbers; shooting has both in several copies.
_MOST_DRAWS, _SHORTEST = 10**7, 32


@functools.cache
def warmed_up(name: str):
    """Target, kernel and pool of a case, tuned on the host and moved to the default device."""
    model, builder, make = CASES[name]
    with jax.default_device(jax.devices("cpu")[0]):
        target = model()
        warmup = sample(jax.random.key(1), target, builder, num_samples=0).warmup
    place = functools.partial(jax.device_put, device=jax.devices()[0])
    kernel = make(target.logdensity, metric=place(warmup.whitening), settings=warmup.settings)
    return kernel, place(warmup.pool)


def chains_and_tapes(name: str, num_steps: int, num_chains: int):
    """Dynamics, starts `(C, ...)`, tapes `(C, T, ...)`."""
    kernel, pool = warmed_up(name)
    starts = jax.tree.map(lambda leaf: leaf[jnp.arange(num_chains) % leaf.shape[0]], pool)
    state = kernel.init(jax.tree.map(lambda leaf: leaf[0], starts))
    initial = jax.vmap(lambda position: kernel.carry(kernel.init(position)))(starts)
    tape = jax.jit(jax.vmap(lambda key: kernel.tape(key, num_steps, state)))(
        jax.random.split(jax.random.key(2), num_chains)
    )
    first, drive = (
        jax.tree.map(lambda leaf: leaf[0], initial),
        jax.tree.map(lambda leaf: leaf[0, 0], tape),
    )
    return kernel, without_captures(kernel.dynamics(), first, drive), initial, tape


def over_chains(function):
    """A function of dynamics, one start and one tape for many chains."""
    return jax.jit(jax.vmap(function, in_axes=(None, 0, 0)))


def measure(name: str, num_steps: int, num_chains: int, loop_steps: int, repeats: int) -> dict:
    """One row."""
    kernel, dynamics, initial, tape = chains_and_tapes(name, num_steps, num_chains)
    looked = min(num_steps, loop_steps)
    runs = {
        "loop": (
            over_chains(rollout),
            (dynamics, initial, jax.tree.map(lambda leaf: leaf[:, :looked], tape)),
        )
    }
    tolerance = default_tolerance(kernel, jnp.float32)
    for segments in sorted({min(lanes // num_chains, num_steps // _SHORTEST) for lanes in LANES}):
        if segments > 1:
            run = functools.partial(solve, solver=shooting(segments), tolerance=tolerance)
            runs[segments] = (over_chains(run), (dynamics, initial, tape))
    found = timed(runs, repeats)
    loop = found["loop"]["seconds"] * num_steps / looked
    rows = [described(segments, found[segments], loop) for segments in runs if segments != "loop"]
    best = max(rows, key=lambda row: (row["status"] == "CONVERGED", row["ratio"]), default=None)
    result = {
        "name": name,
        "num_steps": num_steps,
        "chains": num_chains,
        "loop_seconds": loop,
        "loop_scaled": looked < num_steps,
        "loop_steps": looked,
        "loop_compile": found["loop"]["compile"],
        "loop_temp_bytes": found["loop"]["temp_bytes"],
        "segments": rows,
        "best": best,
    }
    if best is not None:
        states = found[best["segments"]]["value"].states
        judge = jax.jit(jax.vmap(functools.partial(certify, kernel)))
        certificate = jax.block_until_ready(judge(initial, states, tape))
        begin = time.perf_counter()
        jax.block_until_ready(judge(initial, states, tape))
        result |= {
            "certify_seconds": time.perf_counter() - begin,
            "certified": bool(np.all(certificate.certified)),
            "certificate_residual": float(np.max(certificate.max_residual)),
            "rejected": int(np.sum(certificate.num_rejected)),
        }
    return result


def described(segments: int, record: dict, loop: float) -> dict:
    """One number of segments."""
    solution = record["value"]
    return {
        "segments": segments,
        "seconds": record["seconds"],
        "ratio": loop / record["seconds"],
        "compile": record["compile"],
        "temp_bytes": record["temp_bytes"],
        "status": Status(int(np.max(solution.status))).name,
        "evaluations": float(np.mean(solution.stats.evaluations)),
        "depth": int(np.max(solution.stats.depth)),
        "residual": float(np.max(solution.residual)),
    }


def precision(num_steps: int, repeats: int) -> list[dict]:
    """Time and decisions on a logistic regression under each precision of matrix products, against the highest."""
    found, reference = [], None
    for name in ("highest", "tensorfloat32", "default"):
        with jax.default_matmul_precision(name):
            # Traced anew: the precision is read while tracing.
            kernel, dynamics, initial, tape = chains_and_tapes(
                "logistic regression, MALA", num_steps, 1
            )
            one = jax.tree.map(lambda leaf: leaf[0], (initial, tape))
            run = jax.jit(
                lambda start, tape: solve(
                    dynamics, start, tape, solver=shooting(256), tolerance=Tolerance()
                )
            )
            loop = jax.jit(lambda start, tape: rollout(dynamics, start, tape))
            times = timed({"solve": (run, one), "loop": (loop, one)}, repeats)
            solution = times["solve"]["value"]
        with jax.default_matmul_precision("highest"):
            certificate = jax.jit(functools.partial(certify, kernel))(
                one[0], solution.states, one[1]
            )
        accepted = np.asarray(certificate.accepted)
        reference = accepted if reference is None else reference
        found.append(
            {
                "precision": name,
                "num_steps": num_steps,
                "seconds": times["solve"]["seconds"],
                "loop_seconds": times["loop"]["seconds"],
                "compile": times["solve"]["compile"],
                "temp_bytes": times["solve"]["temp_bytes"],
                "decisions_that_differ": int(np.sum(accepted != reference)),
                "certified": bool(certificate.certified),
                "residual": float(certificate.max_residual),
                "rejected": int(certificate.num_rejected),
            }
        )
    return found


def table(rows: list[dict], products: list[dict], left_out: list[str]) -> str:
    """All tables as Markdown."""
    lines = [
        "| target, kernel | T | chains | loop, s | shooting, s | ratio | segments per chain | evaluations per draw | "
        "depth | residual | certified |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        best = row["best"]
        if best is None:
            continue
        lines.append(
            f"| {row['name']} | {row['num_steps']:,} | {row['chains']} | {row['loop_seconds']:.3f}{_marked(row)} | "
            f"{best['seconds']:.4f} | {gain(best)} | {best['segments']} | {best['evaluations']:.2f} | {best['depth']:,} | "
            f"{best['residual']:.0e} | {'yes' if row['certified'] else 'no'} ({row['certificate_residual']:.0e}, "
            f"{row['rejected']} rejections) |"
        )
    lines += ["", "\\* timed for so many steps and scaled.", ""]
    lines += [f"Left out: {name}." for name in left_out]
    lines += [
        "",
        "| matrix products | T | loop, s | shooting, s | decisions that differ from `highest` | "
        "residual, noise units | rejections |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {one['precision']} | {one['num_steps']:,} | {one['loop_seconds']:.4f} | {one['seconds']:.4f} | "
        f"{one['decisions_that_differ']} | {one['residual']:.0e} | {one['rejected']} |"
        for one in products
    ]
    return "\n".join(lines) + "\n"


def _marked(row: dict) -> str:
    return f"* ({row['loop_steps']:,})" if row["loop_scaled"] else ""


def main(argv: list[str] | None = None) -> None:
    """Measure rows while there is time and write `chains-gpu.json` and `.md`, named by the platform, after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="largest T")
    parser.add_argument("--chains", type=int, nargs="*", default=CHAINS)
    parser.add_argument(
        "--loop-steps", type=int, default=20_000, help="steps for which the loop is timed"
    )
    parser.add_argument("--nuts-loop-steps", type=int, default=1_000, help="the same, for NUTS")
    parser.add_argument(
        "--budget", type=float, default=240, help="seconds after which no row begins"
    )
    arguments = parser.parse_args(argv)
    stored = arguments.out / f"chains-{jax.default_backend()}.json"
    begin, rows = time.monotonic(), []
    products = precision(min(10_000, arguments.longest), arguments.repeats)
    write(stored, rows, products, [])
    # The longest single chains first: they are what an accelerator is for.
    cases = sorted(
        (
            (name, num_steps, count)
            for name in CASES
            for num_steps in LENGTHS
            for count in arguments.chains
            if num_steps <= arguments.longest
        ),
        key=lambda case: (case[2], -case[1]),
    )
    left_out = []
    for name, num_steps, count in cases:
        late, large = time.monotonic() - begin > arguments.budget, num_steps * count > _MOST_DRAWS
        if late or large:
            left_out.append(
                f"{name} at T = {num_steps:,} with {count} chains, for {'memory' if large else 'time'}"
            )
            continue
        loop_steps = arguments.nuts_loop_steps if "NUTS" in name else arguments.loop_steps
        rows.append(measure(name, num_steps, count, loop_steps, arguments.repeats))
        print(table(rows[-1:], [], []).splitlines()[2], flush=True)
        write(stored, rows, products, left_out)
    write(stored, rows, products, left_out)


def write(stored: Path, rows: list[dict], products: list[dict], left_out: list[str]) -> None:
    """Keep what there is."""
    keep(
        stored,
        {"rows": rows, "precision": products, "left_out": left_out},
        table(rows, products, left_out),
    )


if __name__ == "__main__":
    main()
