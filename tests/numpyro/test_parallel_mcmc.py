"""`ParallelMCMC` keeps NumPyro's contract: a script that uses `MCMC` can use it unchanged, and the chains are NumPyro's
own loop's.

One model and three runs serve most tests; programs are shared because shapes are.
"""

import functools
import inspect
import warnings

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from fakes import exact_path
from numpyro.infer import MCMC, Predictive, log_likelihood

from partime_mcmc.diagnostics.arviz import to_arviz
from partime_mcmc.diagnostics.checks import PrecisionWarning
from partime_mcmc.diagnostics.report import Level
from partime_mcmc.engine.recipes import jacobi, sequential
from partime_mcmc.numpyro import HMC, MALA, NUTS, BlackJAXKernel, CoalescingHMC, ParallelMCMC
from partime_mcmc.storage.saved_run import StoreMismatch
from partime_mcmc.storage.store import Store
from partime_mcmc.validation import InvalidStart

WARMUP, SAMPLES, CHAINS = 240, 160, 4
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


X = np.linspace(-1, 1, 12)
Y = 1.0 + 2.0 * X + 0.3 * np.cos(9 * X)


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 5))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    level = numpyro.deterministic("level", 0.5 * slope + 1.0)
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Normal(level + slope * (x - 0.5), noise), obs=y)


@functools.cache
def sampler():
    return CoalescingHMC(line)


@functools.cache
def finished():
    """A run with a silent progress bar and every field."""
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        mcmc = ParallelMCMC(sampler(), num_warmup=WARMUP, num_samples=SAMPLES, num_chains=CHAINS)
        mcmc.run(
            KEY,
            X,
            y=Y,
            extra_fields=(
                "potential_energy",
                "num_steps",
                "accept_prob",
                "z.noise",
                "adapt_state.step_size",
            ),
        )
        return mcmc


def test_what_is_overridden_is_what_numpyro_has():
    """NumPyro's private method that moves chains, by its arguments, and the collection parameters that it reads."""
    theirs = inspect.signature(MCMC._single_chain_mcmc)
    assert list(theirs.parameters) == [
        "self",
        "init",
        "args",
        "kwargs",
        "collect_fields",
        "remove_sites",
    ]
    assert theirs == inspect.signature(ParallelMCMC._single_chain_mcmc)
    assert list(inspect.signature(MCMC.run).parameters) == [
        name for name in inspect.signature(ParallelMCMC.run).parameters if name != "store"
    ]
    ours = inspect.signature(ParallelMCMC.__init__).parameters
    assert set(inspect.signature(MCMC.__init__).parameters) <= set(ours)
    assert set(finished()._collection_params) == {"lower", "upper", "collection_size", "phase"}


def test_draws_fields_and_report():
    mcmc = finished()
    grouped, flat = mcmc.get_samples(group_by_chain=True), mcmc.get_samples()
    assert {name: value.shape for name, value in grouped.items()} == {
        name: (CHAINS, SAMPLES) for name in ("slope", "noise", "level")
    }
    np.testing.assert_array_equal(flat["slope"], np.asarray(grouped["slope"]).reshape(-1))
    np.testing.assert_allclose(grouped["level"], 0.5 * grouped["slope"] + 1)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert set(fields) == {
        "diverging",
        "potential_energy",
        "num_steps",
        "accept_prob",
        "z.noise",
        "adapt_state.step_size",
    }
    np.testing.assert_allclose(np.exp(fields["z.noise"]), grouped["noise"])
    assert (
        fields["potential_energy"].shape == (CHAINS, SAMPLES) and fields["diverging"].dtype == bool
    )
    exact_path(mcmc.draws)
    report = mcmc.report
    assert (
        report.level == Level.CERTIFIED_PATH
        and report.parallel
        and report.warmup.num_steps <= WARMUP
    )
    assert "CERTIFIED_PATH" in str(report) and "gradients in all" in str(report)


