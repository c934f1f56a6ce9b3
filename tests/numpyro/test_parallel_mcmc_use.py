"""What users of NumPyro do with a run besides running it: other kinds of keys, resuming, pickling, data changed in place,
NumPyro's own kernels and arguments; and what the errors say when something cannot work.

One small model and few shapes, so that programs are shared.
"""

import copy
import dataclasses
import functools
import inspect
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from fakes import exact_path
from numpyro.infer import MCMC, Predictive, init_to_median

import partime_mcmc.numpyro.mcmc
from partime_mcmc.engine.recipes import jacobi, sequential
from partime_mcmc.numpyro import HMC, MALA, NUTS, CoalescingHMC, ParallelMCMC
from partime_mcmc.numpyro.kernels import _CARRIED, _OWN, from_numpyro_kernel
from partime_mcmc.numpyro.mcmc import _read_by
from partime_mcmc.sampling.pilots import advise_plan
from partime_mcmc.tracing import WithoutParams, explicit
from partime_mcmc.warmup.warmup import WindowAdaptation

KEY = jax.random.key(0)
SAMPLES = 8


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def level(y):
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


Y = np.array([1.0, 2.0, 1.5, 1.2, 1.9])


def fixed():
    """A kernel that needs no warm-up, most of what is compiled."""
    return HMC(level, step_size=0.5, num_steps=2, inverse_mass_matrix=np.array([0.05, 0.2]))


def run(sampler=None, key=KEY, data=(Y,), num_chains=2, num_warmup=0, init_params=None, **options):
    sampler = fixed() if sampler is None else sampler
    mcmc = ParallelMCMC(
        sampler, num_warmup=num_warmup, num_samples=SAMPLES, num_chains=num_chains, **options
    )
    mcmc.run(key, *data, init_params=init_params)
    return mcmc


@functools.cache
def shared():
    """One object for several runs: the data are its own, so nothing is compiled twice."""
    return run()


# --- keys


def test_typed_and_legacy_keys_one_or_one_per_chain():
    """Two typed keys have the shape of one legacy key."""
    mcmc = shared()

    def mu(key):
        mcmc.run(key, Y)
        return mcmc.get_samples()["mu"]

    one, legacy = jax.random.key(7), jax.random.PRNGKey(7)
    first = mu(one)
    for key in (legacy, jax.random.split(one, 2), jax.random.split(legacy, 2)):
        np.testing.assert_array_equal(mu(key), first)
    assert not np.array_equal(mu(jax.random.split(jax.random.key(8), 2)), first)


KEYS = {
    "three typed": (jax.random.split(KEY, 3), ValueError, "got 3 keys for 2 chains"),
    "three legacy": (
        jax.random.split(jax.random.PRNGKey(0), 3),
        ValueError,
        "got 3 keys for 2 chains",
    ),
    "a table": (jax.random.split(KEY, (2, 2)), ValueError, "got 2 x 2 keys for 2 chains"),
    "wrong width": (np.zeros((2, 3), np.uint32), ValueError, r"uint32 numbers of shape \(3,\)"),
    "integers": (np.zeros((2, 2), np.int32), TypeError, "int32"),
    "no key": (None, TypeError, "rng_key: got None"),
}


@pytest.mark.parametrize("case", KEYS)
def test_bad_keys(case):
    key, error, words = KEYS[case]
    with pytest.raises(error, match=words):
        run(key=key)


# --- resuming, pickling, data


@pytest.mark.slow
def test_advice_after_resuming_one_chain():
    """Pilots need two states: those of the warm-up, or where this object had none on these data, draws."""
    mcmc = run(MALA(level), num_chains=1, num_warmup=40)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.last_state.rng_key, Y)
    assert mcmc.report.warmup is None
    np.testing.assert_array_equal(mcmc._pool["mu"], mcmc.warmed.pool["mu"])
    mcmc._warmed_on = None
    mcmc.run(mcmc.last_state.rng_key, Y)
    assert mcmc._pool["mu"].shape == (1 + SAMPLES,) and len(np.unique(mcmc._pool["mu"])) > 2
    assert 0 <= mcmc.advice.meeting.fraction_met <= 1 and mcmc.advice is mcmc.advice


