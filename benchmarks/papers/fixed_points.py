"""Fixed-point schemes on one table: Newton, quasi-Newton, Picard and Jacobi (arXiv:2509.21716, arXiv:2603.16850).

All four solve the same linear recurrence in every iteration and differ in what stands for the Jacobian: the Jacobian, its
diagonal, the identity, zero. So each should win where its matrix is right and cheap. Five recurrences that part them:

    permutations    x_t = P_{u_t} x_{t-1}, the word problem of S5: linear, the Jacobian neither diagonal nor near I or 0
    gated network   x' = (1 − z) x + z tanh(W x + u) with a small W: the Jacobian nearly diagonal
    Langevin        x' = x + ε ∇log p(x) + √(2ε) noise with a small ε: the Jacobian nearly I
    forgetful       x' = tanh(0.1 W x) + u: the Jacobian nearly 0
    diffusion       the probability flow of a mixture of Gaussians in small steps from noise to data, where the paper on
                    sampling diffusion models in parallel iterates Picard's scheme (Shih et al. 2023, arXiv:2305.16317)

The cost of an iteration is counted as evaluations and Jacobian products of `f` per step of the path; the last pass, which
only finds that nothing is left, is among them.
"""

from __future__ import annotations

from typing import Any

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
    ratio,
    row_of,
    solved,
    times,
)
from partime_mcmc import Dynamics, deer, jacobi, picard, quasi_deer

SMALL = {"num_steps": 512, "dimension": 8, "repeats": 1}
PAPER = {"num_steps": 8192, "dimension": 32, "repeats": 3}

METHODS = {
    "Newton": deer(),
    "quasi-Newton": quasi_deer(clip=None),
    "Picard": picard(),
    "Jacobi": jacobi(),
}


def permute(tables, state, which):
    """One letter of a word in S5, acting on a vector of five numbers."""
    return tables[which] @ state


def gated(params, state, drive):
    """A gate that keeps most of the state, and a small coupling between units."""
    keep, weights = params
    return keep * state + (1 - keep) * jnp.tanh(weights @ state + drive)


def langevin(params, state, noise):
    """An Euler–Maruyama step of Langevin dynamics on a correlated normal."""
    step_size, precision = params
    return state - step_size * (precision @ state) + jnp.sqrt(2 * step_size) * noise


def forgetful(weights, state, drive):
    """A step that hardly remembers."""
    return jnp.tanh(weights @ state) + drive


def denoise(means, state, times):
    """An Euler step of the probability flow x' = −½ β (x + score) backwards in time, for equal normal components of sd 0.3."""
    level, size = times
    spread = 0.3**2 * level + 1 - level
    centres = jnp.sqrt(level) * means
    distances = -0.5 * jnp.sum((state - centres) ** 2, axis=1) / spread
    score = (jax.nn.softmax(distances) @ centres - state) / spread
    return state + 0.5 * size * (state + score)


def problems(num_steps: int, dimension: int) -> dict[str, tuple[Dynamics, Any, Any]]:
    """Recurrences by name: dynamics, initial state, drives."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    tables = jnp.asarray([np.eye(5)[rng.permutation(5)] for _ in range(8)])
    weights = normal(dimension, dimension) / dimension**0.5
    precision = jnp.eye(dimension) + 0.3 * (weights @ weights.T)
    # β(s) = 20 s as in the usual schedule: the signal's share is exp(−10 s²) at time s, from s = 1 to 0.
    s = np.linspace(1, 0, num_steps + 1)
    level, size = np.exp(-10 * s[:-1] ** 2), 20 * s[:-1] / num_steps
    drives = normal(num_steps, dimension)
    return {
        "permutations": (
            Dynamics(permute, tables),
            normal(5),
            jnp.asarray(rng.integers(0, 8, num_steps)),
        ),
        "gated network": (Dynamics(gated, (0.8, 0.1 * weights)), jnp.zeros(dimension), drives),
        "Langevin": (Dynamics(langevin, (1e-3, precision)), normal(dimension), drives),
        "forgetful": (Dynamics(forgetful, 0.1 * weights), jnp.zeros(dimension), drives),
        "diffusion": (
            Dynamics(denoise, 2 * jnp.sign(normal(4, dimension))),
            normal(dimension),
            (jnp.asarray(level), jnp.asarray(size)),
        ),
    }


def run(num_steps: int, dimension: int, repeats: int) -> Findings:
    """Every scheme on every recurrence, with the theorem's bound of T iterations."""
    rows = []
    for name, problem in problems(num_steps, dimension).items():
        rows += solved(name, *problem, METHODS, max_iterations=num_steps + 1, repeats=repeats)
    return Findings(rows, claims(rows, num_steps), figure(rows))


