"""Sampling from end to end: the chain is BlackJAX's own whatever solves it, faults are seen, and nothing hides."""

import functools
import sys
import threading
import time
from types import SimpleNamespace
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import exact_path
from kernel_catalogue import logdensity_of

from partime_mcmc.diagnostics.checks import NonDeterministicTarget
from partime_mcmc.engine.recipes import jacobi, quasi_deer, sequential
from partime_mcmc.engine.solution import SolveError, Status
from partime_mcmc.engine.windows import AllAtOnce, SlidingWindow, Windows
from partime_mcmc.kernels import Kernel, from_blackjax, hmc, mala
from partime_mcmc.models.eight_schools import make_target as eight_schools
from partime_mcmc.sampling import plan, progress
from partime_mcmc.sampling.local import LocalExecutor
from partime_mcmc.sampling.pilots import advise_plan
from partime_mcmc.sampling.progress import progress_line, quiet
from partime_mcmc.sampling.sample import sample
from partime_mcmc.sampling.target import Target
from partime_mcmc.validation import InvalidStart

T, CHAINS, STEP = 90, 3, 0.35


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def target():
    """A dict position with a site called "position"; every chain has its own start."""

    def initial(key):
        return {"position": jax.random.normal(key, (2,)), "slope": jnp.asarray(0.3)}

    return Target(logdensity_of(jnp.float64), initial)


@functools.cache
def kernel():
    return from_blackjax(blackjax.mala(target().logdensity, STEP), noise_scale=np.sqrt(2 * STEP))


def run(key=None, **changes):
    """The run that most tests look at, or a variation of it."""
    arguments = {
        "num_samples": T,
        "num_chains": CHAINS,
        "solver": jacobi(),
        "schedule": Windows(32),
    } | changes
    return sample(jax.random.key(0) if key is None else key, target(), kernel(), **arguments)


@pytest.fixture(scope="module")
def base():
    with jax.enable_x64(True):
        return run()


@functools.cache
def by_hand():
    """The chains as a BlackJAX user would draw them, by the documented use of the key."""
    start_key, _, chains_key = jax.random.split(jax.random.key(0), 3)
    algorithm = blackjax.mala(target().logdensity, STEP)

    def advance(state, key):
        state, info = algorithm.step(key, state)
        return state, (state.position, info)

    def chain(start_key, key):
        return jax.lax.scan(
            advance, algorithm.init(target().initial(start_key)), jax.random.split(key, T)
        )[1]

    return jax.jit(jax.vmap(chain))(
        jax.random.split(start_key, CHAINS), jax.random.split(chains_key, CHAINS)
    )


def assert_same_chains(draws, wanted, atol=1e-8):
    for name, values in wanted.items():
        np.testing.assert_allclose(draws.positions[name], values, rtol=0, atol=atol, err_msg=name)


# --- the chain


def test_draws_are_blackjaxs_own_chains(base):
    positions, infos = by_hand()
    assert_same_chains(base, positions)
    np.testing.assert_array_equal(base.info["accepted"], infos.is_accepted)
    np.testing.assert_allclose(base.info["acceptance_rate"], infos.acceptance_rate, atol=1e-8)
    density = jax.vmap(jax.vmap(target().logdensity))(positions)
    np.testing.assert_allclose(base.info["logdensity"], density, atol=1e-8)
    rejected = (~np.asarray(infos.is_accepted)).sum(axis=1)
    assert (rejected > 10).all() and (rejected < T - 10).all()
    np.testing.assert_array_equal(base.certificate.num_rejected, rejected)


def test_what_a_run_returns(base):
    assert base.report.status == (Status.CONVERGED,) * CHAINS and exact_path(base) is base
    assert {name: leaf.shape for name, leaf in base.positions.items()} == {
        "position": (CHAINS, T, 2),
        "slope": (CHAINS, T),
    }
    assert set(base.constrained) == {"position", "slope"} and base.warmup is None
    assert {value.shape for value in base.info.values()} == {(CHAINS, T)}
    assert set(base.info) == {"accepted", "acceptance_rate", "logdensity", "residual"}
    certificate = base.certificate
    assert np.asarray(certificate.certified).tolist() == [True] * CHAINS
    assert certificate.max_residual.shape == (CHAINS,) and certificate.residual.shape == (CHAINS, T)
    report = base.report
    assert report.dtype == "float64" and report.fallbacks == () and not report.num_sequential.any()
    assert report.iterations.shape == (CHAINS,) and (report.iterations > 3).all()
    assert report.jvps_per_sample == 0 and 1 < report.evaluations_per_sample < 40
    assert (
        report.residual_history.shape[0] == CHAINS
        and report.seconds_compile > 0
        and report.versions["jax"]
    )
    plan = base.plan
    assert plan["key"] == [0, 0] and plan["num_samples"] == T and plan["num_chains"] == CHAINS
    assert "ZeroJacobian" in plan["solver"] and "32" in plan["schedule"]