def test_what_was_pickled_knows_its_draws_and_can_run_again():
    mcmc = run(MALA(level), num_chains=1, num_warmup=40)
    again, report = pickle.loads(pickle.dumps(mcmc)), pickle.loads(pickle.dumps(mcmc.report))
    copied = copy.deepcopy(mcmc)
    for one in (again, copied):
        jax.tree.map(np.testing.assert_array_equal, one.get_samples(), mcmc.get_samples())
        assert (
            str(one.report) == str(mcmc.report) == str(report)
            and one.warmed.settings == mcmc.warmed.settings
        )
    assert 0 <= again.advice.meeting.fraction_met <= 1
    again.run(KEY, Y)
    jax.tree.map(np.testing.assert_array_equal, again.get_samples(), mcmc.get_samples())
    copied.post_warmup_state = mcmc.last_state
    copied.run(mcmc.last_state.rng_key, Y)
    assert not np.array_equal(copied.get_samples()["mu"], mcmc.get_samples()["mu"])


def test_data_changed_in_place_are_new_data():
    mine = Y.copy()
    mcmc = run(data=(mine,), num_chains=1, solver=sequential())
    target = mcmc._known.target
    mcmc.run(KEY, mine)
    assert mcmc._known.target is target, "the same data are traced once"
    mine += 50
    start = {"mu": jnp.array(51.0), "sigma": jnp.array(-1.0)}
    mcmc.run(KEY, mine, init_params=start)
    assert abs(mcmc.get_samples()["mu"].mean() - 51.5) < 1


def test_data_are_the_same_by_content():
    values = [0.0] * 20_000
    before = _read_by(level, (values, Y), {"scale": 1})
    assert _read_by(level, (values, Y.copy()), {"scale": 1}) == before
    assert _read_by(level, (values, Y), {"scale": 1.0}) != before
    with jax.enable_x64(not jax.config.jax_enable_x64):
        assert _read_by(level, (values, Y), {"scale": 1}) != before
    values[7] = 1.0
    assert _read_by(level, (values, Y), {"scale": 1}) != before


# --- arguments


def test_few_warmup_steps_become_as_many_as_teach_something():
    mcmc = run(MALA(level), num_warmup=5)
    assert "num_warmup was 5" in str(mcmc.report) and mcmc.report.warmup.num_steps <= 20


