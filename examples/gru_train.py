"""Train a GRU on a long real sequence, by `lax.scan` and in parallel over time: the same loss curve, two wall times.

    python examples/gru_train.py                    # 150 steps of Adam each way

The 1,797 handwritten digits that scikit-learn ships are read as one stream, row of pixels by row of pixels, eight rows a
digit; after its last row the network names the digit. It is never reset, so the first 1,500 digits are one sequence of
12,000 steps, and every step of Adam is the gradient through all of it. The other 297 digits follow as a test.

One line differs between the two runs: which function unrolls the cell.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from partime_mcmc.rnn import gru, gru_params, unroll, unroll_with_status

ROWS = 8


def by_scan(params, carry, inputs):
    """`lax.scan`."""
    return jax.lax.scan(functools.partial(gru, params), carry, inputs)


by_unroll = functools.partial(unroll, gru)


def stream(num_digits: int) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Rows `(8 N, 8)` and labels `(N,)`, of the first digits and of the rest."""
    digits = load_digits()
    rows = jnp.asarray(digits.images.reshape(-1, ROWS) / 16 - 0.3, jnp.float32)
    labels = jnp.asarray(digits.target)
    return (rows[: ROWS * num_digits], labels[:num_digits]), (
        rows[ROWS * num_digits :],
        labels[num_digits:],
    )


def initial_weights(num_units: int) -> dict:
    """The cell's and the readout's weights."""
    cell = gru_params(jax.random.key(0), ROWS, num_units)
    readout = jax.random.normal(jax.random.key(1), (num_units, 10)) / np.sqrt(num_units)
    return {"cell": cell, "readout": readout, "bias": jnp.zeros(10)}


def loss(run, weights, rows, labels):
    """Mean cross entropy after each digit's last row, and how many were right."""
    carry = jnp.zeros(weights["readout"].shape[0])
    states = run(weights["cell"], carry, rows)[1][ROWS - 1 :: ROWS]
    logits = states @ weights["readout"] + weights["bias"]
    right = jnp.mean(logits.argmax(axis=1) == labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), right


def train(run, weights, data, num_updates: int, rate: float) -> tuple[dict, np.ndarray, float]:
    """Adam on the whole sequence: weights, losses, and seconds without compilation."""
    optimizer = optax.adam(rate)

    @jax.jit
    def update(weights, memory):
        (value, _), gradient = jax.value_and_grad(functools.partial(loss, run), has_aux=True)(
            weights, *data
        )
        change, memory = optimizer.update(gradient, memory)
        return optax.apply_updates(weights, change), memory, value

    memory, values = optimizer.init(weights), []
    jax.block_until_ready(update(weights, memory))
    begin = time.perf_counter()
    for _ in range(num_updates):
        weights, memory, value = update(weights, memory)
        values.append(float(value))
    return weights, np.array(values), time.perf_counter() - begin


def main(argv: list[str] | None = None) -> dict:
    """Train both ways; returns what was printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-units", type=int, default=64)
    parser.add_argument("--num-digits", type=int, default=1500)
    parser.add_argument("--num-updates", type=int, default=150)
    parser.add_argument("--rate", type=float, default=3e-3)
    flags = parser.parse_args(argv)
    data, rest = stream(flags.num_digits)
    weights = initial_weights(flags.num_units)
    found = {}
    for name, run in (("lax.scan", by_scan), ("unroll", by_unroll)):
        trained, losses, seconds = train(run, weights, data, flags.num_updates, flags.rate)
        accuracy = (
            float(jax.jit(functools.partial(loss, by_scan))(trained, *rest)[1])
            if rest[1].size
            else float("nan")
        )
        found[name] = {
            "losses": losses,
            "seconds": seconds,
            "accuracy": accuracy,
            "weights": trained,
        }
        shown = ", ".join(f"{value:.4f}" for value in losses[:: max(1, flags.num_updates // 6)])
        print(
            f"{name:9s} {seconds:6.2f} s, {1e3 * seconds / flags.num_updates:6.1f} ms per update; loss {shown}, "
            f"{losses[-1]:.4f}; {100 * accuracy:.1f} % of the other digits named",
            flush=True,
        )
    scan, parallel = found["lax.scan"], found["unroll"]
    difference = float(np.max(np.abs(scan["losses"] - parallel["losses"]) / scan["losses"]))
    status = unroll_with_status(
        gru, parallel["weights"]["cell"], jnp.zeros(flags.num_units), data[0]
    )[2]
    apart, tilted = on_trained(parallel["weights"], data)
    print(
        f"{scan['seconds'] / parallel['seconds']:.2f} times as fast; losses differ by {difference:.1e} at most "
        f"(relative); trained network: {'in parallel' if status.parallel else 'sequentially'}, "
        f"{float(status.evaluations):.2f} evaluations per step, its states differ from lax.scan's by {apart:.1e}, its "
        f"gradients by {tilted:.1e} of the largest"
    )
    return {
        **found,
        "difference": difference,
        "parallel": bool(status.parallel),
        "states": apart,
        "gradients": tilted,
    }


def on_trained(weights, data) -> tuple[float, float]:
    """Largest difference of states, and of gradients relative to the largest of each array, between both ways on one network."""
    carry, found = jnp.zeros(weights["readout"].shape[0]), []
    for run in (by_scan, by_unroll):
        gradient = jax.jit(jax.grad(lambda weights: loss(run, weights, *data)[0]))(weights)
        found.append((jax.jit(run)(weights["cell"], carry, data[0])[1], gradient))
    (states, gradients), (others, theirs) = found
    tilted = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(a).max(), gradients, theirs)
    return float(jnp.abs(states - others).max()), float(max(jax.tree.leaves(tilted)))


if __name__ == "__main__":
    main()
