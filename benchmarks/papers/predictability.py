"""Predictability enables parallelisation: iterations against the largest Lyapunov exponent (arXiv:2508.16817).

*Mean-field network*: x_t = W tanh(x_{t-1}) + u_t with W_ij ~ N(0, g²/D): the gain g moves the largest Lyapunov exponent
(LLE) through zero, and DEER's iterations with it. *Two wells*: Langevin dynamics in the potential (x² − 1)²/4 with the same
noise from everywhere: it hops between wells and is predictable all the same. *Observers of chaotic flows*: the Lorenz and
Rössler flows are chaotic, an observer that sees one of their coordinates, z' = flow(z) + K (y − C z), is not.

The bound on iterations is T, which the theorem allows; DEER is the paper's, without clipping or damping.
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
    converged,
    judged,
    panels,
    ratio,
    row_of,
    solved,
    times,
)
from partime_mcmc import Dynamics, Status, deer, iterates, quasi_deer, rollout, solve
from partime_mcmc.forgetting.lyapunov import lyapunov

SMALL = {
    "dimension": 50,
    "num_gains": 10,
    "lengths": (40, 160),
    "num_exponent": 2000,
    "num_langevin": 4096,
    "num_flow": 512,
    "repeats": 2,
}
PAPER = {
    "dimension": 100,
    "num_gains": 50,
    "lengths": (256, 1024),
    "num_exponent": 10_000,
    "num_langevin": 100_000,
    "num_flow": 10_000,
    "repeats": 2,
}
_FLOWS = ("Lorenz", "Rössler")
# Which coordinate is seen, the gain K that it acts with, and the step size. With K = (10, 28, 0) the first two equations of the
# Lorenz flow take x from the observation.
_SEEN = {"Lorenz": 0, "Rössler": 1}
_GAINS = {"Lorenz": (10.0, 28.0, 0.0), "Rössler": (0.0, 2.0, 0.0)}
_STEPS = {"Lorenz": 0.01, "Rössler": 0.05}


def mean_field(weights, state, drive):
    """A step of the network."""
    return weights @ jnp.tanh(state) + drive


def two_wells(step_size, state, noise):
    """An Euler–Maruyama step of Langevin dynamics at temperature 0.15."""
    return state - step_size * (state**3 - state) + jnp.sqrt(2 * 0.15 * step_size) * noise


def flow(name: str, state):
    """The velocity of a chaotic flow in three dimensions."""
    x, y, z = state
    if name == "Lorenz":
        return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])
    return jnp.stack([-y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)])


def pushed(name: str, step_size, gain, state, observed):
    """A Runge–Kutta step of a flow that is drawn to what is observed; with a gain of 0 it is the flow itself.

    The Lorenz flow is seen through x, the Rössler flow through y.
    """
    seen = _SEEN[name]

    def field(s):
        return flow(name, s) + gain * (observed - s[seen])

    k1 = field(state)
    k2 = field(state + 0.5 * step_size * k1)
    k3 = field(state + 0.5 * step_size * k2)
    return state + step_size / 6 * (k1 + 2 * k2 + 2 * k3 + field(state + step_size * k3))


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


def with_exponent(row: dict, dynamics, initial, drives) -> dict:
    """A row with the exponent along the loop's path."""
    path = jax.jit(rollout)(dynamics, initial, drives)
    found = lyapunov(dynamics, initial, path, drives, key=jax.random.key(0))
    return row | {"exponent": float(found.exponent)}


def run(dimension, num_gains, lengths, num_exponent, num_langevin, num_flow, repeats) -> Findings:
    """All three."""
    rows = network_rows(dimension, num_gains, lengths, num_exponent)
    noise = jnp.asarray(np.random.default_rng(1).normal(size=num_langevin))
    wells = Dynamics(two_wells, jnp.asarray(0.05)), jnp.asarray(-1.0), noise
    (row,) = solved("two wells", *wells, {"DEER": deer()}, repeats=repeats)
    crossings = int(np.sum(np.diff(np.sign(np.asarray(jax.jit(rollout)(*wells)))) != 0))
    rows.append(with_exponent(row, *wells) | {"crossings": crossings})
    for name in _FLOWS:
        step = functools.partial(pushed, name, _STEPS[name])
        alone, observer = Dynamics(step, jnp.zeros(3)), Dynamics(step, jnp.asarray(_GAINS[name]))
        nothing = jnp.zeros(num_flow)
        truth = jax.jit(rollout)(alone, jnp.ones(3), jnp.zeros(2 * num_flow))
        start, seen = truth[num_flow - 1], truth[num_flow:, _SEEN[name]]
        methods = {"DEER": deer(), "quasi-DEER": quasi_deer(clip=None)}
        given = alone, start, nothing
        (row,) = solved(
            f"{name} flow", *given, {"DEER": deer()}, max_iterations=num_flow, repeats=repeats
        )
        rows.append(with_exponent(row, *given))
        # The observer does not know where the flow began.
        given = observer, jnp.zeros(3), seen
        for row in solved(
            f"{name} observer", *given, methods, max_iterations=num_flow, repeats=repeats
        ):
            rows.append(with_exponent(row, *given))
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
    order = spearmanr(
        [row["exponent"] for row in longest], [row["iterations"] for row in longest]
    ).statistic
    tame_short = [row for row in shortest if row["gain"] in {row["gain"] for row in tame}]
    wild_short = [row for row in shortest if row["gain"] in {row["gain"] for row in wild}]
    wells = row_of(rows, problem="two wells")
    flows = [row_of(rows, problem=f"{name} flow") for name in _FLOWS]
    observers = [row_of(rows, problem=f"{name} observer", method="DEER") for name in _FLOWS]
    quasi = [row_of(rows, problem=f"{name} observer", method="quasi-DEER") for name in _FLOWS]
    said = lambda row: f"{row['problem']} {row['iterations']} iterations, LLE {row['exponent']:.3f}"
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
        judged(
            "arXiv:2508.16817",
            "Langevin dynamics in two wells has a negative exponent and takes few iterations, though the path hops",
            f"T = {wells['T']:,}: LLE {wells['exponent']:.3f}, {wells['crossings']} changes of sign, {wells['iterations']} "
            f"iterations, {times(wells)}",
            converged(wells) and wells["exponent"] < 0 and wells["iterations"] < 50,
        ),
        judged(
            "arXiv:2508.16817",
            "an observer of a chaotic flow has a negative exponent where the flow's is positive",
            "; ".join(
                f"{row['problem']} {row['exponent']:.4f} per step" for row in (*flows, *observers)
            ),
            all(row["exponent"] > 0 for row in flows)
            and all(row["exponent"] < 0 for row in observers),
        ),
        judged(
            "arXiv:2508.16817",
            "DEER solves observers in fewer iterations than the flows they observe",
            "; ".join(map(said, (*flows, *observers)))
            + f"; largest residual of the observers {max(row['residual'] for row in observers):.0e}",
            all(
                converged(one) and one["iterations"] < other["iterations"]
                for one, other in zip(observers, flows)
            ),
        ),
        judged(
            "the method",
            "quasi-DEER solves the observers, too",
            "; ".join(
                f"{row['problem']}: {row['status']} after {row['iterations']} iterations"
                for row in quasi
            ),
            all(map(converged, quasi)) and all(row["iterations"] < row["T"] / 2 for row in quasi),
            "the diagonal of a rotation says nothing of where it turns",
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
