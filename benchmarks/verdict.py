"""Does the verdict tell right runs from wrong ones? `python -m benchmarks.verdict [NAME...] --out DIR`, `--small` for a look.

Right runs: `coalescing_hmc` with its own warm-up on small posteriors, 4 chains, 1,000 draws each, float64, several seeds; they
should be called CONVERGED. Runs made wrong on purpose should never be: draws cut short, and, on some of the posteriors,

    never rejects, ratio × 3     HMC whose acceptance ratio is taken for 1, or three times too large: chains mix, on a wrong law
    no Hastings correction       MALA accepted by the ratio of densities alone
    frozen coordinate            one coordinate is never moved
    step too small, too large    a random walk that creeps, HMC that hardly accepts

and on posteriors of their own: a funnel in its own coordinates, modes far apart, and one chain of four in another mode. The starts
of wrong kernels are draws of a right run, so that nothing but the kernel is wrong. Where warm-up may learn the funnel's map its
draws can be right: each run is judged by the law of the funnel's scale, which is known, a normal one, before its verdict is looked at.
Results of posteriors that were measured before and are not named are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import stats
from jax.scipy.special import gammaln

from benchmarks.record import OUT, keep
from partime_mcmc import (
    Kernel,
    PooledAdaptation,
    Target,
    coalescing_hmc,
    random_walk,
    sample,
    sequential,
)
from partime_mcmc.diagnostics import arviz
from partime_mcmc.diagnostics.verdict import Outcome
from partime_mcmc.models import MODELS

CHAINS, STEPS, SEEDS, SMALL_SEEDS = 4, 1000, 10, 2


def around(place: float, dimension: int) -> Callable:
    """Starts uniform within 2 of a place, as NumPyro's are of 0."""
    return lambda key: place + jax.random.uniform(key, (dimension,), minval=-2.0, maxval=2.0)


def on(logdensity: Callable, dimension: int, place: float = 0.0) -> Target:
    """A target with starts about a place."""
    return Target(logdensity, around(place, dimension))


def correlated() -> Target:
    """A normal whose neighbours correlate by 0.9."""
    index = np.arange(6)
    precision = np.linalg.inv(0.9 ** np.abs(index[:, None] - index))
    return on(lambda x: -0.5 * x @ precision @ x, 6)


def many_scales() -> Target:
    """A normal with standard deviations from 0.01 to 100."""
    scale = np.logspace(-2, 2, 8)
    return on(lambda x: -0.5 * jnp.sum((x / scale) ** 2), 8)


def linear() -> Target:
    """Linear regression with unknown noise."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 3))
    y = x @ [1.0, -2.0, 0.5] + 0.5 * rng.normal(size=40)

    def logdensity(p):
        noise = jnp.exp(p[3])
        likelihood = stats.norm.logpdf(y, x @ p[:3], noise).sum()
        return likelihood + stats.norm.logpdf(p[:3], 0, 5).sum() - 0.5 * noise**2 + p[3]

    return on(logdensity, 4)


def robust() -> Target:
    """Linear regression with Student's noise and two outliers."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=30)
    y = 1 + 2 * x + 0.3 * rng.normal(size=30)
    y[:2] += 8

    def logdensity(p):
        z = (y - p[0] - p[1] * x) / jnp.exp(p[2])
        return stats.t.logpdf(z, 4).sum() - 30 * p[2] - 0.5 * jnp.sum(p**2) / 9

    return on(logdensity, 3)


def logistic() -> Target:
    """Logistic regression, 60 observations."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 4))
    y = rng.random(60) < 1 / (1 + np.exp(-x @ [1.0, -1.0, 0.5, 0.0]))

    def logdensity(p):
        return -jnp.logaddexp(0, jnp.where(y, -1, 1) * (x @ p)).sum() - 0.5 * jnp.sum(p**2) / 4

    return on(logdensity, 4)


def counts() -> Target:
    """Poisson regression."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(50, 2))
    y = rng.poisson(np.exp(1 + x @ [0.5, -0.3]))

    def logdensity(p):
        rate = p[0] + x @ p[1:]
        return (y * rate - jnp.exp(rate)).sum() - 0.5 * jnp.sum(p**2) / 9

    return on(logdensity, 3)


