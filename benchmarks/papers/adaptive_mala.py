"""MALA that adapts its metric inside the solve, in every step or in every window (Atchadé 2006, arXiv:2508.16817).

The step size h and the variances v of the metric are part of the state, so that adaptation is solved for together with the chain
(Atchadé 2006 and Marshall & Roberts 2012 have such chains and their ergodicity; γ_t = (t + 2)^-0.6 diminishes):

    x' = x + (h²/2) v ∘ ∇log p(x) + h √v ∘ ξ_t,        accepted with probability α, else x' = x
    μ' = μ + γ_t (x' − μ),     log v' = log v + γ_t ((x' − μ)²/v − 1),     log h' = log h + γ_t (α − 0.574)

What such an adaptation has learned it hardly forgets: its largest Lyapunov exponent is nearly 0, and by arXiv:2508.16817 no parallel
method finds such a path in few iterations. With *windows* the same quantities are summed over n steps, in which h and v stand still, and
replace h and v at the end of the window. Inside a window the sums do not act on the chain, which forgets as it does without adaptation.

The target is a normal with standard deviations from 0.1 to 10 and a quartic term.
"""

from __future__ import annotations

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
    said,
    solved,
    times,
)
from partime_mcmc import Dynamics, SlidingWindow, Windows, deer, rollout, shooting
from partime_mcmc.forgetting import lyapunov

SMALL = {"num_steps": 2048, "dimension": 6, "window": 128, "repeats": 1}
PAPER = {"num_steps": 65_536, "dimension": 16, "window": 1024, "repeats": 2}
_IN_STEPS, _IN_WINDOWS = "adapting in every step", "adapting in every window"
_OPTIMAL = 0.574
_RATE = 0.6


def widths(dimension: int) -> np.ndarray:
    """Standard deviations of the normal, from 0.1 to 10."""
    return np.geomspace(0.1, 10.0, dimension)


def logdensity(scales, x):
    """Log density: normal, with a quartic term that keeps the drift from being linear."""
    z = x / scales
    return -0.5 * jnp.sum(z**2) - 0.02 * jnp.sum(z**4)


def transition(scales, state, normal, log_uniform):
    """MALA at the state's step size and metric: the new x, and the acceptance probability."""
    x, root = state["x"], jnp.exp(0.5 * state["log_variance"] + state["log_step"])
    value, slope = jax.value_and_grad(logdensity, argnums=1)(scales, x)
    proposal = x + 0.5 * root**2 * slope + root * normal
    new_value, new_slope = jax.value_and_grad(logdensity, argnums=1)(scales, proposal)
    back = (x - proposal - 0.5 * root**2 * new_slope) / root
    log_ratio = new_value - value - 0.5 * jnp.sum(back**2) + 0.5 * jnp.sum(normal**2)
    x = jnp.where(log_uniform < log_ratio, proposal, x)
    return x, jnp.exp(jnp.minimum(log_ratio, 0.0))


def step_by_step(scales, state, drive):
    """A transition, and adaptation at the rate γ of the drive."""
    normal, log_uniform, rate, _ = drive
    x, acceptance = transition(scales, state, normal, log_uniform)
    mean, variance = state["mean"], jnp.exp(state["log_variance"])
    # A surprise of at most ten variances counts, as at the start anything may happen.
    surprise = jnp.minimum((x - mean) ** 2 / variance, 10.0)
    return {
        "x": x,
        "mean": mean + rate * (x - mean),
        "log_variance": state["log_variance"] + rate * (surprise - 1),
        "log_step": state["log_step"] + rate * (acceptance - _OPTIMAL),
    }


def step_by_window(scales, state, drive):
    """A transition, and at the end of a window adaptation by what was summed in it; the drive has 1/n and whether this is the end."""
    normal, log_uniform, share, ends = drive
    x, acceptance = transition(scales, state, normal, log_uniform)
    mean = state["mean"] + share * x
    square = state["square"] + share * x**2
    accepted = state["accepted"] + share * acceptance
    # A chain that stood still has no variance.
    spread = jnp.maximum(square - mean**2, 1e-3 * jnp.exp(state["log_variance"]))
    learned = state["log_step"] + 2 * (accepted - _OPTIMAL)
    return {
        "x": x,
        "mean": jnp.where(ends, 0, mean),
        "square": jnp.where(ends, 0, square),
        "accepted": jnp.where(ends, 0, accepted),
        "log_variance": jnp.where(ends, jnp.log(spread), state["log_variance"]),
        "log_step": jnp.where(ends, learned, state["log_step"]),
    }


def problems(num_steps: int, dimension: int, window: int) -> dict:
    """Dynamics, start and drives of both ways to adapt, with the same random numbers."""
    scales, rng = jnp.asarray(widths(dimension)), np.random.default_rng(11)
    start = {
        "x": jnp.asarray(rng.normal(size=dimension)) * scales,
        "mean": jnp.zeros(dimension),
        "log_variance": jnp.zeros(dimension),
        "log_step": jnp.log(jnp.asarray(0.3)),
    }
    sums = {"square": jnp.zeros(dimension), "accepted": jnp.asarray(0.0)}
    ends = np.arange(1, num_steps + 1) % window == 0
    dice = (
        jnp.asarray(rng.normal(size=(num_steps, dimension))),
        jnp.asarray(np.log(rng.uniform(size=num_steps))),
    )
    rates = jnp.asarray((np.arange(num_steps) + 2.0) ** -_RATE)
    shares = jnp.full(num_steps, 1 / window)
    return {
        _IN_STEPS: (Dynamics(step_by_step, scales), start, (*dice, rates, jnp.asarray(ends))),
        _IN_WINDOWS: (
            Dynamics(step_by_window, scales),
            start | sums,
            (*dice, shares, jnp.asarray(ends)),
        ),
    }