ADAPTED = {
    "trajectory_length": 1.0,
    "target_accept_prob": 0.9,
    "inverse_mass_matrix": np.ones(2),
    "dense_mass": True,
    "adapt_mass_matrix": False,
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adaptation_comes_alone(name):
    with pytest.raises(
        ValueError, match=f"adaptation: got a WindowAdaptation together with {name}, wanted"
    ):
        HMC(level, adaptation=WindowAdaptation(), **{name: ADAPTED[name]})
    assert isinstance(
        HMC(level, adaptation=WindowAdaptation(), num_steps=3).adaptation, WindowAdaptation
    )


def from_their_state():
    mcmc = ParallelMCMC(fixed(), num_warmup=0, num_samples=SAMPLES)
    mcmc.post_warmup_state = numpyro.infer.HMC(level).init(KEY, 0, None, (Y,), {})
    mcmc.run(KEY, Y)


BAD = {
    "no steps": (lambda: HMC(level, num_steps=0), ValueError, "num_steps: got 0"),
    "half a step": (lambda: HMC(level, num_steps=1.5), TypeError, "num_steps: got 1.5"),
    "path": (lambda: HMC(level, trajectory_length=-1.0), ValueError, "trajectory_length: got -1.0"),
    "step nan": (lambda: MALA(level, step_size=float("nan")), ValueError, "step_size: got nan"),
    "step inf": (lambda: MALA(level, step_size=float("inf")), ValueError, "step_size: got inf"),
    "step text": (lambda: MALA(level, step_size="small"), ValueError, "step_size: got 'small'"),
    "depth": (lambda: NUTS(level, max_tree_depth=0), ValueError, "max_tree_depth: got 0"),
    "every": (
        lambda: CoalescingHMC(level, every=0),
        ValueError,
        "every: got 0; wanted an int of at least 1",
    ),
    "block of nothing": (
        lambda: run(HMC(level, dense_mass=[("nu",)])),
        ValueError,
        "got a block of site 'nu', wanted some of",
    ),
    "block's shape": (
        lambda: run(HMC(level, inverse_mass_matrix={("mu",): np.eye(2)})),
        ValueError,
        r"inverse_mass_matrix\[\('mu',\)\]: shape \(2, 2\), wanted \(1,\) or \(1, 1\)",
    ),
    "two blocks": (
        lambda: HMC(level, dense_mass=[("mu", "sigma"), ("mu",)]),
        ValueError,
        "got site 'mu' in two blocks",
    ),
    "another's argument": (
        lambda: NUTS(level, num_steps=3),
        TypeError,
        "NUTS: got num_steps, which it does not take",
    ),
    "their state": (
        from_their_state,
        TypeError,
        "post_warmup_state: got a state of another kernel",
    ),
    "chain method": (
        lambda: setattr(shared(), "chain_method", "threads"),
        ValueError,
        "chain_method: got 'threads'",
    ),
    "site": (
        lambda: run(init_params={"nu": jnp.zeros(8)}, num_chains=8),
        ValueError,
        r"got sites \['nu'\], wanted",
    ),
    "few sites": (lambda: run(init_params={"mu": jnp.zeros(2)}), ValueError, r"got sites \['mu'\]"),
    "array": (lambda: run(init_params=jnp.zeros((2, 2))), ValueError, "init_params: got a "),
    "shape": (
        lambda: run(init_params={"mu": jnp.zeros(8), "sigma": jnp.zeros((8, 1))}, num_chains=8),
        ValueError,
        r"init_params\['sigma'\]: got shape \(8, 1\), wanted \(8,\)",
    ),
    "chains": (
        lambda: run(init_params={"mu": jnp.zeros(2), "sigma": 0.0}),
        ValueError,
        r"init_params\['sigma'\]: got shape \(\), wanted \(2, ...\)",
    ),
    "none": (lambda: run(init_params={}), ValueError, "init_params: got {}"),
    "no kernel": (lambda: run(level), TypeError, "sampler: got a builtins.function"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()


def test_arguments_of_numpyros_that_have_nothing_to_do():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NUTS(
            level,
            find_heuristic_step_size=True,
            regularize_mass_matrix=False,
            forward_mode_differentiation=False,
            trajectory_length=2.0,
        )


def test_draws_of_a_warm_up_are_of_the_tuned_kernel_and_the_run_goes_on_from_them():
    mcmc = ParallelMCMC(
        CoalescingHMC(level), num_warmup=40, num_samples=SAMPLES, num_chains=2, progress_bar=False
    )
    mcmc.warmup(KEY, Y, collect_warmup=True, extra_fields=("num_steps",))
    first, collected = mcmc.draws, mcmc.get_samples(group_by_chain=True)
    assert collected["mu"].shape == mcmc.get_extra_fields(group_by_chain=True)["num_steps"].shape
    assert collected["mu"].shape == (2, 40)
    assert mcmc.post_warmup_state is mcmc.last_state
    settings = mcmc.last_state.adapt_state.settings
    mcmc.run(jax.random.key(1), Y)
    assert mcmc.get_samples(group_by_chain=True)["mu"].shape == (2, SAMPLES)
    jax.tree.map(np.testing.assert_array_equal, mcmc.last_state.adapt_state.settings, settings)
    assert mcmc.draws.warmup is None and first.warmup is not None


def test_forward_mode_sees_each_data_set():
    """Also where programs are kept: a derivative of its own must not capture data."""

    def normal(y):
        mu = numpyro.sample("mu", dist.Normal(0, 10))
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)

    density = HMC(normal, forward_mode_differentiation=True)
    values = []
    for centre in (0.0, 5.0):
        y = np.full(20, centre, np.float32)
        target = density.target((y,), {}, KEY, None)
        step, (data, _) = explicit(WithoutParams(target.logdensity), None, target.example())
        slope = jax.grad(step, argnums=1)((data, None), {"mu": jnp.array(5.0)})["mu"]
        values.append((float(slope), step))
    assert abs(values[0][0] + 100) < 0.1 and abs(values[1][0]) < 0.1
    assert values[0][1] is values[1][1], "one program for all data of these shapes"


def test_a_global_that_shapes_a_model_is_seen():
    groups = 1

    def model():
        with numpyro.plate("groups", groups):
            total = numpyro.sample("effect", dist.Normal(0, 1)).sum()
        numpyro.sample("y", dist.Normal(total, 1), obs=1.0)

    mcmc = ParallelMCMC(CoalescingHMC(model), num_warmup=100, num_samples=50, num_chains=2)
    for groups in (1, 3):
        mcmc.run(KEY)
        assert mcmc.get_samples()["effect"].shape == (100, groups)


@pytest.mark.slow
def test_forward_mode_is_honoured():
    """A `while_loop` has no reverse mode. Here it takes 3 from mu, which is then held near 0: mu ~ N(3 / 1.01, 1 / 1.01)."""

    def loops():
        mu = numpyro.sample("mu", dist.Normal(0, 10))
        moved, _ = jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] - 1.0, c[1] + 1), (mu, 0))
        numpyro.factor("loop", -0.5 * moved**2)

    mcmc = ParallelMCMC(
        HMC(loops, forward_mode_differentiation=True, num_steps=2),
        num_warmup=100,
        num_samples=400,
        num_chains=2,
    )
    mcmc.run(KEY)
    assert (
        abs(mcmc.get_samples()["mu"].mean() - 3.0 / 1.01) < 0.2
        and exact_path(mcmc.draws)
        and mcmc.report.parallel
    )
    with pytest.raises(ValueError, match="[Rr]everse-mode"):
        ParallelMCMC(HMC(loops), num_warmup=20, num_samples=4).run(KEY)


