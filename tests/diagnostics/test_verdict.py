"""The verdict on a run: right ones converge, wrong ones never, and everything that prints a run says so first."""

import dataclasses
import json
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from partime_mcmc import (
    CoalescingHMC,
    Kernel,
    ParallelMCMC,
    Target,
    Windows,
    coalescing_hmc,
    mala,
    sample,
    sequential,
    shooting,
)
from partime_mcmc.cli import _code_of
from partime_mcmc.diagnostics import describe
from partime_mcmc.diagnostics import verdict as verdicts
from partime_mcmc.diagnostics.verdict import (
    NotConverged,
    NotConvergedWarning,
    Outcome,
    judge,
)
from partime_mcmc.kernels import Whitening


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def run_of(x, *, warmup=None, certified=True, info=None, scores=None):
    """A run as far as a verdict looks at it, with draws `(C, T, D)`."""
    num_chains, num_samples = x.shape[:2]
    return SimpleNamespace(
        positions={"x": x},
        constrained={},
        info=info or {},
        scores=scores,
        certificate=SimpleNamespace(
            certified=np.full(num_chains, certified), frozen=np.zeros(num_chains, bool)
        ),
        warmup=warmup,
        num_chains=num_chains,
        num_samples=num_samples,
    )


def exact(seed, num_chains=4, num_samples=500, dimension=10):
    return np.random.default_rng(seed).normal(size=(num_chains, num_samples, dimension))


def test_right_runs_converge():
    found = [judge(run_of(exact(seed))).outcome for seed in range(40)]
    assert found.count(Outcome.CONVERGED) >= 38


def shifted(seed):
    x = exact(seed)
    x[2, :, 3] += 3
    return run_of(x)


def drifting(seed):
    x = exact(seed)
    x[..., 0] += np.linspace(0, 4, x.shape[1])
    return run_of(x)


def wider(seed):
    """Locations agree, one chain's scale does not."""
    x = exact(seed)
    x[1] *= 5
    return run_of(x)


def frozen(seed):
    x = exact(seed)
    x[3, :, 2] = 0.5
    return run_of(x)


def uncertified(seed):
    return run_of(exact(seed), certified=False)


def one_mode_kept(seed):
    """Two chains are kept, which agree; the eight of warm-up did not."""
    return run_of(exact(seed, 2), warmup=SimpleNamespace(rhat=40.0, settled=False))


@pytest.mark.parametrize("make", [shifted, drifting, wider, frozen, uncertified, one_mode_kept])
def test_wrong_runs_never_converge(make):
    for seed in range(20):
        verdict = judge(make(seed))
        assert verdict.outcome is Outcome.NOT_CONVERGED, verdict
        with pytest.raises(NotConverged, match="NOT CONVERGED: "):
            verdict.or_raise()


def unsettled(seed):
    return run_of(exact(seed), warmup=SimpleNamespace(rhat=1.15, settled=False))


def sticky(seed):
    """Right in law, but strongly autocorrelated: too few effective draws."""
    x = exact(seed)
    for step in range(1, x.shape[1]):
        x[:, step] = 0.98 * x[:, step - 1] + np.sqrt(1 - 0.98**2) * x[:, step]
    return run_of(x)


def diverging(seed):
    x = exact(seed)
    return run_of(x, info={"diverging": np.arange(x.shape[1]) % 50 == np.zeros((4, 1))})


def narrowing(seed, low=0.3, edge=-2.0):
    """Proposals from where one coordinate is low are refused more often."""
    x = exact(seed)
    rates = np.full(x.shape[:2], 0.9)
    # Of the step from one draw to the next.
    rates[:, 1:] = np.where(x[:, :-1, 4] < edge, low, 0.9)
    return run_of(x, info={"acceptance_rate": rates})


def slow_energy(seed):
    return run_of(exact(seed), info={"energy": np.cumsum(exact(seed)[..., 0], axis=1)})


def short(seed):
    return run_of(exact(seed, num_samples=20))


@pytest.mark.parametrize("make", [unsettled, sticky, diverging, narrowing, slow_energy, short])
def test_doubtful_runs_are_not_called_converged(make):
    found = {judge(make(seed)).outcome for seed in range(20)}
    assert Outcome.CONVERGED not in found and (make is sticky or found == {Outcome.UNDECIDED})


