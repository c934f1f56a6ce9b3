"""Models of the kinds in NumPyro's gallery and tutorials, with simulated data and the settings usual there.

`SCRIPTS[name]` has the model, its arguments, and how it is run: most by one chain. Data have fixed seeds. Sites that a posterior
does not determine (weights of a network, which can be exchanged) are left out of comparisons by `compared`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.experimental.ode import odeint
from numpyro.contrib.control_flow import scan
from numpyro.infer.reparam import LocScaleReparam


@dataclasses.dataclass(frozen=True)
class Script:
    """A model and how it is run.

    Attributes:
        model: A NumPyro model.
        data: Makes its keyword arguments.
        num_warmup, num_samples, num_chains: As usual for it.
        compared: Sites whose posteriors can be compared; all of them by default.
        predicted: A site that `Predictive` draws afterwards, with the arguments that `unseen` changes.
        summed_out: Of a model with discrete sites, which are summed out, those that NumPyro's `infer_discrete` can draw afterwards.
        unseen: Arguments that are other than in the run when predicting.
    """

    model: Callable
    data: Callable[[], dict[str, Any]]
    num_warmup: int = 1000
    num_samples: int = 1000
    num_chains: int = 1
    compared: tuple[str, ...] | None = None
    predicted: str | None = None
    summed_out: tuple[str, ...] | None = None
    unseen: tuple[tuple[str, Any], ...] = ()


# --- regressions


def student_line(x, y=None):
    """A line with an unknown slope, noise and outliers of a Student law."""
    intercept = numpyro.sample("intercept", dist.Normal(0, 5))
    slope = numpyro.sample("slope", dist.Normal(0, 5))
    scale = numpyro.sample("scale", dist.HalfNormal(2))
    freedom = numpyro.sample("freedom", dist.Gamma(2, 0.1))
    numpyro.sample("y", dist.StudentT(freedom, intercept + slope * x, scale), obs=y)


def _line_data():
    rng = np.random.default_rng(11)
    x = rng.normal(size=80)
    return {"x": x, "y": 1 + 2 * x + 0.5 * rng.standard_t(4, 80)}


def cover_types(x, y=None):
    """A logistic regression with many columns, some of them correlated."""
    weights = numpyro.sample("weights", dist.Normal(0, jnp.ones(x.shape[1])).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)


def _cover_data():
    rng = np.random.default_rng(12)
    x = rng.normal(size=(2000, 30)) @ (np.eye(30) + 0.3 * rng.normal(size=(30, 30)) / np.sqrt(30))
    x = np.concatenate([x, np.ones((2000, 1))], axis=1)
    logits = x @ (0.5 * rng.normal(size=31))
    return {"x": x, "y": rng.binomial(1, 1 / (1 + np.exp(-logits)))}


def horseshoe_regression(x, y=None):
    """Few of many coefficients are not zero, Carvalho and others (2010)."""
    local = numpyro.sample("local", dist.HalfCauchy(jnp.ones(x.shape[1])).to_event(1))
    overall = numpyro.sample("overall", dist.HalfCauchy(1))
    raw = numpyro.sample("raw", dist.Normal(jnp.zeros(x.shape[1]), 1).to_event(1))
    beta = numpyro.deterministic("beta", overall * local * raw)
    precision = numpyro.sample("precision", dist.Gamma(3, 1))
    numpyro.sample("y", dist.Normal(x @ beta, 1 / jnp.sqrt(precision)), obs=y)


def _horseshoe_data():
    rng = np.random.default_rng(13)
    x = rng.normal(size=(100, 12))
    return {"x": x, "y": x[:, :3] @ np.array([1.0, 2.0, -1.0]) + 0.4 * rng.normal(size=100)}


def ordered_answers(x, y=None):
    """Answers on a scale of five, cut out of a latent line."""
    slope = numpyro.sample("slope", dist.Normal(0, 2))
    cuts = numpyro.sample(
        "cuts",
        dist.TransformedDistribution(
            dist.Normal(0, 2).expand([4]).to_event(1), dist.transforms.OrderedTransform()
        ),
    )
    numpyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)


def _ordered_data():
    rng = np.random.default_rng(14)
    x = rng.normal(size=150)
    latent = 1.2 * x + rng.logistic(size=150)
    return {"x": x, "y": np.digitize(latent, [-2.0, -0.7, 0.5, 2.0])}


def survival(x, censored, y=None):
    """Weibull times of which some are only known to be longer than what was seen."""
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    level = numpyro.sample("level", dist.Normal(0, 2))
    shape = numpyro.sample("shape", dist.Gamma(2, 1))
    law = dist.Weibull(jnp.exp(level + slope * x), shape)
    with numpyro.handlers.mask(mask=~censored):
        numpyro.sample("y", law, obs=y)
    numpyro.factor("longer", jnp.where(censored, -((y / law.scale) ** shape), 0.0).sum())


def _survival_data():
    rng = np.random.default_rng(15)
    x = rng.normal(size=120)
    times = np.exp(1 + 0.4 * x) * rng.weibull(1.5, 120)
    end = rng.uniform(1, 8, 120)
    return {"x": x, "censored": times > end, "y": np.minimum(times, end)}


def zero_inflated(x, y=None):
    """Counts with too many zeros."""
    slopes = numpyro.sample("slopes", dist.Normal(0, 1).expand([2]).to_event(1))
    gate = numpyro.sample("gate", dist.Beta(1, 1))
    rate = jnp.exp(slopes[0] + slopes[1] * x)
    numpyro.sample("y", dist.ZeroInflatedPoisson(gate, rate), obs=y)


def _zero_inflated_data():
    rng = np.random.default_rng(16)
    x = rng.normal(size=200)
    y = rng.poisson(np.exp(0.7 + 0.5 * x)) * rng.binomial(1, 0.7, 200)
    return {"x": x, "y": y}


def missing_ages(age, sex, survived=None):
    """A logistic regression in which some ages are missing and are sampled with everything else."""
    mean = numpyro.sample("mean", dist.Normal(0, 1).expand([2]).to_event(1))
    spread = numpyro.sample("spread", dist.HalfNormal(1))
    missing = np.flatnonzero(np.isnan(age))
    with numpyro.plate("missing", len(missing)):
        drawn = numpyro.sample("drawn", dist.Normal(mean[sex[missing]], spread).mask(False))
    whole = jnp.asarray(age).at[missing].set(drawn)
    numpyro.sample("age", dist.Normal(mean[sex], spread), obs=whole)
    slopes = numpyro.sample("slopes", dist.Normal(0, 2).expand([2]).to_event(1))
    level = numpyro.sample("level", dist.Normal(0, 2))
    logits = level + slopes[0] * whole + slopes[1] * sex
    numpyro.sample("survived", dist.Bernoulli(logits=logits), obs=survived)


def _missing_data():
    rng = np.random.default_rng(17)
    sex = rng.integers(0, 2, 150)
    age = 0.3 * sex + rng.normal(size=150)
    survived = rng.binomial(1, 1 / (1 + np.exp(-(0.2 - 0.6 * age + 1.2 * sex))))
    age[rng.random(150) < 0.15] = np.nan
    return {"age": age, "sex": sex, "survived": survived}


def network(x, y=None, size=4):
    """A network with one hidden layer; what it predicts is determined, its weights are not."""
    into = numpyro.sample("into", dist.Normal(0, 1).expand([x.shape[1], size]).to_event(2))
    within = numpyro.sample("within", dist.Normal(0, 1).expand([size, size]).to_event(2))
    out = numpyro.sample("out", dist.Normal(0, 1).expand([size]).to_event(1))
    mean = numpyro.deterministic("mean", jnp.tanh(jnp.tanh(x @ into) @ within) @ out)
    precision = numpyro.sample("precision", dist.Gamma(3, 1))
    numpyro.sample("y", dist.Normal(mean, 1 / jnp.sqrt(precision)), obs=y)


def _network_data():
    rng = np.random.default_rng(18)
    x = np.linspace(-1.3, 1.3, 60)
    y = x + 0.5 * x**2 + 0.5 * x**3 + 0.1 * rng.normal(size=60)
    return {"x": np.stack([x**power for power in range(3)], axis=1), "y": (y - y.mean()) / y.std()}


# --- hierarchies


def batting(at_bats, hits=None):
    """Chances of players who are alike to an unknown degree."""
    mean = numpyro.sample("mean", dist.Uniform(0, 1))
    alike = numpyro.sample("alike", dist.Pareto(1, 1.5))
    with numpyro.plate("players", len(at_bats)):
        chance = numpyro.sample("chance", dist.Beta(mean * alike, (1 - mean) * alike))
        numpyro.sample("hits", dist.Binomial(at_bats, probs=chance), obs=hits)


def _batting_data():
    rng = np.random.default_rng(19)
    at_bats = np.full(18, 45)
    return {"at_bats": at_bats, "hits": rng.binomial(at_bats, rng.beta(14, 40, 18))}


def admissions(department, male, applications, admitted=None):
    """A binomial regression whose intercepts and slopes vary together from department to department."""
    mean = numpyro.sample("mean", dist.Normal(0, 1).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfCauchy(2 * jnp.ones(2)).to_event(1))
    correlation = numpyro.sample("correlation", dist.LKJCholesky(2, concentration=2))
    root = scale[:, None] * correlation
    with numpyro.plate("departments", 6):
        effects = numpyro.sample("effects", dist.MultivariateNormal(mean, scale_tril=root))
    logits = effects[department, 0] + effects[department, 1] * male
    numpyro.sample("admitted", dist.Binomial(applications, logits=logits), obs=admitted)


def _admissions_data():
    rng = np.random.default_rng(20)
    department, male = np.repeat(np.arange(6), 2), np.tile([1, 0], 6)
    applications = rng.integers(25, 800, 12)
    chance = 1 / (1 + np.exp(-(np.linspace(1, -2.5, 6)[department] - 0.2 * male)))
    return {
        "department": department,
        "male": male,
        "applications": applications,
        "admitted": rng.binomial(applications, chance),
    }


def mortality(age, place, people, deaths=None):
    """Deaths by age and place: two crossed effects."""
    level = numpyro.sample("level", dist.Normal(-4, 2))
    scales = numpyro.sample("scales", dist.HalfNormal(1).expand([2]).to_event(1))
    with numpyro.plate("ages", 10):
        by_age = numpyro.sample("by_age", dist.Normal(0, scales[0]))
    with numpyro.plate("places", 25):
        by_place = numpyro.sample("by_place", dist.Normal(0, scales[1]))
    logits = level + by_age[age] + by_place[place]
    numpyro.sample("deaths", dist.Binomial(people, logits=logits), obs=deaths)


def _mortality_data():
    rng = np.random.default_rng(21)
    age, place = np.repeat(np.arange(10), 25), np.tile(np.arange(25), 10)
    people = rng.integers(50, 2000, 250)
    logits = -4 + np.linspace(-1, 1.5, 10)[age] + 0.2 * rng.normal(size=25)[place]
    return {
        "age": age,
        "place": place,
        "people": people,
        "deaths": rng.binomial(people, 1 / (1 + np.exp(-logits))),
    }


def lungs(patient, week, y=None):
    """A line for every patient, intercepts and slopes from common normal laws."""
    means = numpyro.sample("means", dist.Normal(0, 2).expand([2]).to_event(1))
    scales = numpyro.sample("scales", dist.HalfNormal(1).expand([2]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("patients", 30):
        level = numpyro.sample("level", dist.Normal(means[0], scales[0]))
        slope = numpyro.sample("slope", dist.Normal(means[1], scales[1]))
    numpyro.sample("y", dist.Normal(level[patient] + slope[patient] * week, noise), obs=y)


def _lungs_data():
    rng = np.random.default_rng(22)
    patient = np.repeat(np.arange(30), 8)
    week = np.tile(np.linspace(-1, 1, 8), 30)
    level, slope = rng.normal(0, 1, 30), rng.normal(-0.3, 0.4, 30)
    y = level[patient] + slope[patient] * week + 0.3 * rng.normal(size=240)
    return {"patient": patient, "week": week, "y": y}


@numpyro.handlers.reparam(config={"effect": LocScaleReparam(0)})
def schools(sigma, y=None):
    """Eight schools with the reparametrisation that the user has chosen."""
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    spread = numpyro.sample("spread", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(sigma)):
        effect = numpyro.sample("effect", dist.Normal(mean, spread))
        numpyro.sample("y", dist.Normal(effect, sigma), obs=y)


def _schools_data():
    return {
        "sigma": np.array([15.0, 10, 16, 11, 9, 11, 10, 18]),
        "y": np.array([28.0, 8, -3, 7, -1, 1, 18, 12]),
    }


def two_pages(clicks, views):
    """Two shares and how many times one exceeds the other."""
    with numpyro.plate("pages", 2):
        share = numpyro.sample("share", dist.Beta(1, 1))
        numpyro.sample("clicks", dist.Binomial(views, probs=share), obs=clicks)
    numpyro.deterministic("ratio", share[1] / share[0])


def _pages_data():
    return {"clicks": np.array([45, 62]), "views": np.array([500, 520])}


# --- time


def autoregression(y):
    """Two lags, by NumPyro's scan."""
    coefficients = numpyro.sample("coefficients", dist.Normal(0, 1).expand([2]).to_event(1))
    level = numpyro.sample("level", dist.Normal(0, 1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))

    def step(last, now):
        before, previous = last
        mean = level + coefficients[0] * previous + coefficients[1] * before
        numpyro.sample("y", dist.Normal(mean, noise), obs=now)
        return (previous, now), None

    scan(step, (y[0], y[1]), y[2:])