@pytest.mark.filterwarnings("ignore:num_warmup")
def test_matrices_of_the_state_have_the_form_that_was_asked_for():
    def pair():
        numpyro.sample("a", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("b", dist.Normal())

    def shapes(**options):
        mcmc = ParallelMCMC(HMC(pair, num_steps=2, **options), num_warmup=0, num_samples=2)
        mcmc.run(KEY)
        return {k: v.shape for k, v in mcmc.last_state.adapt_state.inverse_mass_matrix.items()}

    assert shapes(dense_mass=True) == {("a", "b"): (3, 3)}
    assert shapes(dense_mass=False) == {("a", "b"): (3,)}
    assert shapes(dense_mass=[("a",)]) == {("a",): (2, 2), ("b",): (1,)}
    given = {"inverse_mass_matrix": np.ones(3), "adapt_mass_matrix": False}
    assert shapes(dense_mass=True, **given) == {("a", "b"): (3, 3)}
    assert shapes(**given) == {("a", "b"): (3,)}


def test_a_step_size_is_where_adaptation_begins_and_blocks_of_the_metric_are_those_asked_for():
    """A step a hundred times too long, correlations within one block only; the state has NumPyro's matrices."""

    def pair(y):
        a = numpyro.sample("a", dist.Normal(jnp.zeros(2), 1.0))
        b = numpyro.sample("b", dist.Normal())
        numpyro.sample("y", dist.Normal(a.sum() + b, 0.5), obs=y)

    kernel = HMC(pair, step_size=jnp.float64(100.0), dense_mass=[("a",)])
    mcmc = ParallelMCMC(kernel, num_warmup=200, num_samples=5, num_chains=2, thinning=2)
    mcmc.warmup(KEY, Y[:1], extra_fields=("num_steps", "z.a"))
    assert {name: one.shape for name, one in mcmc.get_extra_fields().items()} == {
        "num_steps": (0,), "z.a": (0, 2)}  # fmt: skip
    assert 0.1 < mcmc.warmed.settings["step_size"] < 2 and mcmc.warmed.acceptance > 0.6
    matrices = ("inverse_mass_matrix", "mass_matrix_sqrt", "mass_matrix_sqrt_inv")
    fields = (
        *(f"adapt_state.{name}" for name in matrices),
        "z_grad",
        "rng_key",
        "mean_accept_prob",
    )
    np.testing.assert_array_equal(mcmc.warmed.whitening.scale[2, :2], np.zeros(2))
    mcmc.chain_method = "sequential"
    mcmc.run(KEY, Y[:1], extra_fields=fields)
    found = mcmc.get_extra_fields()
    metric, root, inverse = (found[f"adapt_state.{name}"] for name in matrices)
    assert {names: one.shape for names, one in metric.items()} == {
        ("a",): (4, 2, 2), ("b",): (4, 1)}  # fmt: skip
    block = metric[("a",)][0]
    assert block[0, 1] < -0.1, "the sum is known, so that the parts are anticorrelated"
    np.testing.assert_allclose(block, np.linalg.inv(root[("a",)][0] @ root[("a",)][0].T), rtol=1e-9)
    np.testing.assert_allclose(inverse[("b",)], 1 / root[("b",)])
    np.testing.assert_array_equal(np.triu(root[("a",)][0], 1), np.zeros((2, 2)))
    a, b = mcmc.get_samples()["a"], mcmc.get_samples()["b"]
    slope = b - (Y[0] - a.sum(axis=1) - b) / 0.25
    np.testing.assert_allclose(found["z_grad"]["b"], slope, rtol=1e-9)
    assert found["rng_key"].shape == (4,)
    for _ in range(2):
        z, z_grad = mcmc.last_state.z, mcmc.last_state.z_grad
        slope = z["b"] - (Y[0] - z["a"].sum(axis=1) - z["b"]) / 0.25
        np.testing.assert_allclose(z_grad["b"], slope, rtol=1e-9)
        mcmc.post_warmup_state = mcmc.last_state
        mcmc.run(KEY, Y[:1])
        assert (mcmc.last_state.z["b"] != z["b"]).any()
    assert "acc. prob=" in mcmc.sampler.get_diagnostics_str(mcmc.last_state)
    # What was adapted is where another kernel begins.
    adapted = jax.tree.map(lambda leaf: leaf[0], mcmc.last_state.adapt_state)
    options = {"step_size": adapted.step_size, "adapt_step_size": False, "num_steps": 2}
    given = HMC(pair, inverse_mass_matrix=adapted.inverse_mass_matrix, **options)
    again = run(given, data=(Y[:1],), num_chains=1).last_state.adapt_state
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        again.inverse_mass_matrix,
        adapted.inverse_mass_matrix,
    )
    assert again.step_size == adapted.step_size


