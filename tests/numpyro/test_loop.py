"""Kernels without a form in parallel time: NumPyro's own draws, with a verdict."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import AIES, HMC, MCMC, NUTS, BarkerMH, DiscreteHMCGibbs, HMCGibbs

from partime_mcmc.diagnostics.verdict import NotConverged, NotConvergedWarning
from partime_mcmc.numpyro import CoalescingHMC, ParallelMCMC
from partime_mcmc.numpyro.loop import LoopMCMC

KEY = jax.random.key(3)


def plane():
    """x and y independent and standard normal: x + y and x − y are, too."""
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(0, 1))
    numpyro.deterministic("twice", 2 * x)


def switch():
    """P(c = 1) = 0.7, x | c ~ N(±1, 1)."""
    c = numpyro.sample("c", dist.Categorical(jnp.array([0.3, 0.7])))
    numpyro.sample("x", dist.Normal(2.0 * c - 1.0, 1.0))


def apart():
    """Two modes, 60 standard deviations from each other."""
    at = dist.Normal(jnp.array([-30.0, 30.0]), 1.0)
    numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), at))


def redraw_x(rng_key, gibbs_sites, hmc_sites):
    return {"x": jax.random.normal(rng_key)}


def kinetic_energy(inverse_mass_matrix, momentum):
    """As of unit masses."""
    return 0.5 * sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(momentum))


KERNELS = {
    "BarkerMH": (lambda: BarkerMH(plane), 2),
    "HMCGibbs": (lambda: HMCGibbs(NUTS(plane), redraw_x, ["x"]), 2),
    "DiscreteHMCGibbs": (lambda: DiscreteHMCGibbs(HMC(switch)), 2),
    "AIES": (lambda: AIES(plane), 4),
    "own kinetic energy": (lambda: HMC(plane, kinetic_fn=kinetic_energy), 2),
    "a child of NUTS": (lambda: type("Mine", (NUTS,), {})(plane), 2),
}


@pytest.mark.parametrize("name", KERNELS)
def test_draws_are_those_of_numpyros_own_loop(name):
    make, num_chains = KERNELS[name]
    options = {"num_warmup": 20, "num_samples": 30, "num_chains": num_chains, "progress_bar": False}
    method = "vectorized" if name == "AIES" else "sequential"
    theirs = MCMC(make(), chain_method=method, **options)
    ours = ParallelMCMC(make(), **options)
    for mcmc in (theirs, ours):
        mcmc.run(KEY)
    assert isinstance(ours, LoopMCMC)
    wanted, found = (mcmc.get_samples(group_by_chain=True) for mcmc in (theirs, ours))
    assert wanted.keys() == found.keys()
    for site in wanted:
        np.testing.assert_array_equal(wanted[site], found[site], err_msg=site)
    assert not ours.report.parallel
    assert "no certificate" in str(ours.report)
    assert "30 draws per chain are too few to judge" in str(ours.report)


def test_a_discrete_site_is_judged_like_any_other(capsys):
    mcmc = ParallelMCMC(
        DiscreteHMCGibbs(HMC(switch, trajectory_length=1.5)),
        num_warmup=200,
        num_samples=3000,
        num_chains=2,
        progress_bar=False,
    )
    mcmc.run(KEY, extra_fields=("hmc_state.num_steps",))
    report = mcmc.or_raise().report
    assert report.verdict.outcome.value == "CONVERGED", report
    assert report.num_gradients >= 6000
    # Within four standard errors of 0.7.
    assert abs(float(mcmc.get_samples()["c"].mean()) - 0.7) < 4 * np.sqrt(0.21 / report.verdict.ess)
    mcmc.print_summary()
    assert capsys.readouterr().out.startswith("CONVERGED")
    again = pickle.loads(pickle.dumps(mcmc))
    assert str(again.report) == str(report)


def test_modes_that_no_chain_leaves_are_not_handed_over_in_silence():
    mcmc = ParallelMCMC(
        BarkerMH(apart), num_warmup=200, num_samples=200, num_chains=4, progress_bar=False
    )
    starts = {"x": jnp.array([-30.0, 30.0, -30.0, 30.0])}
    with pytest.warns(NotConvergedWarning, match="R-hat"):
        mcmc.run(KEY, init_params=starts)
    with pytest.raises(NotConverged, match="R-hat"):
        mcmc.or_raise()


def test_warm_up_by_itself_goes_before():
    mcmc = ParallelMCMC(BarkerMH(plane), num_warmup=20, num_samples=40, progress_bar=False)
    mcmc.warmup(KEY, collect_warmup=True)
    assert mcmc.get_samples()["x"].shape == (20,)
    mcmc.run(KEY)
    assert mcmc.get_samples()["x"].shape == (40,)


BAD = {
    "store": (lambda: made().run(KEY, store="runs"), ValueError, "store: got one with BarkerMH"),
    "draws": (lambda: made().draws, RuntimeError, "draws: NumPyro's own loop ran BarkerMH"),
    "report": (lambda: made().report, RuntimeError, "run must be called first"),
    "count": (lambda: made(num_chains=0), ValueError, "num_chains: got 0"),
}


def made(**options):
    return ParallelMCMC(
        BarkerMH(plane), **{"num_warmup": 4, "num_samples": 4, "progress_bar": False, **options}
    )


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()


def test_kernels_of_ours_are_solved():
    mcmc = ParallelMCMC(CoalescingHMC(plane), num_warmup=20, num_samples=4)
    assert type(mcmc) is ParallelMCMC