def test_draws_answer_like_stored_ones(base):
    assert (base.num_samples, base.num_chains) == (T, CHAINS) and base.finished
    assert base.status == base.report.status and base.warmup_notes == ""
    assert dict(base.posterior.sizes) == {"chain": CHAINS, "draw": T, "position_dim_0": 2}
    np.testing.assert_array_equal(base.posterior["slope"], base.constrained["slope"])
    np.testing.assert_array_equal(base.sample_stats["lp"], base.info["logdensity"])
    shown = repr(base)
    assert f"{CHAINS} chains x {T} draws of position, slope" in shown and len(shown) < 200


def test_pilots_run_when_advice_is_looked_at(base, monkeypatch):
    asked = []

    def counted(plan, pool):
        asked.append(plan)
        return advise_plan(plan, pool)

    monkeypatch.setattr(sys.modules["partime_mcmc.sampling.sample"], "advise_plan", counted)
    draws = run(num_samples=40, num_chains=2, solver=None)
    assert not asked and "shooting" in draws.plan["solver"].lower()
    assert 0 <= draws.advice.meeting.fraction_met <= 1
    assert draws.advice is draws.advice and len(asked) == 1
    assert run(num_samples=0, num_chains=2).advice is None


def test_same_seed_and_plan_same_bits_with_progress_and_a_legacy_key(base, capsys):
    assert capsys.readouterr().err == ""
    again = run(jax.random.PRNGKey(0), progress=progress_line)
    jax.tree.map(np.testing.assert_array_equal, again.positions, base.positions)
    jax.tree.map(np.testing.assert_array_equal, again.info, base.info)
    assert again.plan == base.plan
    printed = capsys.readouterr()
    assert printed.out == "" and "sampling" in printed.err and f"{T}/{T}" in printed.err
    assert "all chains certified" in printed.err


