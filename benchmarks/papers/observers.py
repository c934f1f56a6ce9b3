"""Predictable systems that look unpredictable: two wells, and observers of chaotic flows (arXiv:2508.16817).

*Two wells*: Langevin dynamics in the potential (x² − 1)²/4, with the same noise whatever the start: it hops between wells and is
predictable all the same. *Observers of chaotic flows*: the Lorenz and Rössler flows are chaotic, an observer that sees one of
their coordinates, z' = flow(z) + K (y − C z), is not. The largest Lyapunov exponent (LLE) is taken along the loop's path.

The bound on iterations is T, which the theorem allows; DEER is the paper's, without clipping or damping.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.papers.experiment import (
    Claim,
    Findings,
    converged,
    draw_histories,
    judged,
    panels,
    row_of,
    solved,
    times,
)
from partime_mcmc import Dynamics, deer, quasi_deer, rollout
from partime_mcmc.forgetting.lyapunov import lyapunov

SMALL = {"num_langevin": 4096, "num_flow": 1024, "repeats": 1}
PAPER = {"num_langevin": 100_000, "num_flow": 10_000, "repeats": 2}
_FLOWS = ("Lorenz", "Rössler")
# Which coordinate is seen, the gain K that it acts with, and the step size. With K = (10, 28, 0) the first two equations of the
# Lorenz flow take x from the observation.
_SEEN = {"Lorenz": 0, "Rössler": 1}
_GAINS = {"Lorenz": (10.0, 28.0, 0.0), "Rössler": (0.0, 2.0, 0.0)}
_STEPS = {"Lorenz": 0.01, "Rössler": 0.05}


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


def with_exponent(row: dict, dynamics, initial, drives) -> dict:
    """A row with the exponent along the loop's path."""
    path = jax.jit(rollout)(dynamics, initial, drives)
    found = lyapunov(dynamics, initial, path, drives, key=jax.random.key(0))
    return row | {"exponent": float(found.exponent)}


def run(num_langevin, num_flow, repeats) -> Findings:
    """Two wells, and each flow with its observer."""
    rows = []
    noise = jnp.asarray(np.random.default_rng(1).normal(size=num_langevin))
    wells = Dynamics(two_wells, jnp.asarray(0.05)), jnp.asarray(-1.0), noise
    crossings = int(np.sum(np.diff(np.sign(np.asarray(jax.jit(rollout)(*wells)))) != 0))
    tamed = {"DEER": deer(), "DEER, clipped": deer(clip=1.0)}
    for row in solved("two wells", *wells, tamed, repeats=repeats):
        rows.append(with_exponent(row, *wells) | {"crossings": crossings})
    for name in _FLOWS:
        step = functools.partial(pushed, name, _STEPS[name])
        alone, observer = Dynamics(step, jnp.zeros(3)), Dynamics(step, jnp.asarray(_GAINS[name]))
        nothing = jnp.zeros(num_flow)
        truth = jax.jit(rollout)(alone, jnp.ones(3), jnp.zeros(2 * num_flow))
        start, seen = truth[num_flow - 1], truth[num_flow:, _SEEN[name]]
        methods = tamed | {"quasi-DEER": quasi_deer(clip=None)}
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
    return Findings(rows, claims(rows), figure(rows))


def claims(rows: list[dict]) -> list[Claim]:
    """What the paper says, beside the rows."""
    wells, clipped_wells = (
        row_of(rows, problem="two wells", method=method) for method in ("DEER", "DEER, clipped")
    )
    clipped = [row_of(rows, problem=f"{name} observer", method="DEER, clipped") for name in _FLOWS]
    flows = [row_of(rows, problem=f"{name} flow") for name in _FLOWS]
    observers = [row_of(rows, problem=f"{name} observer", method="DEER") for name in _FLOWS]
    quasi = [row_of(rows, problem=f"{name} observer", method="quasi-DEER") for name in _FLOWS]
    said = lambda row: f"{row['problem']} {row['iterations']} iterations, LLE {row['exponent']:.3f}"
    return [
        judged(
            "arXiv:2508.16817",
            "Langevin dynamics in two wells has a negative exponent and takes few iterations, though the path hops",
            f"T = {wells['T']:,}: LLE {wells['exponent']:.3f}, {wells['crossings']} changes of sign, {wells['iterations']} "
            f"iterations, {times(wells)}; Jacobians clipped to 1: {clipped_wells['status']} after "
            f"{clipped_wells['iterations']} iterations, {times(clipped_wells)}",
            converged(wells) and wells["exponent"] < 0 and wells["iterations"] < 50,
            "the path is predictable, but iterates pass between the wells and beyond them, where a step's slope exceeds 1 in size, and "
            "an undamped Newton step overflows; step size, temperature and start are ours, the paper's may be milder",
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
            + "; clipped to 1: "
            + "; ".join(f"{row['problem']} {row['iterations']} iterations" for row in clipped)
            + f"; largest residual of the observers {max(row['residual'] for row in observers):.0e}",
            all(
                converged(one) and one["iterations"] < other["iterations"]
                for one, other in zip(observers, flows)
            ),
            "the exponent is that of the right path: iterates far from it pass through states where the linearised observer is "
            "unstable, as the observer here uses its own x in the products; only the front of exact steps moves then",
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


def figure(rows: list[dict]) -> Figure:
    """Residual by iteration of DEER on each system."""
    drawn, axes = panels(1, 5.5)
    shown = [
        row | {"method": f"{row['problem']}, LLE {row['exponent']:.3f}"}
        for row in rows
        if row["method"] == "DEER"
    ]
    draw_histories(axes[0], shown, "DEER")
    return drawn
