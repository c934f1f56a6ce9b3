"""Scalable evaluation of nonlinear recurrences: the Jacobian's diagonal, quasi-DEER (arXiv:2407.19115).

A GRU on noise at several hidden sizes, float32: iterations, time and temporary memory of DEER, of quasi-DEER with the exact
diagonal, and of quasi-DEER with one Hutchinson probe, which arXiv:2508.18413 added.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks.papers.experiment import (
    Claim,
    Findings,
    converged,
    judged,
    panels,
    row_of,
    solved,
    times,
)
from partime_mcmc import Dynamics, deer, quasi_deer
from partime_mcmc.rnn import gru, gru_params

SMALL = {"num_steps": 1024, "widths": (4, 32), "repeats": 2}
PAPER = {"num_steps": 16_384, "widths": (8, 16, 32, 64), "repeats": 3}
_METHODS = {
    "DEER": deer(),
    "quasi-DEER": quasi_deer(clip=None),
    "quasi-DEER, 1 probe": quasi_deer(num_probes=1, clip=None),
}


def driven(params, state, drive):
    """A GRU's carry."""
    return gru(params, state, drive)[0]


def run(num_steps, widths, repeats) -> Findings:
    """Every method at every width."""
    rows = []
    for width in widths:
        params = gru_params(jax.random.key(width), width, width)
        inputs = jax.random.normal(jax.random.key(1), (num_steps, width), jnp.float32)
        rows += solved(
            f"GRU on noise, D = {width}",
            Dynamics(driven, params),
            jnp.zeros(width, jnp.float32),
            inputs,
            _METHODS,
            repeats=repeats,
        )
    return Findings(rows, claims(rows, widths), figure(rows, widths))


def claims(rows: list[dict], widths) -> list[Claim]:
    """What the paper says, beside the rows."""
    narrow, wide = (
        {
            method: row_of(rows, problem=f"GRU on noise, D = {width}", method=method)
            for method in _METHODS
        }
        for width in (widths[0], widths[-1])
    )
    probe = wide["quasi-DEER, 1 probe"]
    memory = {name: one["temp_bytes"] / 2**20 for name, one in wide.items()}
    per_iteration = lambda row: row["seconds"] / (row["iterations"] + 1)
    growth = math.log(per_iteration(wide["DEER"]) / per_iteration(narrow["DEER"])) / math.log(
        widths[-1] / widths[0]
    )
    return [
        judged(
            "arXiv:2407.19115",
            "quasi-DEER converges comparably to DEER",
            f"GRU on noise, D = {widths[-1]}: DEER {wide['DEER']['iterations']}, "
            f"quasi-DEER {wide['quasi-DEER']['iterations']} iterations",
            wide["quasi-DEER"]["iterations"] <= 5 * wide["DEER"]["iterations"],
        ),
        judged(
            "arXiv:2407.19115",
            "quasi-DEER uses less memory",
            f"temporary memory at D = {widths[-1]}, T = {wide['DEER']['T']:,}: DEER {memory['DEER']:.1f} MiB, "
            f"quasi-DEER {memory['quasi-DEER']:.1f} MiB",
            memory["quasi-DEER"] < memory["DEER"],
        ),
        judged(
            "arXiv:2407.19115",
            "quasi-DEER is faster",
            f"D = {widths[-1]}: quasi-DEER {times(wide['quasi-DEER'])}; DEER {times(wide['DEER'])}",
            wide["quasi-DEER"]["seconds"] < wide["DEER"]["seconds"],
            "both take D Jacobian products per step, which is most of the time where the scan is not a tree of matrix products",
        ),
        judged(
            "arXiv:2407.19115",
            "an iteration of DEER costs D³ per step",
            f"time of an iteration from D = {widths[0]} to {widths[-1]} grows like D^{growth:.1f}; "
            f"D = {widths[-1]}: {times(wide['DEER'])}",
            growth > 2.5,
            f"on {jax.default_backend()} small matrices cost no more than their overhead, and on a CPU the scan is a loop that "
            "applies matrices to a vector, D² per step",
        ),
        judged(
            "arXiv:2508.18413",
            "one random probe of the diagonal makes an iteration cheaper and still converges",
            f"D = {widths[-1]}: {probe['status']} after {probe['iterations']} iterations, {probe['jvps']:.0f} Jacobian products per "
            f"step (exact diagonal {wide['quasi-DEER']['jvps']:.0f}), {times(probe)}",
            converged(probe) and probe["seconds"] < wide["quasi-DEER"]["seconds"],
        ),
    ]


def figure(rows: list[dict], widths) -> Figure:
    """Time and temporary memory by hidden size."""
    drawn, axes = panels(2)
    for method in _METHODS:
        of = [row for row in rows if row["method"] == method]
        axes[0].loglog(widths, [1e3 * row["seconds"] for row in of], "o-", label=method)
        axes[1].loglog(widths, [(row["temp_bytes"] or 1) / 2**20 for row in of], "o-", label=method)
    loop = [1e3 * row["loop_seconds"] for row in rows if row["method"] == "DEER"]
    axes[0].loglog(widths, loop, "k--", label="sequential loop")
    for axis, label in zip(axes, ("ms", "temporary memory, MiB")):
        axis.set_xlabel("hidden size D")
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
    return drawn
