"""Parallelising nonlinear sequential models: the speed of DEER over sizes (arXiv:2309.12252).

A GRU on noise, over hidden sizes and lengths, float32: the forward pass and the gradient of a loss in all weights, by
`lax.scan` over the same cell, by DEER as in the paper, and by what `unroll` chooses here.

Where T exceeds `loop_steps`, `lax.scan` is timed for so many steps and scaled.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.papers.experiment import (
    Claim,
    Findings,
    judged,
    panels,
    ratio,
    times,
)
from benchmarks.record import timed
from partime_mcmc import deer
from partime_mcmc.rnn import gru, gru_params, unroll_with_status

SMALL = {
    "widths": (2, 16),
    "short_widths": (2,),
    "gradient_widths": (16,),
    "lengths": (1_000, 10_000),
    "largest": 2**24,
    "loop_steps": 10_000,
    "repeats": 3,
}
PAPER = {
    "widths": (1, 4, 16, 64),
    "short_widths": (1, 4, 16, 64),
    "gradient_widths": (1, 4, 16, 64),
    "lengths": (1_000, 10_000, 100_000, 1_000_000),
    "largest": 2**30,
    "loop_steps": 1000,
    "repeats": 3,
}
_METHODS = {"DEER": deer(), "chosen by unroll": None}


def by_scan(params, carry, inputs):
    """`lax.scan` over the cell."""
    return jax.lax.scan(functools.partial(gru, params), carry, inputs)


def gradient_of(function):
    """The gradient of the outputs' mean square in all weights."""
    return jax.grad(lambda params, carry, inputs: jnp.mean(function(params, carry, inputs)[1] ** 2))


def network_rows(
    width: int, length: int, kinds: tuple, names: tuple, loop_steps: int, repeats: int
) -> list[dict]:
    """Forward pass, and gradient if it is among the kinds, of a GRU by these methods."""
    params = gru_params(jax.random.key(0), width, width)
    carry = jnp.zeros(width, jnp.float32)
    inputs = jax.random.normal(jax.random.key(1), (length, width), jnp.float32)
    looked, rows = min(length, loop_steps), []
    by_method = {
        name: functools.partial(unroll_with_status, gru, solver=solver)
        for name, solver in _METHODS.items()
        if name in names
    }
    runs = {}
    for kind in kinds:
        wrap = jax.jit if kind == "forward" else lambda function: jax.jit(gradient_of(function))
        runs[kind, None] = (wrap(by_scan), (params, carry, inputs[:looked]))
        for name, function in by_method.items():
            runs[kind, name] = (wrap(function), (params, carry, inputs))
    found = timed(runs, repeats)
    for kind, name in runs:
        if name is None:
            continue
        status = found["forward", name]["value"][2]
        values = [
            np.asarray(leaf)
            for leaf in jax.tree.leaves(
                found[kind, name]["value"][1][:looked]
                if kind == "forward"
                else found[kind, name]["value"]
            )
        ]
        wanted = [
            np.asarray(leaf)
            for leaf in jax.tree.leaves(
                found[kind, None]["value"][1] if kind == "forward" else found[kind, None]["value"]
            )
        ]
        gap = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(values, wanted))
        rows.append(
            {
                "problem": f"GRU, {kind}",
                "method": name,
                "T": length,
                "D": width,
                "iterations": int(np.max(status.iterations)),
                "evaluations": float(np.mean(status.evaluations)),
                "residual": float(np.max(status.residual)),
                "difference": float(gap) if kind == "forward" or looked == length else None,
                "seconds": found[kind, name]["seconds"],
                "loop_seconds": found[kind, None]["seconds"] * length / looked,
                "loop_scaled": looked < length,
                "temp_bytes": found[kind, name]["temp_bytes"],
            }
        )
    return rows


def run(widths, short_widths, gradient_widths, lengths, largest, loop_steps, repeats) -> Findings:
    """Speed over sizes."""
    rows = []
    for length in lengths:
        # Shorter sequences show how the gain depends on the length; everything else is measured on the longest.
        longest = length == lengths[-1]
        names = tuple(_METHODS) if longest else ("DEER",)
        for width in widths if longest else short_widths:
            kinds = (
                ("forward", "gradient") if longest and width in gradient_widths else ("forward",)
            )
            if length * width**2 <= largest:
                rows += network_rows(width, length, kinds, names, loop_steps, repeats)
    return Findings(rows, claims(rows), figure(rows))


