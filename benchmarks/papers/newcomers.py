"""Newcomers: Picard maps for gradient-free chains, and networks with diagonal recurrences (arXiv:2506.09762, arXiv:2510.21450).

*Random-walk Metropolis* on a standard normal in d dimensions with steps of 2.4/√d, started in equilibrium: Picard's iteration
takes the increments of all steps of a window at the last guess; an increment is the proposal's or 0, and as steps are short a wrong
guess hardly changes the decisions. The front of exact steps then moves by some √d steps per iteration (Grazzi & Zanella), where a
chain with common random numbers never forgets its start, so that shooting and Jacobi have nothing to gain.

*A GRU whose hidden matrices are diagonal*, as in ParaRNN: its Jacobian is diagonal, so that quasi-Newton is Newton, at D
instead of D³ per composition; trained here to add up marked inputs, by the loop and by the solve.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.papers.experiment import (
    Claim,
    Findings,
    converged,
    judged,
    panels,
    ratio,
    row_of,
    solved,
    times,
    train,
)
from partime_mcmc import Dynamics, SlidingWindow, deer, jacobi, picard, random_walk
from partime_mcmc.linearize import HutchinsonDiagonal
from partime_mcmc.rnn import unroll, unroll_with_status
from partime_mcmc.solvers import Newton

SMALL = {
    "dimensions": (25, 400),
    "num_walk": 1024,
    "window": 128,
    "network": {"num_steps": 512, "num_units": 8, "num_series": 16, "num_updates": 60},
    "repeats": 1,
}
PAPER = {
    "dimensions": (100, 400, 1600, 6400),
    "num_walk": 16_384,
    "window": 1024,
    "network": {"num_steps": 8192, "num_units": 64, "num_series": 16, "num_updates": 200},
    "repeats": 2,
}
_NETWORK = "diagonal GRU"
# With signs ±1 a diagonal Jacobian is its own Hutchinson estimate, exactly: one product per step instead of D.
_DIAGONAL = Newton(HutchinsonDiagonal(1))


def diagonal_gru(params, carry, x):
    """A GRU whose gates see only their own unit of the carry; `params` hold rows for r, z and n."""
    own = params["own"] * carry
    seen = x @ params["input"] + params["bias"]
    r, z = jax.nn.sigmoid(seen[0] + own[0]), jax.nn.sigmoid(seen[1] + own[1])
    n = jnp.tanh(seen[2] + r * own[2])
    new = n + z * (carry - n)
    return new, new


def weights_of(num_units: int) -> dict:
    """Weights at the start: `input` (3, 2, D), `own` and `bias` (3, D)."""
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "input": jax.random.normal(keys[0], (3, 2, num_units), jnp.float32) / 2**0.5,
        "own": 0.5 * jax.random.normal(keys[1], (3, num_units), jnp.float32),
        "bias": jnp.zeros((3, num_units), jnp.float32).at[1].set(2.0),
    }


def marked_sums(num_series: int, num_steps: int):
    """Inputs `(N, T, 2)`, of which the second marks two steps of each series, and the sum of their first numbers."""
    rng = np.random.default_rng(1)
    values, marks = rng.uniform(size=(num_series, num_steps)), np.zeros((num_series, num_steps))
    for one in marks:
        one[rng.choice(num_steps, 2, replace=False)] = 1
    inputs = np.stack([values, marks], axis=2)
    return jnp.asarray(inputs, jnp.float32), jnp.asarray((values * marks).sum(axis=1), jnp.float32)


def training_rows(num_steps, num_units, num_series, num_updates) -> list[dict]:
    """Losses and seconds per update by the loop and by the solve, from the same weights."""
    inputs, wanted = marked_sums(num_series, num_steps)
    start = jnp.zeros(num_units, jnp.float32)
    weights = {
        "cell": weights_of(num_units),
        "readout": jnp.ones(num_units, jnp.float32) / num_units,
    }

    def by_scan(params, carry, x):
        return jax.lax.scan(functools.partial(diagonal_gru, params), carry, x)

    def trained(function):
        def loss(weights):
            last = jax.vmap(lambda x: function(weights["cell"], start, x)[0])(inputs)
            return jnp.mean((last @ weights["readout"] - wanted) ** 2)

        return train(loss, weights, optax.adam(1e-2), num_updates)

    loop, loop_seconds, _ = trained(by_scan)
    ours, seconds, now = trained(functools.partial(unroll, diagonal_gru, solver=_DIAGONAL))
    status = unroll_with_status(diagonal_gru, now["cell"], start, inputs[0], solver=_DIAGONAL)[2]
    return [
        {
            "problem": f"{_NETWORK}, one update",
            "method": "quasi-DEER, exact",
            "T": num_steps,
            "D": num_units,
            "iterations": int(status.iterations),
            "residual": float(status.residual),
            "difference": float(np.max(np.abs(np.subtract(ours, loop)) / np.abs(loop))),
            "seconds": seconds,
            "loop_seconds": loop_seconds,
            "first_loss": ours[0],
            "last_loss": ours[-1],
        }
    ]


def walk(dimension: int, num_steps: int):
    """A random walk on a standard normal: dynamics, start, tape."""
    kernel = random_walk(lambda x: -0.5 * jnp.sum(x**2), 2.4 / dimension**0.5)
    state = kernel.init(jnp.asarray(np.random.default_rng(2).normal(size=dimension)))
    return (
        kernel.dynamics(),
        kernel.carry(state),
        kernel.tape(jax.random.key(3), num_steps, state),
    )


def run(dimensions, num_walk, window, network, repeats) -> Findings:
    """Random walks, a forward pass of the network by both linear parts, and its training."""
    rows = []
    for dimension in dimensions:
        rows += solved(
            f"random walk, d = {dimension}",
            *walk(dimension, num_walk),
            {"Picard": picard()},
            max_iterations=num_walk,
            repeats=repeats,
            options={"Picard": {"schedule": SlidingWindow(window)}},
        )
    rows += solved(
        f"random walk, d = {dimensions[0]}",
        *walk(dimensions[0], num_walk),
        {"Jacobi": jacobi()},
        max_iterations=num_walk,
        repeats=1,
    )
    inputs, _ = marked_sums(1, network["num_steps"])
    params = weights_of(network["num_units"])
    rows += solved(
        _NETWORK,
        Dynamics(_carry_of, params),
        jnp.zeros(network["num_units"], jnp.float32),
        inputs[0],
        {"DEER": deer(), "quasi-DEER, exact": _DIAGONAL},
        repeats=repeats,
    )
    rows += training_rows(**network)
    return Findings(rows, claims(rows, dimensions), figure(rows, dimensions))


def _carry_of(params, state, x):
    return diagonal_gru(params, state, x)[0]


def claims(rows: list[dict], dimensions) -> list[Claim]:
    """What the papers say, beside the rows."""
    walks = [
        row_of(rows, problem=f"random walk, d = {dimension}", method="Picard")
        for dimension in dimensions
    ]
    gains = [row["T"] / row["iterations"] for row in walks]
    growth = np.log(gains[-1] / gains[0]) / np.log(dimensions[-1] / dimensions[0])
    other = row_of(rows, problem=f"random walk, d = {dimensions[0]}", method="Jacobi")
    newton, quasi = (
        row_of(rows, problem=_NETWORK, method=method) for method in ("DEER", "quasi-DEER, exact")
    )
    update = row_of(rows, problem=f"{_NETWORK}, one update")
    fastest = max(walks, key=ratio)
    here = jax.default_backend()
    return [
        judged(
            "arXiv:2506.09762",
            "Picard maps parallelise gradient-free Metropolis chains: steps won per iteration grow like √d",
            "; ".join(
                f"d = {dimension} {gain:.1f} steps per iteration ({times(row)})"
                for dimension, gain, row in zip(dimensions, gains, walks)
            )
            + f": like d^{growth:.2f}",
            all(map(converged, walks)) and growth > 0.3,
        ),
        judged(
            "the method",
            "the same chains are of no use to an iteration that waits for them to forget",
            f"d = {dimensions[0]}: Jacobi {other['status']} after {other['iterations']} iterations for T = {other['T']:,}",
            other["iterations"] > 0.5 * other["T"],
        ),
        judged(
            "the method",
            "a Picard iteration on short steps beats the loop where the density is dear or lanes are many",
            f"fastest: {fastest['problem']}, {times(fastest)}",
            ratio(fastest) > 1,
            f"on {here} this density costs less than what surrounds it",
        ),
        judged(
            "arXiv:2510.21450",
            "with diagonal recurrences the Newton iteration is exact at the cost of its diagonal",
            f"T = {quasi['T']:,}, D = {quasi['D']}: {quasi['iterations']} iterations with the diagonal, {newton['iterations']} with the "
            f"Jacobian; {times(quasi)} and {times(newton)}",
            quasi["iterations"] == newton["iterations"] and quasi["seconds"] < newton["seconds"],
        ),
        judged(
            "arXiv:2510.21450",
            "such networks train through the solve as through the loop",
            f"loss from {update['first_loss']:.3f} to {update['last_loss']:.3f}, largest relative difference of losses "
            f"{update['difference']:.0e}",
            update["difference"] < 1e-2 and update["last_loss"] < update["first_loss"],
        ),
        judged(
            "arXiv:2510.21450",
            "and faster, by up to 665 times for single layers on GPUs",
            f"one update: {times(update)}",
            ratio(update) > 1,
            f"on {here}: several series already fill the lanes of the loop, and the paper has kernels of its own for the reduction",
        ),
    ]


def figure(rows: list[dict], dimensions) -> Figure:
    """Steps won per iteration by dimension."""
    drawn, axes = panels(1)
    walks = [
        row_of(rows, problem=f"random walk, d = {dimension}", method="Picard")
        for dimension in dimensions
    ]
    gains = [row["T"] / row["iterations"] for row in walks]
    axes[0].loglog(dimensions, gains, "o-", label="Picard, sliding window")
    axes[0].loglog(
        dimensions,
        gains[0] * (np.asarray(dimensions) / dimensions[0]) ** 0.5,
        "k--",
        label="√d",
    )
    axes[0].set_xlabel("dimension d")
    axes[0].set_ylabel("steps per iteration")
    axes[0].set_title("random-walk Metropolis", fontsize=10)
    axes[0].legend(fontsize=8)
    return drawn
