"""Parallelising nonlinear sequential models: DEER (arXiv:2309.12252).

*A GRU on noise*, over hidden sizes and lengths, float32: the forward pass and the gradient of a loss in all weights, by
`lax.scan` over the same cell, by DEER as in the paper, and by what `unroll` chooses here. *A classification of long
series*, trained through the solve and through the loop from the same weights: simulated worms, five classes that differ in
how fast six noisy angles oscillate (the paper's EigenWorms have as many of each). *A Hamiltonian neural network* as a
recurrence, x' = x + Runge–Kutta step of J ∇H_w(x), two bodies in the plane, with the gradient of a loss in w.

Where T exceeds `loop_steps`, `lax.scan` is timed for so many steps and scaled.
"""

from __future__ import annotations

import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.papers.experiment import (
    Claim,
    Findings,
    judged,
    panels,
    ratio,
    row_of,
    solved,
    times,
)
from benchmarks.record import timed
from partime_mcmc import Dynamics, Tolerance, deer, iterates, rollout, solve
from partime_mcmc.rnn import gru, gru_params, unroll, unroll_with_status

SMALL = {
    "widths": (2, 16),
    "lengths": (1_000, 10_000),
    "largest": 2**24,
    "loop_steps": 10_000,
    "worms": {"num_steps": 256, "num_units": 8, "num_series": 16, "num_updates": 20},
    "num_hamiltonian": 1000,
    "repeats": 3,
}
PAPER = {
    "widths": (1, 4, 16, 64),
    "lengths": (1_000, 10_000, 100_000, 1_000_000),
    "largest": 2**30,
    "loop_steps": 1000,
    "worms": {"num_steps": 17_984, "num_units": 24, "num_series": 8, "num_updates": 20},
    "num_hamiltonian": 10_000,
    "repeats": 3,
}
_METHODS = {"DEER": deer(), "chosen by unroll": None}
_HAMILTONIAN = "Hamiltonian network"


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


def orders(num_steps: int = 1000, width: int = 8) -> list[float]:
    """The order of convergence of DEER in float64, `log(e_{k+1} / e_k) / log(e_k / e_{k-1})` while residuals e fall from 1 to 10⁻¹³."""
    # Larger weights than a fresh network's, or there would be too few iterations to see an order.
    params = jax.tree.map(
        lambda leaf: 3 * leaf, gru_params(jax.random.key(0), width, width, jnp.float64)
    )
    inputs = jax.random.normal(jax.random.key(1), (num_steps, width))
    network = Dynamics(lambda params, state, drive: gru(params, state, drive)[0], params)
    found = iterates(
        network, jnp.zeros(width), inputs, num_iterations=30, tolerance=Tolerance(1e-13, 1e-13)
    )
    e = np.asarray(found.residual)
    index = [k for k in range(1, len(e) - 1) if 1e-13 < e[k + 1] < e[k] < e[k - 1] < 1]
    return [float(math.log(e[k + 1] / e[k]) / math.log(e[k] / e[k - 1])) for k in index]


def worms(num_series: int, num_steps: int, seed: int = 0):
    """Series `(N, T, 6)` of noisy angles and their classes, 0 to 4, which set how fast they oscillate."""
    rng = np.random.default_rng(seed)
    classes = np.arange(num_series) % 5
    speed = 0.02 * 1.6**classes * rng.uniform(0.9, 1.1, num_series)
    phase = rng.uniform(0, 2 * np.pi, (num_series, 1, 6))
    angles = speed[:, None, None] * np.arange(num_steps)[None, :, None] * (1 + np.arange(6) / 6)
    series = np.sin(angles + phase) + 0.3 * rng.normal(size=(num_series, num_steps, 6))
    return jnp.asarray(series, jnp.float32), jnp.asarray(classes)