def test_a_stage_says_that_it_compiles_until_its_first_steps_are_done(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_TICK_SECONDS", 0.02)
    with progress_line.stage("sampling", 10) as advance:
        advance(0, residual=1)
        time.sleep(0.5)
        waiting = capsys.readouterr().err
        advance(4, residual=2)
        time.sleep(0.2)
        advance(6, residual=2)
    assert waiting.count("compiling") > 5 and "residual" not in waiting
    begun = capsys.readouterr().err
    assert "compiling" not in begun and "10/10" in begun and "residual=2" in begun
    assert all("ticks" not in one.name for one in threading.enumerate())


@pytest.mark.parametrize(
    ("solver", "schedule"),
    [
        (None, Windows(41)),
        (quasi_deer(damping=0.1), Windows(45)),
        (sequential(), None),
        (jacobi(), SlidingWindow(20)),
    ],
    ids=["default", "quasi-deer", "sequential", "sliding"],
)
def test_another_solver_and_schedule_give_the_same_chains(solver, schedule):
    draws = run(solver=solver, schedule=schedule)
    assert_same_chains(draws, by_hand()[0])
    assert exact_path(draws).report.fallbacks == ()
    rejected = ~np.asarray(draws.info["accepted"])[:, 1:]
    moved = (np.diff(np.asarray(draws.positions["position"]), axis=1) != 0).any(axis=-1)
    assert rejected.any() and not (moved & rejected).any(), (
        "rejected steps are exact to the last bit"
    )


def test_a_solver_that_cannot_converge_falls_back_to_the_exact_chain_and_says_so():
    draws = run(schedule=Windows(15), max_iterations=1)
    assert_same_chains(draws, by_hand()[0], atol=1e-12)
    report = exact_path(draws).report
    # One pass of Jacobi makes the first step of a window right, at least: what is right is kept.
    assert (report.num_sequential < T).all() and (report.num_sequential > T / 2).all()
    first = [sentence for sentence in report.fallbacks if "steps 0 to 15" in sentence]
    assert len(first) == CHAINS
    assert all("OUT_OF_ITERATIONS" in sentence and "sequentially" in sentence for sentence in first)
    assert any("steps are exact and kept" in sentence for sentence in report.fallbacks)
    given_up = [
        number
        for number, sentence in enumerate(report.fallbacks)
        if sentence.startswith("from step 30 on all")
    ]
    assert given_up == [len(report.fallbacks) - 1], "having given up, it must not try again"


def test_one_chain_and_one_step():
    draws = run(num_chains=1, num_samples=1, schedule=AllAtOnce())
    assert draws.positions["position"].shape == (1, 1, 2) and bool(
        exact_path(draws).certificate.certified[0]
    )
    start_key, _, chains_key = jax.random.split(jax.random.key(0), 3)
    state = kernel().init(target().initial(jax.random.split(start_key, 1)[0]))
    state, _ = kernel().step(jax.random.split(jax.random.split(chains_key, 1)[0], 1)[0], state)
    np.testing.assert_allclose(
        draws.positions["position"][0, 0], state.position["position"], atol=1e-12
    )


@pytest.mark.parametrize("schedule", [Windows(8), AllAtOnce()], ids=["windows", "all at once"])
def test_no_steps(schedule):
    draws = run(num_samples=0, num_chains=2, schedule=schedule)
    assert {leaf.shape for leaf in jax.tree.leaves(draws.positions)} == {(2, 0, 2), (2, 0)}
    assert {leaf.dtype for leaf in jax.tree.leaves(draws.positions)} == {jnp.dtype("float64")}
    assert {value.shape for value in draws.info.values()} == {(2, 0)}
    assert exact_path(draws).report.evaluations_per_sample == 0


# --- trouble at run time


class _Walk(NamedTuple):
    position: jax.Array


def _walk_into_nan(key, state):
    """An autoregression that keeps its first coordinate; where that is large it leaves the finite numbers."""
    x = state.position
    new = jnp.concatenate([x[:1], 0.6 * jnp.sin(x[1:]) + jax.random.normal(key, (2,))])
    return _Walk(jnp.where((x[0] > 50) & (new[1] > 1.5), jnp.nan, new)), ()


def test_one_bad_chain_leaves_the_others_bit_for_bit():
    """Chain 5 of eight meets NaN in its first window: its status is NONFINITE, and seven chains are as if it were well."""
    kernel = Kernel(
        SimpleNamespace(init=lambda position: _Walk(position), step=_walk_into_nan), noise_scale=1.0
    )
    start_key = jax.random.split(jax.random.key(0), 3)[0]
    unlucky = jax.random.key_data(jax.random.split(start_key, 8)[5])

    def initial(far, key):
        is_it = jnp.all(jax.random.key_data(key) == unlucky)
        return jnp.zeros(3).at[0].set(jnp.where(is_it, far, 1.0))

    found = {
        far: sample(
            jax.random.key(0),
            Target(lambda x: -0.5 * jnp.sum(x**2), functools.partial(initial, far)),
            kernel,
            num_samples=60,
            num_chains=8,
            solver=jacobi(),
            schedule=Windows(12),
        )
        for far in (1.0, 60.0)
    }
    good, bad = found[1.0], found[60.0]
    assert exact_path(good).report.fallbacks == ()
    assert [status.name for status in bad.report.status] == ["CONVERGED"] * 5 + ["NONFINITE"] + [
        "CONVERGED"
    ] * 2
    assert np.asarray(bad.certificate.certified).tolist() == [True] * 5 + [False] + [True] * 2
    with pytest.raises(SolveError, match="NONFINITE: chain 5"):
        bad.or_raise()
    well = np.arange(8) != 5
    np.testing.assert_array_equal(np.asarray(bad.positions)[well], np.asarray(good.positions)[well])
    residuals = [np.asarray(draws.certificate.residual)[well] for draws in (bad, good)]
    np.testing.assert_array_equal(*residuals)
    lost = np.isnan(np.asarray(bad.positions)[5]).any(axis=1)
    assert lost.sum() > 0 and (np.diff(lost.astype(int)) >= 0).all(), (
        "what is not finite is not made up"
    )
    np.testing.assert_array_equal(bad.report.iterations[well], good.report.iterations[well])
    assert not bad.report.num_sequential[well].any(), "the well ones are still solved in parallel"


def test_a_frozen_chain_says_so():
    draws = sample(
        jax.random.key(0),
        target(),
        from_blackjax(blackjax.mala(target().logdensity, 1e6)),
        num_samples=20,
        num_chains=2,
        solver=jacobi(),
    )
    assert (
        draws.report.status == (Status.FROZEN,) * 2 and np.asarray(draws.certificate.frozen).all()
    )
    assert (np.ptp(np.asarray(draws.positions["position"]), axis=1) == 0).all()
    with pytest.raises(SolveError, match="FROZEN: chain 0: the chain never moves"):
        draws.or_raise()


# --- warm-up


@pytest.fixture(scope="module")
def tuned():
    """MALA tuned on a correlated normal density with scales 0.01 and 100."""
    with jax.enable_x64(True):
        spread = np.array([0.01, 100.0, 1.0])
        correlation = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.3], [0.0, 0.3, 1.0]])
        covariance = correlation * np.outer(spread, spread)
        precision, center = jnp.asarray(np.linalg.inv(covariance)), jnp.array([5.0, -3.0, 0.0])
        badly_scaled = Target(
            lambda x: -0.5 * (x - center) @ precision @ (x - center),
            lambda key: center + jax.random.uniform(key, (3,), minval=-2.0, maxval=2.0) * spread,
        )
        draws = sample(
            jax.random.key(1),
            badly_scaled,
            mala,
            num_samples=24,
            num_chains=4,
            num_warmup=600,
            solver=jacobi(),
        )
        return SimpleNamespace(target=badly_scaled, draws=draws, covariance=covariance)


