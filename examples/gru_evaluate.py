"""A GRU over a long sequence: the same states by `lax.scan`, by segments, and by Newton's method over the whole path.

    python examples/gru_evaluate.py                      # 64 units, 32,768 steps, as fast as this machine goes
    python examples/gru_evaluate.py --num-units 32 --num-steps 65536 --only shooting DEER quasi-DEER

For every method: its verdict, passes over the path, evaluations of the cell per step, the largest difference from
`lax.scan`, and times of the forward pass and of the gradient of a loss in all weights. "chosen" is `unroll` with no
solver: segments where they pay, `lax.scan` where they do not. Newton's method needs few passes but D products per step in
each, so on a CPU it only shows that the path is the same; on devices with thousands of lanes it is another matter.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc import Status, deer, shooting
from partime_mcmc.linearize import Clipped
from partime_mcmc.rnn import ClosedForm, gru, gru_diagonal, gru_params, unroll_with_status
from partime_mcmc.solvers import Newton


def methods(carry: jax.Array) -> dict:
    """Solvers by name; None leaves the choice to `unroll`."""
    return {
        "chosen": None,
        "shooting": shooting(32),
        "DEER": deer(),
        "quasi-DEER": Newton(Clipped(ClosedForm(gru_diagonal, carry), 1.0)),
    }


def by_scan(params, carry, inputs):
    """The definition."""
    return jax.lax.scan(functools.partial(gru, params), carry, inputs)


def loss(run, params, carry, inputs):
    """Something to differentiate: the mean square of all outputs."""
    return jnp.mean(run(params, carry, inputs)[1] ** 2)


def fastest(function, arguments, repeats: int) -> tuple[float, object]:
    """Seconds of the fastest of some runs, compilation apart, and the result."""
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        value = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:]), value


def main(argv: list[str] | None = None) -> list[dict]:
    """Run every method; returns one row per method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-units", type=int, default=64)
    parser.add_argument("--num-inputs", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=32_768)
    parser.add_argument("--only", nargs="+", default=["chosen", "shooting", "quasi-DEER"])
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args(argv)
    params = gru_params(jax.random.key(0), flags.num_inputs, flags.num_units)
    carry = jnp.zeros(flags.num_units)
    inputs = jax.random.normal(jax.random.key(1), (flags.num_steps, flags.num_inputs))
    arguments = params, carry, inputs
    scan, (_, wanted) = fastest(by_scan, arguments, flags.repeats)
    scan_gradient, _ = fastest(jax.grad(functools.partial(loss, by_scan)), arguments, flags.repeats)
    print(
        f"GRU, {flags.num_units} units, {flags.num_inputs} inputs, {flags.num_steps:,} steps, float32\n"
        f"{'lax.scan':12s} {1e3 * scan:8.1f} ms, gradient {1e3 * scan_gradient:8.1f} ms"
    )
    rows = []
    for name in flags.only:
        run = functools.partial(unroll_with_status, gru, solver=methods(carry)[name])
        seconds, (_, ys, status) = fastest(run, arguments, flags.repeats)
        gradient, _ = fastest(jax.grad(functools.partial(loss, run)), arguments, flags.repeats)
        row = {
            "method": name,
            "status": Status(int(status.solver_status)).name,
            "parallel": bool(status.parallel),
            "iterations": int(status.iterations),
            "evaluations": float(status.evaluations),
            "seconds": seconds,
            "gradient": gradient,
            "difference": float(np.abs(np.asarray(ys) - np.asarray(wanted)).max()),
        }
        rows.append(row)
        print(
            f"{name:12s} {1e3 * row['seconds']:8.1f} ms, gradient {1e3 * row['gradient']:8.1f} ms: "
            f"{scan / row['seconds']:.2f}x and {scan_gradient / row['gradient']:.2f}x; {row['status']}, "
            f"{row['iterations']} passes, {row['evaluations']:.2f} evaluations per step, "
            f"difference {row['difference']:.1e}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
