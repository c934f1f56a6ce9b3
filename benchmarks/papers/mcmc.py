"""Markov chain Monte Carlo across the sequence length (arXiv:2508.18413).

Models and settings are those of the authors' examples (github.com/lindermanlab/parallel-mcmc), but for data that have to be
downloaded. *Gibbs* for eight schools with twenty students each, every conditional by its inverse distribution function at
uniforms (`gibbs`), Gamma laws for the variances. *MALA* on a logistic regression like the German credit data (simulated
features, a ridge of 1), in the eigenvectors of its Hessian, and on a mixture of four normals in the plane. *HMC* on a banana, with
DEER damped by the factor 0.55. *Parallel over leapfrogs*: one long trajectory as a recurrence in (q, p), with
quasi-DEER whose linear part is a 2 × 2 block per coordinate. *Sliding windows*, and *early stopping* judged by the maximum mean
discrepancy (MMD) between the draws of an iterate and exact draws.

MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y) with k(x, y) = exp(−‖x − y‖²/2); unbiased estimates of it scatter about 0 for draws
of one law.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import jax.scipy.stats as stats
import numpy as np
from matplotlib.figure import Figure

from benchmarks.papers.experiment import (
    Claim,
    Findings,
    converged,
    draw_histories,
    judged,
    panels,
    ratio,
    row_of,
    solved,
    times,
)
from partime_mcmc import (
    Dynamics,
    SlidingWindow,
    deer,
    gibbs,
    hmc,
    iterates,
    mala,
    quasi_deer,
    shooting,
)
from partime_mcmc.kernels import Whitening, gamma_quantile
from partime_mcmc.linearize import Clipped, Damped, DenseJacobian, PairedDiagonal
from partime_mcmc.models.banana import logdensity as banana
from partime_mcmc.solvers import Newton

SMALL = {
    "num_gibbs": 1000,
    "logistic": {"num_steps": 512, "num_data": 250, "dimension": 9, "step_size": 0.006},
    "num_mixture": 4096,
    "num_banana": 4096,
    "leapfrog": {"num_steps": 64, "num_data": 250, "dimension": 9},
    "repeats": 2,
}
PAPER = {
    "num_gibbs": 10_000,
    "logistic": {"num_steps": 2048, "num_data": 1000, "dimension": 25, "step_size": 0.0015},
    "num_mixture": 100_000,
    "num_banana": 100_000,
    "leapfrog": {"num_steps": 256, "num_data": 1000, "dimension": 25},
    "repeats": 2,
}
_GIBBS, _LOGISTIC, _MIXTURE, _BANANA, _LEAPFROG = (
    "Gibbs, eight schools",
    "MALA, logistic regression",
    "MALA, four normals",
    "HMC, banana",
    "one trajectory",
)
MEANS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
STUDENTS = 20
MODES = 2.0 * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


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


def regression(num_data: int, dimension: int):
    """A logistic regression on simulated standardised features, the first one constant: log density, mode, curvature there."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(num_data, dimension)) @ (
        np.eye(dimension) + 0.2 * rng.normal(size=(dimension, dimension))
    )
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    features[:, 0] = 1.0
    weights = rng.normal(size=dimension)
    labels = (rng.uniform(size=num_data) < 1 / (1 + np.exp(-features @ weights))).astype(float)
    mode = np.zeros(dimension)
    for _ in range(30):
        chance = 1 / (1 + np.exp(-features @ mode))
        curvature = (features.T * (chance * (1 - chance))) @ features + np.eye(dimension)
        mode = mode + np.linalg.solve(curvature, features.T @ (labels - chance) - mode)
    X, y = jnp.asarray(features), jnp.asarray(labels)

    def logdensity(w):
        logits = X @ w
        return jnp.sum(y * logits - jax.nn.softplus(logits)) - 0.5 * jnp.sum(w**2)

    return logdensity, jnp.asarray(mode), curvature