def test_without_warmup_the_step_size_is_the_one_given():
    for kernel in (CoalescingHMC(level, step_size=0.3), numpyro.infer.HMC(level, step_size=0.3)):
        assert run(kernel, num_chains=1).last_state.adapt_state.step_size == 0.3
    plain = HMC(level, adapt_step_size=False, max_tree_depth=(5, 6), num_steps=jnp.int32(2))
    assert plain._fixed == {"step_size": 1.0, "num_integration_steps": 2}, "as in NumPyro"


def test_inside_of_transformations_the_argument_is_named():
    def mean(key, y):
        return run(fixed(), key=key, data=(y,)).get_samples()["mu"].mean()

    words = "got a traced value; call run outside jit, vmap and grad"
    with pytest.raises(TypeError, match=f"rng_key: {words}"):
        jax.vmap(mean, in_axes=(0, None))(jax.random.split(KEY, 2), Y)
    with pytest.raises(TypeError, match=rf"args\[0\]: {words}"):
        jax.jit(functools.partial(mean, KEY))(Y)
    with pytest.raises(TypeError, match="run: called while JAX traces"):
        jax.jit(lambda: mean(KEY, Y))()


# --- scripts of NumPyro's


def test_numpyros_kernels_keep_their_arguments_where_we_look():
    """An argument is stored under its name with an underscore, as given."""
    marker = {
        "target_accept_prob": 0.77,
        "step_size": 0.33,
        "dense_mass": True,
        "adapt_step_size": False,
        "adapt_mass_matrix": False,
        "init_strategy": init_to_median,
        "model": level,
        "inverse_mass_matrix": np.eye(2),
        "find_heuristic_step_size": True,
        "forward_mode_differentiation": True,
        "regularize_mass_matrix": False,
        "num_steps": 7,
        "trajectory_length": 1.25,
        "max_tree_depth": 6,
    }
    for theirs, own in _OWN.items():
        names = (*_CARRIED, *own, "kinetic_fn", "step_size", "adapt_step_size")
        assert set(names) <= set(inspect.signature(theirs.__init__).parameters)
        given = {name: marker[name] for name in names if name in marker}
        made = theirs(**given)
        assert all(getattr(made, f"_{name}") is value for name, value in given.items())
        assert theirs(potential_fn=level)._potential_fn is level


