"""The figures of the documentation, each computed or read from a committed record: `python docs/draw_figures.py [NAME ...]`.

A figure is a function that returns what it shows, and a drawing of it. `docs/figures/NAME.svg` is written for every name in
`FIGURES`; the same versions and machine give the same file.

The chain that most figures show is MALA on a density with a quartic wall in two dimensions,

    log p(x) = −½ xᵀ P x − 0.05 Σ x_j⁴,     P = [[1.5, 0.6], [0.6, 1.0]],

in float64.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from partime_mcmc import (
    CommonRandomNumbers,
    MultishiftCoupling,
    certify,
    deer,
    hmc,
    mala,
    random_walk,
    rollout,
    solve,
)
from partime_mcmc.forgetting import distances
from partime_mcmc.kernels import Kernel, Whitening
from partime_mcmc.kernels.coupling import draw_multishift_noise, multishift

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT.parent / "benchmarks" / "results"
INK, GREY, BLUE, RED, GREEN = "#1f2430", "#b9bec9", "#2f6fb0", "#c8452f", "#2b8a57"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "partime_mcmc",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
}


def logdensity(x):
    """A correlated normal density with a quartic wall, in two dimensions."""
    precision = jnp.array([[1.5, 0.6], [0.6, 1.0]])
    return -0.5 * x @ precision @ x - 0.05 * jnp.sum(x**4)


def chain(kernel: Kernel, num_steps: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """A kernel's dynamics, a start, the random numbers of a path, and the path one step after another."""
    state = kernel.init(jnp.array([2.5, -2.0]))
    tape = kernel.tape(jax.random.key(seed), num_steps, state)
    dynamics, start = kernel.dynamics(), kernel.carry(state)
    return dynamics, start, tape, rollout(dynamics, start, tape)


# --- shooting


def shooting_passes(num_segments: int = 6, length: int = 40) -> dict[str, Any]:
    """Multiple shooting by its definition: segments rolled from guessed starts, then from their predecessors' ends.

    Returns:
        `exact`, shape `(T, 2)`; `passes`, a list of paths `(C, n, 2)`; `rolled`, of each pass how many steps of each segment
        were computed, `(C,)`.
    """
    kernel = mala(logdensity, 0.25, coupling=MultishiftCoupling())
    dynamics, start, tape, exact = chain(kernel, num_segments * length, seed=4)
    cut = jax.tree.map(lambda leaf: leaf.reshape(num_segments, length, *leaf.shape[1:]), tape)
    roll = jax.jit(jax.vmap(lambda first, drives: rollout(dynamics, first, drives)))
    starts = jnp.broadcast_to(start, (num_segments, 2))
    path = np.asarray(roll(starts, cut))
    passes, rolled = [path], [np.full(num_segments, length)]
    while True:
        starts = np.concatenate([np.asarray(start)[None], path[:-1, -1]])
        new = np.asarray(roll(starts, cut))
        apart = (new != path).any(axis=2)
        if not apart.any():
            break
        # A segment is rolled up to and including the step at which it meets its stored path.
        steps = np.where(apart.any(axis=1), length - np.argmax(apart[:, ::-1], axis=1) + 1, 0).clip(
            max=length
        )
        passes.append(new)
        rolled.append(steps)
        path = new
    return {"exact": np.asarray(exact), "passes": passes, "rolled": rolled}


def draw_shooting() -> Figure:
    found = shooting_passes()
    exact, passes, rolled = found["exact"], found["passes"], found["rolled"]
    count, length = passes[0].shape[:2]
    times = np.arange(1, count * length + 1).reshape(count, length)
    drawn = Figure(figsize=(8.2, 2.1 * len(passes) + 0.5), layout="constrained")
    for number, axis in enumerate(np.atleast_1d(drawn.subplots(len(passes), sharex=True))):
        axis.plot(times.ravel(), exact[:, 0], color=GREY, lw=4, label="the chain, step by step")
        for segment in range(count):
            upto = int(rolled[number][segment])
            axis.plot(
                times[segment, :upto],
                passes[number][segment, :upto, 0],
                color=BLUE if segment % 2 else RED,
                lw=1.4,
            )
            axis.axvline(times[segment, 0] - 0.5, color=GREY, lw=0.6, ls=":")
        axis.set_title(
            f"Pass {number + 1}: "
            + (
                f"{count} segments of {length} steps at once, from a guessed start"
                if number == 0
                else f"each from its neighbour's end, until it meets its old path ({int(rolled[number].sum())} steps)"
            )
        )
        axis.set_ylabel("$x_1$")
    drawn.axes[0].legend(frameon=False, loc="upper right", fontsize=9)
    drawn.axes[-1].set_xlabel("step t")
    return drawn


# --- Newton's iterates