def mixture(x):
    """Log density of four normals of unit variance in the plane, in equal parts."""
    return jax.nn.logsumexp(-0.5 * jnp.sum((x - jnp.asarray(MODES)) ** 2, axis=1))


def chain(kernel, position, num_steps: int, seed: int):
    """A kernel's recurrence with its random numbers."""
    state = kernel.init(position)
    return (
        kernel.dynamics(),
        kernel.carry(state),
        kernel.tape(jax.random.key(seed), num_steps, state),
    )


def leapfrog(logdensity):
    """A leapfrog step of (q, p) as a recurrence; its drive is not looked at."""

    def step(step_size, state, _):
        q, p = state
        p = p + 0.5 * step_size * jax.grad(logdensity)(q)
        q = q + step_size * p
        return q, p + 0.5 * step_size * jax.grad(logdensity)(q)

    return step


@functools.partial(jax.jit, static_argnames="block")
def mmd(x, y, block: int = 256):
    """The unbiased estimate of MMD² between draws `(N, D)` and `(M, D)`, N and M multiples of `block`."""

    def total(a, b):
        def one(rows):
            return jnp.sum(
                jnp.exp(-0.5 * jnp.sum((rows[:, None] - b[None]) ** 2, axis=2)), axis=None
            )

        return jnp.sum(jax.lax.map(one, a.reshape(-1, block, a.shape[1])))

    n, m = x.shape[0], y.shape[0]
    return (
        (total(x, x) - n) / (n * (n - 1))
        + (total(y, y) - m) / (m * (m - 1))
        - 2 * total(x, y) / (n * m)
    )


