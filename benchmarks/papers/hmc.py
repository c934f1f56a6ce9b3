"""HMC across the sequence length, and the leapfrogs of one trajectory in parallel (arXiv:2508.18413).

*A banana* with the authors' settings (github.com/lindermanlab/parallel-mcmc): eight leapfrogs of 0.5, DEER with Jacobians times 0.55.
*One trajectory* of many leapfrogs as a recurrence in (q, p), on a logistic regression in whitened coordinates: quasi-DEER with a
diagonal, with a 2 × 2 block per coordinate (`PairedDiagonal`), exact and by one probe, and DEER.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.papers.experiment import (
    Claim,
    Findings,
    chain,
    converged,
    draw_histories,
    judged,
    panels,
    row_of,
    said,
    shooting_claim,
    solved,
    times,
)
from benchmarks.papers.mala import regression
from partime_mcmc import Dynamics, deer, hmc, quasi_deer, shooting
from partime_mcmc.kernels import Whitening
from partime_mcmc.linearize import Clipped, Damped, DenseJacobian, PairedDiagonal
from partime_mcmc.models.banana import logdensity as banana
from partime_mcmc.solvers import Newton

SMALL = {
    "num_banana": 2048,
    "trajectory": {"num_steps": 64, "num_data": 250, "dimension": 9},
    "repeats": 1,
}
PAPER = {
    "num_banana": 100_000,
    "trajectory": {"num_steps": 256, "num_data": 1000, "dimension": 25},
    "repeats": 2,
}
_BANANA, _LEAPFROG = "HMC, banana", "one trajectory"


def leapfrog(logdensity):
    """A leapfrog step of (q, p) as a recurrence; its drive is not looked at."""

    def step(step_size, state, _):
        q, p = state
        p = p + 0.5 * step_size * jax.grad(logdensity)(q)
        q = q + step_size * p
        return q, p + 0.5 * step_size * jax.grad(logdensity)(q)

    return step


def trajectory_rows(num_steps: int, num_data: int, dimension: int, repeats: int) -> list[dict]:
    """One trajectory of so many leapfrogs on the whitened logistic regression."""
    logdensity, mode, curvature = regression(num_data, dimension)
    metric = Whitening.of_covariance(mode, mode, jnp.asarray(np.linalg.inv(curvature)))
    rng = np.random.default_rng(6)
    step = Dynamics(leapfrog(metric.density(logdensity)), jnp.asarray(0.1))
    start = jnp.asarray(rng.normal(size=dimension)), jnp.asarray(rng.normal(size=dimension))
    return solved(
        _LEAPFROG,
        step,
        start,
        jnp.arange(num_steps),
        {
            "DEER": deer(),
            "quasi-DEER": quasi_deer(clip=None),
            "quasi-DEER, blocks": Newton(PairedDiagonal()),
        },
        max_iterations=num_steps,
        repeats=repeats,
    )


def run(num_banana, trajectory, repeats) -> Findings:
    """The banana and a trajectory."""
    begin = 10 * jnp.asarray(np.random.default_rng(8).normal(size=2))
    bent = chain(hmc(banana, 0.5, jnp.ones(2), 8), begin, num_banana, 3)
    methods = {
        "DEER, times 0.55": Newton(Clipped(Damped(DenseJacobian(), 0.45), 1.0)),
        "DEER": deer(),
        "shooting": shooting(32),
    }
    rows = solved(_BANANA, *bent, methods, max_iterations=300, repeats=repeats)
    rows += trajectory_rows(**trajectory, repeats=repeats)
    return Findings(rows, claims(rows), figure(rows))


def claims(rows: list[dict]) -> list[Claim]:
    """What the paper says, beside the rows."""
    here = lambda problem, method="DEER": row_of(rows, problem=problem, method=method)
    bent, undamped = here(_BANANA, "DEER, times 0.55"), here(_BANANA)
    rolled = here(_BANANA, "shooting")
    blocks, plain = here(_LEAPFROG, "quasi-DEER, blocks"), here(_LEAPFROG, "quasi-DEER")
    return [
        judged(
            "arXiv:2508.18413",
            "HMC on a banana takes about 147 iterations for 100,000 draws, with DEER damped",
            f"{said(bent)}; undamped {undamped['status']} after {undamped['iterations']} iterations",
            converged(bent) and bent["iterations"] < 300,
            "the authors stop when updates are below 10⁻⁴ absolutely or 10⁻³ relatively, here every step is exact to rounding",
        ),
        judged(
            "arXiv:2508.18413",
            "the leapfrogs of one trajectory can be solved in parallel by quasi-DEER with a 2 × 2 block per coordinate, in about "
            "L/2 iterations",
            f"L = {blocks['T']}: {blocks['status']} after {blocks['iterations']} iterations, {times(blocks)}; with a diagonal "
            f"{plain['iterations']}, DEER {here(_LEAPFROG)['iterations']}",
            converged(blocks) and blocks["iterations"] <= 0.75 * blocks["T"],
        ),
        shooting_claim(rolled),
    ]


def figure(rows: list[dict]) -> Figure:
    """Residual by iteration of the chain and of the trajectory."""
    drawn, axes = panels(2)
    for axis, problem in zip(axes, (_BANANA, _LEAPFROG)):
        shown = [row for row in rows if row["problem"] == problem and row["method"] != "shooting"]
        draw_histories(axis, shown, problem)
    return drawn