def _autoregression_data():
    rng = np.random.default_rng(23)
    y = [0.0, 0.0]
    for _ in range(150):
        y.append(0.1 + 0.5 * y[-1] + 0.3 * y[-2] + 0.5 * rng.normal())
    return {"y": np.array(y)}


def volatility(returns):
    """The log scale of returns walks at random."""
    step = numpyro.sample("step", dist.Exponential(50))
    freedom = numpyro.sample("freedom", dist.Exponential(0.1))
    walk = numpyro.sample("walk", dist.GaussianRandomWalk(step, num_steps=len(returns)))
    numpyro.sample("returns", dist.StudentT(freedom, 0, jnp.exp(walk)), obs=returns)


def _volatility_data():
    rng = np.random.default_rng(24)
    scale = np.exp(-1 + np.cumsum(0.1 * rng.normal(size=120)))
    return {"returns": scale * rng.standard_t(8, 120)}


def two_series(y):
    """A vector autoregression of order one with correlated noise."""
    matrix = numpyro.sample("matrix", dist.Normal(0, 0.5).expand([2, 2]).to_event(2))
    scale = numpyro.sample("scale", dist.HalfNormal(1).expand([2]).to_event(1))
    correlation = numpyro.sample("correlation", dist.LKJCholesky(2, 1))
    root = scale[:, None] * correlation
    numpyro.sample("y", dist.MultivariateNormal(y[:-1] @ matrix.T, scale_tril=root), obs=y[1:])


