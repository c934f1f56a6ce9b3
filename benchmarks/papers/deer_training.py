"""Training nonlinear sequential models in parallel, and a Hamiltonian network: DEER (arXiv:2309.12252).

*A classification of long series*, trained through the solve and through the loop from the same weights: simulated worms, five
classes that differ in how fast six noisy angles oscillate (the paper's EigenWorms have as many of each). *A Hamiltonian neural
network* as a recurrence, x' = x + Runge–Kutta step of J ∇H_w(x), two bodies in the plane, with the gradient of a loss in w.
And the order of convergence on a GRU in float64.
"""

from __future__ import annotations

import functools
import math

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
    train,
)
from partime_mcmc import Dynamics, Tolerance, deer, iterates, rollout, solve
from partime_mcmc.rnn import gru, gru_params, unroll, unroll_with_status

SMALL = {
    "worms": {"num_steps": 256, "num_units": 8, "num_series": 16, "num_updates": 20},
    "num_hamiltonian": 1000,
    "repeats": 3,
}
PAPER = {
    "worms": {"num_steps": 17_984, "num_units": 24, "num_series": 8, "num_updates": 20},
    "num_hamiltonian": 10_000,
    "repeats": 3,
}
_HAMILTONIAN = "Hamiltonian network"


def by_scan(params, carry, inputs):
    """`lax.scan` over the cell."""
    return jax.lax.scan(functools.partial(gru, params), carry, inputs)


def residuals(num_steps: int = 1000, width: int = 8) -> list[float]:
    """The largest residual of DEER's iterates on a GRU in float64."""
    # Larger weights than a fresh network's, or there would be too few iterations to see an order.
    params = jax.tree.map(
        lambda leaf: 3 * leaf, gru_params(jax.random.key(0), width, width, jnp.float64)
    )
    inputs = jax.random.normal(jax.random.key(1), (num_steps, width))
    network = Dynamics(lambda params, state, drive: gru(params, state, drive)[0], params)
    found = iterates(
        network, jnp.zeros(width), inputs, num_iterations=30, tolerance=Tolerance(1e-13, 1e-13)
    )
    return [float(one) for one in np.asarray(found.residual)[: int(found.iterations) + 1]]


def orders(e: list[float]) -> list[float]:
    """`log(e_{k+1} / e_k) / log(e_k / e_{k-1})` while residuals e fall from 1 to 10⁻¹³."""
    index = [k for k in range(1, len(e) - 1) if 1e-13 < e[k + 1] < e[k] < e[k - 1] < 1]
    return [math.log(e[k + 1] / e[k]) / math.log(e[k] / e[k - 1]) for k in index]


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

    def trained(function):
        def loss(weights):
            outputs = jax.vmap(
                lambda one: function(weights["cell"], jnp.zeros(num_units, jnp.float32), one)[1]
            )(series)
            logits = outputs.mean(axis=1) @ weights["readout"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

        return train(loss, begin, optax.adam(1e-2), num_updates)

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
            "losses": ours,
            "loop_losses": loop,
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


def run(worms, num_hamiltonian, repeats) -> Findings:
    """Order of convergence, training, and a Hamiltonian network."""
    fallen = residuals()
    rows = training_rows(**worms) + hamiltonian_rows(num_hamiltonian, repeats)
    return Findings(rows, claims(rows, fallen), figure(rows, fallen))


def claims(rows: list[dict], fallen: list[float]) -> list[Claim]:
    """What the paper says, beside the rows."""
    worm = row_of(rows, problem="simulated worms, one update")
    bodies = row_of(rows, problem=_HAMILTONIAN)
    here, found = jax.default_backend(), orders(fallen)
    return [
        judged(
            "arXiv:2309.12252",
            "the iteration converges quadratically near the path",
            f"orders of convergence from iteration to iteration {', '.join(f'{one:.2f}' for one in found)} in float64",
            bool(found) and max(found) > 1.6,
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


def figure(rows: list[dict], fallen: list[float]) -> Figure:
    """How residuals fall, beside squares, and the losses of both trainings."""
    drawn, axes = panels(2)
    axes[0].semilogy(fallen, "o-", label="GRU, float64")
    bodies = row_of(rows, problem=_HAMILTONIAN)
    axes[0].semilogy(np.maximum(bodies["history"], 1e-17), "s--", label=_HAMILTONIAN)
    axes[0].set_xlabel("iteration")
    axes[0].set_ylabel("largest residual")
    axes[0].legend(fontsize=8)
    worm = row_of(rows, problem="simulated worms, one update")
    axes[1].plot(worm["losses"], label="through DEER")
    axes[1].plot(worm["loop_losses"], "k--", label="through lax.scan")
    axes[1].set_xlabel("update")
    axes[1].set_ylabel("loss")
    axes[1].legend(fontsize=8)
    return drawn