def test_warm_up_whitens_and_tunes(tuned):
    warmup = tuned.draws.or_raise().warmup
    scale = np.asarray(warmup.whitening.scale)
    root = np.linalg.solve(
        np.linalg.cholesky(tuned.covariance), scale
    )  # orthogonal, were the estimate perfect
    singular = np.linalg.svd(root, compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.6
    # In whitened coordinates MALA's step is of order 1, not of order 0.01² as in the position's own.
    assert 0.25 < warmup.settings["step_size"] <= 1.0
    assert warmup.target_acceptance - 1e-9 <= warmup.acceptance < 0.9
    rate = float(np.mean(tuned.draws.info["acceptance_rate"]))
    assert (
        abs(rate - warmup.acceptance) < 0.2
    )  # 96 draws; sd of one is about 0.3, and draws are correlated
    assert (
        64 <= warmup.num_steps <= 600
        and warmup.num_gradients > 4 * warmup.num_steps
        and warmup.seconds > 0
    )
    assert (
        warmup.depth < warmup.num_gradients / 8
        and tuned.draws.plan["num_warmup"] == warmup.num_steps
    )


def test_warm_up_reused_goes_on_where_it_ended(tuned):
    warmup = tuned.draws.warmup
    draws = sample(
        jax.random.key(1), tuned.target, warmup, num_samples=24, num_chains=4, solver=jacobi()
    )
    assert draws.warmup is warmup
    np.testing.assert_array_equal(draws.positions, tuned.draws.positions)
    with pytest.raises(
        ValueError, match="num_chains: got 3, but the warm-up given as `kernel` has 4 chains"
    ):
        sample(jax.random.key(1), tuned.target, warmup, num_samples=24, num_chains=3)
    with pytest.raises(TypeError, match="target: got None, wanted a Target"):
        sample(jax.random.key(1), None, warmup, num_samples=24, num_chains=4)


def test_eight_schools_from_end_to_end():
    """A NumPyro model in float64: starts that NumPyro finds, and draws in the model's own space."""
    schools = eight_schools(jax.random.key(1))
    draws = sample(
        jax.random.key(0),
        schools,
        hmc(schools.logdensity, 0.3, jnp.ones(10), 5),
        num_samples=60,
        num_chains=4,
        solver=jacobi(),
        schedule=Windows(30),
    )
    assert exact_path(draws).report.status == (Status.CONVERGED,) * 4
    assert {name: value.shape for name, value in draws.constrained.items()} == {
        "mu": (4, 60),
        "tau": (4, 60),
        "theta_trans": (4, 60, 8),
        "theta": (4, 60, 8),
    }
    assert draws.dims["theta"] == ("school",) and set(draws.names) == set(draws.constrained)
    mu, tau, shift = (np.asarray(draws.constrained[name]) for name in ("mu", "tau", "theta_trans"))
    np.testing.assert_allclose(
        draws.constrained["theta"], mu[..., None] + tau[..., None] * shift, atol=1e-10
    )
    np.testing.assert_allclose(np.exp(draws.positions["tau"]), tau, rtol=1e-12)
    assert {"energy", "num_steps", "diverging"} <= set(draws.info) and (
        np.asarray(draws.info["num_steps"]) == 5
    ).all()
    assert 0.5 < np.mean(draws.info["acceptance_rate"]) < 1 and np.ptp(mu, axis=1).min() > 3


# --- data


@pytest.fixture
def no_large_constants():
    """JAX warns (here: raises) where a program is compiled with more than 1,000 bytes of captured constants."""
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 1000)
    yield
    jax.config.update("jax_captured_constants_warn_bytes", before)