def _two_series_data():
    rng = np.random.default_rng(25)
    y, matrix = [np.zeros(2)], np.array([[0.6, 0.2], [-0.1, 0.5]])
    for _ in range(120):
        y.append(matrix @ y[-1] + rng.normal(size=2) * np.array([0.5, 0.3]))
    return {"y": np.array(y)}


def seasons(y, season=12):
    """Level, trend and season of Holt and Winters, carried by a scan."""
    smoothing = numpyro.sample("smoothing", dist.Beta(2, 2).expand([3]).to_event(1))
    level = numpyro.sample("level", dist.Normal(5, 5))
    trend = numpyro.sample("trend", dist.Normal(0, 2))
    start = numpyro.sample("start", dist.Normal(0, 2).expand([season]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(2))

    def step(carry, now):
        level, trend, ring = carry
        mean = level + trend + ring[0]
        numpyro.sample("y", dist.Normal(mean, noise), obs=now)
        new = smoothing[0] * (now - ring[0]) + (1 - smoothing[0]) * (level + trend)
        slope = smoothing[1] * (new - level) + (1 - smoothing[1]) * trend
        last = smoothing[2] * (now - new) + (1 - smoothing[2]) * ring[0]
        return (new, slope, jnp.concatenate([ring[1:], last[None]])), None

    scan(step, (level, trend, start), y)


def _seasons_data():
    rng = np.random.default_rng(26)
    time = np.arange(96)
    return {"y": 5 + 0.05 * time + 2 * np.sin(2 * np.pi * time / 12) + 0.3 * rng.normal(size=96)}


def hares_and_lynxes(years, y=None):
    """Predators and prey: an ordinary differential equation with unknown rates."""

    def slope(logs, time, rates):
        prey, predators = jnp.exp(logs)
        return jnp.stack([rates[0] - rates[1] * predators, rates[2] * prey - rates[3]])

    start = numpyro.sample("start", dist.LogNormal(jnp.log(10), 1).expand([2]).to_event(1))
    rates = numpyro.sample(
        "rates",
        dist.TruncatedNormal(
            jnp.array([1.0, 0.05, 0.05, 1.0]), jnp.array([0.2, 0.01, 0.01, 0.2]), low=0.01
        ).to_event(1),
    )
    logs = odeint(slope, jnp.log(start), years, rates, rtol=1e-6, atol=1e-5, mxstep=1000)
    noise = numpyro.sample("noise", dist.LogNormal(-1, 1).expand([2]).to_event(1))
    numpyro.sample("y", dist.LogNormal(logs, noise), obs=y)


def _hares_data():
    rng = np.random.default_rng(27)
    years, state, path = np.arange(15.0), np.array([30.0, 8.0]), []
    rates, small = np.array([0.8, 0.05, 0.04, 0.9]), 0.001
    for step in range(15_000):
        if step % 1000 == 0:
            path.append(state)
        prey, predators = state
        state = state + small * np.array(
            [(rates[0] - rates[1] * predators) * prey, (rates[2] * prey - rates[3]) * predators]
        )
    return {"years": years, "y": np.array(path) * np.exp(0.2 * rng.normal(size=(15, 2)))}


# --- functions


def gaussian_process(x, y):
    """Scale, length and noise of a Gaussian process."""
    scale = numpyro.sample("scale", dist.LogNormal(0, 1))
    length = numpyro.sample("length", dist.LogNormal(0, 1))
    noise = numpyro.sample("noise", dist.LogNormal(-1, 1))
    gaps = ((x[:, None] - x) / length) ** 2
    covariance = scale * jnp.exp(-0.5 * gaps) + (noise + 1e-6) * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(0, covariance), obs=y)


