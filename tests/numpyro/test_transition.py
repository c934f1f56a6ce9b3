"""Chains of NumPyro's other kernels in parallel time: those of its own loop, or a sentence that says why not."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, BarkerMH, HMCGibbs
from numpyro.infer.mcmc import MCMCKernel

from partime_mcmc import ParallelMCMC, shooting
from partime_mcmc.numpyro.transition import NoParallelForm, Transition

KEY = jax.random.key(3)


class State(NamedTuple):
    """A chain that halves, and a switch that it throws."""

    i: Any
    z: Any
    hidden: Any
    scale: Any
    accept_prob: Any
    mean_accept_prob: Any
    late: Any
    rng_key: Any


class Halving(MCMCKernel):
    """x ← x / 2 + noise, thrown by a switch; `rule` makes it other than it looks."""

    sample_field = "z"

    def __init__(self, rule: str = "plain"):
        self.rule = rule

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        return State(
            jnp.array(0),
            {"x": jnp.array([1.0, 2.0]), "on": jnp.array(False)},
            jnp.array(0.5),
            jnp.array(1.0),
            jnp.array(0.0),
            jnp.array(0.0),
            jnp.array(False),
            rng_key,
        )

    def sample(self, state, model_args, model_kwargs):
        key, noise_key = jax.random.split(state.rng_key)
        shrink = 1.0 if self.rule == "remembers" else 0.5
        x = shrink * state.z["x"] + state.scale * jax.random.normal(noise_key, (2,))
        on = jnp.where(x[0] > 0.8, ~state.z["on"], state.z["on"] & (x[1] > 0))
        x = x + 0.1 * on
        hidden, scale = x.sum(), state.scale
        if self.rule == "rarely matters":
            x = jnp.where(state.i == 200, x + state.hidden, x)
        if self.rule == "adapts late":
            scale = jnp.where(state.i > 150, 0.5, state.scale)
        if self.rule == "keys of the chain":
            key = jax.random.fold_in(key, (1000 * x[0]).astype(jnp.int32))
        rate = jax.nn.sigmoid(x[0])
        mean = state.mean_accept_prob + (rate - state.mean_accept_prob) / (state.i + 1)
        late = state.i == 250
        return State(state.i + 1, {"x": x, "on": on}, hidden, scale, rate, mean, late, key)


def runs(kernel, extra=(), key=KEY, **options):
    """NumPyro's run and ours with a solver."""
    given = {"num_warmup": 0, "num_samples": 400, "progress_bar": False} | options
    theirs = MCMC(kernel, chain_method="sequential", **given)
    theirs.run(key, extra_fields=extra)
    ours = ParallelMCMC(kernel, solver=shooting(), **given)
    ours.run(key, extra_fields=extra)
    return theirs, ours


@pytest.mark.parametrize(
    "options",
    [{}, {"num_chains": 2}, {"thinning": 3}, {"key": jax.random.PRNGKey(3), "num_chains": 2}],
    ids=["one", "two", "thinned", "untyped keys"],
)
def test_draws_are_those_of_the_loop(options):
    theirs, ours = runs(Halving(), ("accept_prob", "mean_accept_prob", "i", "late"), **options)
    expected, found = (one.get_samples(group_by_chain=True) for one in (theirs, ours))
    np.testing.assert_allclose(found["x"], expected["x"], atol=1e-5)
    np.testing.assert_array_equal(found["on"], expected["on"])
    assert found["on"].dtype == expected["on"].dtype == bool and 0 < found["on"].mean() < 1
    for name, values in theirs.get_extra_fields(group_by_chain=True).items():
        mine = ours.get_extra_fields(group_by_chain=True)[name]
        np.testing.assert_allclose(mine, values, atol=1e-4, err_msg=name)
    assert ours.report.parallel and not ours.report.notes
    (took, *_) = ours.report.solved
    # 128 units in the last place of states of size 3.
    assert took.passes <= 4 and took.residual < 5e-5 and 2 < took.evaluations_per_draw < 6
    assert "solved in parallel time" in str(ours.report)
    np.testing.assert_allclose(ours.last_state.z["x"], theirs.last_state.z["x"], atol=1e-5)
    assert np.all(ours.last_state.i == theirs.last_state.i)


def test_leaves_have_their_parts():
    kernel = Halving()
    state = kernel.init(KEY, 0, None, (), {})
    transition = Transition(lambda one: kernel.sample(one, (), {}), state, "z")
    parts = [{transition._names[k] for k in part} for part in transition.roles]
    assert parts == [
        {".scale"},
        {".i", ".rng_key"},
        {".z['x']", ".z['on']"},
        {".hidden", ".accept_prob", ".mean_accept_prob", ".late"},
    ]


@pytest.mark.parametrize(
    "rule, why",
    [
        ("remembers", "did not forget"),
        ("rarely matters", "hangs on the chain"),
        ("adapts late", "hangs on the chain"),
        ("keys of the chain", "keys depend on where the chain stands"),
    ],
)
def test_what_cannot_be_solved_is_run_by_the_loop_and_says_why(rule, why):
    theirs, ours = runs(Halving(rule))
    np.testing.assert_array_equal(ours.get_samples()["x"], theirs.get_samples()["x"])
    assert not ours.report.parallel and why in str(ours.report)


def test_a_chain_whose_state_changes_its_structure_is_refused():
    with pytest.raises(NoParallelForm, match="structure"):
        Transition(lambda state: (state, state), {"z": jnp.zeros(2)}, "z")


def conjugate(y):
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    spread = numpyro.sample("spread", dist.HalfNormal(3))
    numpyro.sample("y", dist.Normal(mean, spread), obs=y)


Y = np.random.default_rng(0).normal(1.0, 2.0, 30)


def mean_given_spread(rng_key, gibbs_sites, hmc_sites):
    precision = 1 / 25 + len(Y) / hmc_sites["spread"] ** 2
    centre = Y.sum() / hmc_sites["spread"] ** 2 / precision
    return {"mean": dist.Normal(centre, precision**-0.5).sample(rng_key)}


def test_gibbs_in_parallel_time_is_numpyros_own():
    def kernel():
        return HMCGibbs(NUTS(conjugate), gibbs_fn=mean_given_spread, gibbs_sites=["mean"])

    options = {"num_warmup": 100, "num_samples": 300, "progress_bar": False}
    theirs, ours = MCMC(kernel(), **options), ParallelMCMC(kernel(), solver=shooting(), **options)
    for one in (theirs, ours):
        one.run(KEY, Y)
    for name, expected in theirs.get_samples().items():
        np.testing.assert_allclose(ours.get_samples()[name], expected, atol=1e-3, err_msg=name)
    assert ours.report.parallel and ours.report.solved[0].passes < 10


def test_a_solver_needs_chains_that_move_alone():
    from numpyro.infer import AIES

    with pytest.raises(ValueError, match="solver: got one with AIES, wanted none"):
        ParallelMCMC(AIES(conjugate), num_warmup=1, num_samples=1, num_chains=4, solver=shooting())
    with pytest.raises(ValueError, match="schedule: got one with BarkerMH"):
        ParallelMCMC(BarkerMH(conjugate), num_warmup=1, num_samples=1, schedule=object())
