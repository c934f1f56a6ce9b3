"""HMC in Rosenbrock's valley: where Newton over the whole chain overflows, and what to do about it.

    log p(x, y) = -((1 - x)² + b (y - x²)²) / 2,      HMC with a plain step size and the unit metric

This chain forgets where it started (two chains with the same random numbers meet after some 200 steps), yet in the curved valley
single steps stretch distances by large factors. Newton's method over the *whole* chain multiplies a thousand such
Jacobians around a guess that is nowhere near the chain, and overflows: its front of exact steps crawls on, the rest is
1e100 and worse. Clipping the Jacobians stops the overflow, with or without ELK's trust region, but does not find the
chain either. Cutting time does: in a short window (`Windows`), or behind the front of exact steps (`SlidingWindow`),
products stay bounded and guesses stay good.

Shooting needs no Jacobians and cannot overflow: its four segments become the chain in a second pass, at less than two
evaluations per draw once they are some times longer than those 200 steps.

How to read the table: status and residual first; `exact` counts the steps from the start on that are right, `differs`
is the distance from the sequential path. The sequential loop needs one evaluation per draw; `depth` counts evaluations
that wait for one another. On a machine with enough lanes time goes with depth, on two cores with evaluations. The best
depth here is about half of T, at some twenty evaluations per draw: on this target the sequential loop is hard to beat.

With `--step-size 0.3 --num-integration-steps 8` the chain is chaotic: windows then find *a* path with residual 1e-15
that is far from the sequential one. Both obey the kernel; rounding decides which one you get.

    python examples/rosenbrock_hmc.py --num-samples 1024
"""

import argparse
import time

import jax
import jax.numpy as jnp

from partime_mcmc import (
    AllAtOnce,
    SlidingWindow,
    Status,
    Windows,
    certify,
    deer,
    elk,
    hmc,
    quasi_deer,
    sequential,
    shooting,
    solve,
)
from partime_mcmc.kernels import blackjax_loop

HEADER = (
    f"{'method':32} {'status':18} {'passes':>6} {'exact':>5} {'evals/draw':>10} {'JVPs/draw':>9} {'depth':>6} "
    f"{'residual':>9} {'differs':>8} {'seconds':>8}"
)


def methods(size):
    """Name, solver, schedule: one line each, and each becomes one row."""
    return [
        ("sequential", sequential(), AllAtOnce()),
        ("DEER, whole chain", deer(), AllAtOnce()),
        ("quasi-DEER, whole chain", quasi_deer(clip=None), AllAtOnce()),
        ("quasi-DEER clipped, whole", quasi_deer(), AllAtOnce()),
        ("ELK clipped, whole", elk(clip=1.0), AllAtOnce()),
        (f"DEER, windows of {size}", deer(), Windows(size)),
        (f"quasi-DEER, windows of {size}", quasi_deer(), Windows(size)),
        (f"ELK clipped, windows of {size}", elk(clip=1.0), Windows(size)),
        (f"DEER, sliding window of {size}", deer(), SlidingWindow(size)),
        ("shooting, 4 segments", shooting(4), AllAtOnce()),
    ]


def main(argv=None):
    """Solve one chain with every method and print a row each; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=1024, help="steps of the chain, T")
    parser.add_argument(
        "--steepness", type=float, default=4.0, help="b; Rosenbrock's own function has 100"
    )
    parser.add_argument("--step-size", type=float, default=0.25)
    parser.add_argument("--num-integration-steps", type=int, default=4)
    parser.add_argument(
        "--window", type=int, default=32, help="size of windows and of the sliding window"
    )
    parser.add_argument(
        "--max-iterations", type=int, default=200, help="passes per window's length of time"
    )
    parser.add_argument(
        "--only", nargs="*", default=[""], help="rows that begin so; the sequential one always runs"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)

    def logdensity(position):
        x, y = position
        return -0.5 * ((1 - x) ** 2 + args.steepness * (y - x**2) ** 2)

    kernel = hmc(
        logdensity, args.step_size, jnp.ones(2), num_integration_steps=args.num_integration_steps
    )
    burn_key, tape_key = jax.random.split(jax.random.key(args.seed))
    burnt, _ = blackjax_loop(
        kernel, kernel.init(jnp.ones(2)), jax.random.split(burn_key, 500)
    )  # BlackJAX's own loop
    state = kernel.init(burnt[-1])
    initial, tape, dynamics = (
        kernel.carry(state),
        kernel.tape(tape_key, args.num_samples, state),
        kernel.dynamics(),
    )

    rows, truth = [], None
    print(HEADER)
    for name, solver, schedule in methods(args.window):
        if not name.startswith(("sequential", *args.only)):
            continue
        compiled = (
            jax.jit(
                lambda start, randomness: solve(
                    dynamics,
                    start,
                    randomness,
                    solver=solver,
                    schedule=schedule,
                    max_iterations=args.max_iterations,
                )  # noqa: B023
            )
            .lower(initial, tape)
            .compile()
        )
        begin = time.perf_counter()
        found = jax.block_until_ready(compiled(initial, tape))
        seconds = time.perf_counter() - begin
        truth = found.states if truth is None else truth
        # Not the solver's word: an independent pass over the path, in units that do not grow with a path's own errors.
        certificate = certify(kernel, initial, found.states, tape, scale=truth.std(axis=0))
        row = dict(
            method=name,
            status=Status(int(found.status)).name,
            passes=int(found.iterations),
            exact=int(found.num_exact),
            evaluations=float(found.stats.evaluations),
            jvps=float(found.stats.jvps),
            depth=int(found.stats.depth),
            residual=float(certificate.max_residual),
            differs=float(jnp.abs(found.states - truth).max()),
            seconds=seconds,
            certified=bool(certificate.certified),
            rejected=int(certificate.num_rejected),
        )
        rows.append(row)
        print(
            f"{name:32} {row['status']:18} {row['passes']:6d} {row['exact']:5d} {row['evaluations']:10.1f} "
            f"{row['jvps']:9.1f} {row['depth']:6d} {row['residual']:9.1e} {row['differs']:8.1e} {seconds:8.3f}"
        )
    print(
        f"\nresidual: in standard deviations of the sequential chain, by an independent pass; compilation apart\n"
        f"the sequential chain rejected {rows[0]['rejected']} of {args.num_samples} proposals"
    )
    return rows


if __name__ == "__main__":
    main()