def _process_data():
    rng = np.random.default_rng(28)
    x = np.linspace(-1, 1, 30)
    y = x + 0.2 * x**3 + 0.5 * (0.5 + x) ** 2 * np.sin(4 * x) + 0.15 * rng.normal(size=30)
    return {"x": x, "y": (y - y.mean()) / y.std()}


def smooth_counts(x, y):
    """A latent function in a basis of sines, as in Hilbert-space approximations of Gaussian processes."""
    order = jnp.arange(1, 16)
    basis = jnp.sin(jnp.pi * order * (x[:, None] + 1.5) / 3) / jnp.sqrt(1.5)
    length = numpyro.sample("length", dist.InverseGamma(3, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    density = jnp.sqrt(length * jnp.sqrt(2 * jnp.pi)) * jnp.exp(
        -0.25 * (length * jnp.pi * order / 3) ** 2
    )
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([15]).to_event(1))
    level = numpyro.sample("level", dist.Normal(0, 2))
    numpyro.sample("y", dist.Poisson(jnp.exp(level + scale * basis @ (density * weights))), obs=y)


def _smooth_data():
    rng = np.random.default_rng(29)
    x = np.linspace(-1, 1, 80)
    return {"x": x, "y": rng.poisson(np.exp(1.5 + np.sin(3 * x)))}


# --- discrete latents, summed out


def mixture(y):
    """Two normal laws, of which one is drawn for every datum; the first is the lower one, or a single chain may find them the other way."""
    weight = numpyro.sample("weight", dist.Beta(2, 2))
    low, gap = (
        numpyro.sample("low", dist.Normal(-2, 1)),
        numpyro.sample("gap", dist.LogNormal(1, 1)),
    )
    centres = jnp.stack([low, low + gap])
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    with numpyro.plate("data", len(y)):
        which = numpyro.sample("which", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(centres[which], scale), obs=y)


def _mixture_data():
    rng = np.random.default_rng(30)
    first = rng.random(120) < 0.4
    return {"y": np.where(first, -1.5, 1.8) + 0.7 * rng.normal(size=120)}


def annotators(answers):
    """Items with a true class that several people have told, each with errors of their own (Dawid and Skene 1979)."""
    num_items, num_people = answers.shape
    with numpyro.plate("people", num_people), numpyro.plate("classes", 3):
        errors = numpyro.sample("errors", dist.Dirichlet(jnp.ones(3)))
    # Nobody is worse than chance: the classes keep their names.
    numpyro.factor("names", 8.0 * jnp.log(errors[jnp.arange(3), :, jnp.arange(3)]).sum())
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("items", num_items, dim=-2):
        truth = numpyro.sample("truth", dist.Categorical(shares), infer={"enumerate": "parallel"})
        with numpyro.plate("tellers", num_people, dim=-1):
            told = dist.Categorical(errors[truth, jnp.arange(num_people)])
            numpyro.sample("answers", told, obs=answers)


def _annotators_data():
    rng = np.random.default_rng(31)
    truth = rng.integers(0, 3, 45)
    wrong = rng.random((45, 5)) < 0.25
    return {"answers": np.where(wrong, rng.integers(0, 3, (45, 5)), truth[:, None])}


def recaptures(captured):
    """Animals that are caught again or not, alive or not (Cormack, Jolly and Seber); life and death are summed out."""
    survive = numpyro.sample("survive", dist.Uniform(0, 1))
    caught = numpyro.sample("caught", dist.Uniform(0, 1))

    def step(alive, seen):
        with numpyro.plate("animals", captured.shape[0]):
            lives = dist.Bernoulli(jnp.clip(survive * alive, 1e-6, 1 - 1e-6))
            alive = numpyro.sample("alive", lives, infer={"enumerate": "parallel"})
            numpyro.sample(
                "seen", dist.Bernoulli(jnp.clip(caught * alive, 1e-6, 1 - 1e-6)), obs=seen
            )
        return alive, None

    # All are caught at first.
    scan(step, jnp.ones(captured.shape[0], int), jnp.swapaxes(captured[:, 1:], 0, 1))


def _recaptures_data():
    rng = np.random.default_rng(32)
    captured, alive = [np.ones(60, int)], np.ones(60, int)
    for _ in range(6):
        alive = alive * rng.binomial(1, 0.8, 60)
        captured.append(alive * rng.binomial(1, 0.6, 60))
    return {"captured": np.stack(captured, axis=1)}


SCRIPTS = {
    "student line": Script(
        student_line,
        _line_data,
        500,
        1000,
        predicted="y",
        unseen=(("x", np.linspace(-1, 1, 7)), ("y", None)),
    ),
    "cover types": Script(cover_types, _cover_data, 300, 1000),
    "horseshoe regression": Script(
        horseshoe_regression, _horseshoe_data, 1000, 1000, compared=("beta", "precision")
    ),
    "ordered answers": Script(ordered_answers, _ordered_data, 500, 1000),
    "censored survival": Script(survival, _survival_data, 500, 1000),
    "zero-inflated counts": Script(
        zero_inflated, _zero_inflated_data, 500, 1000, predicted="y", unseen=(("y", None),)
    ),
    "missing ages": Script(missing_ages, _missing_data, 500, 1000),
    "neural network": Script(network, _network_data, 1000, 1000, compared=("mean", "precision")),
    "batting averages": Script(batting, _batting_data, 1000, 1000),
    "admissions": Script(admissions, _admissions_data, 500, 1000),
    "mortality": Script(mortality, _mortality_data, 200, 1000),
    "lungs": Script(lungs, _lungs_data, 1000, 1000),
    "schools, reparametrised": Script(schools, _schools_data, 500, 1000, num_chains=4),
    "shares of two pages": Script(two_pages, _pages_data, 500, 1000),
    "autoregression": Script(autoregression, _autoregression_data, 500, 1000),
    "volatility": Script(volatility, _volatility_data, 600, 1000),
    "two series": Script(two_series, _two_series_data, 500, 1000),
    "seasons": Script(seasons, _seasons_data, 1000, 1000),
    "predators and prey": Script(hares_and_lynxes, _hares_data, 200, 1000),
    "Gaussian process": Script(gaussian_process, _process_data, 500, 1000, num_chains=2),
    "smooth counts": Script(smooth_counts, _smooth_data, 500, 1000),
    "mixture, enumerated": Script(mixture, _mixture_data, 500, 1000, summed_out=("which",)),
    "annotators, enumerated": Script(
        annotators, _annotators_data, 500, 1000, summed_out=("truth",)
    ),
    "recaptures, enumerated": Script(recaptures, _recaptures_data, 500, 1000, summed_out=()),
}
