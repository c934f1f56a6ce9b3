"""Gibbs sampling across the sequence length: eight schools by inversion (arXiv:2508.18413).

The authors' hierarchy (github.com/lindermanlab/parallel-mcmc): twenty students in each of eight schools, whose marks have the published
means and standard errors. Every conditional is drawn by its inverse distribution function at uniforms (`gibbs`), Gamma laws for
the variances; the state is θ_s, μ, log τ² and log σ_s², 18 numbers. The loop computes the quantiles in every sweep, and those of
the Gamma law are most of its time; solvers compute them for all sweeps side by side.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.scipy.stats as stats
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
    ratio,
    row_of,
    said,
    solved,
    times,
)
from partime_mcmc import deer, gibbs, quasi_deer
from partime_mcmc.kernels import gamma_quantile

SMALL = {"num_sweeps": 1000, "repeats": 2}
PAPER = {"num_sweeps": 10_000, "repeats": 2}
_GIBBS = "Gibbs, eight schools"
MEANS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
STUDENTS = 20


def eight_schools():
    """Blocks of the sweep: log τ², μ, θ_s and log σ_s² of the authors' hierarchy.

    x_sn ~ N(θ_s, σ_s²), θ_s ~ N(μ, τ²), μ ~ N(0, τ²/0.1), τ² and σ_s² scaled inverse chi-square with 0.1 degrees of freedom and
    scales 100 and 10. The students' marks have the published means, and standard errors 1/√20 times their spread.
    """
    means, num = jnp.asarray(MEANS), MEANS.size
    squares = jnp.asarray(STUDENTS * STUDENTS * STANDARD_ERRORS**2)

    def log_inverse_gamma(degrees, twice_rate, uniform):
        return jnp.log(0.5 * twice_rate) - jnp.log(gamma_quantile(0.5 * degrees, uniform))

    def between(state, uniform):
        spread = 0.1 * state["mean"] ** 2 + jnp.sum((state["effects"] - state["mean"]) ** 2)
        return log_inverse_gamma(0.1 + num + 1, 0.1 * 100 + spread, uniform)

    def mean(state, uniform):
        spread = jnp.exp(0.5 * state["between"]) / (0.1 + num) ** 0.5
        return state["effects"].sum() / (0.1 + num) + spread * stats.norm.ppf(uniform)

    def effects(state, uniform):
        data, prior = STUDENTS * jnp.exp(-state["within"]), jnp.exp(-state["between"])
        centre = (data * means + prior * state["mean"]) / (data + prior)
        return centre + stats.norm.ppf(uniform) / jnp.sqrt(data + prior)

    def within(state, uniform):
        spread = squares + STUDENTS * (means - state["effects"]) ** 2
        return log_inverse_gamma(0.1 + STUDENTS, 0.1 * 10 + spread, uniform)

    return {"between": between, "mean": mean, "effects": effects, "within": within}


def run(num_sweeps, repeats) -> Findings:
    """The chain by DEER and quasi-DEER."""
    start = {
        "between": jnp.asarray(np.log(100.0)),
        "mean": jnp.asarray(MEANS.mean()),
        "effects": jnp.asarray(MEANS),
        "within": jnp.log(jnp.asarray(STUDENTS * STANDARD_ERRORS**2)),
    }
    given = chain(gibbs(eight_schools()), start, num_sweeps, 0)
    methods = {"DEER": deer(), "quasi-DEER": quasi_deer(damping=0.1)}
    rows = solved(_GIBBS, *given, methods, max_iterations=400, repeats=repeats)
    return Findings(rows, claims(rows), figure(rows))


def claims(rows: list[dict]) -> list[Claim]:
    """What the paper says, beside the rows."""
    sweep, quasi = (
        row_of(rows, problem=_GIBBS, method=method) for method in ("DEER", "quasi-DEER")
    )
    best = max((sweep, quasi), key=ratio)
    return [
        judged(
            "arXiv:2508.18413",
            "Gibbs sampling of eight schools, written with inverse distribution functions, takes tens of Newton iterations",
            said(sweep),
            converged(sweep) and sweep["iterations"] < 100,
        ),
        judged(
            "the method",
            "quasi-DEER takes more iterations, as a sweep mixes all coordinates",
            said(quasi),
            quasi["iterations"] > sweep["iterations"],
        ),
        judged(
            "arXiv:2508.18413",
            "parallel evaluation is faster than sequential evaluation, in some cases by more than an order of magnitude",
            f"best of DEER and quasi-DEER: {ratio(best):.2g}× ({best['problem']}, {times(best)})",
            ratio(best) > 1,
            f"on {jax.default_backend()}: tens of iterations of D + 1 evaluations each want more lanes than there are",
        ),
    ]


def figure(rows: list[dict]) -> Figure:
    """Residual by iteration."""
    drawn, axes = panels(1)
    draw_histories(axes[0], rows, _GIBBS)
    return drawn
