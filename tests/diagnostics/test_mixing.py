"""R-hat and effective sample sizes of many coordinates at once are ArviZ's of each."""

import numpy as np
import pytest

from partime_mcmc.diagnostics import arviz, mixing


def chains(seed=0, num_chains=4, num_draws=301):
    """Autoregressions of several memories; one with a chain apart, one with heavy tails, one antithetic, one constant."""
    rng = np.random.default_rng(seed)
    memory = np.array([0.0, 0.5, 0.95, 0.3, 0.0, -0.6])
    x = np.zeros((num_chains, num_draws, len(memory)))
    for step in range(1, num_draws):
        x[:, step] = memory * x[:, step - 1] + rng.normal(size=(num_chains, len(memory)))
    x[1, :, 3] += 2
    x[..., 4] = rng.standard_cauchy(x.shape[:2])
    return np.concatenate([x, np.ones((num_chains, num_draws, 1))], axis=2)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (mixing.rank_rhat, arviz.rhat),
        (mixing.ess_bulk, arviz.ess_bulk),
        (mixing.ess_tail, arviz.ess_tail),
    ],
)
def test_statistics_are_those_of_arviz(ours, theirs):
    x = chains()
    found = ours(x)
    wanted = [theirs(x[..., index]) for index in range(x.shape[2] - 1)]
    # Geyer's sum may be cut a pair of lags apart.
    np.testing.assert_allclose(found[:-1], wanted, rtol=0.05)
    assert found[-1] in (0.0, np.inf), "a coordinate that never moves says so"


def test_a_chain_apart_shows():
    found = mixing.split_rhat(chains())
    assert found[3] > 1.1 > found[0]