def overdispersed() -> Target:
    """Counts with a negative binomial law."""
    y = np.random.default_rng(5).negative_binomial(2, 0.2, 60)

    def logdensity(p):
        size, mean = jnp.exp(p[0]), jnp.exp(p[1])
        terms = gammaln(y + size) - gammaln(size) + size * jnp.log(size / (size + mean))
        return (terms + y * jnp.log(mean / (size + mean))).sum() - 0.5 * jnp.sum(p**2) / 9

    return on(logdensity, 2)


def survival() -> Target:
    """Weibull times, a third of them censored."""
    rng = np.random.default_rng(6)
    t = 3 * rng.weibull(1.5, 60)
    seen = t < np.quantile(t, 0.67)
    t = np.minimum(t, np.quantile(t, 0.67))

    def logdensity(p):
        shape, scale = jnp.exp(p[0]), jnp.exp(p[1])
        hazard = jnp.log(shape / scale) + (shape - 1) * jnp.log(t / scale)
        return (seen * hazard - (t / scale) ** shape).sum() - 0.5 * jnp.sum(p**2) / 4

    return on(logdensity, 2)


def proportions() -> Target:
    """Proportions of four kinds, as logits against the last."""
    seen = np.array([12, 30, 5, 8])

    def logdensity(p):
        logits = jnp.append(p, 0.0)
        return (seen * jax.nn.log_softmax(logits)).sum() - 0.5 * jnp.sum(p**2) / 4

    return on(logdensity, 3)


def batting() -> Target:
    """Rates of ten players around a common one."""
    rng = np.random.default_rng(7)
    hits = rng.binomial(40, 1 / (1 + np.exp(1 - 0.8 * rng.normal(size=10))))

    def logdensity(p):
        mean, scale = p[0], jnp.exp(p[1])
        logit = mean + scale * p[2:]
        likelihood = (hits * logit - 40 * jnp.logaddexp(0, logit)).sum()
        return likelihood - 0.5 * jnp.sum(p[2:] ** 2) - 0.5 * mean**2 - 0.5 * scale**2 + p[1]

    return on(logdensity, 12)


def time_series() -> Target:
    """An autoregression with unknown memory and noise."""
    rng = np.random.default_rng(8)
    y = np.zeros(80)
    for t in range(1, 80):
        y[t] = 0.3 + 0.7 * y[t - 1] + 0.5 * rng.normal()

    def logdensity(p):
        noise = stats.norm.logpdf(y[1:], p[0] + p[1] * y[:-1], jnp.exp(p[2]))
        return noise.sum() - 0.5 * jnp.sum(p**2)

    return on(logdensity, 3)


def smooth_curve() -> Target:
    """A Gaussian process of 12 points and counts around its exponential."""
    place = np.linspace(0, 1, 12)
    covariance = np.exp(-0.5 * ((place[:, None] - place) / 0.2) ** 2) + 1e-4 * np.eye(12)
    root = np.linalg.cholesky(covariance)
    y = np.random.default_rng(9).poisson(np.exp(1 + np.sin(6 * place)))

    def logdensity(p):
        rate = 1 + root @ p
        return (y * rate - jnp.exp(rate)).sum() - 0.5 * jnp.sum(p**2)

    return on(logdensity, 12)


def items() -> Target:
    """Ability of 15 persons and difficulty of 6 items from right and wrong answers."""
    rng = np.random.default_rng(10)
    chance = 1 / (1 + np.exp(rng.normal(size=6) - rng.normal(size=(15, 1))))
    right = rng.random((15, 6)) < chance

    def logdensity(p):
        logit = p[:15, None] - p[15:]
        return -jnp.logaddexp(0, jnp.where(right, -logit, logit)).sum() - 0.5 * jnp.sum(p**2)

    return on(logdensity, 21)


