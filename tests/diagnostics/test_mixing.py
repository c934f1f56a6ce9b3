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


def superchains(seed, num_draws, start_weight, num_superchains=16, num_chains=32):
    """Short chains of superchains, whose means still depend on the common start with some weight."""
    rng = np.random.default_rng(seed)
    start = start_weight * rng.normal(size=(num_superchains, 1, 1, 3))
    x = start + rng.normal(size=(num_superchains, num_chains, num_draws, 3))
    return x.reshape(-1, num_draws, 3), np.repeat(np.arange(num_superchains), num_chains)


def test_nested_rhat_is_one_where_starts_are_forgotten():
    for num_draws in (1, 8):
        found = mixing.nested_rhat(*superchains(0, num_draws, 0.0))
        # Its square is 1 + 1/M for one draw a chain, less for more of them.
        assert ((found >= 1) & (found < np.sqrt(1 + 2.2 / 32))).all()
    x, labels = superchains(1, 8, 0.0)
    order = np.random.default_rng(2).permutation(len(x))
    np.testing.assert_allclose(
        mixing.nested_rhat(x[order], labels[order]), mixing.nested_rhat(x, labels)
    )


def test_nested_rhat_shows_a_start_that_is_remembered():
    x, labels = superchains(3, 1, 1.0, num_superchains=256, num_chains=8)
    np.testing.assert_allclose(mixing.nested_rhat(x, labels), np.sqrt(2 + 1 / 8), rtol=0.1)
    # By the definition, of one coordinate.
    groups = x[:, 0, 0].reshape(256, 8)
    ratio = groups.mean(axis=1).var(ddof=1) / groups.var(axis=1, ddof=1).mean()
    assert mixing.nested_rhat(x, labels)[0] == pytest.approx(np.sqrt(1 + ratio))


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 1]])
def test_superchains_of_a_wrong_shape_are_refused(labels):
    with pytest.raises(ValueError, match="superchains: got"):
        mixing.nested_rhat(np.zeros((4, 3, 1)), np.array(labels))


def test_a_chain_apart_shows():
    found = mixing.split_rhat(chains())
    assert found[3] > 1.1 > found[0]


@pytest.mark.parametrize("share", [0.5, 0.03])
def test_independent_draws_of_two_values_mix(share):
    """Exactly so many of ones in every chain: neither the folded draws nor a quantile then moves."""
    ones = np.arange(1000) < 1000 * share
    draws = np.stack([np.random.default_rng(seed).permutation(ones) for seed in range(4)])
    draws = draws[..., None].astype(float)
    assert mixing.rank_rhat(draws) < 1.01
    assert 3000 < mixing.ess_bulk(draws) < 5000
    assert mixing.ess_tail(draws) > 3000
    assert mixing.ess_tail(np.ones((4, 100, 1))) == 0