def newton_iterates(num_steps: int = 160, most: int = 12) -> dict[str, Any]:
    """The paths that DEER makes of a chain, pass after pass, with their residuals.

    Returns:
        `exact` `(T, 2)`, `iterates` `(P, T, 2)` and `residuals` `(P, T)`, the first of them of the guess.
    """
    dynamics, start, tape, exact = chain(mala(logdensity, 0.25), num_steps, seed=4)
    step = jax.jit(jax.vmap(dynamics))
    path = np.broadcast_to(np.asarray(start), exact.shape)
    iterates, residuals = [], []
    for passes in range(most + 1):
        if passes:
            path = np.asarray(
                solve(dynamics, start, tape, solver=deer(), max_iterations=passes).states
            )
        before = np.concatenate([np.asarray(start)[None], path[:-1]])
        iterates.append(path)
        residuals.append(np.abs(np.asarray(step(before, tape)) - path).max(axis=1))
        if residuals[-1].max() < 1e-12:
            break
    return {
        "exact": np.asarray(exact),
        "iterates": np.stack(iterates),
        "residuals": np.stack(residuals),
    }


def draw_newton() -> Figure:
    found = newton_iterates()
    exact, iterates, residuals = found["exact"], found["iterates"], found["residuals"]
    last = len(iterates) - 1
    drawn = Figure(figsize=(8.2, 4.6), layout="constrained")
    paths, image = drawn.subplots(2, height_ratios=(3, 2), sharex=True)
    times = np.arange(1, len(exact) + 1)
    paths.plot(times, exact[:, 0], color=GREY, lw=4, label="the chain, step by step")
    colours = matplotlib.colormaps["viridis"]
    shown = [number for number in (0, 1, 2, 4) if number < last] + [last]
    for number in shown:
        label = "the guess" if number == 0 else f"after pass {number}"
        paths.plot(times, iterates[number][:, 0], lw=1.2, color=colours(number / last), label=label)
    low, high = exact[:, 0].min(), exact[:, 0].max()
    paths.set_ylim(low - 0.6 * (high - low), high + 0.6 * (high - low))
    paths.legend(frameon=False, fontsize=8, ncols=3, loc="lower right")
    paths.set_title("DEER: the whole path is corrected at once")
    paths.set_ylabel("$x_1$")
    seen = image.imshow(
        np.log10(np.maximum(residuals, 1e-16)),
        aspect="auto",
        extent=(0.5, len(exact) + 0.5, last + 0.5, -0.5),
        cmap="viridis",
        interpolation="nearest",
    )
    drawn.colorbar(seen, ax=image, label="log10 residual")
    image.set(xlabel="step t", ylabel="pass")
    return drawn


# --- coupling


def coupled_distances(num_pairs: int = 24, num_steps: int = 60) -> dict[str, np.ndarray]:
    """How far apart pairs of MALA chains with the same random numbers are, step by step, `(K, T)`, by coupling."""
    starts = 1.5 * jax.random.normal(jax.random.key(1), (num_pairs, 2))
    others = -starts
    found = {}
    for name, coupling in (("plain", CommonRandomNumbers()), ("multishift", MultishiftCoupling())):
        kernel = mala(logdensity, 0.25, coupling=coupling)
        keys = jax.random.split(jax.random.key(2), num_pairs)
        state = kernel.init(starts[0])
        tapes = jax.vmap(lambda key: kernel.tape(key, num_steps, state))(keys)  # noqa: B023
        found[name] = np.asarray(distances(kernel.dynamics(), starts, others, tapes))
    return found


def draw_coupling() -> Figure:
    drawn = Figure(figsize=(8.2, 3.2), layout="constrained")
    stairs, apart = drawn.subplots(1, 2)
    places = jnp.linspace(-4, 4, 2001)
    for seed, colour in ((3, BLUE), (8, GREEN)):
        layers, _ = draw_multishift_noise(jax.random.key(seed), 1, places.dtype)
        value = jax.vmap(lambda x: multishift(x[None], 1.0, layers).value[0])(places)  # noqa: B023
        stairs.plot(places, value, color=colour, lw=1.4)
    stairs.plot(places, places + 0.8, color=RED, ls="--", lw=1.2)
    stairs.text(-3.8, 3.4, "dashed: plain noise, c + σn\nstairs: multishift, two draws", va="top")
    stairs.set(xlabel="where the proposal is centred, c", ylabel="where it lands")
    stairs.set_title("One draw of noise, for every centre")
    for name, found in coupled_distances().items():
        colour = RED if name == "plain" else BLUE
        steps = np.arange(1, found.shape[1] + 1)
        apart.plot(steps, np.maximum(found, 1e-17).T, color=colour, lw=0.7, alpha=0.6)
        apart.plot([], [], color=colour, label=name)
    apart.set_yscale("log")
    apart.legend(frameon=False, loc="lower right")
    apart.set(xlabel="step", ylabel="distance (1e-17: equal floats)")
    apart.set_title("Pairs of chains with the same random numbers")
    return drawn


