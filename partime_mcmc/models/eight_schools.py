"""Eight schools: effects of coaching on a school test, partially pooled; D = 10.

    mu ~ N(0, 5²),  tau ~ HalfCauchy(5),  theta_trans_j ~ N(0, 1),  theta_j = mu + tau · theta_trans_j,
    y_j ~ N(theta_j, sigma_j²),  j = 1..8, sigma_j known.

The non-centred form: given mu and tau the theta_trans_j are standard normal a priori, so the funnel of the centred form
is gone. Float64 is needed: in float32 HMC and NUTS stall on it. Source: Rubin, "Estimation in parallel randomized
experiments", Journal of Educational Statistics 6(4), 1981; priors as in posteriordb's `eight_schools_noncentered`.
"""

import numpy as np

from partime_mcmc.sampling.target import Target
from partime_mcmc.types import Key

EFFECT = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
"""Estimated effects y, one for each school."""
STANDARD_ERROR = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
"""Their standard errors sigma."""


def model(y, sigma):
    """The NumPyro model.

    Args:
        y: Estimated effects, shape (J,).
        sigma: Standard errors, shape (J,).
    """
    import numpyro
    import numpyro.distributions as dist

    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * theta_trans)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def make_target(key: Key) -> Target:
    """The posterior given Rubin's data.

    Args:
        key: PRNG key, shape ().

    Returns:
        A target on positions `{"mu": (), "tau": (), "theta_trans": (8,)}` that reports `theta`, shape (8,), too.
    """
    from partime_mcmc.numpyro import from_numpyro

    return from_numpyro(model, np.array(EFFECT), np.array(STANDARD_ERROR), key=key)
