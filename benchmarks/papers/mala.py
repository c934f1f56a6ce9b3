"""MALA across the sequence length: a regression, a mixture, windows, early stopping (arXiv:2508.18413).

Models and settings are those of the authors' examples (github.com/lindermanlab/parallel-mcmc), but for data that have to be
downloaded. *A logistic regression* like the German credit data: simulated features, a ridge of 1, in the eigenvectors of its
Hessian. *A mixture* of four normals in the plane. *A sliding window*, and *early stopping* judged by the maximum mean
discrepancy (MMD) between the draws of an iterate and exact draws,

    MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y),     k(x, y) = exp(−‖x − y‖²/2),

whose unbiased estimates scatter about 0 for independent draws of one law.
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
    chain,
    converged,
    draw_histories,
    judged,
    panels,
    ratio,
    row_of,
    said,
    shooting_claim,
    solved,
    times,
)
from partime_mcmc import SlidingWindow, deer, iterates, mala, quasi_deer, shooting

SMALL = {
    "logistic": {"num_steps": 512, "num_data": 250, "dimension": 9, "step_size": 0.006},
    "num_mixture": 2048,
    "repeats": 1,
}
PAPER = {
    "logistic": {"num_steps": 2048, "num_data": 1000, "dimension": 25, "step_size": 0.0015},
    "num_mixture": 100_000,
    "repeats": 2,
}
_LOGISTIC, _MIXTURE = "MALA, logistic regression", "MALA, four normals"
MODES = 2.0 * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


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


def run(logistic, num_mixture, repeats) -> Findings:
    """Both chains."""
    logdensity, _, curvature = regression(logistic["num_data"], logistic["dimension"])
    # In the eigenvectors of the Hessian a step without its noise is nearly diagonal.
    turn = jnp.asarray(np.linalg.eigh(curvature)[1])
    begin = 0.1 * jnp.asarray(np.random.default_rng(7).normal(size=logistic["dimension"]))
    kernel = mala(lambda z: logdensity(turn @ z), logistic["step_size"])
    given = chain(kernel, turn.T @ begin, logistic["num_steps"], 1)
    methods = {"DEER": deer(), "quasi-DEER, 1 probe": quasi_deer(num_probes=1)}
    rows = solved(_LOGISTIC, *given, methods, repeats=repeats)

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

    return Findings(rows, claims(rows, early), figure(rows, early))


def early_stopping(given, num_steps: int) -> dict:
    """MMD² of every iterate to exact draws of the mixture, and of independent exact draws."""
    watch = jax.jit(lambda *args: iterates(*args, solver=deer(), num_iterations=200))
    found = watch(*given)
    rng = np.random.default_rng(5)
    count = min(num_steps - num_steps % 256, 1024)

    def exact():
        return jnp.asarray(MODES[rng.integers(4, size=count)] + rng.normal(size=(count, 2)))

    reference = exact()
    between = [float(mmd(exact(), reference)) for _ in range(5)]
    index = np.arange(0, num_steps, num_steps // count)[:count]
    last = int(found.iterations)
    values = [float(mmd(found.states[k][index], reference)) for k in range(last + 1)]
    # A correlated chain scatters more than independent draws: what counts is the converged chain's own distance.
    return {
        "values": values,
        "between": between,
        "iterations": last,
        "converged": int(found.status) == 0,
        "exact": np.asarray(found.num_exact)[: last + 1] / num_steps,
    }


def claims(rows: list[dict], early: dict) -> list[Claim]:
    """What the paper says, beside the rows."""
    here = lambda problem, method="DEER": row_of(rows, problem=problem, method=method)
    regression_, four = here(_LOGISTIC), here(_MIXTURE)
    probe, window = (
        here(_LOGISTIC, "quasi-DEER, 1 probe"),
        here(_MIXTURE, "DEER, sliding window"),
    )
    probe_mixture, rolled = here(_MIXTURE, "quasi-DEER, 1 probe"), here(_MIXTURE, "shooting")
    best = max((regression_, four, probe, probe_mixture), key=ratio)
    end = early["values"][-1]
    scatter = max(3 * float(np.std(early["between"])), 0.1 * abs(end))
    near = [abs(value - end) <= scatter for value in early["values"]]
    first = next(k for k in range(len(near)) if all(near[k:]))
    tens = lambda row: converged(row) and row["iterations"] < 100
    return [
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
            early["converged"] and first < early["iterations"],
            "the chain did not converge in 200 iterations, or no earlier iterate was as good",
        ),
        judged(
            "arXiv:2508.18413",
            "parallel evaluation is faster than sequential evaluation, in some cases by more than an order of magnitude",
            f"best of DEER and quasi-DEER: {ratio(best):.2g}× ({best['problem']}, {times(best)})",
            ratio(best) > 1,
            f"on {jax.default_backend()}: tens of iterations of D + 1 evaluations each want more lanes than there are",
        ),
        shooting_claim(rolled),
    ]


def figure(rows: list[dict], early: dict) -> Figure:
    """Residual by iteration of both chains, and MMD² by iteration."""
    drawn, axes = panels(3)
    for axis, problem in zip(axes, (_LOGISTIC, _MIXTURE)):
        draw_histories(axis, [row for row in rows if row["problem"] == problem], problem)
    axes[2].plot(np.maximum(early["values"], 1e-6), "o-", markersize=3, label="iterate")
    axes[2].axhline(max(early["values"][-1], 1e-6), color="k", linestyle="--", label="converged")
    axes[2].plot(early["exact"], color="grey", label="share of exact steps")
    axes[2].set_yscale("log")
    axes[2].set_title("MMD² to exact draws, four normals", fontsize=10)
    axes[2].set_xlabel("iteration")
    axes[2].legend(fontsize=8)
    return drawn