def growth() -> Target:
    """A saturating curve with unknown ceiling, rate and noise."""
    rng = np.random.default_rng(11)
    t = np.linspace(0.1, 5, 25)
    y = 3 * (1 - np.exp(-0.8 * t)) + 0.2 * rng.normal(size=25)

    def logdensity(p):
        curve = jnp.exp(p[0]) * (1 - jnp.exp(-jnp.exp(p[1]) * t))
        return stats.norm.logpdf(y, curve, jnp.exp(p[2])).sum() - 0.5 * jnp.sum(p**2) / 4

    return on(logdensity, 3)


def waiting_times() -> Target:
    """Gamma times with unknown shape and rate."""
    t = np.random.default_rng(12).gamma(2.5, 1.5, 50)

    def logdensity(p):
        shape, rate = jnp.exp(p[0]), jnp.exp(p[1])
        terms = shape * p[1] - gammaln(shape) + (shape - 1) * np.log(t) - rate * t
        return terms.sum() - 0.5 * jnp.sum(p**2) / 4

    return on(logdensity, 2)


def built_in(name: str) -> Target:
    """A built-in model's target."""
    return MODELS[name]().make_target(jax.random.key(0))


POSTERIORS: dict[str, Callable[[], Target]] = {
    "normal, 1 dimension": lambda: on(lambda x: -0.5 * jnp.sum(x**2), 1),
    "normal, 10 dimensions": lambda: on(lambda x: -0.5 * jnp.sum(x**2), 10),
    "normal, 50 dimensions": lambda: on(lambda x: -0.5 * jnp.sum(x**2), 50),
    "correlated normal": correlated,
    "normal of many scales": many_scales,
    "Student, 6 degrees": lambda: on(lambda x: stats.t.logpdf(x, 6).sum(), 4),
    "logistic law": lambda: on(lambda x: stats.logistic.logpdf(x).sum(), 3),
    "skewed (log gamma)": lambda: on(lambda x: jnp.sum(3 * x - jnp.exp(x)), 3),
    "linear regression": linear,
    "robust regression": robust,
    "logistic regression": logistic,
    "Poisson regression": counts,
    "negative binomial": overdispersed,
    "survival times": survival,
    "proportions": proportions,
    "batting": batting,
    "time series": time_series,
    "smooth curve, counts": smooth_curve,
    "item responses": items,
    "growth curve": growth,
    "gamma times": waiting_times,
    "eight schools": lambda: built_in("eight_schools"),
}
SMALL = ("normal, 10 dimensions",)


# --- kernels that are wrong -----------------------------------------------------------------------------------------


class State(NamedTuple):
    """Position and log density."""

    position: Any
    logdensity: Any


class Info(NamedTuple):
    """What a step reports."""

    acceptance_rate: Any
    is_accepted: Any


def faulty(propose: Callable, logdensity: Callable, power: float, factor: float, keep_first: bool):
    """A Metropolis kernel whose acceptance ratio r is taken for factor · r^power, or whose first coordinate stands still."""

    def init(position, rng_key=None):
        return State(position, logdensity(position))

    def step(key, state):
        propose_key, accept_key = jax.random.split(key)
        end, log_ratio = propose(propose_key, state.position)
        rate = jnp.minimum(
            1, factor * jnp.exp(power * jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio))
        )
        accepted = jax.random.uniform(accept_key) < rate
        if keep_first:
            end = end.at[0].set(state.position[0])
        position = jnp.where(accepted, end, state.position)
        return State(position, logdensity(position)), Info(rate, accepted)

    return blackjax.SamplingAlgorithm(init, step)


