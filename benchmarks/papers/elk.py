"""Stable evaluation of nonlinear recurrences: DEER inside a trust region, ELK (arXiv:2407.19115).

Two recurrences. *A network that feeds on itself*: a GRU trained to predict a noisy sine wave runs on its own predictions
with noise, float32; along the first guess products of Jacobians grow by the step, and Newton's method overflows where a
trust region does not (`benchmarks.gru_autoregressive` has the cell and its training). *Lorenz-96*: five numbers, forcing 8,
Runge–Kutta steps of 0.01, chaotic.

ELK's trust region has a damping λ; λ = 0 is DEER. The papers choose one by a sweep; `elk()` here lets it fall with the
residual ("automatic"). scale-ELK is the variant without a smoother that multiplies every Jacobian by 1 − k.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.gru_autoregressive import step as predict
from benchmarks.gru_autoregressive import train
from benchmarks.papers.experiment import (
    Claim,
    Findings,
    converged,
    draw_histories,
    judged,
    panels,
    row_of,
    solved,
    times,
)
from partime_mcmc import Dynamics, deer, elk, quasi_deer, quasi_elk
from partime_mcmc.solvers import ConstantDamping

SMALL = {
    "num_steps": 1024,
    "num_updates": 400,
    "max_iterations": 60,
    "dampings": (1e-6, 1e-4, 1e-2),
    "num_chaotic": 200,
}
PAPER = {
    "num_steps": 10_000,
    "num_updates": 600,
    "max_iterations": 1000,
    "dampings": (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    "num_chaotic": 1000,
}
_ITSELF, _CHAOS = "GRU on its own predictions", "Lorenz-96"


def lorenz96(forcing, state, _):
    """A Runge–Kutta step of 0.01 of x_j' = (x_{j+1} − x_{j−2}) x_{j−1} − x_j + F."""

    def field(x):
        return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + forcing

    k1 = field(state)
    k2 = field(state + 0.005 * k1)
    k3 = field(state + 0.005 * k2)
    return state + 0.01 / 6 * (k1 + 2 * k2 + 2 * k3 + field(state + 0.01 * k3))


def run(num_steps, num_updates, max_iterations, dampings, num_chaotic) -> Findings:
    """Both recurrences."""
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), train(4, num_updates))
    noise = 0.5 * jnp.asarray(np.random.default_rng(1).normal(size=(num_steps, 1)), jnp.float32)
    start = jnp.zeros(4, jnp.float32), jnp.zeros(1, jnp.float32)
    itself = Dynamics(predict, {"cell": weights["cell"], "readout": weights["readout"]})
    methods = {
        "DEER": deer(),
        "quasi-DEER": quasi_deer(clip=None),
        "scale-ELK, k = 0.1": deer(damping=0.1),
        "quasi-ELK, λ = 0.1": quasi_elk(policy=ConstantDamping(0.1)),
        "ELK, automatic": elk(),
    }
    methods |= {f"ELK, λ = {value:g}": elk(policy=ConstantDamping(value)) for value in dampings}
    rows = solved(
        _ITSELF,
        itself,
        start,
        noise,
        methods,
        # A diagonal needs more passes, which cost less.
        max_iterations={
            name: max_iterations * (4 if name.startswith("quasi") else 1) for name in methods
        },
        repeats=1,
    )
    chaos = Dynamics(lorenz96, jnp.asarray(8.0))
    begin = 8.0 + jnp.asarray(np.random.default_rng(2).normal(size=5))
    rows += solved(
        _CHAOS,
        chaos,
        begin,
        jnp.arange(num_chaotic),
        {
            "DEER": deer(),
            "quasi-DEER": quasi_deer(clip=None),
            "ELK, automatic": elk(),
        },
        max_iterations=num_chaotic,
        repeats=1,
    )
    return Findings(rows, claims(rows, dampings), figure(rows, dampings))