def test_what_was_set_is_kept_and_what_was_not_is_left_open():
    plain = from_numpyro_kernel(numpyro.infer.HMC(level))
    assert isinstance(plain, HMC) and plain._fixed == {} and plain.model is level
    assert plain.adaptation == HMC(level).adaptation
    found = from_numpyro_kernel(
        numpyro.infer.NUTS(
            level,
            target_accept_prob=0.9,
            max_tree_depth=5,
            step_size=0.2,
            adapt_step_size=False,
            init_strategy=init_to_median,
            inverse_mass_matrix=jnp.ones(2),
        )
    )
    assert isinstance(found, NUTS) and found._fixed == {"step_size": 0.2, "max_num_doublings": 5}
    assert found.adaptation.target_acceptance == 0.9 and found._init_strategy is init_to_median
    np.testing.assert_array_equal(found.adaptation.guess, np.ones(2))
    path = from_numpyro_kernel(
        numpyro.infer.HMC(
            level, num_steps=3, trajectory_length=1.5, adapt_step_size=False, step_size=0.5
        )
    )
    assert (
        path._fixed == {"step_size": 0.5, "num_integration_steps": 3}
        and path.adaptation.path_length == 1.5
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:There are not enough devices")
def test_a_script_of_numpyros_runs_with_the_class_changed(capsys):
    """The divorce regression of NumPyro's tutorial "Bayesian Regression Using NumPyro", its model and its calls."""
    rng = np.random.default_rng(0)
    marriage, age = rng.normal(size=(2, 50))
    divorce = 0.2 - 0.6 * age + 0.5 * rng.normal(size=50)

    def model(marriage=None, age=None, divorce=None):
        a = numpyro.sample("a", dist.Normal(0.0, 0.2))
        M, A = 0.0, 0.0
        if marriage is not None:
            bM = numpyro.sample("bM", dist.Normal(0.0, 0.5))
            M = bM * marriage
        if age is not None:
            bA = numpyro.sample("bA", dist.Normal(0.0, 0.5))
            A = bA * age
        sigma = numpyro.sample("sigma", dist.Exponential(1.0))
        mu = numpyro.deterministic("mu", a + M + A)
        numpyro.sample("obs", dist.Normal(mu, sigma), obs=divorce)

    def script(MCMC):
        _, run_key, predict_key = jax.random.split(jax.random.key(0), 3)
        kernel = numpyro.infer.NUTS(model)
        mcmc = MCMC(kernel, num_warmup=300, num_samples=400, num_chains=2)
        mcmc.run(
            run_key,
            marriage=marriage,
            age=age,
            divorce=divorce,
            extra_fields=("potential_energy",),
        )
        mcmc.print_summary()
        samples = mcmc.get_samples()
        predictive = Predictive(model, samples)
        drawn = predictive(predict_key, marriage=marriage, age=age)["obs"]
        energy = mcmc.get_extra_fields()["potential_energy"]
        return mcmc, samples, drawn, energy

    (_, theirs_drawn, _, energy), (mine, samples, drawn, my_energy) = (
        script(MCMC),
        script(ParallelMCMC),
    )
    assert capsys.readouterr().out.count("Number of divergences: 0") == 2
    assert drawn.shape == (800, 50) and my_energy.shape == energy.shape == (800,)
    assert set(samples) == set(theirs_drawn)
    for name in ("a", "bM", "bA", "sigma"):
        assert (
            abs(samples[name].mean() - theirs_drawn[name].mean()) < 0.35 * theirs_drawn[name].std()
        )
        assert 0.75 < samples[name].std() / theirs_drawn[name].std() < 1.3
    try:
        from arviz_base import from_numpyro
    except ImportError:
        from arviz import from_numpyro
    assert from_numpyro(mine)["posterior"]["bA"].shape == (2, 400)
    exact_path(mine.draws)


# --- chains that do not forget


def unforgetting():
    """Long paths over a bumpy potential: chains with the same random numbers stay apart for ever."""
    kernel = HMC(
        potential_fn=lambda z: jnp.sum(0.5 * z**2 + 1.5 * jnp.cos(3 * z)),
        step_size=0.2,
        num_steps=9,
        inverse_mass_matrix=np.ones(2),
    )
    # More than sixteen segments of 64 steps: fewer are found in the time that shooting is given, forgotten or not.
    mcmc = ParallelMCMC(kernel, num_warmup=0, num_samples=2048, num_chains=2)
    mcmc.run(KEY, init_params=jnp.array([[1.0, 1.0], [-1.0, 1.0]]))
    return mcmc


def test_chains_that_do_not_forget_are_reported(monkeypatch):
    """Pilots are run when the report of a run that fell back is printed, and only then."""
    plans = []

    def counted(plan, pool):
        plans.append(plan)
        return advise_plan(plan, pool)

    monkeypatch.setattr(partime_mcmc.numpyro.mcmc, "advise_plan", counted)
    mcmc = unforgetting()
    report = mcmc.report
    assert report.run.fallbacks and not plans
    assert "report.advice" in str(report) and not plans, "printing runs no pilots"
    assert not report.advice.parallel
    assert len(plans) == 1 and mcmc.report.advice is report.advice
    good = shared()
    assert good.report.advice is None and "report.advice" not in str(good.report)
    assert dataclasses.replace(mcmc.report, ask=None).advice is None
    mcmc.solver = jacobi()
    assert mcmc.report.advice is None, "who chose a solver has asked for no advice"
