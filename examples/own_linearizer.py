"""A linearizer of one's own: one number per step in place of a Jacobian, and what it buys on a real chain.

A linearizer says which `A_t` stands in for the Jacobian `J_t` of each step; values, scan, verdict and certificate stay as they
are, so a bad choice costs passes and never exactness. In whitened coordinates the Jacobian of a MALA step is nearly a multiple of
the identity, and the multiple that fits best is `tr(J_t) / D`. With signs v = ±1 one product estimates it:

    A_t = a_t I,    a_t = v · J_t v / D        one JVP per step, variance O(1/D) of Hutchinson's diagonal v ⊙ J_t v

The class below is all there is to it: values and maps for T steps, and its price. Combined with `Newton` it is a new method beside
DEER (the Jacobian), quasi-DEER (its diagonal), Picard (the identity) and Jacobi (zero); `Clipped` and `Damped` wrap it like any other.

    python examples/own_linearizer.py --num-samples 512
"""

import argparse
import time

import jax
import jax.numpy as jnp

from partime_mcmc import (DenseJacobian, DiagonalJacobian, HutchinsonDiagonal, IdentityJacobian, Newton, Status, Whitening,
                          ZeroJacobian, certify, mala, sequential, solve)
from partime_mcmc.scan import Diagonal
from partime_mcmc.types import pytree


@pytree()
class ScalarJacobian:
    """`A_t` is the identity times Hutchinson's estimate of `tr(J_t) / D`, from one product per step."""

    def __call__(self, dynamics, previous, drives, key):
        # The same signs in every pass: a fixed estimate makes the iteration a fixed map, which can converge.
        signs = jax.random.rademacher(key, previous.shape, previous.dtype)

        def one(x, drive, sign):
            value, tangent = jax.jvp(lambda state: dynamics(state, drive), (x,), (sign,))
            return value, jnp.full_like(x, jnp.mean(sign * tangent))

        values, diagonals = jax.vmap(one)(previous, drives, signs)
        return values, Diagonal(diagonals, jnp.zeros_like(values))

    def jvps(self, dimension):
        return 1


def regression(key, num_rows=200, num_coefficients=20):
    """A made-up logistic regression: log density, and whitening by its mode and Hessian there (Laplace)."""
    row_key, truth_key, answer_key = jax.random.split(key, 3)
    rows = jax.random.normal(row_key, (num_rows, num_coefficients))
    truth = jax.random.normal(truth_key, (num_coefficients,))
    signs = 2.0 * jax.random.bernoulli(answer_key, jax.nn.sigmoid(rows @ truth)) - 1.0

    def logdensity(beta):
        return jax.nn.log_sigmoid(signs * (rows @ beta)).sum() - 0.5 * beta @ beta

    mode = jnp.zeros(num_coefficients)
    for _ in range(10):
        mode = mode - jnp.linalg.solve(jax.hessian(logdensity)(mode), jax.grad(logdensity)(mode))
    return logdensity, Whitening.of_covariance(mode, mode, jnp.linalg.inv(-jax.hessian(logdensity)(mode)))


def main(argv=None):
    """Solve one chain with every linearizer and print a row each; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=1024, help="steps of the chain, T")
    parser.add_argument("--step-size", type=float, default=0.15, help="BlackJAX's step size, in whitened coordinates")
    parser.add_argument("--max-iterations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)

    data_key, tape_key = jax.random.split(jax.random.key(args.seed))
    logdensity, whitening = regression(data_key)
    kernel = mala(logdensity, args.step_size, whitening)
    state = kernel.init(whitening.center)
    initial, tape, dynamics = kernel.carry(state), kernel.tape(tape_key, args.num_samples, state), kernel.dynamics()

    methods = [
        ("sequential", sequential()),
        ("ours: tr(J)/D", Newton(ScalarJacobian())),
        ("Hutchinson's diagonal, 1 probe", Newton(HutchinsonDiagonal(1))),
        ("exact diagonal", Newton(DiagonalJacobian())),
        ("Jacobian (DEER)", Newton(DenseJacobian())),
        ("identity (Picard)", Newton(IdentityJacobian())),
        ("zero (Jacobi)", Newton(ZeroJacobian())),
    ]
    rows, truth = [], None
    print(f"{'linear part':30} {'status':18} {'passes':>6} {'JVPs/draw':>9} {'evals/draw':>10} {'residual':>9} {'differs':>8} "
          f"{'seconds':>8}")
    for name, solver in methods:
        compiled = jax.jit(lambda start, dice: solve(
            dynamics, start, dice, solver=solver, max_iterations=args.max_iterations)).lower(initial, tape).compile()  # noqa: B023
        begin = time.perf_counter()
        found = jax.block_until_ready(compiled(initial, tape))
        seconds = time.perf_counter() - begin
        truth = found.states if truth is None else truth
        certificate = certify(kernel, initial, found.states, tape)
        row = dict(method=name, status=Status(int(found.status)).name, passes=int(found.iterations),
                   jvps=float(found.stats.jvps), evaluations=float(found.stats.evaluations),
                   residual=float(certificate.max_residual), differs=float(jnp.abs(found.states - truth).max()),
                   certified=bool(certificate.certified), rejected=int(certificate.num_rejected), seconds=seconds)
        rows.append(row)
        print(f"{name:30} {row['status']:18} {row['passes']:6d} {row['jvps']:9.1f} {row['evaluations']:10.1f} "
              f"{row['residual']:9.1e} {row['differs']:8.1e} {seconds:8.3f}", flush=True)
    print(f"\nresidual: in standard deviations of the proposal's noise, by an independent pass; seconds: compilation apart; the "
          f"sequential chain rejected {rows[0]['rejected']} of {args.num_samples} proposals")
    return rows


if __name__ == "__main__":
    main()
