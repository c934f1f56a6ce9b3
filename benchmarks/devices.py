"""One chain over many devices: `python -m benchmarks.devices --out DIR`.

On 1, 2, 4 and 8 forced host devices, which share the cores of one machine, so that their times are no measure of speed
and everything else can be counted:

- collectives and their bytes, per pass and once per solve, read from the compiled program (HLO) at two lengths of the
  chain: none may grow with the length, or a path would travel;
- evaluations of the step by device: how even the work is;
- a model of strong scaling, fitted on one device and checked against the times of all meshes.

The model. Shooting with C segments on P devices takes D steps one after another in K passes, both read from the solve
(they hang on the chain and on C, hardly on P). A step of w = C / P lanes takes a + b w seconds on one device. What is
done for all T steps at once (drawing ahead, transposing, judging) takes s on this machine, whose cores it uses all of,
however many devices they are called. A pass sends one state to the neighbour and reduces three scalars, r(P). With
`share` the number of devices that share one core,

    t(P) = share · D · (a + b C / P) + s + K · r(P)      here
    t(P) = D · (a + b C / P) + s · cores / P + K · r(P)  on P devices with a core each

a, b and s are fitted on one device over several C, r(P) is measured by a loop that does nothing else: no number is
fitted on the meshes that the model is checked against. Its form is: dividing s by P here as well gave 0.55 to 0.69 of
the times measured, which is how it was found that one device already uses all cores for s. So the check is no
independent one. In the extrapolation r(P) = α (1 + 3 · 2 ⌈log₂ P⌉), α the latency of one message. Assumptions, for
1,024 devices: every device is a core like this one and has its own; bandwidth costs nothing (a pass sends tens of
numbers); nobody disturbs a device (a pass waits for the slowest); for a chain 256 times as long with as many more
segments the slowest of more segments decides, so D − n grows by the slope in log₂ C that was measured on one device,
and K stays.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import lax
from jax.sharding import PartitionSpec

from benchmarks.record import OUT, keep
from partime_mcmc import (
    MultishiftCoupling,
    deer,
    elk,
    jacobi,
    mala,
    picard,
    quasi_deer,
    quasi_elk,
    sample,
    sequential,
    shooting,
)
from partime_mcmc.distributed import sharded_solve, time_mesh
from partime_mcmc.distributed.sharded_solve import time_axis
from partime_mcmc.models import MODELS
from partime_mcmc.sampling.plan import default_tolerance

MESHES = (1, 2, 4, 8)
MOVES = r"(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter|collective-broadcast)"
SIZES = {"f64": 8, "f32": 4, "s64": 8, "u64": 8, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}


def chain(num_steps: int):
    """Dynamics, start and tape of one chain of eight schools, MALA with multishift coupling."""
    target = MODELS["eight_schools"]().make_target(jax.random.key(0))
    warmup = sample(
        jax.random.key(0),
        target,
        mala,
        num_samples=0,
        coupling=MultishiftCoupling(),
        progress=False,
    ).warmup
    kernel = warmup.kernel
    state = kernel.init(jax.tree.map(lambda leaf: leaf[0], warmup.positions))
    tape = jax.jit(lambda: kernel.tape(jax.random.key(1), num_steps, state))()
    return kernel.dynamics(), kernel.carry(state), tape, default_tolerance(kernel, jnp.float64)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Number and bytes (of what one device receives at most) of every kind of collective, once per solve and per pass.

    Per pass are those in the body of the innermost loop that holds any: all loops inside a pass are local.
    """
    blocks, name = {}, None
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opened:
            name = opened.group(1)
            blocks[name] = []
        elif name:
            blocks[name].append(line)
    bodies, children, own = set(), {}, {}
    for name, lines in blocks.items():
        inside = "\n".join(lines)
        bodies |= set(re.findall(r"body=%?([\w.\-]+)", inside))
        children[name] = set(
            re.findall(
                r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)",
                inside,
            )
        )
        for listed in re.findall(r"branch_computations=\{([^}]*)\}", inside):
            children[name] |= set(re.findall(r"[\w.\-]+", listed))
        own[name] = [
            (kind, _bytes(shape))
            for shape, kind in re.findall(rf"= (.+?) {MOVES}(?:-start)?\(", inside)
        ]

    @functools.cache
    def holds(name):
        return bool(own[name]) or any(holds(child) for child in children[name] if child in own)

    def innermost(name):
        return own[name] and not any(holds(child) for child in children[name] if child in bodies)

    found = {"once": {}, "per pass": {}}
    for name, moves in own.items():
        for kind, size in moves:
            kinds = found["per pass" if name in bodies and innermost(name) else "once"]
            count, total = kinds.get(kind, (0, 0))
            kinds[kind] = count + 1, total + size
    return found


