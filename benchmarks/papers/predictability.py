"""Predictability enables parallelisation: iterations against the largest Lyapunov exponent (arXiv:2508.16817).

A mean-field network, x_t = W tanh(x_{t-1}) + u_t with W_ij ~ N(0, g²/D): the gain g moves the largest Lyapunov exponent
(LLE) through zero, and DEER's iterations with it. The bound on iterations is T, which the theorem allows; DEER is the paper's, without clipping or damping.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.papers.experiment import (
    Claim,
    Findings,
    judged,
    panels,
    ratio,
    times,
)
from partime_mcmc import Dynamics, Status, iterates, rollout, solve
from partime_mcmc.forgetting.lyapunov import lyapunov

SMALL = {
    "dimension": 50,
    "num_gains": 10,
    "lengths": (40, 160),
    "num_exponent": 2000,
}
PAPER = {
    "dimension": 100,
    "num_gains": 50,
    "lengths": (256, 1024),
    "num_exponent": 10_000,
}


def mean_field(weights, state, drive):
    """A step of the network."""
    return weights @ jnp.tanh(state) + drive


def network_rows(dimension: int, num_gains: int, lengths, num_exponent: int) -> list[dict]:
    """Iterations for each gain and length beside the exponent of that gain, along one longer path."""
    rng = np.random.default_rng(0)
    base = jnp.asarray(rng.normal(size=(dimension, dimension)) / dimension**0.5)
    start = jnp.asarray(rng.normal(size=dimension))
    every = 0.1 * jnp.asarray(rng.normal(size=(max(num_exponent, *lengths), dimension)))
    gains = np.linspace(0.5, 2.5, num_gains)

    @jax.jit
    def exponent(gain):
        network = Dynamics(mean_field, gain * base)
        path = rollout(network, start, every)
        found = lyapunov(network, start, path, every, key=jax.random.key(0), num_directions=4)
        return found.exponent

    exponents, rows = [float(exponent(gain)) for gain in gains], []
    for length in lengths:
        drives = every[:length]
        given = Dynamics(mean_field, 0.1 * base), start, drives
        # Compiled once for all gains, apart from the times; the first run of a program is slower than the next ones.
        solve_it, loop = (
            jax.jit(function).lower(*given).compile()
            for function in (functools.partial(solve, max_iterations=length), rollout)
        )
        jax.block_until_ready((solve_it(*given), loop(*given)))
        for gain, one in zip(gains, exponents):
            arguments = Dynamics(mean_field, gain * base), start, drives
            found, seconds = _timed(solve_it, arguments)
            _, loop_seconds = _timed(loop, arguments)
            rows.append(
                {
                    "problem": "mean-field network",
                    "method": "DEER",
                    "T": length,
                    "D": dimension,
                    "gain": float(gain),
                    "exponent": one,
                    "status": Status(int(found.status)).name,
                    "iterations": int(found.iterations),
                    "residual": float(found.residual),
                    "seconds": seconds,
                    "loop_seconds": loop_seconds,
                }
            )
    return rows


def _timed(function, arguments):
    """A value, and the seconds of a call."""
    begin = time.perf_counter()
    value = jax.block_until_ready(function(*arguments))
    return value, time.perf_counter() - begin


def run(dimension, num_gains, lengths, num_exponent) -> Findings:
    """Iterations over gains, and the merit of the iterates of three of them."""
    rows = network_rows(dimension, num_gains, lengths, num_exponent)
    merits = {}
    base = jnp.asarray(np.random.default_rng(0).normal(size=(dimension, dimension)))
    base, start = base / dimension**0.5, jnp.ones(dimension)
    drives = 0.1 * jnp.asarray(np.random.default_rng(2).normal(size=(lengths[0], dimension)))
    watch = jax.jit(lambda *given: iterates(*given, num_iterations=60).merit)
    for gain in (0.8, 1.2, 1.8):
        merits[gain] = np.asarray(watch(Dynamics(mean_field, gain * base), start, drives))
    return Findings(rows, claims(rows, lengths), figure(rows, merits))


def claims(rows: list[dict], lengths) -> list[Claim]:
    """What the paper says, beside the rows."""
    network = [row for row in rows if row["problem"] == "mean-field network"]
    longest = [row for row in network if row["T"] == lengths[-1]]
    shortest = [row for row in network if row["T"] == lengths[0]]
    tame = [row for row in longest if row["exponent"] < -0.05]
    wild = [row for row in longest if row["exponent"] > 0.05]
    largest = lambda some: max((row["iterations"] for row in some), default=0)
    least = lambda some: min((row["iterations"] for row in some), default=0)
    exponents, counts = (
        [row["exponent"] for row in longest],
        [row["iterations"] for row in longest],
    )
    order = float(np.asarray(spearmanr(exponents, counts))[0])
    tame_short = [row for row in shortest if row["gain"] in {row["gain"] for row in tame}]
    wild_short = [row for row in shortest if row["gain"] in {row["gain"] for row in wild}]
    fastest = max(tame, key=ratio)
    return [
        judged(
            "arXiv:2508.16817",
            "the largest Lyapunov exponent governs the number of iterations",
            f"mean-field network, {len(longest)} gains, T = {lengths[-1]}: rank correlation of exponent and iterations {order:.3f}",
            order > 0.9,
        ),
        judged(
            "arXiv:2508.16817",
            "iterations jump where the exponent crosses zero",
            f"LLE < −0.05: {least(tame)} to {largest(tame)} iterations; LLE > 0.05: {least(wild)} to {largest(wild)}; "
            f"T = {lengths[-1]}, largest residual {max(row['residual'] for row in longest):.0e}",
            bool(tame and wild) and least(wild) > 3 * largest(tame),
        ),
        judged(
            "arXiv:2508.16817",
            "for predictable systems iterations hardly grow with T",
            f"most iterations at LLE < −0.05: {largest(tame_short)} for T = {lengths[0]}, {largest(tame)} for T = {lengths[-1]}",
            largest(tame) <= 2 * largest(tame_short),
        ),
        judged(
            "arXiv:2508.16817",
            "for chaotic systems they grow in proportion to T, and parallel evaluation is of no use",
            f"most iterations at LLE > 0.05: {largest(wild_short)} for T = {lengths[0]}, {largest(wild)} for T = {lengths[-1]}",
            largest(wild) >= 0.5 * lengths[-1] / lengths[0] * largest(wild_short),
        ),
        judged(
            "arXiv:2508.16817",
            "predictable systems are evaluated faster in parallel than in sequence",
            f"mean-field network, gain {fastest['gain']:.2f}: {times(fastest)}",
            ratio(fastest) > 1,
            f"on {jax.default_backend()} {fastest['D']} Jacobian products per step and iteration cost more than the steps of the loop",
        ),
    ]


def figure(rows: list[dict], merits: dict) -> Figure:
    """Iterations against the exponent, and merit by iteration."""
    drawn, axes = panels(2)
    network = [row for row in rows if row["problem"] == "mean-field network"]
    for length in sorted({row["T"] for row in network}):
        of = [row for row in network if row["T"] == length]
        axes[0].semilogy(
            [row["exponent"] for row in of],
            [row["iterations"] for row in of],
            "o-",
            markersize=3,
            label=f"T = {length}",
        )
    axes[0].axvline(0, color="k", linewidth=0.8)
    axes[0].set_xlabel("largest Lyapunov exponent per step")
    axes[0].set_ylabel("DEER iterations")
    axes[0].set_title("mean-field network", fontsize=10)
    axes[0].legend(fontsize=8)
    for gain, merit in merits.items():
        shown = np.where(np.isfinite(merit), np.clip(merit, 1e-32, 1e30), np.nan)
        axes[1].semilogy(shown, label=f"gain {gain}")
    axes[1].set_xlabel("iteration")
    axes[1].set_ylabel("merit ½ Σ ‖r‖²")
    axes[1].set_title(f"merit of the iterates, T = {min(row['T'] for row in network)}", fontsize=10)
    axes[1].legend(fontsize=8)
    return drawn