def test_a_neck_is_named_and_a_slightly_lower_acceptance_is_none():
    found = judge(narrowing(0)).grounds[0]
    assert "0.30 where x[4] is lowest" in found and "0.8" in found
    assert judge(narrowing(0, low=0.6)).outcome is Outcome.CONVERGED
    # A random walk's rates are 0 or 1, nearly: tails of 40 draws have low ones by chance.
    x = exact(1, dimension=50)
    rates = (np.random.default_rng(1).random(x.shape[:2]) < 0.3).astype(float)
    assert judge(run_of(x, info={"acceptance_rate": rates})).outcome is Outcome.CONVERGED


def of_normal(positions):
    """Rows and gradients of a standard normal's log density."""
    return positions["x"], -positions["x"]


def test_draws_of_another_law_are_doubted_though_they_mix():
    """As of a kernel with a wrong acceptance ratio: nothing else is wrong with them."""
    right, wide, off = [], [], []
    for seed in range(40):
        x = exact(seed, num_samples=1000)
        right.append(judge(run_of(x, scores=of_normal)).outcome)
        wide.append(judge(run_of(1.1 * x, scores=of_normal)))
        off.append(judge(run_of(x + 0.15, scores=of_normal)))
    assert right.count(Outcome.CONVERGED) >= 39
    assert {verdict.outcome for verdict in wide + off} == {Outcome.UNDECIDED}
    assert "the spread of all coordinates" in str(wide[0])
    assert all("Stein's identity at x[" in str(verdict) for verdict in off)


def test_a_density_without_a_gradient_is_judged_by_the_rest():
    def broken(positions):
        raise TypeError("no derivative")

    for scores in (broken, lambda positions: (positions["x"], np.nan * positions["x"])):
        verdict = judge(run_of(exact(0), scores=scores))
        assert verdict.outcome is Outcome.CONVERGED and "Stein" not in str(verdict)


def test_a_kernel_that_never_rejects_is_not_called_converged():
    def logdensity(x):
        return -0.5 * jnp.sum(x**2)

    target = Target(logdensity, lambda key: jax.random.normal(key, (6,)))
    # Two leapfrogs of 1 keep a normal whose variance is larger by 1 / (1 - 1 / 4) = 1.33.
    step = lambda key, x: (_two_leapfrogs(x, jax.random.normal(key, x.shape), 1.0), ())
    kernel = Kernel(SimpleNamespace(init=lambda position, rng_key=None: position, step=step))
    draws = sample(
        jax.random.key(3), target, kernel, num_samples=1000, solver=sequential(), progress=False
    )
    assert draws.certificate.certified.all() and draws.verdict.rhat < 1.01
    assert draws.verdict.outcome is Outcome.UNDECIDED and "acceptance ratio" in str(draws.verdict)
    alone = dataclasses.replace(draws, scores=None)
    assert alone.verdict.outcome is Outcome.CONVERGED, "without gradients nobody would know"


def _two_leapfrogs(x, p, size):
    for _ in range(2):
        p = p - 0.5 * size * x
        x = x + size * p
        p = p - 0.5 * size * x
    return x


def test_many_short_chains_are_judged_by_their_superchains():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(32), 16)
    x = rng.normal(size=(512, 6, 3))
    assert judge(run_of(x)).outcome is Outcome.UNDECIDED, "six draws a chain, and no superchains"
    verdict = judge(run_of(x), labels)
    assert verdict.outcome is Outcome.CONVERGED and "nested R-hat" in str(verdict)
    remembered = x + rng.normal(size=(32, 1, 3)).repeat(16, axis=0)
    assert judge(run_of(remembered), labels).outcome is Outcome.NOT_CONVERGED
    few = judge(run_of(x[:64]), labels[:64])
    assert few.outcome is Outcome.UNDECIDED and "64 chains of 6 draws" in str(few)


def two_modes():
    """Far apart, of equal weight: no chain goes from one to the other."""

    def logdensity(x):
        return jnp.logaddexp(*(-0.5 * jnp.sum((x - place) ** 2) for place in (-20.0, 20.0)))

    return Target(logdensity, lambda key: 15 * jax.random.normal(key, (2,)))