def test_data_travel_as_arguments(no_large_constants):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(500, 2)))
    with pytest.raises(UserWarning, match="constants"):  # the alarm itself works
        jax.jit(lambda x: jnp.sum(jnp.tanh(rows @ x)))(jnp.zeros(2))
    regression = Target(
        lambda x: -0.5 * jnp.sum(x**2) - jnp.sum(jnp.logaddexp(0.0, rows @ x)),
        jnp.zeros(2),
        constrain=lambda x: {"mean": jnp.tanh(rows @ x).mean()},
    )
    draws = sample(
        jax.random.key(0),
        regression,
        mala(regression.logdensity, 0.002),
        num_samples=12,
        num_chains=2,
        solver=jacobi(),
    )
    assert exact_path(draws).constrained["mean"].shape == (2, 12)


# --- what is refused before anything runs

NORMAL = Target(lambda x: -0.5 * jnp.sum(x**2), np.ones(2))


def _nowhere(x):
    return jnp.where(jnp.all(jnp.abs(x) < 0.5), 0.0, -jnp.inf)


def _trap(x):
    return jnp.sum(jnp.where(x > 1, jnp.sqrt(x - 1) * 0, 0.0))


def _noisy(x, count=[]):  # noqa: B006 (a function with a memory is the point)
    count.append(0)
    return -0.5 * jnp.sum(x**2) + len(count)


class _Calls:
    """Refusals come before warm-up and before the run."""

    def __call__(self, *args, **kwargs):
        raise AssertionError("the run began")


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(plan, "warm_up", _Calls())
    monkeypatch.setattr(LocalExecutor, "chunks", _Calls())


KEYS = {
    "int": (0, TypeError, "key: got 0"),
    "float": (0.5, TypeError, "key: got 0.5"),
    "batch": ("batch", ValueError, r"key: got a batch of keys of shape \(3,\)"),
    "width": (np.zeros(4, np.uint32), ValueError, r"key: got uint32 numbers of shape \(4,\)"),
    "float array": (np.zeros(2), TypeError, "key: got an array of dtype float64"),
}


@pytest.mark.parametrize("case", KEYS)
def test_bad_keys(case, nothing_runs):
    key, error, message = KEYS[case]
    key = jax.random.split(jax.random.key(0), 3) if isinstance(key, str) else key
    with pytest.raises(error, match=message):
        sample(key, NORMAL, mala, num_samples=5)


