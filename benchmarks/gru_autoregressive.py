"""Newton's method and its trust regions on a GRU that feeds on itself: `python -m benchmarks.gru_autoregressive`.

A GRU is trained here to predict the next value of a noisy sine wave, and then runs on its own predictions,

    h_t = gru(h_{t-1}, y_{t-1} + noise_t),    y_t = readout(h_t),    state (h_t, y_t).

Without noise it oscillates for ever; with enough of it two copies meet after some hundred steps, so that it can be
solved in parallel, but along the first guess (nothing moves) the products of Jacobians grow by the step. Undamped
Newton then overflows in float32; a trust region does not. What is compared is how its damping is chosen: constants
from 10⁻⁸ to 10⁻², and policies that let it fall with the residual. Diagonal Jacobians want damping of another size,
from 10⁻² to 1, which has to stay for hundreds of passes; they get ten times as many. Figures are passes until every step obeys the
recurrence, the largest residual on the way, and updates that overflowed; the path is compared with the sequential
loop's.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.record import OUT, keep
from partime_mcmc import Dynamics, Status, deer, elk, quasi_deer, quasi_elk, rollout, solve
from partime_mcmc.rnn import gru, gru_params
from partime_mcmc.solvers import ConstantDamping, RelaxingDamping

CONSTANTS = (1e-8, 1e-6, 1e-4, 1e-2)
QUASI_CONSTANTS = (1e-2, 1e-1, 1.0)
NOISE = (0.5, 0.7)
_QUASI_PASSES = 10


def train(num_units: int, num_updates: int, seed: int = 0) -> dict:
    """Weights of cell and readout after Adam on the one-step prediction error of a noisy sine wave."""
    rng = np.random.default_rng(seed)
    wave = np.sin(
        0.3 * np.arange(513)[None] + rng.uniform(0, 2 * np.pi, (8, 1))
    ) + 0.05 * rng.normal(size=(8, 513))
    wave = jnp.asarray(wave[..., None])
    weights = {
        "cell": gru_params(jax.random.key(seed), 1, num_units, wave.dtype),
        "readout": jnp.asarray(rng.normal(size=(num_units, 1)) / num_units**0.5, wave.dtype),
    }
    optimizer = optax.adam(1e-2)

    def loss(weights):
        def run(inputs):
            return jax.lax.scan(
                functools.partial(gru, weights["cell"]), jnp.zeros(num_units, wave.dtype), inputs
            )[1]

        predicted = jax.vmap(run)(wave[:, :-1]) @ weights["readout"]
        return jnp.mean((predicted - wave[:, 1:])[:, 32:] ** 2)

    @jax.jit
    def update(carry, _):
        weights, memory = carry
        value, gradient = jax.value_and_grad(loss)(weights)
        change, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(weights, change), memory), value

    (weights, _), values = jax.lax.scan(
        update, (weights, optimizer.init(weights)), None, length=num_updates
    )
    return weights | {"loss": values[-1]}


def step(weights, state, noise):
    """One step of the network on its own prediction."""
    hidden, value = state
    hidden, _ = gru(weights["cell"], hidden, value + noise)
    return hidden, hidden @ weights["readout"]


def solvers() -> dict:
    """Solvers by name."""
    named = {
        "Newton": deer(),
        "Newton, clipped": deer(clip=1.0),
        "quasi-Newton, clipped": quasi_deer(),
    }
    named |= {f"ELK, damping {value:g}": elk(policy=ConstantDamping(value)) for value in CONSTANTS}
    slow = RelaxingDamping(initial=1.0, cooling=0.7)
    named |= {
        "ELK, relaxing from 1": elk(policy=slow),
        "quasi-ELK, relaxing from 1": quasi_elk(policy=slow),
    }
    named |= {
        f"quasi-ELK, damping {value:g}": quasi_elk(policy=ConstantDamping(value))
        for value in QUASI_CONSTANTS
    }
    named["quasi-ELK, relaxing from 10, slowly"] = quasi_elk(
        policy=RelaxingDamping(initial=10.0, cooling=0.97)
    )
    # The last of these is what `elk()` is.
    for initial in (1e-2, 1e-4):
        named[f"ELK, relaxing from {initial:g}, fast"] = elk(
            policy=RelaxingDamping(initial=initial, cooling=0.5)
        )
    return named


def main(argv: list[str] | None = None) -> list[dict]:
    """Train, solve with every solver, write `gru-autoregressive.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--num-units", type=int, default=4)
    parser.add_argument("--num-updates", type=int, default=600)
    parser.add_argument("--num-steps", type=int, default=4096)
    parser.add_argument("--max-iterations", type=int, default=100)
    parser.add_argument("--only", nargs="+", help="names of solvers")
    flags = parser.parse_args(argv)
    with jax.enable_x64(True):
        weights = train(flags.num_units, flags.num_updates)
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)
    rows = [row for size in NOISE for row in compare(flags, weights, size)]
    if not flags.only:
        settings = {name: value for name, value in vars(flags).items() if isinstance(value, int)}
        keep(
            flags.out / "gru-autoregressive.json", {"settings": settings, "rows": rows}, table(rows)
        )
    return rows


def compare(flags, weights, size: float) -> list[dict]:
    """The rows for one size of noise."""
    noise = size * jnp.asarray(
        np.random.default_rng(1).normal(size=(flags.num_steps, 1)), jnp.float32
    )
    initial = jnp.zeros(flags.num_units), jnp.zeros(1)
    dynamics = Dynamics(step, {"cell": weights["cell"], "readout": weights["readout"]})
    wanted = jax.jit(rollout)(dynamics, initial, noise)
    print(
        f"GRU with {flags.num_units} units, error {float(weights['loss']):.4f}; on its own with noise {size} for "
        f"{flags.num_steps:,} steps: values from {float(wanted[1].min()):.2f} to {float(wanted[1].max()):.2f}"
    )
    rows = []
    for name, solver in solvers().items():
        if flags.only and name not in flags.only:
            continue
        passes = flags.max_iterations * (_QUASI_PASSES if name.startswith("quasi") else 1)
        found = jax.jit(functools.partial(solve, solver=solver, max_iterations=passes))(
            dynamics, initial, noise
        )
        history = np.asarray(found.stats.residual_history)
        rows.append(
            {
                "noise": size,
                "solver": name,
                "status": Status(int(found.status)).name,
                "iterations": int(found.iterations),
                "exact": int(found.num_exact),
                "largest_residual": float(np.nanmax(history)),
                "overflowed": int(found.stats.num_replaced_updates),
                "difference": float(
                    np.abs(np.asarray(found.states[0]) - np.asarray(wanted[0])).max()
                ),
            }
        )
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    heads = (
        "noise",
        "solver",
        "verdict",
        "passes",
        "exact steps",
        "largest residual on the way",
        "updates that overflowed",
        "differs from the loop",
    )
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        lines.append(
            f"| {row['noise']} | {row['solver']} | {row['status']} | {row['iterations']} | {row['exact']} | "
            f"{row['largest_residual']:.1e} | {row['overflowed']} | {row['difference']:.0e} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