def hmc_proposal(logdensity: Callable, step_size: float, num_steps: int) -> Callable:
    """HMC's proposal and the logarithm of its acceptance ratio."""
    gradient = jax.grad(logdensity)

    def propose(key, x):
        start = p = jax.random.normal(key, x.shape)
        end = x
        for _ in range(num_steps):
            p = p + 0.5 * step_size * gradient(end)
            end = end + step_size * p
            p = p + 0.5 * step_size * gradient(end)
        fall = 0.5 * (start @ start - p @ p)
        return end, logdensity(end) - logdensity(x) + fall

    return propose


def mala_proposal(logdensity: Callable, step_size: float) -> Callable:
    """MALA's proposal and the ratio of densities, without the ratio of proposals."""
    gradient = jax.grad(logdensity)

    def propose(key, x):
        noise = jax.random.normal(key, x.shape)
        end = x + step_size * gradient(x) + jnp.sqrt(2 * step_size) * noise
        return end, logdensity(end) - logdensity(x)

    return propose


WRONG_KERNELS: dict[str, Callable[[Callable], Any]] = {
    "never rejects": lambda p: faulty(hmc_proposal(p, 1.2, 2), p, 0.0, 1.0, False),
    "ratio × 3": lambda p: faulty(hmc_proposal(p, 1.2, 2), p, 1.0, 3.0, False),
    "no Hastings correction": lambda p: faulty(mala_proposal(p, 0.5), p, 1.0, 1.0, False),
    "frozen coordinate": lambda p: faulty(hmc_proposal(p, 0.8, 2), p, 1.0, 1.0, True),
    "step too large": lambda p: faulty(hmc_proposal(p, 1.99, 8), p, 1.0, 1.0, False),
}
FAULTY = ("normal, 10 dimensions", "linear regression", "logistic law")


def wrong_kernels(target: Target, warmup: Any) -> dict[str, Kernel]:
    """Kernels with a fault, in the coordinates that a right warm-up learned."""
    whitening = warmup.whitening
    density = whitening.density(target.logdensity)
    made = {
        name: Kernel(build(density), whitening.enter, whitening.leave, name=name)
        for name, build in WRONG_KERNELS.items()
    }
    return made | {"step too small": random_walk(target.logdensity, 0.01, whitening)}


# --- posteriors on which nothing converges ----------------------------------------------------------------------------


def funnel() -> Target:
    """Neal's, nine dimensions with one scale, not centred."""

    def logdensity(x):
        return stats.norm.logpdf(x[0], 0, 3) + stats.norm.logpdf(x[1:], 0, jnp.exp(x[0] / 2)).sum()

    return on(logdensity, 10)


def modes(apart: float, share: float = 0.5) -> Target:
    """Two normals in two dimensions; starts near either."""
    places = np.array([0.0, apart])

    def logdensity(x):
        return jnp.logaddexp(
            jnp.log(share) - 0.5 * jnp.sum((x - places[0]) ** 2),
            jnp.log(1 - share) - 0.5 * jnp.sum((x - places[1]) ** 2),
        )

    def initial(key):
        which, noise = jax.random.split(key)
        return apart * jax.random.bernoulli(which) + jax.random.normal(noise, (2,))

    return Target(logdensity, initial)


def fourth_elsewhere(num_seeds: int) -> list:
    """Runs on modes far apart whose warm-up saw the one alone; three chains of four go on there, the last in the other."""
    target = dataclasses.replace(modes(20.0), initial=lambda key: jax.random.normal(key, (2,)))
    warmup = right_run(target, 0).warmup
    starts = np.array(warmup.positions)
    starts[-1] += 20.0
    elsewhere = dataclasses.replace(warmup, positions=jnp.asarray(starts))
    return [right_run(target, seed, elsewhere) for seed in range(num_seeds)]


def in_own_coordinates(num_seeds: int) -> list:
    """Runs on the funnel whose warm-up learns no map."""
    adaptation = PooledAdaptation(coordinates=None)
    return [right_run(funnel(), seed, adaptation=adaptation) for seed in range(num_seeds)]