TARGETS = {
    "density -inf": (
        lambda: Target(_nowhere, np.ones(2)),
        InvalidStart,
        "initial: got a start where .* is -inf",
    ),
    "density NaN": (
        lambda: Target(lambda x: jnp.log(-jnp.sum(x**2)), np.ones(2)),
        InvalidStart,
        "log density is nan",
    ),
    "NaN start": (
        lambda: Target(NORMAL.logdensity, np.array([0.0, np.nan])),
        InvalidStart,
        r"initial\[1\]: got nan",
    ),
    "NaN gradient": (lambda: Target(_trap, np.zeros(2)), InvalidStart, "double-where"),
    "vector density": (
        lambda: Target(lambda x: -(x**2), np.ones(2)),
        InvalidStart,
        r"got shape \(2,\).*\.sum\(\)",
    ),
    "density (1,)": (
        lambda: Target(lambda x: -jnp.sum(x**2)[None], np.ones(2)),
        InvalidStart,
        r"got shape \(1,\)",
    ),
    "no entries": (lambda: Target(NORMAL.logdensity, np.ones(0)), InvalidStart, "dimension 0"),
    "bool start": (lambda: Target(NORMAL.logdensity, np.array([True])), InvalidStart, "bool"),
    "complex start": (lambda: Target(NORMAL.logdensity, np.array([1j])), InvalidStart, "complex"),
    "object start": (lambda: Target(NORMAL.logdensity, np.array([None])), InvalidStart, "object"),
    "random density": (
        lambda: Target(_noisy, np.ones(2)),
        NonDeterministicTarget,
        "wanted one value for one position",
    ),
    "no target": (lambda: NORMAL.logdensity, TypeError, "target: got the function"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_bad_targets_and_starts(case, nothing_runs):
    make, error, message = TARGETS[case]
    with pytest.raises(error, match=message):
        sample(jax.random.key(0), make(), mala, num_samples=5)


def test_one_bad_start_of_several_is_named(nothing_runs):
    keys = jax.random.split(jax.random.split(jax.random.key(0), 3)[0], 4)
    third = jax.random.key_data(keys[2])
    starts = Target(
        NORMAL.logdensity,
        lambda key: jnp.where(jnp.all(jax.random.key_data(key) == third), jnp.inf, jnp.zeros(2)),
    )
    with pytest.raises(InvalidStart, match=r"chain 2, initial\[0\]: got inf"):
        sample(jax.random.key(0), starts, mala, num_samples=5)


def test_integer_starts_become_floats_with_a_warning(nothing_runs):
    with (
        pytest.warns(UserWarning, match="initial: got integers .* they become float64"),
        pytest.raises(AssertionError, match="the run began"),
    ):
        sample(jax.random.key(0), Target(NORMAL.logdensity, np.array([1, 2])), mala, num_samples=5)


ARGUMENTS = {
    "num_samples negative": (
        {"num_samples": -1},
        ValueError,
        "num_samples: got -1; wanted an int of at least 0",
    ),
    "num_samples float": ({"num_samples": 4.0}, TypeError, "num_samples: got 4.0"),
    "num_samples bool": ({"num_samples": True}, TypeError, "num_samples: got the bool True"),
    "no chains": ({"num_chains": 0}, ValueError, "num_chains: got 0; wanted an int of at least 1"),
    "num_warmup": (
        {"num_warmup": 3},
        ValueError,
        "num_warmup: got 3; wanted an int of at least 20",
    ),
    "max_iterations": ({"max_iterations": 0}, ValueError, "max_iterations"),
    "solver": ({"solver": "deer"}, TypeError, "solver"),
    "schedule": ({"schedule": 5}, TypeError, "schedule"),
    "tolerance": ({"tolerance": 1e-8}, TypeError, "tolerance"),
    "progress": ({"progress": 5}, TypeError, "progress"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments(case, nothing_runs):
    changes, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        sample(jax.random.key(0), NORMAL, mala, **({"num_samples": 5} | changes))


KERNELS = {
    "number": (lambda: 5, TypeError, "kernel: got 5, wanted a Kernel"),
    "BlackJAX's own": (
        lambda: blackjax.mala(NORMAL.logdensity, 0.1),
        TypeError,
        "kernel: got a SamplingAlgorithm, wanted a Kernel",
    ),
    "step size": (lambda: mala(NORMAL.logdensity, -0.1), ValueError, "step_size: got -0.1"),
    "metric": (lambda: hmc(NORMAL.logdensity, 0.1, jnp.array([1.0, -1.0])), ValueError, "metric"),
}


@pytest.mark.parametrize("case", KERNELS)
def test_bad_kernels(case, nothing_runs):
    make, error, message = KERNELS[case]
    with pytest.raises(error, match=message):
        sample(jax.random.key(0), NORMAL, make(), num_samples=5)


def test_good_arguments_do_begin(nothing_runs):
    """So that every refusal above is about the argument it names."""
    with pytest.raises(AssertionError, match="the run began"):
        sample(
            jax.random.key(0),
            NORMAL,
            mala,
            num_samples=5,
            num_chains=1,
            num_warmup=20,
            solver=jacobi(),
            schedule=AllAtOnce(),
            max_iterations=1,
            progress=quiet,
        )
