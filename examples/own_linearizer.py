"""A linearizer of one's own: what one knows about a kernel, in place of its derivatives.

A linearizer chooses which `A_t` stands in for the Jacobian `J_t` of each step; scan, verdict and certificate stay as they
are, so a bad choice costs passes and never exactness. For MALA in whitened coordinates one knows J_t without any
derivative: an accepted step is x + ε ∇log p(x) + noise with -∇² log p ≈ I, a rejected one stays where it is, so

    A_t = (1 - ε) I  if step t moved,    A_t = I  if it did not          no Jacobian-vector product at all

The class below is all there is to it: values and maps for T steps, and its price. With `Newton` it is a new method
beside DEER (the Jacobian), quasi-DEER (its diagonal), Picard (the identity) and Jacobi (zero); `Clipped` and `Damped`
wrap it like any other. The table shows the bargain: about as many passes as the exact diagonal, which costs D products
a pass; Picard and Jacobi, which know nothing of ε, do not get there in a hundred. DEER needs the fewest passes, at D
products and D² numbers a step. All that converge find the same path.

    python examples/own_linearizer.py --num-samples 1024
"""

import argparse
import time

import jax
import jax.numpy as jnp

from partime_mcmc import Status, certify, mala, sequential, solve
from partime_mcmc.kernels import Whitening
from partime_mcmc.linearize import (
    DenseJacobian,
    DiagonalJacobian,
    HutchinsonDiagonal,
    IdentityJacobian,
    ZeroJacobian,
)
from partime_mcmc.scan import Diagonal
from partime_mcmc.solvers import Newton
from partime_mcmc.types import pytree


@pytree()
class WhitenedLangevin:
    """`A_t` is `1 - step_size` where the step moved and 1 where it was rejected, times the identity."""

    step_size: float

    def __call__(self, dynamics, previous, drives, key):
        values = jax.vmap(dynamics)(previous, drives)
        moved = (values != previous).any(axis=1, keepdims=True)
        diagonals = jnp.broadcast_to(
            jnp.where(moved, 1 - self.step_size, 1.0), values.shape
        ).astype(values.dtype)
        return values, Diagonal(diagonals, jnp.zeros_like(values))

    def jvps(self, dimension):
        return 0


def regression(key, num_rows=200, num_coefficients=20):
    """A made-up logistic regression: log density, and whitening by its mode and Hessian there (Laplace)."""
    row_key, truth_key, answer_key = jax.random.split(key, 3)
    rows = jax.random.normal(row_key, (num_rows, num_coefficients))
    truth = jax.random.normal(truth_key, (num_coefficients,))
    signs = 2.0 * jax.random.bernoulli(answer_key, jax.nn.sigmoid(rows @ truth)) - 1.0

    def logdensity(beta):
        return jax.nn.log_sigmoid(signs * (rows @ beta)).sum() - 0.5 * beta @ beta

    gradient, hessian = jax.jit(jax.grad(logdensity)), jax.jit(jax.hessian(logdensity))
    mode = jnp.zeros(num_coefficients)
    for _ in range(10):
        mode = mode - jnp.linalg.solve(hessian(mode), gradient(mode))
    return logdensity, Whitening.of_covariance(mode, mode, jnp.linalg.inv(-hessian(mode)))


def main(argv=None):
    """Solve one chain with every linearizer and print a row each; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=1024, help="steps of the chain, T")
    parser.add_argument(
        "--step-size",
        type=float,
        default=0.15,
        help="BlackJAX's step size, in whitened coordinates",
    )
    parser.add_argument("--max-iterations", type=int, default=100)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="rows that begin so; the sequential one always runs"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)

    data_key, tape_key = jax.random.split(jax.random.key(args.seed))
    logdensity, whitening = regression(data_key)
    kernel = mala(logdensity, args.step_size, whitening)
    state = kernel.init(whitening.center)
    initial, tape, dynamics = (
        kernel.carry(state),
        kernel.tape(tape_key, args.num_samples, state),
        kernel.dynamics(),
    )

    methods = [
        ("sequential", sequential()),
        ("ours: 1 - step size, or 1", Newton(WhitenedLangevin(args.step_size))),
        ("Hutchinson's diagonal, 1 probe", Newton(HutchinsonDiagonal(1))),
        ("exact diagonal", Newton(DiagonalJacobian())),
        ("Jacobian (DEER)", Newton(DenseJacobian())),
        ("identity (Picard)", Newton(IdentityJacobian())),
        ("zero (Jacobi)", Newton(ZeroJacobian())),
    ]
    rows, truth = [], None
    print(
        f"{'linear part':30} {'status':18} {'passes':>6} {'JVPs/draw':>9} {'evals/draw':>10} {'residual':>9} "
        f"{'differs':>8} {'seconds':>8}"
    )
    for name, solver in methods:
        if not name.startswith(("sequential", *args.only)):
            continue
        compiled = (
            jax.jit(
                lambda start, randomness: solve(
                    dynamics, start, randomness, solver=solver, max_iterations=args.max_iterations
                )  # noqa: B023
            )
            .lower(initial, tape)
            .compile()
        )
        begin = time.perf_counter()
        found = jax.block_until_ready(compiled(initial, tape))
        seconds = time.perf_counter() - begin
        truth = found.states if truth is None else truth
        certificate = certify(kernel, initial, found.states, tape)
        row = dict(
            method=name,
            status=Status(int(found.status)).name,
            passes=int(found.iterations),
            jvps=float(found.stats.jvps),
            evaluations=float(found.stats.evaluations),
            residual=float(certificate.max_residual),
            differs=float(jnp.abs(found.states - truth).max()),
            certified=bool(certificate.certified),
            rejected=int(certificate.num_rejected),
            seconds=seconds,
        )
        rows.append(row)
        print(
            f"{name:30} {row['status']:18} {row['passes']:6d} {row['jvps']:9.1f} {row['evaluations']:10.1f} "
            f"{row['residual']:9.1e} {row['differs']:8.1e} {seconds:8.3f}"
        )
    print(
        f"\nresidual: in standard deviations of the proposal's noise, by an independent pass; compilation apart\n"
        f"the sequential chain rejected {rows[0]['rejected']} of {args.num_samples} proposals"
    )
    return rows


if __name__ == "__main__":
    main()