def funnel_by_its_law(name: str, num_seeds: int) -> list[dict]:
    """Rows of the funnel with its map learned: of the runs whose scale has mean 0 and variance 9, and of the others."""
    runs = [right_run(funnel(), seed) for seed in range(num_seeds)]
    kinds = {True: "right by its law", False: "wrong by its law"}
    found = [(_has_the_law(run), run) for run in runs]
    return [
        row(name, kind, is_right, [run for right, run in found if right is is_right])
        for is_right, kind in kinds.items()
        if any(right is is_right for right, _ in found)
    ]


# Standard errors that the mean and the variance of the funnel's scale may be off: 1 right run in some 8,000 is farther.
_FAR = 4.0


def _has_the_law(run: Any) -> bool:
    """Whether mean and second moment of the funnel's scale are those of its normal law, in Monte Carlo standard errors."""
    scale = np.asarray(run.positions)[..., 0]

    def off(values, truth):
        return abs(values.mean() - truth) / arviz.mcse_mean(values)

    return bool(max(off(scale, 0.0), off(scale**2, 9.0)) < _FAR)


HOPELESS: dict[str, Callable[[], Target]] = {
    "modes 10 apart": lambda: modes(10.0),
    "modes 30 apart, one of 2%": lambda: modes(30.0, 0.98),
}


# --- measuring --------------------------------------------------------------------------------------------------------


def right_run(target: Target, seed: int, kernel: Any = coalescing_hmc, **options: Any) -> Any:
    """A run with its own warm-up."""
    return sample(
        jax.random.key(seed), target, kernel, num_samples=STEPS, num_chains=CHAINS,
        num_warmup=1000, progress=False, **options,
    )  # fmt: skip


def wrong_run(target: Target, kernel: Kernel, seed: int) -> Any:
    """A run of a tuned kernel, one step after another."""
    return sample(
        jax.random.key(1000 + seed), target, kernel, num_samples=STEPS, num_chains=CHAINS,
        solver=sequential(), progress=False,
    )  # fmt: skip


def cut_short(draws: Any, num_chains: int, num_samples: int) -> Any:
    """The first draws of the first chains."""

    def cut(leaf):
        leaf = np.asarray(leaf)
        return leaf[:num_chains, :num_samples] if leaf.ndim > 1 else leaf[:num_chains]

    names = ("positions", "constrained", "info", "certificate")
    return dataclasses.replace(
        draws, **{name: jax.tree.map(cut, getattr(draws, name)) for name in names}
    )


def measure(name: str, num_seeds: int) -> list[dict]:
    """The rows of one posterior."""
    if name in HOPELESS:
        target = HOPELESS[name]()
        return [row(name, name, False, [right_run(target, seed) for seed in range(num_seeds)])]
    if name == "funnel, its map learned":
        return funnel_by_its_law(name, num_seeds)
    if name == "funnel":
        return [row(name, name, False, in_own_coordinates(num_seeds))]
    if name == "one chain in another mode":
        return [row(name, name, False, fourth_elsewhere(num_seeds))]
    target = POSTERIORS[name]()
    runs = [right_run(target, seed) for seed in range(num_seeds)]
    rows = [row(name, "right", True, runs)]
    rows.append(row(name, "cut short", False, [cut_short(run, 2, 60) for run in runs]))
    if name in FAULTY:
        draws = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), runs[0].positions)

        def initial(key):
            place = jax.random.randint(key, (), 0, STEPS)
            return jax.tree.map(lambda leaf: leaf[place], draws)

        own = dataclasses.replace(target, initial=initial)
        for fault, kernel in wrong_kernels(target, runs[0].warmup).items():
            wrong = [wrong_run(own, kernel, seed) for seed in range(num_seeds)]
            rows.append(row(name, fault, False, wrong))
    return rows