def test_modes_that_no_chain_leaves_are_reported_everywhere():
    with pytest.warns(NotConvergedWarning, match="NOT CONVERGED: R-hat"):
        draws = sample(
            jax.random.key(0), two_modes(), coalescing_hmc, num_samples=200, num_chains=4,
            num_warmup=300, progress=False,
        )  # fmt: skip
    assert draws.certificate.certified.all(), "the chains are those of the kernel, and yet"
    assert draws.verdict.outcome is Outcome.NOT_CONVERGED and draws.verdict.rhat > 1.1
    assert repr(draws).startswith("Draws(NOT CONVERGED; ")
    assert describe.run_text(draws).startswith("NOT CONVERGED: ")
    assert "NOT CONVERGED" in draws._repr_html_()
    told = json.loads(describe.run_json(draws))
    assert told["verdict"] == "NOT CONVERGED" and told["grounds"] and told["certified"]
    assert _code_of(draws) == 3
    with pytest.raises(NotConverged):
        draws.or_raise()
    one = dataclasses.replace(
        draws, **{name: jax.tree.map(lambda leaf: leaf[:1], getattr(draws, name)) for name in ("positions", "constrained", "info", "certificate")}
    )  # fmt: skip
    assert one.verdict.outcome is Outcome.NOT_CONVERGED, "the pooled chains of warm-up still know"


def test_segments_that_met_say_how_soon_a_chain_forgets():
    """The same chain in two windows as in one; rolled one step after another there are no segments that could tell."""
    target = Target(lambda x: -0.5 * jnp.sum(x**2), lambda key: jax.random.normal(key, (3,)))
    metric = Whitening.of_covariance(jnp.zeros(3), np.zeros(3), np.eye(3))
    kernel = coalescing_hmc(
        target.logdensity, 0.7, metric, num_integration_steps=2, mala_step_size=0.5
    )
    options = {"num_samples": 1024, "num_chains": 2, "num_warmup": 0, "progress": False}
    one, two, rolled = (
        sample(jax.random.key(0), target, kernel, **options, **extra)
        for extra in (
            {"solver": shooting(steps=128)},
            {"solver": shooting(steps=128), "schedule": Windows(512)},
            {"solver": sequential()},
        )
    )
    assert 0 < one.report.memory < 100 and 0 < two.report.memory < 100
    assert one.report.depth == 128 + one.report.memory
    assert f"back on its path within {one.report.memory} steps" in str(one.verdict)
    assert rolled.report.memory is None and "back on" not in str(rolled.verdict)


def test_a_good_run_says_so_and_warns_of_nothing(capsys):
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=1.0)

    mcmc = ParallelMCMC(
        CoalescingHMC(model), num_warmup=600, num_samples=600, num_chains=4, progress_bar=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mcmc.run(jax.random.key(1))
    assert mcmc.report.verdict.outcome is Outcome.CONVERGED, str(mcmc.report)
    assert str(mcmc.report).startswith("CONVERGED: R-hat") and mcmc.or_raise() is mcmc
    assert any("warm-up" in ground for ground in mcmc.report.verdict.grounds)
    assert any("Stein's identity" in ground for ground in mcmc.report.verdict.grounds)
    mcmc.print_summary()
    assert capsys.readouterr().out.startswith("CONVERGED: ")
    assert mcmc.draws.certificate.num_rejected.sum() > 0


@pytest.mark.parametrize("num_samples, outcome", [(800, Outcome.CONVERGED), (60, None)])
def test_a_run_on_disk_is_judged_by_what_it_keeps(tmp_path, monkeypatch, num_samples, outcome):
    monkeypatch.setattr(verdicts, "_MOST_DRAWS", 500)
    target = Target(lambda x: -0.5 * jnp.sum(x**2), lambda key: jax.random.normal(key, (3,)))
    options = {"num_samples": num_samples, "num_chains": 4, "num_warmup": 500, "progress": False}
    draws = sample(jax.random.key(4), target, coalescing_hmc, store=tmp_path / "run", **options)
    assert outcome in (draws.verdict.outcome, None) and np.isfinite(draws.verdict.rhat)
    assert str(draws.verdict) in describe.run_text(draws).replace("\n    ", " ")


def test_a_step_size_that_is_too_small_is_not_called_converged():
    target = Target(lambda x: -0.5 * jnp.sum(x**2), lambda key: 3 * jax.random.normal(key, (5,)))
    whitening = Whitening.of_covariance(np.zeros(5), np.zeros(5), np.ones(5))
    draws = sample(
        jax.random.key(2), target, mala(target.logdensity, 1e-4, whitening), num_samples=500,
        num_chains=4, progress=False,
    )  # fmt: skip
    assert draws.verdict.outcome is Outcome.NOT_CONVERGED
