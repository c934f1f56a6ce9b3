"""Bytes that a solve takes per step, by the compiler's own account: `python -m benchmarks.memory --out DIR`.

The temporary memory of the compiled `solve` of a long path, in copies of that path (T D numbers, float32), for a tanh
network of D units whose inputs are the drives. Drives and the solution itself come on top. Nothing is run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.record import OUT, keep, temporary_bytes
from partime_mcmc import (
    Dynamics,
    Tolerance,
    deer,
    elk,
    jacobi,
    picard,
    quasi_deer,
    quasi_elk,
    sequential,
    shooting,
    solve,
)

SOLVERS = {
    "sequential": sequential(),
    "shooting": shooting(steps=64),
    "Jacobi": jacobi(),
    "Picard": picard(),
    "quasi-DEER, exact diagonal": quasi_deer(),
    "quasi-DEER, 1 probe": quasi_deer(num_probes=1),
    "quasi-ELK": quasi_elk(),
    "DEER": deer(),
    "ELK": elk(),
}
# Below some thousand steps the compiler keeps less.
_NUM_STEPS = 16_384


def step(params, state, drive):
    """A tanh network."""
    return jnp.tanh(params @ state + drive)


def bytes_of(solver, width: int, num_steps: int) -> int:
    """Temporary memory of the compiled solve."""
    dynamics = Dynamics(step, jnp.zeros((width, width)))
    run = jax.jit(
        lambda dynamics, initial, drives: solve(
            dynamics, initial, drives, solver=solver, tolerance=Tolerance()
        )
    )
    shapes = jax.eval_shape(lambda: (dynamics, jnp.zeros(width), jnp.zeros((num_steps, width))))
    return temporary_bytes(run.lower(*shapes).compile())


def copies(name: str, width: int) -> float:
    """Temporary memory per step, in copies of a state."""
    return bytes_of(SOLVERS[name], width, _NUM_STEPS) / (_NUM_STEPS * width * 4)


def table(rows: dict[str, dict[int, float]]) -> str:
    """The Markdown table."""
    widths = sorted(next(iter(rows.values())))
    lines = [
        "| solver | " + " | ".join(f"D = {width}" for width in widths) + " |",
        "|---" * (1 + len(widths)) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{row[width]:.1f}" for width in widths) + " |"
        for name, row in rows.items()
    ]
    return "\n".join(lines) + "\n\nTemporary memory per step, in copies of a state of D numbers.\n"


def main(argv: list[str] | None = None) -> None:
    """Compile every solver and write `memory-cpu.json` and `.md`, named by the platform."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--widths", type=int, nargs="*", default=[4, 16])
    arguments = parser.parse_args(argv)
    rows = {name: {width: copies(name, width) for width in arguments.widths} for name in SOLVERS}
    keep(arguments.out / f"memory-{jax.default_backend()}.json", {"rows": rows}, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