def run(num_gibbs, logistic, num_mixture, num_banana, leapfrog, repeats) -> Findings:
    """All of them, in float64."""
    rows = []
    start = {
        "between": jnp.asarray(np.log(100.0)),
        "mean": jnp.asarray(MEANS.mean()),
        "effects": jnp.asarray(MEANS),
        "within": jnp.log(jnp.asarray(STUDENTS * STANDARD_ERRORS**2)),
    }
    given = chain(gibbs(eight_schools()), start, num_gibbs, 0)
    methods = {"DEER": deer(), "quasi-DEER": quasi_deer(damping=0.1)}
    rows += solved(_GIBBS, *given, methods, max_iterations=400, repeats=repeats)

    logdensity, _, curvature = regression(logistic["num_data"], logistic["dimension"])
    # In the eigenvectors of the Hessian a step without its noise is nearly diagonal.
    turn = jnp.asarray(np.linalg.eigh(curvature)[1])
    begin = 0.1 * jnp.asarray(np.random.default_rng(7).normal(size=logistic["dimension"]))
    kernel = mala(lambda z: logdensity(turn @ z), logistic["step_size"])
    given = chain(kernel, turn.T @ begin, logistic["num_steps"], 1)
    methods = {"DEER": deer(), "quasi-DEER, 1 probe": quasi_deer(num_probes=1)}
    rows += solved(_LOGISTIC, *given, methods, repeats=repeats)

    four = chain(mala(mixture, 0.5), jnp.asarray(MODES[0]), num_mixture, 2)
    methods = {
        "DEER": deer(),
        "quasi-DEER, 1 probe": quasi_deer(num_probes=1),
        "DEER, sliding window": deer(),
        "shooting": shooting(32),
    }
    rows += solved(
        _MIXTURE,
        *four,
        methods,
        max_iterations=400,
        repeats=repeats,
        options={"DEER, sliding window": {"schedule": SlidingWindow(max(num_mixture // 8, 64))}},
    )
    early = early_stopping(four, num_mixture)

    begin = 10 * jnp.asarray(np.random.default_rng(8).normal(size=2))
    bent = chain(hmc(banana, 0.5, jnp.ones(2), 8), begin, num_banana, 3)
    methods = {
        "DEER, times 0.55": Newton(Clipped(Damped(DenseJacobian(), 0.45), 1.0)),
        "DEER": deer(),
        "shooting": shooting(32),
    }
    rows += solved(_BANANA, *bent, methods, max_iterations=400, repeats=repeats)
    rows += trajectory_rows(**leapfrog, repeats=repeats)
    return Findings(rows, claims(rows, early), figure(rows, early))


def early_stopping(given, num_steps: int) -> dict:
    """MMD² of every iterate to exact draws of the mixture, and of independent exact draws."""
    watch = jax.jit(lambda *args: iterates(*args, solver=deer(), num_iterations=40))
    found = watch(*given)
    rng = np.random.default_rng(5)
    count = min(num_steps - num_steps % 256, 4096)

    def exact():
        return jnp.asarray(MODES[rng.integers(4, size=count)] + rng.normal(size=(count, 2)))

    reference = exact()
    between = [float(mmd(exact(), reference)) for _ in range(5)]
    index = np.arange(0, num_steps, num_steps // count)[:count]
    last = int(found.iterations)
    values = [float(mmd(found.states[k][index], reference)) for k in range(min(last, 40) + 1)]
    # A correlated chain scatters more than independent draws: what counts is the converged chain's own distance.
    return {
        "values": values,
        "between": between,
        "iterations": last,
        "exact": np.asarray(found.num_exact)[: last + 1] / num_steps,
    }


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


def claims(rows: list[dict], early: dict) -> list[Claim]:
    """What the paper says, beside the rows."""
    here = lambda problem, method="DEER": row_of(rows, problem=problem, method=method)
    said = lambda row: (
        f"T = {row['T']:,}: {row['status']} after {row['iterations']} iterations, {times(row)}"
    )
    sweep, regression_, four = (here(problem) for problem in (_GIBBS, _LOGISTIC, _MIXTURE))
    bent, undamped = here(_BANANA, "DEER, times 0.55"), here(_BANANA)
    probe, window = (
        here(_LOGISTIC, "quasi-DEER, 1 probe"),
        here(_MIXTURE, "DEER, sliding window"),
    )
    probe_mixture = here(_MIXTURE, "quasi-DEER, 1 probe")
    rolled = [here(problem, "shooting") for problem in (_MIXTURE, _BANANA)]
    blocks, plain = here(_LEAPFROG, "quasi-DEER, blocks"), here(_LEAPFROG, "quasi-DEER")
    best = max((sweep, regression_, four, bent, probe, probe_mixture), key=ratio)
    quickest = max(rolled, key=ratio)
    end = early["values"][-1]
    scatter = max(3 * float(np.std(early["between"])), 0.1 * abs(end))
    near = [abs(value - end) <= scatter for value in early["values"]]
    first = next(k for k in range(len(near)) if all(near[k:]))
    backend = jax.default_backend()
    tens = lambda row: converged(row) and row["iterations"] < 100
    return [
        judged(
            "arXiv:2508.18413",
            "Gibbs sampling of eight schools, written with inverse distribution functions, takes tens of Newton iterations",
            said(sweep),
            tens(sweep),
        ),
        judged(
            "arXiv:2508.18413",
            "MALA on a logistic regression takes tens of iterations",
            said(regression_),
            tens(regression_),
        ),
        judged(
            "arXiv:2508.18413",
            "the stochastic quasi-Newton method, one product with the Jacobian per step, converges too, for less work and memory",
            f"{said(probe)}; Jacobian products per step {probe['jvps']:.0f} against {regression_['jvps']:.0f}, memory "
            f"{probe['temp_bytes'] / 2**20:.1f} against {regression_['temp_bytes'] / 2**20:.1f} MiB",
            converged(probe)
            and probe["jvps"] < regression_["jvps"]
            and probe["temp_bytes"] < regression_["temp_bytes"],
        ),
        judged(
            "arXiv:2508.18413",
            "MALA on a mixture of four normals takes tens of iterations for up to hundreds of thousands of draws",
            f"DEER {said(four)}; one probe {said(probe_mixture)}",
            tens(four) and tens(probe_mixture),
        ),
        judged(
            "arXiv:2508.18413",
            "HMC on a banana takes about 147 iterations for 100,000 draws, with DEER damped",
            f"{said(bent)}; undamped {undamped['status']} after {undamped['iterations']} iterations",
            converged(bent) and bent["iterations"] < 300,
            "the authors stop when updates are below 10⁻⁴ absolutely or 10⁻³ relatively, here every step is exact to rounding",
        ),
        judged(
            "arXiv:2508.18413",
            "a window that slides along with the exact steps bounds memory and gives the same chain",
            f"window of {max(window['T'] // 8, 64)}: {said(window)}; largest difference from the loop's path "
            f"{window['difference']:.0e}",
            converged(window) and window["temp_bytes"] < four["temp_bytes"],
            "the window holds less, but the path is kept beside it, and D = 2 is too small for the Jacobians to be most of the memory",
        ),
        judged(
            "arXiv:2508.18413",
            "stopping early gives draws as good as the converged chain's, judged by MMD",
            f"MMD² to exact draws stays within {scatter:.0e} of the converged chain's {end:.1e} from iteration {first} of "
            f"{early['iterations']} on, when {100 * early['exact'][min(first, len(early['exact']) - 1)]:.0f}% of the steps are exact",
            first < early["iterations"],
        ),
        judged(
            "arXiv:2508.18413",
            "the leapfrogs of one trajectory can be solved in parallel by quasi-DEER with a 2 × 2 block per coordinate, in about "
            "L/2 iterations",
            f"L = {blocks['T']}: {blocks['status']} after {blocks['iterations']} iterations, {times(blocks)}; with a diagonal "
            f"{plain['iterations']}, DEER {here(_LEAPFROG)['iterations']}",
            converged(blocks) and blocks["iterations"] <= 0.75 * blocks["T"],
        ),
        judged(
            "arXiv:2508.18413",
            "parallel evaluation is faster than sequential evaluation, in some cases by more than an order of magnitude",
            f"best of DEER and quasi-DEER: {ratio(best):.2g}× ({best['problem']}, {times(best)})",
            ratio(best) > 1,
            f"on {backend}: tens of iterations of D + 1 evaluations each want more lanes than there are",
        ),
        judged(
            "the method",
            "shooting solves the same chains at little more than one evaluation per draw",
            "; ".join(
                f"{row['problem']} {row['evaluations']:.2f} evaluations, {ratio(row):.2g}×, {times(row)}"
                for row in rolled
            ),
            all(converged(row) and row["evaluations"] < 2 for row in rolled)
            and ratio(quickest) > 1,
        ),
    ]


def figure(rows: list[dict], early: dict) -> Figure:
    """Residual by iteration of every chain, of a trajectory, and MMD² by iteration."""
    drawn, axes = panels(3)
    chains = [row for row in rows if row["method"] == "DEER" and row["problem"] != _LEAPFROG]
    draw_histories(
        axes[0],
        [row | {"method": f"{row['problem']}, T = {row['T']:,}"} for row in chains],
        "DEER on chains",
    )
    draw_histories(axes[1], [row for row in rows if row["problem"] == _LEAPFROG], _LEAPFROG)
    axes[2].plot(np.maximum(early["values"], 1e-6), "o-", markersize=3, label="iterate")
    axes[2].axhline(max(early["values"][-1], 1e-6), color="k", linestyle="--", label="converged")
    axes[2].plot(early["exact"], color="grey", label="share of exact steps")
    axes[2].set_yscale("log")
    axes[2].set_title("MMD² to exact draws, four normals", fontsize=10)
    axes[2].set_xlabel("iteration")
    axes[2].legend(fontsize=8)
    return drawn