def row(posterior: str, run: str, is_right: bool, runs: list) -> dict:
    """Outcomes of runs that are alike."""
    verdicts = [one.verdict for one in runs]
    outcomes = [verdict.outcome for verdict in verdicts]
    wanted = [v for v in verdicts if (v.outcome is Outcome.CONVERGED) is not is_right]
    return {
        "posterior": posterior,
        "run": run,
        "right": is_right,
        "runs": len(runs),
        **{outcome.name.lower(): outcomes.count(outcome) for outcome in Outcome},
        "first_not_as_wanted": str(wanted[0]) if wanted else "",
    }


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    lines = [
        "| runs | posteriors | runs | CONVERGED | UNDECIDED | NOT CONVERGED |",
        "|---|---|---|---|---|---|",
    ]
    kinds = list(dict.fromkeys(one["run"] for one in rows))
    for kind in sorted(kinds, key=lambda kind: kind != "right"):
        of = [one for one in rows if one["run"] == kind]
        total = {key: sum(one[key] for one in of) for key in ("runs", *_OUTCOMES)}
        alone = len(of) == 1 and of[0]["posterior"] != kind
        label = f"{of[0]['posterior']}: {kind}" if alone else kind
        lines.append(
            f"| {'**right**' if kind == 'right' else label} | {len(of)} | {total['runs']} | "
            + " | ".join(str(total[key]) for key in _OUTCOMES)
            + " |"
        )
    (every, good, *_), (wrongs, bad, *_) = (_totals(rows, is_right) for is_right in (True, False))
    share = f"{good / every:.1%}" if every else "none"
    lines += [
        "",
        f"Right runs called CONVERGED: {share} of {every}. Wrong runs called CONVERGED: {bad} of {wrongs}.",
    ]
    return "\n".join(lines) + "\n"


def _totals(rows: list[dict], is_right: bool) -> list[int]:
    """How many runs are right, or wrong, and how many of them were called what, in the order of `_OUTCOMES`."""
    of = [one for one in rows if one["right"] is is_right]
    return [sum(one[key] for one in of) for key in ("runs", *_OUTCOMES)]


def in_short(record: dict) -> str:
    """Right runs and wrong ones, all posteriors together, in a sentence."""
    right, wrong = (_totals(record["rows"], is_right) for is_right in (True, False))
    return (
        f"Of {right[0]} right runs {right[1]} were called CONVERGED and {right[3]} NOT CONVERGED; of {wrong[0]} runs "
        f"[made wrong on purpose]({_PAGE}#how-often-it-is-right) {wrong[1]} were called CONVERGED.\n"
    )


_PAGE = "https://github.com/partime-mcmc/partime-mcmc/blob/main/docs/converged.md"
_OUTCOMES = ("converged", "undecided", "not_converged")
NAMES = (
    *POSTERIORS,
    "funnel",
    "funnel, its map learned",
    *HOPELESS,
    "one chain in another mode",
)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a wrong run was called CONVERGED."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--small", action="store_true", help="one posterior and two seeds")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    names = arguments.names or (SMALL if arguments.small else NAMES)
    seeds = arguments.seeds or (SMALL_SEEDS if arguments.small else SEEDS)
    stored = arguments.out / "verdict-cpu.json"
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    warnings.simplefilter("ignore")
    with jax.enable_x64(True):
        for name in names:
            begin = time.perf_counter()
            rows = [one for one in rows if one["posterior"] != name] + measure(name, seeds)
            print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
            for one in rows:
                if one["posterior"] == name:
                    told = {key: one[key] for key in ("run", *_OUTCOMES, "first_not_as_wanted")}
                    print("   ", told, flush=True)
            rows.sort(key=lambda one: NAMES.index(one["posterior"]))
            keep(stored, {"rows": rows}, table(rows))
    print(table(rows))
    return int(any(one["converged"] for one in rows if not one["right"]))


if __name__ == "__main__":
    sys.exit(main())