def claims(rows: list[dict]) -> list[Claim]:
    """What the paper says, beside the rows."""
    network = [row for row in rows if row["problem"].startswith("GRU")]
    forward = [row for row in network if "forward" in row["problem"] and row["method"] == "DEER"]
    gradient = [row for row in network if "gradient" in row["problem"] and row["method"] == "DEER"]
    chosen = [row for row in network if row["method"] != "DEER"]
    best, best_chosen = max(forward, key=ratio), max(chosen, key=ratio)
    width = forward[0]["D"]
    by_length = sorted((row for row in forward if row["D"] == width), key=lambda row: row["T"])
    longest = min(row["T"] for row in (forward[-1], by_length[-1]))
    by_width = sorted((row for row in forward if row["T"] == longest), key=lambda row: row["D"])
    here = jax.default_backend()
    known = [row["difference"] for row in gradient if row["difference"] is not None]
    return [
        judged(
            "arXiv:2309.12252",
            "the outputs are those of the sequential evaluation",
            f"{len(forward)} sizes: largest difference relative to the largest output "
            f"{max(row['difference'] for row in forward):.0e} in float32, largest residual "
            f"{max(row['residual'] for row in forward):.0e}",
            max(row["difference"] for row in forward) < 1e-4,
        ),
        judged(
            "arXiv:2309.12252",
            "gradients through the solve are those of the sequential evaluation",
            f"largest relative difference {max(known):.0e} in float32",
            max(known) < 1e-3,
        ),
        judged(
            "arXiv:2309.12252",
            "evaluation on a GPU is up to three orders of magnitude faster than the loop",
            f"on {here}: at best {ratio(best):.2g}× "
            f"(D = {best['D']}, T = {best['T']:,}: {times(best)})",
            here == "gpu" and ratio(best) >= 300,
            "this is a CPU with two cores; DEER does D + 1 evaluations' worth of work per iteration and needs the lanes of a GPU"
            if here != "gpu"
            else "a loop over a small GRU is compiled into one kernel here, and is itself faster than the paper's",
        ),
        judged(
            "the method",
            "a parallel evaluation can gain on this machine, too, if it does hardly more work than the loop",
            f"what unroll chooses: at best {ratio(best_chosen):.2g}× (D = {best_chosen['D']}, T = {best_chosen['T']:,}, "
            f"{best_chosen['problem']}, {best_chosen['evaluations']:.2f} evaluations per step: {times(best_chosen)})",
            ratio(best_chosen) > 1,
            "the sizes are too small, or other programs used the machine",
        ),
        judged(
            "arXiv:2309.12252",
            "the gain grows with the length of the sequence",
            f"D = {width}: "
            + "; ".join(f"T = {row['T']:,} {ratio(row):.2g}×" for row in by_length)
            + f"; residuals at most {max(row['residual'] for row in by_length):.0e}",
            ratio(by_length[-1]) > 1.2 * ratio(by_length[0]),
            "without lanes to fill, both times grow like T",
        ),
        judged(
            "arXiv:2309.12252",
            "the gain falls with the hidden size, as the work per iteration grows like D³ and memory like D²",
            f"T = {longest:,}: "
            + "; ".join(f"D = {row['D']} {ratio(row):.2g}×" for row in by_width),
            ratio(by_width[-1]) < ratio(by_width[0]) / 2,
        ),
        judged(
            "the method",
            "a few iterations suffice, whatever the length",
            f"iterations from {min(row['iterations'] for row in forward)} to {max(row['iterations'] for row in forward)} "
            f"for T from {forward[0]['T']:,} to {forward[-1]['T']:,}",
            max(row["iterations"] for row in forward) <= 20,
        ),
    ]


def figure(rows: list[dict]) -> Figure:
    """Gain over the loop by hidden size, for each length."""
    drawn, axes = panels(2)
    for axis, kind in zip(axes, ("forward", "gradient")):
        for method, style in (("DEER", "-o"), ("chosen by unroll", "--s")):
            of = [
                row for row in rows if row["problem"] == f"GRU, {kind}" and row["method"] == method
            ]
            for length in sorted({row["T"] for row in of}):
                line = sorted((row for row in of if row["T"] == length), key=lambda row: row["D"])
                axis.loglog(
                    [row["D"] for row in line],
                    [ratio(row) for row in line],
                    style,
                    label=f"{method}, T = {length:,}",
                    markersize=4,
                )
        axis.axhline(1.0, color="k", linewidth=0.8)
        axis.set_title(f"GRU, {kind}", fontsize=10)
        axis.set_xlabel("hidden size D")
        axis.set_ylabel("times faster than lax.scan")
        axis.legend(fontsize=7)
    return drawn