def claims(rows: list[dict], num_steps: int) -> list[Claim]:
    """What the papers say of these schemes, beside the rows."""
    here = lambda problem, method: row_of(rows, problem=problem, method=method)
    count = lambda problem: ", ".join(
        f"{method} {here(problem, method)['iterations']}" for method in METHODS
    )
    cost = lambda row: row["evaluations"] + row["jvps"]
    words = [here("permutations", method)["iterations"] for method in METHODS]
    quasi, newton = here("gated network", "quasi-Newton"), here("gated network", "Newton")
    euler, forgets = here("Langevin", "Picard"), here("forgetful", "Jacobi")
    flow, fastest = here("diffusion", "Picard"), max(rows, key=ratio)
    names = list(dict.fromkeys(row["problem"] for row in rows))
    works = lambda problem: ", ".join(
        f"{method} {cost(here(problem, method)):.0f}" for method in METHODS
    )
    least = lambda problem: min(METHODS, key=lambda method: cost(here(problem, method)))
    most = max(row["iterations"] for row in rows)
    return [
        judged(
            "arXiv:2509.21716",
            "Newton, quasi-Newton, Picard and Jacobi are one scheme with four matrices, each exact after at most T iterations",
            f"{sum(map(converged, rows))} of {len(rows)} solves converge, in at most {most} of T = {num_steps} iterations, "
            f"largest residual {max(row['residual'] for row in rows):.0e}",
            all(map(converged, rows)) and most <= num_steps,
        ),
        judged(
            "arXiv:2509.21716",
            "a recurrence that is linear in the state, as the group word problem, takes Newton one iteration and the others many",
            f"iterations on the words of S5: {count('permutations')}",
            words[0] == 1 and min(words[1:]) > 10,
        ),
        judged(
            "the method",
            "where the Jacobian is nearly diagonal, quasi-Newton needs few iterations more than Newton and less time",
            f"gated network: {count('gated network')}; quasi-Newton {times(quasi)}; Newton {times(newton)}",
            quasi["iterations"] <= 3 * newton["iterations"]
            and quasi["seconds"] < newton["seconds"],
            "the exact diagonal takes D Jacobian products per step, as many as the Jacobian",
        ),
        judged(
            "arXiv:2509.21716",
            "Picard's iteration suits recurrences whose Jacobian is near the identity, such as Langevin dynamics in small steps",
            f"Langevin: {count('Langevin')}; Picard {times(euler)}",
            euler["iterations"] < min(here("Langevin", "Jacobi")["iterations"], num_steps) / 4,
        ),
        judged(
            "the method",
            "Jacobi's iteration suits recurrences whose Jacobian is near zero: there it takes the least work",
            f"forgetful: {count('forgetful')}; work {works('forgetful')}; Jacobi {times(forgets)}",
            least("forgetful") == "Jacobi",
        ),
        judged(
            "arXiv:2305.16317",
            "sampling a diffusion model in small steps takes Picard's iteration far fewer passes than steps",
            f"probability flow in {num_steps} steps: {count('diffusion')}; Picard {times(flow)}",
            flow["iterations"] < num_steps / 4,
            "here every step is exact to rounding, where that paper stops at a tolerance that images do not show",
        ),
        judged(
            "arXiv:2603.16850",
            "which scheme is best depends on the recurrence: the cheapest whose matrix is close enough to the Jacobian, "
            "not the one with fewest iterations",
            "least work: " + ", ".join(f"{least(name)} on {name}" for name in names),
            len({least(name) for name in names}) > 1,
        ),
        judged(
            "the method",
            "iterations in parallel beat the sequential loop where the processor has lanes to spare",
            f"fastest here: {fastest['method']} on {fastest['problem']}, {times(fastest)}",
            ratio(fastest) > 1,
            f"on {jax.default_backend()} a step of these small recurrences costs a loop less than a pass in parallel",
        ),
    ]


def figure(rows: list[dict]) -> Figure:
    """Largest residual by iteration, one panel per recurrence."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    drawn, axes = panels(len(names), 3.0, 3.0)
    for axis, name in zip(axes, names):
        draw_histories(axis, [row for row in rows if row["problem"] == name], name)
    return drawn