def test_summary_is_numpyros(capsys):
    finished().print_summary()
    printed = capsys.readouterr().out
    assert "slope" in printed and "level" not in printed and "Number of divergences: 0" in printed


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_arviz_predictive_and_log_likelihood_take_it():
    mcmc = finished()
    try:
        from arviz_base import from_numpyro
    except ImportError:
        from arviz import from_numpyro
    posterior = from_numpyro(mcmc)["posterior"]
    assert posterior["slope"].shape == (CHAINS, SAMPLES)
    drawn = Predictive(line, mcmc.get_samples())(KEY, X)
    assert drawn["y"].shape == (CHAINS * SAMPLES, len(X))
    assert log_likelihood(line, mcmc.get_samples(), X, y=Y)["y"].shape == (CHAINS * SAMPLES, len(X))
    assert to_arviz(mcmc.draws) is not None


def test_numpyros_own_mcmc_walks_the_same_chains():
    """The sequential reference: the same kernel object, keys and states in NumPyro's `MCMC`."""
    mcmc = finished()
    theirs = MCMC(
        sampler(),
        num_warmup=0,
        num_samples=SAMPLES,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    warmed = ParallelMCMC(sampler(), num_warmup=WARMUP, num_samples=SAMPLES, num_chains=CHAINS)
    warmed.warmup(KEY, X, y=Y)
    theirs.post_warmup_state = warmed.post_warmup_state
    theirs.run(
        jax.random.split(KEY, CHAINS),
        X,
        y=Y,
        extra_fields=("accept_prob", "num_steps", "mean_accept_prob"),
    )
    np.testing.assert_allclose(
        theirs.get_samples()["slope"], mcmc.get_samples()["slope"], rtol=1e-8
    )
    np.testing.assert_allclose(
        theirs.get_extra_fields()["accept_prob"], mcmc.get_extra_fields()["accept_prob"], rtol=1e-6
    )
    np.testing.assert_allclose(
        theirs.last_state.mean_accept_prob, mcmc.last_state.mean_accept_prob, rtol=1e-6
    )
    np.testing.assert_array_equal(
        theirs.last_state.adapt_state.discrete["phase"],
        mcmc.last_state.adapt_state.discrete["phase"],
    )


def test_going_on_from_the_last_state_is_one_long_run():
    """Two halves with the chains' own keys are the whole, to the last bit of a chain that lands on the same floats."""
    whole = finished()
    half = ParallelMCMC(sampler(), num_warmup=WARMUP, num_samples=SAMPLES // 2, num_chains=CHAINS)
    half.run(KEY, X, y=Y)
    first = half.get_samples(group_by_chain=True)["slope"]
    half.post_warmup_state = half.last_state
    half.run(half.post_warmup_state.rng_key, X, y=Y)
    assert half.report.warmup is None
    joined = np.concatenate([first, half.get_samples(group_by_chain=True)["slope"]], axis=1)
    np.testing.assert_allclose(joined, whole.get_samples(group_by_chain=True)["slope"], rtol=1e-9)
    np.testing.assert_array_equal(half.last_state.i, whole.last_state.i)


def test_a_run_on_disk_is_the_run_in_memory(tmp_path):
    """Stored in two chunks, the second lost and drawn again by another object with another kernel of the same model."""
    fields = ("potential_energy", "num_steps", "accept_prob")

    def run(kernel, **changes):
        mcmc = ParallelMCMC(
            kernel, num_warmup=WARMUP, num_samples=SAMPLES, num_chains=CHAINS, progress_bar=False
        )
        mcmc.run(
            KEY,
            X,
            **(
                {"y": Y, "store": Store(tmp_path, chunk=SAMPLES // 2), "extra_fields": fields}
                | changes
            ),
        )
        return mcmc

    mcmc, whole = run(sampler()), finished()
    for name, values in whole.get_samples(group_by_chain=True).items():
        np.testing.assert_allclose(mcmc.get_samples(group_by_chain=True)[name], values, rtol=1e-9)
    for name in fields:
        np.testing.assert_allclose(
            mcmc.get_extra_fields()[name], whole.get_extra_fields()[name], rtol=1e-6, atol=1e-9
        )
    assert mcmc.report.level == Level.CERTIFIED_PATH and mcmc.draws.finished
    for name in ("i", "mean_accept_prob", "num_steps"):
        np.testing.assert_allclose(
            getattr(mcmc.last_state, name), getattr(whole.last_state, name), rtol=1e-9
        )
    before = mcmc.get_samples()
    # As if it had died before the second chunk was committed.
    sorted(tmp_path.glob("chunk-*.npz"))[1].unlink()
    again = run(CoalescingHMC(line))
    jax.tree.map(np.testing.assert_array_equal, again.get_samples(), before)
    jax.tree.map(
        np.testing.assert_array_equal, again.last_state.adapt_state, mcmc.last_state.adapt_state
    )
    with pytest.raises(StoreMismatch, match="data: "):
        run(sampler(), y=Y + 1)
    with pytest.raises(ValueError, match="extra_fields: got 'z.noise' with a store"):
        run(sampler(), extra_fields=("z.noise",))


@pytest.mark.slow
def test_thinning_one_chain_and_left_out_sites():
    mcmc = ParallelMCMC(
        sampler(),
        num_warmup=WARMUP,
        num_samples=SAMPLES,
        num_chains=CHAINS,
        thinning=3,
        chain_method="parallel",
    )
    mcmc.run(KEY, X, y=Y, extra_fields=("~z.level",))
    kept = np.asarray(finished().get_samples(group_by_chain=True)["slope"])[:, SAMPLES % 3 + 2 :: 3]
    np.testing.assert_array_equal(mcmc.get_samples(group_by_chain=True)["slope"], kept)
    assert set(mcmc.get_samples()) == {"slope", "noise"} and kept.shape == (CHAINS, SAMPLES // 3)
    alone = ParallelMCMC(sampler(), num_warmup=WARMUP, num_samples=20, solver=sequential())
    alone.run(KEY, X, y=Y, init_params={"slope": jnp.zeros(()), "noise": jnp.zeros(())})
    assert (
        alone.get_samples(group_by_chain=True)["slope"].shape == (1, 20)
        and alone.last_state.i == 20
    )
    assert not alone.report.parallel and alone.report.level == Level.CERTIFIED_PATH


def test_a_second_run_compiles_nothing():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **more: compiled.append(name) if "backend_compile" in name else None
    )
    mcmc, other = finished(), jax.random.key(3)  # making a key is a program, too
    mcmc.run(KEY, X, y=Y)
    compiled.clear()
    mcmc.run(other, X, y=Y)
    assert mcmc.report.run.seconds_compile < 1 and len(compiled) <= 1


KERNELS = {
    "hmc": lambda: HMC(line, trajectory_length=1.4, target_accept_prob=0.9),
    "nuts": lambda: NUTS(line, dense_mass=False, max_tree_depth=(5, 6)),
    "mala": lambda: MALA(potential_fn=lambda z: 0.5 * jnp.sum((z - 3.0) ** 2)),
    "blackjax": lambda: BlackJAXKernel(
        lambda logdensity, step_size: blackjax.barker(logdensity, step_size), line
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_runs(name):
    kernel = KERNELS[name]()
    mcmc = ParallelMCMC(
        kernel, num_warmup=120, num_samples=24, num_chains=2, solver=jacobi(), progress_bar=False
    )
    data = (X, Y) if kernel.model is not None else ()
    mcmc.run(
        KEY,
        *data,
        init_params=None if data else jnp.zeros((2, 3)),
        extra_fields=("accept_prob", "num_steps"),
    )
    exact_path(mcmc.draws)
    report = mcmc.report
    assert report.level == Level.CERTIFIED_PATH and report.warmup.settings["step_size"] > 0
    assert np.ptp(mcmc.get_extra_fields()["accept_prob"]) > 0
    if name == "nuts":
        assert report.warmup.whitening.scale.ndim == 1
    if name == "hmc":
        settings = report.warmup.settings
        assert settings["step_size"] * settings["num_integration_steps"] == pytest.approx(1.4)
    if name == "mala":
        assert mcmc.get_samples().shape == (48, 3) and abs(np.mean(mcmc.get_samples()) - 3) < 1


# --- faults


def bad_start():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("box", jnp.where(x > 50, 0.0, -jnp.inf))


def nan_gradient():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("trap", jnp.where(x > 100, jnp.sqrt(x - 100) * 0, 0.0))


MODELS = {
    "-inf everywhere": (bad_start, InvalidStart, "no start with a finite"),
    "NaN gradient": (nan_gradient, InvalidStart, "no start with a finite"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_sampled(case):
    model, error, words = MODELS[case]
    with pytest.raises(error, match=words):
        ParallelMCMC(CoalescingHMC(model), num_warmup=40, num_samples=4).run(KEY)


ARGUMENTS = {
    "no samples": (
        lambda: ParallelMCMC(sampler(), num_warmup=40, num_samples=0),
        ValueError,
        "num_samples: got 0",
    ),
    "no chains": (
        lambda: ParallelMCMC(sampler(), num_warmup=40, num_samples=4, num_chains=0),
        ValueError,
        "num_chains: got 0",
    ),
    "step size": (
        lambda: _run(CoalescingHMC(line, step_size=-0.1)),
        ValueError,
        "step_size: got -0.1",
    ),
    "metric": (
        lambda: CoalescingHMC(line, inverse_mass_matrix=-np.eye(2)),
        ValueError,
        "inverse_mass_matrix",
    ),
    "metric shape": (
        lambda: _run(CoalescingHMC(line, inverse_mass_matrix=np.eye(3))),
        ValueError,
        "inverse_mass_matrix",
    ),
    "key": (lambda: _run(sampler(), key=3), TypeError, "rng_key: got 3"),
    "too many keys": (
        lambda: _run(sampler(), key=jax.random.split(KEY, 3), num_chains=2),
        ValueError,
        "got 3 keys for 2 chains",
    ),
    "field": (
        lambda: finished().run(KEY, X, y=Y, extra_fields=("steps",)),
        ValueError,
        "extra_fields: got 'steps'",
    ),
    "two models": (lambda: HMC(line, lambda z: 0.0), ValueError, "exactly one"),
    "starts": (
        lambda: _run(
            sampler(),
            init_params={"slope": jnp.full(2, jnp.nan), "noise": jnp.zeros(2)},
            num_chains=2,
        ),
        InvalidStart,
        "init_params",
    ),
    "integer starts": (
        lambda: _run(
            sampler(),
            init_params={"slope": jnp.zeros(2, int), "noise": jnp.zeros(2, bool)},
            num_chains=2,
        ),
        InvalidStart,
        "init_params",
    ),
    "vector density": (
        lambda: _run(HMC(potential_fn=lambda z: z**2), init_params=jnp.ones(2), data=()),
        InvalidStart,
        r"\.sum\(\)",
    ),
}


def _run(kernel, key=KEY, data=(X, Y), init_params=None, **counts):
    mcmc = ParallelMCMC(kernel, **({"num_warmup": 40, "num_samples": 4} | counts))
    mcmc.run(key, *data, init_params=init_params)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments(case):
    run, error, words = ARGUMENTS[case]
    with pytest.raises(error, match=words):
        run()


def test_an_improper_posterior_is_suspected():
    with pytest.warns(UserWarning, match="improper|accepted less than"):
        _run(
            CoalescingHMC(potential_fn=lambda z: 0.0 * jnp.sum(z)),
            init_params=jnp.ones(2),
            data=(),
            num_warmup=200,
        )


def test_a_density_that_loses_its_digits_in_float32_is_found_out():
    def potential(z):
        return jnp.sum((1e4 + z) ** 2) - 2e8 - 2e4 * jnp.sum(z)

    with jax.enable_x64(False), pytest.warns(PrecisionWarning, match="Run in float64"):
        _run(HMC(potential_fn=potential), init_params=jnp.full(2, 0.7, jnp.float32), data=())