def training_rows(num_steps, num_units, num_series, num_updates) -> list[dict]:
    """Losses and seconds of the same training by the loop and by DEER."""
    series, classes = worms(num_series, num_steps)
    begin = {
        "cell": gru_params(jax.random.key(2), 6, num_units),
        "readout": jax.random.normal(jax.random.key(3), (num_units, 5), jnp.float32)
        / num_units**0.5,
    }
    optimizer = optax.adam(1e-2)

    def trained(function):
        def loss(weights):
            outputs = jax.vmap(
                lambda one: function(weights["cell"], jnp.zeros(num_units, jnp.float32), one)[1]
            )(series)
            logits = outputs.mean(axis=1) @ weights["readout"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

        @jax.jit
        def update(weights, memory):
            value, gradient = jax.value_and_grad(loss)(weights)
            change, memory = optimizer.update(gradient, memory)
            return optax.apply_updates(weights, change), memory, value

        weights, memory, losses, seconds = begin, optimizer.init(begin), [], []
        for _ in range(num_updates + 1):
            start = time.perf_counter()
            weights, memory, value = jax.block_until_ready(update(weights, memory))
            seconds.append(time.perf_counter() - start)
            losses.append(float(value))
        return losses, float(np.median(seconds[1:])), weights

    solve_cell = functools.partial(unroll, gru, solver=deer())
    loop, loop_seconds, _ = trained(by_scan)
    ours, seconds, weights = trained(solve_cell)
    status = unroll_with_status(
        gru, weights["cell"], jnp.zeros(num_units, jnp.float32), series[0], solver=deer()
    )[2]
    return [
        {
            "problem": "simulated worms, one update",
            "method": "DEER",
            "T": num_steps,
            "D": num_units,
            "iterations": int(status.iterations),
            "residual": float(status.residual),
            "difference": float(np.max(np.abs(np.subtract(ours, loop)) / np.abs(loop))),
            "seconds": seconds,
            "loop_seconds": loop_seconds,
            "first_loss": loop[0],
            "last_loss": ours[-1],
        }
    ]


def energy(params, state):
    """H_w: a network of two layers on positions and momenta of two bodies, (8,) -> scalar."""
    hidden = jnp.tanh(params[0] @ state + params[1])
    return params[2] @ jnp.tanh(params[3] @ hidden) + 0.5 * jnp.sum(state**2)


def hamiltonian(params, state, _):
    """A Runge–Kutta step of 0.05 along J ∇H_w."""

    def field(x):
        q, p = jnp.split(jax.grad(energy, argnums=1)(params, x), 2)
        return jnp.concatenate([p, -q])

    k1 = field(state)
    k2 = field(state + 0.025 * k1)
    k3 = field(state + 0.025 * k2)
    return state + 0.05 / 6 * (k1 + 2 * k2 + 2 * k3 + field(state + 0.05 * k3))


def hamiltonian_rows(num_steps: int, repeats: int) -> list[dict]:
    """The path, and how far the gradient of a loss in w is from the loop's."""
    rng = np.random.default_rng(4)
    params = tuple(
        jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5)
        for shape in ((16, 8), (16,), (16,), (16, 16))
    )
    start, drives = jnp.asarray(rng.normal(size=8)), jnp.arange(num_steps)
    rows = solved(
        _HAMILTONIAN,
        Dynamics(hamiltonian, params),
        start,
        drives,
        {"DEER": deer()},
        repeats=repeats,
    )

    def loss(path, params):
        return jnp.mean(path(Dynamics(hamiltonian, params), start, drives) ** 2)

    ours, loop = (
        jax.jit(jax.grad(functools.partial(loss, path)))(params)
        for path in (lambda *given: solve(*given).states, rollout)
    )
    gaps = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, loop)]
    return [rows[0] | {"gradient_difference": max(gaps)}]


def run(widths, lengths, largest, loop_steps, worms, num_hamiltonian, repeats) -> Findings:
    """Speed over sizes, order of convergence, training, and a Hamiltonian network."""
    rows = []
    for length in lengths:
        # Short sequences show how the gain depends on the length; everything else is measured on the longest.
        longest = length == lengths[-1]
        kinds = ("forward", "gradient") if longest else ("forward",)
        names = tuple(_METHODS) if longest else ("DEER",)
        for width in widths:
            if length * width**2 <= largest:
                rows += network_rows(width, length, kinds, names, loop_steps, repeats)
    found = orders()
    rows += training_rows(**worms) + hamiltonian_rows(num_hamiltonian, repeats)
    return Findings(rows, claims(rows, found), figure(rows))


def claims(rows: list[dict], found: list[float]) -> list[Claim]:
    """What the paper says, beside the rows."""
    network = [row for row in rows if row["problem"].startswith("GRU")]
    forward = [row for row in network if "forward" in row["problem"] and row["method"] == "DEER"]
    gradient = [row for row in network if "gradient" in row["problem"] and row["method"] == "DEER"]
    chosen = [row for row in network if row["method"] != "DEER"]
    best, best_chosen = max(forward, key=ratio), max(chosen, key=ratio)
    width = best["D"]
    by_length = sorted((row for row in forward if row["D"] == width), key=lambda row: row["T"])
    longest = min(row["T"] for row in (forward[-1], by_length[-1]))
    by_width = sorted((row for row in forward if row["T"] == longest), key=lambda row: row["D"])
    worm = row_of(rows, method="DEER", problem="simulated worms, one update")
    bodies = row_of(rows, problem=_HAMILTONIAN)
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
            "arXiv:2309.12252",
            "the iteration converges quadratically near the path",
            f"orders of convergence from iteration to iteration {', '.join(f'{one:.2f}' for one in found)} in float64",
            bool(found) and max(found) > 1.6,
        ),
        judged(
            "the method",
            "a few iterations suffice, whatever the length",
            f"iterations from {min(row['iterations'] for row in forward)} to {max(row['iterations'] for row in forward)} "
            f"for T from {forward[0]['T']:,} to {forward[-1]['T']:,}",
            max(row["iterations"] for row in forward) <= 20,
        ),
        judged(
            "arXiv:2309.12252",
            "training through the solve gives no meaningful difference in results",
            f"simulated worms, loss from {worm['first_loss']:.3f} to {worm['last_loss']:.3f}; largest relative difference of "
            f"losses from the loop's {worm['difference']:.0e}",
            worm["difference"] < 1e-2 and worm["last_loss"] < worm["first_loss"],
        ),
        judged(
            "arXiv:2309.12252",
            "training is more than ten times faster than with the loop",
            f"one update: {times(worm)}",
            ratio(worm) > 10,
            f"on {here}: the paper's figure is for a GPU and 17,984 steps; several series already fill the lanes of the loop",
        ),
        judged(
            "arXiv:2309.12252",
            "a Hamiltonian neural network is evaluated and differentiated by the same iteration",
            f"T = {bodies['T']:,}: {bodies['iterations']} iterations, {times(bodies)}, relative difference of gradients "
            f"{bodies['gradient_difference']:.0e}",
            bodies["status"] == "CONVERGED" and bodies["gradient_difference"] < 1e-6,
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