def _bytes(shape: str) -> int:
    return sum(
        SIZES.get(kind, 8) * math.prod(int(size) for size in dims.split(",") if size)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )


def traffic(problem, num_steps: int) -> list[dict]:
    """Collectives of every recipe on eight devices, at this length and at half of it."""
    dynamics, initial, tape, tolerance = problem
    recipes = {
        "shooting": shooting(steps=64),
        "quasi_deer": quasi_deer(),
        "deer": deer(),
        "quasi_elk": quasi_elk(),
        "elk": elk(),
        "picard": picard(),
        "jacobi": jacobi(),
        "sequential": sequential(),
    }
    rows = []
    for name, solver in recipes.items():
        program = jax.jit(
            lambda first, drives, solver=solver: (
                sharded_solve(
                    dynamics, first, drives, mesh=time_mesh(8), solver=solver, tolerance=tolerance
                ).states
            )
        )
        texts = [
            program.lower(initial, jax.tree.map(lambda leaf: leaf[:length], tape))
            .compile()
            .as_text()
            for length in (num_steps // 2, num_steps)
        ]
        counted = [collectives(text) for text in texts]
        rows.append({"recipe": name, **counted[1], "grows": counted[0] != counted[1]})
        print(rows[-1], flush=True)
    return rows


def timed(program, *args, repeats: int) -> float:
    """Median seconds."""
    jax.block_until_ready(program(*args))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def measure(problem, num_parts: int, num_segments: int, repeats: int) -> dict:
    """A solve by shooting on so many devices: time, work, and whether the path is the sequential one to the last
    bit."""
    dynamics, initial, tape, tolerance = problem
    mesh = time_mesh(num_parts, devices=jax.devices()[:num_parts])
    program = jax.jit(
        lambda first, drives: sharded_solve(
            dynamics, first, drives, mesh=mesh, solver=shooting(num_segments), tolerance=tolerance
        )
    )
    found = program(initial, tape).or_raise()
    by_device = np.asarray(found.stats.evaluations_by_part, float)
    return {
        "devices": num_parts,
        "segments": num_segments,
        "seconds": timed(program, initial, tape, repeats=repeats),
        "depth": int(found.stats.depth),
        "passes": int(found.iterations) + 1,
        "evaluations": float(found.stats.evaluations),
        "busiest": float(by_device.max() / by_device.mean()),
        "states": np.asarray(found.states),
        "residual": float(found.residual),
    }


def waiting(num_parts: int, dimension: int, repeats: int) -> float:
    """Seconds that a pass takes where there is nothing to compute: one state to the neighbour, three scalars to all."""
    if num_parts == 1:
        return 0.0
    mesh, loops = time_mesh(num_parts, devices=jax.devices()[:num_parts]), 100
    axis = time_axis(mesh)

    def one_pass(_, states):
        states = axis.previous(states[0], states)
        seen = axis.total(states[:, 0]), axis.maximum(jnp.abs(states[:, 1]))
        return jnp.where(axis.anyone(seen[0] > seen[1]), states + 1e-9, states)

    along = PartitionSpec("time")
    program = jax.jit(
        jax.shard_map(
            lambda states: lax.fori_loop(0, loops, one_pass, states),
            mesh=mesh,
            in_specs=along,
            out_specs=along,
            check_vma=False,
        )
    )
    return timed(program, jnp.ones((2 * num_parts, dimension)), repeats=repeats) / loops


def model(rows: list[dict], widths: list[dict], cores: int) -> dict:
    """The model's numbers, from one device, and what it predicts for the rows measured."""
    # Each solve on one device gives one equation, weighed so that relative errors count.
    terms = np.array([[row["depth"], row["depth"] * row["segments"], 1.0] for row in widths])
    seconds = np.array([row["seconds"] for row in widths])
    a, b, s = (
        float(value)
        for value in scipy.optimize.nnls(terms / seconds[:, None], np.ones(len(widths)))[0]
    )
    predicted = []
    for row in rows:
        compute = row["depth"] * (a + b * row["segments"] / row["devices"])
        predicted.append(
            max(1.0, row["devices"] / cores) * compute + s + row["passes"] * row["waiting"]
        )
    return {
        "a": a,
        "b": b,
        "s": s,
        "predicted": predicted,
        "predicted_of_widths": (terms @ np.array([a, b, s])).tolist(),
    }


def longer(results_row: dict, widths: list[dict], num_steps: int, times: int) -> dict:
    """The row of a chain so many times as long in segments of the same length: the slowest of more segments decides."""
    lanes = np.log2([row["segments"] for row in widths])
    again = np.array([row["depth"] - num_steps / row["segments"] for row in widths])
    slope = max(0.0, float(np.polyfit(lanes, again, 1)[0]))
    depth = results_row["depth"] + slope * math.log2(times)
    return {
        **results_row,
        "segments": times * results_row["segments"],
        "depth": round(depth),
        "times": times,
    }


def scaling(fitted: dict, row: dict, latency: float, cores: int) -> list[dict]:
    """What the model predicts for more devices, each with a core of its own."""
    found = []
    for parts in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        wait = latency * (1 + 6 * math.ceil(math.log2(parts))) if parts > 1 else 0.0
        compute = row["depth"] * (fitted["a"] + fitted["b"] * row["segments"] / parts)
        compute += fitted["s"] * row.get("times", 1) * cores / parts
        wait *= row["passes"]
        found.append(
            {"devices": parts, "compute": compute, "wait": wait, "seconds": compute + wait}
        )
    return found


def markdown(results: dict) -> str:
    """The results as tables."""

    def described(kinds):
        return (
            ", ".join(
                f"{count} {kind} ({size:,} B)" for kind, (count, size) in sorted(kinds.items())
            )
            or "none"
        )

    lines = [
        "# One chain over many devices",
        "",
        results["what"],
        "",
        "## Collectives on eight devices, from the compiled program",
        "",
        "| recipe | per pass: number (bytes received) | once per solve | grows with T |",
        "|---|---|---|---|",
    ]
    for row in results["traffic"]:
        lines.append(
            f"| {row['recipe']} | {described(row['per pass'])} | {described(row['once'])} | "
            f"{'YES' if row['grows'] else 'no'} |"
        )
    lines += [
        "",
        "## Balance and time on forced host devices",
        "",
        f"All devices share {results['cores']} cores: a time is no speed. Shooting.",
        "",
        "| devices | segments | passes | depth | evaluations per draw | busiest device / mean | "
        "same bits as the loop | largest residual | s | model, s | model / measured | one pass waits, µs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, seconds in zip(results["meshes"], results["model"]["predicted"]):
        lines.append(
            f"| {row['devices']} | {row['segments']:,} | {row['passes']} | {row['depth']} | "
            f"{row['evaluations']:.2f} | {row['busiest']:.2f} | {row['same_bits']:.2%} | {row['residual']:.0e} | "
            f"{row['seconds']:.3f} | "
            f"{seconds:.3f} | {seconds / row['seconds']:.2f} | {1e6 * row['waiting']:.0f} |"
        )
    fitted = results["model"]
    widths = "; ".join(
        f"{row['segments']}: {row['seconds']:.4f} s, model {seconds:.4f}"
        for row, seconds in zip(results["widths"], fitted["predicted_of_widths"])
    )
    lines += [
        "",
        f"Model: a = {1e6 * fitted['a']:.2f} µs, b = {1e9 * fitted['b']:.1f} ns per lane, s = "
        f"{1e3 * fitted['s']:.1f} ms, fitted on one device (segments: {widths}).",
        "",
        f"The loop, one step after another, on one device: {results['loop_seconds']:.3f} s.",
        "",
        f"## The model at 1,024 devices, {1e6 * results['latency']:.0f} µs per message",
    ]
    for title, scaled in results["scaling"].items():
        lines += [
            "",
            f"{title}: {scaled['row']['segments']:,} segments, depth {scaled['row']['depth']}, "
            f"{scaled['row']['passes']} passes.",
            "",
            "| devices | compute, s | waiting, s | s | speed-up over one device | efficiency |",
            "|---|---|---|---|---|---|",
        ]
        for row in scaled["rows"]:
            gain = scaled["rows"][0]["seconds"] / row["seconds"]
            lines.append(
                f"| {row['devices']:,} | {row['compute']:.4f} | {row['wait']:.4f} | {row['seconds']:.4f} | "
                f"{gain:.1f} | {gain / row['devices']:.0%} |"
            )
    return "\n".join(lines) + "\n"


def run(arguments) -> dict:
    """Everything, in a process that has eight devices."""
    with jax.enable_x64(True):
        problem = chain(arguments.num_steps)
        dynamics, initial, tape, tolerance = problem
        mesh = time_mesh(1, devices=jax.devices()[:1])
        alone = jax.jit(
            lambda first, drives: (
                sharded_solve(
                    dynamics, first, drives, mesh=mesh, solver=sequential(), tolerance=tolerance
                ).states
            )
        )
        path, loop_seconds = (
            np.asarray(alone(initial, tape)),
            timed(alone, initial, tape, repeats=arguments.repeats),
        )
        measured = [
            measure(problem, parts, arguments.num_segments, arguments.repeats)
            | {"waiting": waiting(parts, initial.shape[0], arguments.repeats)}
            for parts in MESHES
        ]
        widths = [
            measure(problem, 1, segments, arguments.repeats) for segments in (32, 64, 128, 256, 512)
        ]
        widths.append(dict(measured[0]))
        for row in (*measured, *widths):
            row["same_bits"] = float((row.pop("states") == path).all(axis=1).mean())
            print(row, flush=True)
        counted = traffic(problem, min(arguments.num_steps, 8192))
    cores = len(os.sched_getaffinity(0))
    fitted = model(measured, widths, cores)
    scaled = {
        f"T = {arguments.num_steps:,}": measured[-1],
        f"T = {256 * arguments.num_steps:,}": longer(
            measured[-1], widths, arguments.num_steps, 256
        ),
    }
    return {
        "what": f"Eight schools, MALA with multishift coupling, T = {arguments.num_steps:,}, float64, {cores} cores "
        "(`python -m benchmarks.devices`).",
        "num_steps": arguments.num_steps,
        "cores": cores,
        "latency": arguments.latency,
        "loop_seconds": loop_seconds,
        "meshes": measured,
        "widths": widths,
        "model": fitted,
        "traffic": counted,
        "scaling": {
            title: {"row": row, "rows": scaling(fitted, row, arguments.latency, cores)}
            for title, row in scaled.items()
        },
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=65536, help="length of the chain")
    parser.add_argument("--num-segments", type=int, default=1024, help="segments over all devices")
    parser.add_argument("--repeats", type=int, default=5, help="runs per time")
    parser.add_argument(
        "--latency", type=float, default=2e-5, help="seconds per message, in the extrapolation"
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder for devices.json and devices.md"
    )
    arguments = parser.parse_args(argv)
    if len(jax.devices()) < MESHES[-1]:
        # The number of devices is fixed before JAX starts.
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={MESHES[-1]}"
        )
        given = sys.argv[1:] if argv is None else argv
        subprocess.run(
            [sys.executable, "-m", "benchmarks.devices", *map(str, given)],
            check=True,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
        return
    results = run(arguments)
    text = markdown(results)
    print(text)
    keep(arguments.out / "devices.json", results, text)


if __name__ == "__main__":
    main()