# --- the certificate


def residuals_of_paths(num_steps: int = 200) -> dict[str, np.ndarray]:
    """What the certificate measures at every step: of a solved path, and of one in which a rejected move was made anyway.

    Returns:
        By name, the residuals in noise units, shape `(T,)`; with `tolerance`, shape ().
    """
    kernel = mala(logdensity, 0.25)
    dynamics, start, tape, _ = chain(kernel, num_steps, seed=4)
    path = np.asarray(solve(dynamics, start, tape, solver=deer()).or_raise().states)
    right = certify(kernel, start, path, tape)
    rejected = np.flatnonzero(~np.asarray(right.accepted))
    step = int(rejected[len(rejected) // 2])
    wrong_path = path.copy()
    # As if the proposal had been taken: a move of half a standard deviation of the noise.
    wrong_path[step] = path[step - 1] + 0.5 * np.sqrt(2 * 0.25)
    wrong = certify(kernel, start, wrong_path, tape)
    return {
        "the path that DEER found: certified": np.asarray(right.residual),
        "one rejected step moved: not certified": np.asarray(wrong.residual),
        "tolerance": np.asarray(right.tolerance),
        "certified": np.asarray([bool(right.certified), bool(wrong.certified)]),
    }


def draw_certificate() -> Figure:
    found = residuals_of_paths()
    tolerance = float(found.pop("tolerance"))
    found.pop("certified")
    drawn = Figure(figsize=(8.2, 2.8), layout="constrained")
    axis = drawn.subplots()
    for (name, values), colour, size in zip(found.items(), (BLUE, RED), (6, 18)):
        axis.scatter(
            np.arange(1, values.size + 1),
            np.maximum(values, 1e-18),
            s=size,
            color=colour,
            label=name,
            zorder=2 if colour == BLUE else 1,
        )
    axis.axhline(tolerance, color=INK, lw=1, ls="--", label=f"allowed: {tolerance:g}")
    axis.set_yscale("log")
    axis.set(xlabel="step t", ylabel="residual (noise units)")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    axis.set_title("Every step, compared with what the kernel makes of the state before it")
    return drawn


# --- forgetting


def kernels_that_forget_or_not(num_pairs: int = 12, num_steps: int = 300) -> dict[str, np.ndarray]:
    """Distances of pairs of chains with the same random numbers, `(K, T)`, by kernel."""
    metric = Whitening.of_covariance(jnp.zeros(2), jnp.zeros(2), jnp.eye(2))
    kernels = {
        "HMC, path π/2": hmc(logdensity, 0.2, metric, 8),
        "HMC, path 4π": hmc(logdensity, 0.2, metric, 63),
        "random walk": random_walk(logdensity, 0.8, metric),
    }
    starts = 2 * jax.random.normal(jax.random.key(3), (num_pairs, 2))
    found = {}
    for name, kernel in kernels.items():
        state = kernel.init(starts[0])
        keys = jax.random.split(jax.random.key(4), num_pairs)
        tapes = jax.vmap(lambda key: kernel.tape(key, num_steps, state))(keys)  # noqa: B023
        carries = jax.vmap(lambda x: kernel.carry(kernel.init(x)))(starts)  # noqa: B023
        others = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), carries)
        found[name] = np.asarray(distances(kernel.dynamics(), carries, others, tapes))
    return found


def draw_forgetting() -> Figure:
    found = kernels_that_forget_or_not()
    drawn = Figure(figsize=(8.2, 2.7), layout="constrained")
    for axis, (name, values) in zip(drawn.subplots(1, len(found), sharey=True), found.items()):
        steps = np.arange(1, values.shape[1] + 1)
        axis.plot(steps, np.maximum(values, 1e-17).T, color=BLUE, lw=0.7, alpha=0.6)
        axis.plot(steps, np.maximum(np.median(values, axis=0), 1e-17), color=INK, lw=1.6)
        axis.set_yscale("log")
        axis.set_title(name)
        axis.set_xlabel("step")
    drawn.axes[0].set_ylabel("distance of two chains")
    return drawn


# --- centring


