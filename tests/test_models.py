"""The built-in models: data as published, densities as written down, starts that can run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from partime_mcmc.diagnostics.checks import check_deterministic, check_precision, check_start
from partime_mcmc.models import MODELS, BuiltIn, banana, eight_schools, logistic

KEY = jax.random.key(3)


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def precision(request):
    with jax.enable_x64(request.param):
        yield jnp.dtype("float64" if request.param else "float32")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_start(precision, name):
    built_in = MODELS[name]()
    assert (
        isinstance(built_in, BuiltIn)
        and built_in.name == name
        and built_in.source
        and built_in.description
    )
    target = built_in.make_target(KEY)
    one, two = target.start(jax.random.key(1)), target.start(jax.random.key(2))
    check_start(target.logdensity, one)
    check_deterministic(target.logdensity, one)
    if precision == jnp.float32:
        assert check_precision(target.logdensity, one) < 1e-5
    assert all(leaf.dtype == precision for leaf in jax.tree.leaves((one, target.constrain(one))))
    assert not np.array_equal(jax.tree.leaves(one)[0], jax.tree.leaves(two)[0])
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two)
    named, single = jax.jit(jax.vmap(target.constrain))(batch), target.constrain(one)
    for value in named:
        np.testing.assert_allclose(
            named[value][0], single[value], rtol=20 * jnp.finfo(precision).eps
        )


def test_eight_schools_density():
    with jax.enable_x64(True):
        target = eight_schools.make_target(KEY)
        z = np.linspace(-1, 1, 8)
        position = {"mu": jnp.asarray(1.5), "tau": jnp.log(2.0), "theta_trans": jnp.asarray(z)}
        y, sigma = np.array(eight_schools.EFFECT), np.array(eight_schools.STANDARD_ERROR)
        expected = (
            stats.norm(0, 5).logpdf(1.5)
            + stats.halfcauchy(scale=5).logpdf(2.0)
            + np.log(2.0)  # the Jacobian of tau = exp(x)
            + stats.norm.logpdf(z).sum()
            + stats.norm(1.5 + 2 * z, sigma).logpdf(y).sum()
        )
        np.testing.assert_allclose(target.logdensity(position), expected, rtol=1e-12)
        named = target.constrain(position)
        assert set(named) == {"mu", "tau", "theta_trans", "theta"}
        np.testing.assert_allclose(named["tau"], 2.0, rtol=1e-12)
        np.testing.assert_allclose(named["theta"], 1.5 + 2 * z, rtol=1e-12)
        assert target.dims["theta"] == ("school",)


def test_survey_is_as_published():
    survey = logistic.load_survey()
    assert {name: values.shape for name, values in survey.items()} == dict.fromkeys(survey, (944,))
    np.testing.assert_allclose(
        [
            survey["vote"].sum(),
            survey["age"].mean(),
            survey["income"].mean(),
            survey["logpopul"].mean(),
        ],
        [393, 47.043432, 16.331568, 2.472307],
        rtol=1e-6,
    )
    for answer, baseline in logistic.BASELINES.items():
        levels, counts = np.unique(survey[answer], return_counts=True)
        assert len(levels) == 7 and levels[counts.argmax()] == baseline


def test_design():
    x, vote, names = logistic.design()
    assert x.shape == (944, 25) and len(set(names)) == 25 and vote.shape == (944,)
    np.testing.assert_allclose(x[:, -6:].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(x[:, -6:].std(0), 1, rtol=1e-12)
    assert np.linalg.matrix_rank(x) == 25 and np.isin(x[:, :-6], [0, 1]).all()
    survey = logistic.load_survey()
    np.testing.assert_array_equal(x[:, names.index("PID[6]")], survey["PID"] == 6)


def test_logistic_density_and_hoisted_data():
    with jax.enable_x64(True):
        target = logistic.make_target(KEY)
        x, vote, _ = logistic.design()
        beta = np.linspace(-0.5, 0.5, 25)
        logits = x @ beta
        expected = (
            stats.norm(0, 2.5).logpdf(beta).sum() + (vote * logits - np.logaddexp(0, logits)).sum()
        )
        position = {"beta": jnp.asarray(beta)}
        np.testing.assert_allclose(target.logdensity(position), expected, rtol=1e-12)
        shapes = [np.shape(const) for const in jax.make_jaxpr(target.logdensity)(position).consts]
        assert (944, 25) in shapes  # so that it can travel as an argument


def test_banana_moments():
    with jax.enable_x64(True):
        draws = np.asarray(banana.exact_draws(jax.random.key(5), 400_000))
        moments = np.stack([draws[:, 0], draws[:, 1], draws[:, 0] ** 2, draws[:, 1] ** 2, draws.prod(1),
                            draws[:, 0] ** 2 * draws[:, 1]])  # fmt: skip
        z = (moments.mean(1) - [0, 0, 100, 19, 0, 600]) / (moments.std(1) / np.sqrt(draws.shape[0]))
        assert np.abs(z).max() < 4.5  # six z-scores; false alarm below 1e-4
        # the density is that of the draws: p(x_1) p(x_2 | x_1) up to one constant
        some = draws[:50]
        exact = stats.norm(0, 10).logpdf(some[:, 0])
        exact += stats.norm.logpdf(some[:, 1] - 0.03 * (some[:, 0] ** 2 - 100))
        constant = jax.vmap(banana.logdensity)(jnp.asarray(some)) - exact
        np.testing.assert_allclose(constant, constant[0], rtol=1e-11)
