"""A GRU by `lax.scan` and by `unroll`: `python -m benchmarks.gru --out benchmarks/results`.

For every length, width and batch: seconds of the forward pass and of the gradient of a loss in all weights, by `lax.scan`
over the same cell and by every solver, interleaved in one process, the fastest of some runs each (other programs may use the
machine), compilation apart. Beside every time stand the largest difference of the states from those of `lax.scan`, the
largest relative difference of the gradients, passes, evaluations of the cell per step, whether the parallel path was used,
and the bytes of temporary memory that the compiled program asks for. `chosen` is `unroll` with no solver given.

Rows are kept by their key in the JSON file: `--only` measures some and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc import Clipped, Dynamics, Newton, Status, deer, quasi_elk, shooting
from partime_mcmc.adjoint import pulled_back
from partime_mcmc.dynamics import ravel
from partime_mcmc.mcmc.finish import versions
from partime_mcmc.rnn.masks import PackedStep
from partime_mcmc.rnn.plan import plan_for
from partime_mcmc.rnn import ClosedForm, gru, gru_diagonal, gru_params, unroll, unroll_with_status

LENGTHS = (1024, 4096, 16_384, 65_536, 262_144)
WIDTHS = (1, 8, 32, 64, 128)
BATCHES = (1, 16)
# Numbers in a path up to which a row is measured: `lax.scan` needs seconds for a gradient there.
LARGEST = 2**24


def solver_named(name: str, num_units: int):
    """A solver; None leaves the choice to `unroll`."""
    closed = ClosedForm(gru_diagonal, jnp.zeros(num_units))
    return {"chosen": None, "shooting": shooting(32), "DEER": deer(), "quasi-DEER": Newton(Clipped(closed, 1.0)),
            "quasi-ELK": quasi_elk()}[name]


def solvers_of(length: int, width: int, batch: int) -> list[str]:
    """Every solver where all are affordable; elsewhere what `unroll` chooses."""
    if batch == 1 and length in (4096, 65_536) and width in (8, 32):
        return ["chosen", "shooting", "quasi-DEER", "DEER"] + ["quasi-ELK"] * (width == 8)
    return ["chosen"]


def by_scan(params, carry, inputs):
    """`lax.scan` of every sequence in the batch."""
    return jax.vmap(lambda carry, inputs: jax.lax.scan(functools.partial(gru, params), carry, inputs))(carry, inputs)


def loss(run, params, carry, inputs):
    """The mean square of all outputs."""
    return jnp.mean(run(params, carry, inputs)[1] ** 2)


def interleaved(functions: dict, arguments, repeats: int) -> dict:
    """Compile each, run them in turn; seconds, memory and values."""
    found = {}
    for name, function in functions.items():
        compiled = jax.jit(function).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        found[name] = {"function": compiled, "bytes": int(memory.temp_size_in_bytes), "times": [],
                       "value": jax.block_until_ready(compiled(*arguments))}
    for _ in range(repeats):
        for record in found.values():
            begin = time.perf_counter()
            jax.block_until_ready(record["function"](*arguments))
            record["times"].append(time.perf_counter() - begin)
    return found


def measure(length: int, width: int, batch: int, repeats: int) -> list[dict]:
    """The rows of one problem, one per solver."""
    params = gru_params(jax.random.key(0), width, width)
    carry = jnp.zeros((batch, width))
    inputs = jax.random.normal(jax.random.key(1), (batch, length, width))
    arguments = params, carry, inputs
    names = solvers_of(length, width, batch)
    runs = {"scan": by_scan} | {name: functools.partial(
        unroll, gru, solver=solver_named(name, width), batch_axes=1) for name in names}
    forward = interleaved(runs, arguments, repeats)
    gradient = interleaved({name: jax.grad(functools.partial(loss, run)) for name, run in runs.items()}, arguments, repeats)
    rows = []
    for name in names:
        status = unroll_with_status(gru, *arguments, solver=solver_named(name, width), batch_axes=1)[2]
        states = np.abs(np.asarray(forward[name]["value"][1]) - np.asarray(forward["scan"]["value"][1])).max()
        gaps = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(*(map(np.asarray, jax.tree.leaves(
            gradient[key]["value"])) for key in (name, "scan")))]
        row = {"T": length, "D": width, "batch": batch, "solver": name, "parallel": bool(np.all(status.parallel)),
               "status": Status(int(np.max(status.solver_status))).name, "iterations": int(np.max(status.iterations)),
               "evaluations": float(np.mean(status.evaluations)), "state_difference": float(states),
               "gradient_difference": float(max(gaps))}
        if name == "chosen" and batch == 1 and row["parallel"]:
            row["adjoint_evaluations"] = adjoint_evaluations(params, carry[0], inputs[0])
        for kind, found in (("forward", forward), ("gradient", gradient)):
            row[kind] = {"scan_seconds": min(found["scan"]["times"]), "seconds": min(found[name]["times"]),
                         "ratio": min(found["scan"]["times"]) / min(found[name]["times"]),
                         "scan_bytes": found["scan"]["bytes"], "bytes": found[name]["bytes"]}
        rows.append(row)
    return rows


def adjoint_evaluations(params, carry, inputs) -> float:
    """Products with Jᵀ per step in the gradient of the loss, for one sequence and the plan that `unroll` takes."""
    flat, start, _ = ravel(Dynamics(PackedStep(gru, False), params), carry)
    states = unroll(gru, params, carry, inputs)[1]
    before = jnp.concatenate([start[None], states[:-1]])
    right = jax.grad(lambda states: jnp.mean(states**2))(states)
    plan = plan_for(gru, params, carry, inputs[0])
    return float(pulled_back(flat.step, plan, flat.params, before, inputs, right)[1].evaluations)


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    lines = ["| T | D | batch | solver | forward: scan, ms | | gradient: scan, ms | | states differ | gradients differ | "
             "passes | evaluations per step, adjoint | memory of the gradient: scan, this |", "|" + "---|" * 13]
    for row in sorted(rows, key=key_of):
        forward, gradient = row["forward"], row["gradient"]
        how = f"{row['solver']}" + ("" if row["parallel"] else " (sequential)")
        lines.append(
            f"| {row['T']:,} | {row['D']} | {row['batch']} | {how} | {1e3 * forward['scan_seconds']:.2f} | "
            f"{forward['ratio']:.2f}× | {1e3 * gradient['scan_seconds']:.2f} | {gradient['ratio']:.2f}× | "
            f"{row['state_difference']:.0e} | {row['gradient_difference']:.0e} | {row['iterations']} | "
            f"{row['evaluations']:.2f}" + (f", {row['adjoint_evaluations']:.2f}" if "adjoint_evaluations" in row else "") + f" | {gradient['scan_bytes'] / 2**20:.0f}, {gradient['bytes'] / 2**20:.0f} MiB |")
    return "\n".join(lines) + "\n"


def key_of(row: dict) -> tuple:
    """What names a row."""
    return row["batch"], row["D"], row["T"], row["solver"]


def main(argv: list[str] | None = None) -> None:
    """Measure and write `gru-<platform>.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    flags = parser.parse_args(argv)
    flags.out.mkdir(parents=True, exist_ok=True)
    stored = flags.out / f"gru-{jax.default_backend()}.json"
    rows = {key_of(row): row for row in json.loads(stored.read_text())["rows"]} if stored.exists() else {}
    machine = {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind, "cpu": platform.machine(),
               "repeats": flags.repeats, "versions": versions()}
    for batch in flags.batches:
        for width in flags.widths:
            for length in flags.lengths:
                if length * width * batch > LARGEST:
                    continue
                fresh = measure(length, width, batch, flags.repeats)
                rows |= {key_of(row): row for row in fresh}
                print("\n".join(table(fresh).splitlines()[2:]), flush=True)
                stored.write_text(json.dumps({"machine": machine, "rows": list(rows.values())}, indent=1))
                stored.with_suffix(".md").write_text(table(list(rows.values())))


if __name__ == "__main__":
    main()