def centred_and_learned(num_samples: int = 1000) -> dict[str, np.ndarray]:
    """Draws of eight schools, written the centred way, in the model's coordinates and in those that warm-up learned.

    Returns:
        `model` and `kernel`, shape `(N, 2)` each: log τ and the effect of school 1.
    """
    import numpyro
    import numpyro.distributions as dist

    from partime_mcmc import coalescing_hmc, from_numpyro, sample

    effect = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def eight_schools():
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", 8):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, error), obs=effect)

    draws = sample(
        jax.random.key(0),
        from_numpyro(eight_schools, key=jax.random.key(1)),
        coalescing_hmc,
        num_samples=num_samples,
        progress=False,
    )
    positions = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), draws.positions)
    positions = jax.tree.map(lambda leaf: leaf[:: max(1, len(leaf) // 600)], positions)
    assert draws.warmup is not None and draws.warmup.kernel.enter is not None
    entered = jax.vmap(draws.warmup.kernel.enter)(positions)
    entered = np.asarray(entered).reshape(len(np.asarray(positions["tau"])), -1)
    # Flat coordinates are in the order of the sites' names: mu, tau, theta.
    return {
        "model": np.stack([positions["tau"], positions["theta"][:, 0]], axis=1),
        "kernel": entered[:, 1:3],
    }


def draw_centring() -> Figure:
    found = centred_and_learned()
    drawn = Figure(figsize=(8.2, 3.3), layout="constrained")
    titles = {
        "model": "As the model has them: a funnel",
        "kernel": "As the kernel moves in them, after warm-up",
    }
    for axis, (name, title) in zip(drawn.subplots(1, 2), titles.items()):
        axis.scatter(*found[name].T, s=6, color=BLUE, alpha=0.6, linewidths=0)
        axis.set_title(title)
    drawn.axes[0].set(xlabel="log τ", ylabel="effect of school 1")
    drawn.axes[1].set(xlabel="coordinate of log τ", ylabel="coordinate of the effect")
    return drawn


# --- from committed records


def _record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def draw_verdict() -> Figure:
    rows = _record("verdict-cpu")["rows"]
    totals: dict[str, list[int]] = {}
    for row in rows:
        total = totals.setdefault(row["run"], [0, 0, 0])
        for place, outcome in enumerate(("converged", "undecided", "not_converged")):
            total[place] += row[outcome]
    names = list(totals)[::-1]
    shares = np.array([totals[name] for name in names], float)
    labels = [f"{name} ({int(sum(totals[name]))} runs)" for name in names]
    shares /= shares.sum(axis=1, keepdims=True)
    drawn = Figure(figsize=(8.2, 0.32 * len(names) + 0.9), layout="constrained")
    axis, left = drawn.subplots(), np.zeros(len(names))
    for column, (word, colour) in enumerate(
        (("CONVERGED", GREEN), ("UNDECIDED", GREY), ("NOT CONVERGED", RED))
    ):
        axis.barh(labels, shares[:, column], left=left, color=colour, label=word, height=0.7)
        left += shares[:, column]
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of runs")
    drawn.legend(frameon=False, loc="outside upper center", ncols=3)
    return drawn


def draw_nuts() -> Figure:
    rows = _record("posteriors-cpu")["rows"]
    ours, theirs, names = [], [], []
    for name, row in rows.items():
        times = [
            found["seconds_to_target"]
            for method, found in row.items()
            if method != "ours" and "seconds_to_target" in found
        ]
        names.append(name.split("-")[0] if name.split("-")[0] != "eight_schools" else name[14:])
        ours.append(row["ours"]["seconds_to_target"])
        theirs.append(min(times))
    drawn = Figure(figsize=(8.2, 3.0), layout="constrained")
    axis, places = drawn.subplots(), np.arange(len(names))[::-1]
    axis.hlines(places, ours, theirs, color=GREY, lw=2)
    axis.scatter(ours, places, color=BLUE, s=40, zorder=3, label="CoalescingHMC, parallel in time")
    axis.scatter(
        theirs, places, color=RED, s=40, zorder=3, label="NumPyro's NUTS, its fastest chain method"
    )
    axis.set_yticks(places, names)
    axis.set_xscale("log")
    axis.set_xlabel("seconds to an effective sample size of 20,000, compilation apart, two cores")
    drawn.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=2)
    return drawn


FIGURES = {
    "shooting": draw_shooting,
    "newton": draw_newton,
    "coupling": draw_coupling,
    "certificate": draw_certificate,
    "forgetting": draw_forgetting,
    "centring": draw_centring,
    "verdict": draw_verdict,
    "nuts": draw_nuts,
}


def main(argv: list[str] | None = None) -> None:
    """Draw some figures, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--out", type=Path, default=ROOT / "figures")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.names) - set(FIGURES):
        parser.error(f"NAME: got {sorted(unknown)}, wanted some of {list(FIGURES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with jax.enable_x64(True), matplotlib.rc_context(STYLE):
        for name in arguments.names or FIGURES:
            drawn = FIGURES[name]()
            drawn.savefig(arguments.out / f"{name}.svg", metadata={"Date": None})
            print(f"{name}.svg", flush=True)


if __name__ == "__main__":
    main()