def claims(rows: list[dict], dampings) -> list[Claim]:
    """What the paper says, beside the rows."""
    itself = lambda method: row_of(rows, problem=_ITSELF, method=method)
    chaos = lambda method: row_of(rows, problem=_CHAOS, method=method)
    newton, auto = itself("DEER"), itself("ELK, automatic")
    quasi, damped = itself("quasi-DEER"), itself("quasi-ELK, λ = 0.1")
    scaled = itself("scale-ELK, k = 0.1")
    sweep = [itself(f"ELK, λ = {value:g}") for value in dampings]
    right = [row for row in sweep if converged(row)] or sweep
    best = min(right, key=lambda row: row["iterations"])
    top = lambda row: max(row["history"])
    chaotic = [row for row in rows if row["problem"] == _CHAOS]
    damped_chaos = chaos("ELK, automatic")
    undamped = [row for row in chaotic if row is not damped_chaos]
    verdict = lambda row: f"{row['status']} after {row['iterations']} iterations"
    return [
        judged(
            "arXiv:2407.19115",
            "DEER can be numerically unstable: on a network that feeds on itself its iterates grow before they converge",
            f"largest residual on the way {top(newton):.1e}; {verdict(newton)}, residual {newton['residual']:.0e}",
            top(newton) > 1e3 or not converged(newton),
            "products of Jacobians along the first guess grow with its length and with how long the network was trained: with 4,096 "
            "steps and 600 updates they reach 1.8e+38 and 67 iterations (`benchmarks/results/gru-autoregressive.md`)",
        ),
        judged(
            "arXiv:2407.19115",
            "ELK stabilises Newton's method by a trust region: its iterates stay bounded, and it converges in fewer iterations",
            f"ELK, automatic λ: largest residual on the way {top(auto):.1e}, {verdict(auto)} (DEER {newton['iterations']}), "
            f"{times(auto)}",
            converged(auto)
            and auto["iterations"] < newton["iterations"]
            and top(auto) < top(newton),
        ),
        judged(
            "arXiv:2407.19115",
            "quasi-ELK converges where quasi-DEER does not, or sooner",
            f"quasi-DEER: {verdict(quasi)}; quasi-ELK, λ = 0.1: {verdict(damped)}, {times(damped)}",
            converged(damped)
            and (not converged(quasi) or damped["iterations"] < quasi["iterations"]),
            "its residual is smaller, but a diagonal wants some hundred iterations more than are allowed here; which λ is enough "
            "depends on the noise (`benchmarks/results/gru-autoregressive.md`)",
        ),
        judged(
            "arXiv:2407.19115",
            "λ is to be tuned: too small a value is unstable, too large a one slow",
            "; ".join(f"{row['method']}: {verdict(row)}" for row in sweep),
            sweep[-1]["iterations"] > best["iterations"],
        ),
        judged(
            "the method",
            "λ that falls with the residual needs no sweep: no more iterations than the best constant",
            f"automatic {auto['iterations']}, best constant {best['iterations']} ({best['method']})",
            converged(auto) and auto["iterations"] <= best["iterations"],
        ),
        judged(
            "the method",
            "scaling the Jacobians by 1 − k stabilises Newton's method without a smoother",
            f"k = 0.1: largest residual on the way {top(scaled):.1e}, {verdict(scaled)}; DEER {top(newton):.1e}, "
            f"{newton['iterations']} iterations",
            converged(scaled) and top(scaled) < top(newton),
        ),
        judged(
            "arXiv:2407.19115",
            "DEER and quasi-DEER converge globally, in at most T iterations",
            f"Lorenz-96, chaotic, T = {chaotic[0]['T']}: "
            + "; ".join(f"{row['method']} {verdict(row)}" for row in undamped)
            + f"; DEER {times(chaos('DEER'))}",
            all(map(converged, undamped)),
        ),
        judged(
            "the method",
            "a damped iteration does not have that bound: it moves steps that are exact already",
            f"Lorenz-96: ELK, automatic λ, {verdict(damped_chaos)}, {damped_chaos['exact_steps']} exact steps",
            not converged(damped_chaos),
            "λ fell fast enough for ELK to become Newton's method in time",
        ),
    ]


def figure(rows: list[dict], dampings) -> Figure:
    """Traces on the network and on Lorenz-96, and iterations over λ."""
    drawn, axes = panels(3)
    shown = ("DEER", "quasi-DEER", "quasi-ELK, λ = 0.1", "ELK, automatic")
    of = lambda problem, names: [
        row for row in rows if row["problem"] == problem and row["method"] in names
    ]
    draw_histories(axes[0], of(_ITSELF, shown), _ITSELF)
    draw_histories(axes[1], of(_CHAOS, (*shown[:2], shown[3])), _CHAOS)
    sweep = [row_of(rows, problem=_ITSELF, method=f"ELK, λ = {value:g}") for value in dampings]
    axes[2].loglog(dampings, [row["iterations"] for row in sweep], marker="o", label="constant λ")
    auto = row_of(rows, problem=_ITSELF, method="ELK, automatic")
    axes[2].axhline(auto["iterations"], color="k", linestyle="--", label="automatic")
    axes[2].set_title("ELK's damping", fontsize=10)
    axes[2].set_xlabel("λ")
    axes[2].set_ylabel("iterations")
    axes[2].legend(fontsize=8)
    return drawn