def run(num_steps, dimension, window, repeats) -> Findings:
    """Both chains by Newton's method and by shooting, and what they have learned."""
    rows, learned = [], []
    for name, given in problems(num_steps, dimension, window).items():
        rows += solved(
            name,
            *given,
            {"DEER": deer(), "DEER in windows": deer(), "shooting": shooting(32)},
            max_iterations={"DEER": 100, "DEER in windows": num_steps, "shooting": 100},
            repeats=repeats,
            options={
                "DEER in windows": {
                    "schedule": SlidingWindow(window) if name == _IN_STEPS else Windows(window)
                }
            },
        )
        path = jax.jit(rollout)(*given)
        found = lyapunov(given[0], given[1], path, given[2], key=jax.random.key(12))
        learned.append(
            summary(name, path, dimension)
            | {"exponent": float(found.exponent), "error": float(found.standard_error)}
        )
    rows += learned
    return Findings(rows, claims(rows), figure(rows))


def summary(name: str, path, dimension: int) -> dict:
    """What the second half of a path says: learned widths, and how often it moved."""
    half = path["x"].shape[0] // 2
    x, scales = np.asarray(path["x"])[half:], widths(dimension)
    found = np.exp(0.5 * np.asarray(path["log_variance"])[half:].mean(axis=0)) / scales
    return {
        "problem": name,
        "method": "what was learned",
        "T": 2 * half,
        "acceptance": float((x[1:] != x[:-1]).any(axis=1).mean()),
        "widest_ratio": float(found.max() / np.median(found)),
        "narrowest_ratio": float(found.min() / np.median(found)),
    }


def claims(rows: list[dict]) -> list[Claim]:
    """What theory predicts, beside the rows."""

    def row(name, method):
        return row_of(rows, problem=name, method=method)

    learned = {name: row(name, "what was learned") for name in (_IN_STEPS, _IN_WINDOWS)}
    newton, rolled = row(_IN_STEPS, "DEER"), row(_IN_STEPS, "shooting")
    sliding, windows = row(_IN_STEPS, "DEER in windows"), row(_IN_WINDOWS, "DEER in windows")
    exponent, error = (learned[_IN_STEPS][name] for name in ("exponent", "error"))
    return [
        judged(
            "Marshall & Roberts 2012",
            "adaptation learns the scales of a badly scaled target and accepts at its optimal rate, 0.574",
            "; ".join(
                f"{name}: relative widths {one['narrowest_ratio']:.2f} to {one['widest_ratio']:.2f} of the target's, accepted "
                f"{one['acceptance']:.2f}"
                for name, one in learned.items()
            ),
            all(
                one["narrowest_ratio"] > 0.5
                and one["widest_ratio"] < 2
                and abs(one["acceptance"] - _OPTIMAL) < 0.15
                for one in learned.values()
            ),
        ),
        judged(
            "arXiv:2508.16817",
            "a system that hardly forgets, whose largest Lyapunov exponent is nearly 0, is not found in few iterations",
            f"{_IN_STEPS}: exponent {exponent:.4f} ± {error:.4f}, a memory of a hundred steps and more; DEER {newton['status']}, "
            f"{newton['exact_steps']} steps exact after {newton['iterations']} iterations; shooting {rolled['status']}",
            exponent > -0.01 and not converged(newton) and not converged(rolled),
            "this chain forgets sooner than was thought",
        ),
        judged(
            "the method",
            "it is found in a window that slides, at no gain",
            f"{_IN_STEPS}: {said(sliding)}; {sliding['difference']:.0e} from the loop's path",
            converged(sliding) and ratio(sliding) < 1,
        ),
        judged(
            "the method",
            "where the metric stands still in windows and is learned between them, few iterations a window find chain and adaptation",
            f"{_IN_WINDOWS}: {said(windows)}; {windows['difference']:.0e} from the loop's path",
            converged(windows) and windows["iterations"] < windows["T"] / 4,
        ),
        judged(
            "the method",
            "and this is faster than the loop where lanes are many",
            f"{_IN_WINDOWS}: {times(windows)}",
            ratio(windows) > 1,
            f"on {jax.default_backend()}: Newton's method multiplies matrices of {windows['D']} × {windows['D']} for every step, which "
            "wants more lanes than there are",
        ),
    ]


def figure(rows: list[dict]) -> Figure:
    """Residual by iteration, for both ways to adapt."""
    drawn, axes = panels(2)
    for axis, name in zip(axes, (_IN_STEPS, _IN_WINDOWS)):
        solves = [row for row in rows if "history" in row and row["problem"] == name]
        draw_histories(axis, solves, name)
    return drawn
