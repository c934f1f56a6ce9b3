"""A GRU by `lax.scan` and by `unroll`: `python -m benchmarks.gru --out DIR`.

For every length, width and batch: seconds of the forward pass and of the gradient of a loss in all weights, by
`lax.scan` over the same cell and by every solver, interleaved in one process, the fastest of some runs each (other
programs may use the machine; short ones are run for a second in all), compilation apart. Beside every time stand the residual of the solver's path, the
largest difference of the states from those of `lax.scan`, the largest relative difference of the gradients, passes,
evaluations of the cell per step, whether the parallel path was used, and the bytes of temporary memory that the
compiled program asks for. `chosen` is `unroll` with no solver given.

Where T exceeds `--loop-steps`, `lax.scan` is timed for so many steps and scaled (marked *), states are compared on
these steps and gradients not at all; the residual is that of the whole path.

Rows are kept by their key in the JSON file: `--only` measures some and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import OUT, keep, settled, temporary_bytes
from partime_mcmc import Dynamics, Status, deer, quasi_elk, shooting
from partime_mcmc.engine.adjoint import pulled_back
from partime_mcmc.engine.dynamics import ravel
from partime_mcmc.linearize import Clipped
from partime_mcmc.rnn import ClosedForm, gru, gru_diagonal, gru_params, unroll, unroll_with_status
from partime_mcmc.rnn.unroll import PackedStep, plan_for
from partime_mcmc.solvers import Newton

LENGTHS = (1024, 4096, 16_384, 65_536, 262_144)
WIDTHS = (1, 8, 32, 64, 128)
BATCHES = (1, 16)
# Numbers in a path up to which a row is measured, by default: `lax.scan` needs seconds for a gradient there.
LARGEST = 2**24


def solver_named(name: str, num_units: int):
    """A solver; None leaves the choice to `unroll`."""
    closed = ClosedForm(gru_diagonal, jnp.zeros(num_units))
    return {
        "chosen": None,
        "shooting": shooting(32),
        "DEER": deer(),
        "quasi-DEER": Newton(Clipped(closed, 1.0)),
        "quasi-ELK": quasi_elk(),
    }[name]


def solvers_of(length: int, width: int, batch: int) -> list[str]:
    """Every solver where all are affordable; elsewhere what `unroll` chooses."""
    if batch == 1 and length in (4096, 65_536) and width in (8, 32):
        return ["chosen", "shooting", "quasi-DEER", "DEER"] + ["quasi-ELK"] * (width == 8)
    return ["chosen"]


def by_scan(params, carry, inputs):
    """`lax.scan` of every sequence in the batch."""
    return jax.vmap(
        lambda carry, inputs: jax.lax.scan(functools.partial(gru, params), carry, inputs)
    )(carry, inputs)


def loss(run, params, carry, inputs):
    """The mean square of all outputs."""
    return jnp.mean(run(params, carry, inputs)[1] ** 2)


def interleaved(functions: dict, arguments, looked: int, repeats: int) -> dict:
    """Compile each, run them in turn, `lax.scan` for `looked` steps; seconds of all T steps, memory and values."""
    params, carry, inputs = arguments
    found, scale = {}, {"scan": inputs.shape[1] / looked}
    given = {
        name: (params, carry, inputs[:, :looked] if name == "scan" else inputs)
        for name in functions
    }
    for name, function in functions.items():
        begin = time.perf_counter()
        compiled = jax.jit(function).lower(*given[name]).compile()
        took = time.perf_counter() - begin
        value, begin = jax.block_until_ready(compiled(*given[name])), time.perf_counter()
        jax.block_until_ready(compiled(*given[name]))
        found[name] = {
            "compile": took,
            "function": compiled,
            "bytes": temporary_bytes(compiled),
            "times": [],
            "value": value,
            "about": time.perf_counter() - begin,
        }
    for _ in range(settled(repeats, max(record["about"] for record in found.values()))):
        for name, record in found.items():
            begin = time.perf_counter()
            jax.block_until_ready(record["function"](*given[name]))
            record["times"].append((time.perf_counter() - begin) * scale.get(name, 1))
    return found


def measure(length: int, width: int, batch: int, repeats: int, loop_steps: int) -> list[dict]:
    """The rows of one problem, one per solver."""
    looked = min(length, loop_steps)
    params = gru_params(jax.random.key(0), width, width)
    carry = jnp.zeros((batch, width))
    inputs = jax.random.normal(jax.random.key(1), (batch, length, width))
    arguments = params, carry, inputs
    names = solvers_of(length, width, batch)
    runs = {"scan": by_scan} | {
        name: functools.partial(unroll, gru, solver=solver_named(name, width), batch_axes=1)
        for name in names
    }
    forward = interleaved(runs, arguments, looked, repeats)
    gradient = interleaved(
        {name: jax.grad(functools.partial(loss, run)) for name, run in runs.items()},
        arguments,
        looked,
        repeats,
    )
    rows = []
    for name in names:
        status = unroll_with_status(
            gru, *arguments, solver=solver_named(name, width), batch_axes=1
        )[2]
        states = np.abs(
            np.asarray(forward[name]["value"][1][:, :looked])
            - np.asarray(forward["scan"]["value"][1])
        ).max()
        gaps = [
            np.abs(a - b).max() / np.abs(b).max()
            for a, b in zip(
                *(
                    map(np.asarray, jax.tree.leaves(gradient[key]["value"]))
                    for key in (name, "scan")
                )
            )
        ]
        row = {
            "T": length,
            "D": width,
            "batch": batch,
            "solver": name,
            "parallel": bool(np.all(status.parallel)),
            "status": Status(int(np.max(status.solver_status))).name,
            "iterations": int(np.max(status.iterations)),
            "evaluations": float(np.mean(status.evaluations)),
            "state_difference": float(states),
            "gradient_difference": float(max(gaps)) if looked == length else None,
            "residual": float(np.max(status.residual)),
            "loop_scaled": looked < length,
        }
        if name == "chosen" and batch == 1 and row["parallel"]:
            row["adjoint_evaluations"] = adjoint_evaluations(params, carry[0], inputs[0])
        for kind, found in (("forward", forward), ("gradient", gradient)):
            row[kind] = {
                "scan_seconds": min(found["scan"]["times"]),
                "seconds": min(found[name]["times"]),
                "ratio": min(found["scan"]["times"]) / min(found[name]["times"]),
                "scan_bytes": found["scan"]["bytes"],
                "bytes": found[name]["bytes"],
                "compile": found[name]["compile"],
            }
        rows.append(row)
    return rows


def adjoint_evaluations(params, carry, inputs) -> float:
    """Products with Jᵀ per step in the gradient of the loss, for one sequence and the plan that `unroll` takes."""
    flat, start, _ = ravel(Dynamics(PackedStep(gru, False), params), carry)
    states = unroll(gru, params, carry, inputs)[1]
    before = jnp.concatenate([start[None], states[:-1]])
    right = jax.grad(lambda states: jnp.mean(states**2))(states)
    plan = plan_for(carry)
    return float(pulled_back(flat.step, plan, flat.params, before, inputs, right)[1].evaluations)


def table(rows: list[dict], left_out: list[str]) -> str:
    """The Markdown table."""
    lines = [
        "| T | D | batch | solver | forward: scan, ms | | gradient: scan, ms | | residual | states differ | "
        "gradients differ | passes | evaluations per step, adjoint | memory of the gradient: scan, this |",
        "|" + "---|" * 14,
    ]
    for row in sorted(rows, key=key_of):
        forward, gradient = row["forward"], row["gradient"]
        how, scaled = (
            f"{row['solver']}" + ("" if row["parallel"] else " (sequential)"),
            "*" * row.get("loop_scaled", False),
        )
        gap, adjoint = row["gradient_difference"], row.get("adjoint_evaluations")
        # Rows of older records have no residual.
        residual = f"{row['residual']:.0e}" if "residual" in row else "not recorded"
        lines.append(
            f"| {row['T']:,} | {row['D']} | {row['batch']} | {how} | {1e3 * forward['scan_seconds']:.2f}{scaled} | "
            f"{forward['ratio']:.2f}× | {1e3 * gradient['scan_seconds']:.2f}{scaled} | {gradient['ratio']:.2f}× | "
            f"{residual} | {row['state_difference']:.0e} | {'not compared' if gap is None else f'{gap:.0e}'} | "
            f"{row['iterations']} | "
            f"{row['evaluations']:.2f}{'' if adjoint is None else f', {adjoint:.2f}'} | "
            f"{_mebibytes(gradient['scan_bytes'])}, {_mebibytes(gradient['bytes'])} MiB |"
        )
    scaled = any(row.get("loop_scaled") for row in rows)
    notes = ["\\* timed for fewer steps and scaled; its memory is that of fewer steps."] * scaled
    return (
        "\n".join(
            [*lines, "", *notes, *(f"Left out, for memory or time: {name}." for name in left_out)]
        )
        + "\n"
    )


def _mebibytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:.0f}"


def key_of(row: dict) -> tuple:
    """What names a row."""
    return row["batch"], row["D"], row["T"], row["solver"]


def main(argv: list[str] | None = None) -> None:
    """Measure and write `gru-<platform>.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--largest", type=int, default=LARGEST, help="most numbers in a path")
    parser.add_argument(
        "--loop-steps", type=int, default=10**9, help="steps for which `lax.scan` is timed"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no row begins"
    )
    flags = parser.parse_args(argv)
    stored = flags.out / f"gru-{jax.default_backend()}.json"
    rows = (
        {key_of(row): row for row in json.loads(stored.read_text())["rows"]}
        if stored.exists()
        else {}
    )
    left_out, begin = [], time.monotonic()
    # Long ones first: they are what is asked for, and a budget ends the rest.
    for length, width, batch in sorted(
        itertools.product(flags.lengths, flags.widths, flags.batches), reverse=True
    ):
        if length * width * batch > flags.largest or time.monotonic() - begin > flags.budget:
            left_out.append(f"T = {length:,}, D = {width}, batch {batch}")
            continue
        fresh = measure(length, width, batch, flags.repeats, flags.loop_steps)
        rows |= {key_of(row): row for row in fresh}
        print("\n".join(table(fresh, []).splitlines()[2:]), flush=True)
        keep_all(stored, flags.repeats, rows, left_out)
    keep_all(stored, flags.repeats, rows, left_out)


def keep_all(stored: Path, repeats: int, rows: dict, left_out: list[str]) -> None:
    """Write what there is."""
    found = list(rows.values())
    keep(stored, {"repeats": repeats, "rows": found, "left_out": left_out}, table(found, left_out))


if __name__ == "__main__":
    main()
