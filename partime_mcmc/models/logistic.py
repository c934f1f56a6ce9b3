"""Bayesian logistic regression on a survey: who expects to vote for Dole; N = 944, D = 25.

    beta_k ~ N(0, 2.5²),   vote_i ~ Bernoulli(1 / (1 + exp(-x_i · beta))).

The row x_i holds an intercept; 0/1 columns for the levels of three ordered answers (own political position `selfLR`,
party `PID`, schooling `educ`), the most frequent level of each left out; and six columns of mean 0 and standard
deviation 1 (age, income, log population, days of television news, perceived positions of Clinton and Dole).

Source: the American National Election Study of 1996, a public-domain subset as shipped by statsmodels
(`statsmodels.datasets.anes96`), here as `data/anes96.csv` with `logpopul` = log(popul + 0.1) left to be computed.
"""

import csv
from importlib import resources

import numpy as np

from partime_mcmc.sampling.target import Target
from partime_mcmc.types import Key

BASELINES = {"selfLR": 4, "PID": 0, "educ": 3}
"""The most frequent level of each answer, which has no column of its own."""
STANDARDISED = ("age", "income", "logpopul", "TVnews", "ClinLR", "DoleLR")
PRIOR_SCALE = 2.5


def load_survey() -> dict[str, np.ndarray]:
    """The survey's columns by name, float64, shape (944,) each, `logpopul` among them."""
    text = (resources.files("partime_mcmc.models") / "data" / "anes96.csv").read_text(
        encoding="utf-8"
    )
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    survey = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    return {**survey, "logpopul": np.log(survey["popul"] + 0.1)}


def design() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The regression's data.

    Returns:
        Rows x, float64, shape (944, 25); votes (1 for Dole), float64, shape (944,); the 25 column names.
    """
    survey = load_survey()
    columns = {"intercept": np.ones_like(survey["vote"])}
    for answer, baseline in BASELINES.items():
        for level in np.unique(survey[answer]).astype(int):
            if level != baseline:
                columns[f"{answer}[{level}]"] = (survey[answer] == level).astype(float)
    columns |= {
        name: (survey[name] - survey[name].mean()) / survey[name].std() for name in STANDARDISED
    }
    return np.stack(list(columns.values()), axis=1), survey["vote"], tuple(columns)


def model(x, vote):
    """The NumPyro model.

    Args:
        x: Design, shape (N, K).
        vote: 0 or 1, shape (N,).
    """
    import numpyro
    import numpyro.distributions as dist

    with numpyro.plate("coefficient", x.shape[1]):
        beta = numpyro.sample("beta", dist.Normal(0.0, PRIOR_SCALE))
    with numpyro.plate("respondent", x.shape[0]):
        numpyro.sample("vote", dist.Bernoulli(logits=x @ beta), obs=vote)


def make_target(key: Key) -> Target:
    """The posterior of the coefficients.

    Args:
        key: PRNG key, shape ().

    Returns:
        A target on positions `{"beta": (25,)}`.
    """
    from partime_mcmc.numpyro import from_numpyro

    x, vote, _ = design()
    return from_numpyro(model, x, vote, key=key)
