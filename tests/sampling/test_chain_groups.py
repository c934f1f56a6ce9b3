"""Chains on several cores: the groups, what they share, and the same chains however many there are."""

import threading
import time

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import exact_path

from partime_mcmc import compile_cache, executions
from partime_mcmc.compile_cache import Timings, run_program
from partime_mcmc.engine.dynamics import Dynamics, without_captures
from partime_mcmc.engine.recipes import jacobi, sequential, shooting
from partime_mcmc.engine.solution import Status
from partime_mcmc.engine.windows import Windows
from partime_mcmc.kernels import from_blackjax
from partime_mcmc.sampling import chain_groups
from partime_mcmc.sampling.chain_groups import concat_chains, num_groups, run_groups, split_chains
from partime_mcmc.sampling.sample import sample
from partime_mcmc.sampling.target import Target
from partime_mcmc.tracing import OnceCache
from partime_mcmc.warmup.hmc_batch import SeedTree, key_from

T, C, STEP = 96, 6, 0.4


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def with_cores(monkeypatch):
    def have(count):
        monkeypatch.setattr(chain_groups, "num_cores", lambda: count)

    return have


def recurrence(step):
    return without_captures(Dynamics(step), jnp.zeros(3), jnp.zeros(3))


def plain():
    return recurrence(lambda params, state, drive: jnp.tanh(state) + drive)


# chains -> groups: equal ones, few of them, none that leaves a core idle for long
GROUPS = {
    1: {1: 1, 4: 1, 7: 1},
    2: {1: 1, 2: 2, 3: 3, 4: 2, 5: 5, 6: 2, 7: 7, 9: 9, 10: 2, 11: 11, 17: 1, 64: 2},
    4: {1: 1, 2: 2, 4: 4, 5: 5, 6: 3, 7: 7, 8: 4, 12: 4, 1024: 4},
    8: {4: 4, 64: 8},
}


@pytest.mark.parametrize("count", GROUPS)
def test_groups_are_equal_and_fill_the_cores(count, with_cores):
    with_cores(count)
    assert {chains: num_groups(chains, plain()) for chains in GROUPS[count]} == GROUPS[count]


def test_an_accelerator_has_one_group(with_cores, monkeypatch):
    with_cores(16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert num_groups(64, plain()) == 1


def test_what_is_cut_is_joined_again():
    tree = {
        "keys": jax.random.split(jax.random.key(0), C),
        "path": (jnp.arange(C * 3.0).reshape(C, 3), None),
    }
    parts = split_chains(tree, 3)
    assert [part["path"][0].shape for part in parts] == [(2, 3)] * 3
    again = concat_chains(parts)
    np.testing.assert_array_equal(again["path"][0], tree["path"][0])
    assert jnp.array_equal(jax.random.key_data(again["keys"]), jax.random.key_data(tree["keys"]))
    assert concat_chains(split_chains(tree, 1)) is tree


# Steps that wait for threads of XLA's while they occupy one; two of them at once can wait for ever.
LIBRARY = {
    "solve": lambda state: jnp.linalg.solve(jnp.eye(3) + jnp.outer(state, state), state),
    "cholesky": lambda state: jnp.linalg.cholesky(jnp.eye(3) + jnp.outer(state, state)) @ state,
    "in a loop": lambda state: jax.lax.fori_loop(
        0, 3, lambda _, x: jnp.linalg.eigh(jnp.outer(x, x))[0], state
    ),
    "in a branch": lambda state: jax.lax.cond(
        state[0] > 0, lambda x: jnp.linalg.svd(jnp.diag(x))[1], lambda x: x, state
    ),
    "Fourier": lambda state: jnp.fft.irfft(jnp.fft.rfft(state), 3),
    "printing": lambda state: (jax.debug.print("{}", state[0]), state)[1],
    "Python": lambda state: jax.pure_callback(
        lambda x: x, jax.ShapeDtypeStruct((3,), state.dtype), state, vmap_method="sequential"
    ),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_steps_that_call_a_library_are_left_together_and_never_run_side_by_side(
    name, with_cores, monkeypatch
):
    with_cores(2)
    assert num_groups(4, recurrence(lambda params, state, drive: LIBRARY[name](state) + drive)) == 1

    def no_threads(*args):
        raise AssertionError("a thread was started")

    monkeypatch.setattr(chain_groups.concurrent.futures, "ThreadPoolExecutor", no_threads)
    states = np.arange(1.0, 13).reshape(4, 3)
    found = run_groups(jax.vmap(LIBRARY[name]), (), (states,), 2, timings=Timings())
    np.testing.assert_allclose(found, jax.vmap(LIBRARY[name])(states), rtol=1e-12)
    with pytest.raises(AssertionError, match="a thread was started"):
        run_groups(double, (1.0,), (states,), 2, timings=Timings())


def double(scale, x):
    return {"y": scale * x, "sum": x.sum()[None]}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups_run_side_by_side_as_they_do_one_by_one(count, with_cores):
    with_cores(count)
    # NumPy's float64 and a plain number: threads, which do not know of the fixture's setting, may not narrow them.
    x = np.repeat(1 / 3 + np.arange(3), 4)
    found = run_groups(double, (1 / 7,), (x,), 3, timings=Timings())
    assert found["y"].dtype == jnp.float64
    np.testing.assert_array_equal(found["y"], x * (1 / 7))
    np.testing.assert_allclose(found["sum"], x.reshape(3, 4).sum(axis=1))


def test_groups_overlap_and_an_error_in_one_is_raised_after_all_have_ended(with_cores, monkeypatch):
    with_cores(2)
    meet, ended = threading.Barrier(2, timeout=30), []

    def program(x):
        meet.wait()  # passes only if both run at once
        if float(x[0]) == 1:
            raise MemoryError("RESOURCE_EXHAUSTED")
        ended.append(float(x[0]))
        return x

    monkeypatch.setattr(chain_groups, "compiled", lambda *args, timings, options: program)
    for module in (chain_groups, executions):
        monkeypatch.setattr(module, "overlaps", lambda program: True)
    with pytest.raises(MemoryError, match="RESOURCE_EXHAUSTED"):
        run_groups(double, (), (np.array([0.0, 1.0]),), 2, timings=Timings())
    assert ended == [0.0]
    meet.reset()
    with pytest.raises(MemoryError):
        run_groups(double, (), (np.array([1.0, 0.0]),), 2, timings=Timings())
    assert ended == [0.0, 0.0]


def test_programs_that_call_a_library_wait_for_each_other_whoever_wants_them():
    """Two of them side by side, with Cholesky factors of 100 x 100, waited for each other for ever."""
    inside, most = [], []

    def on_host(x):
        inside.append(x)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return x

    def calls(x):
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((3,), x.dtype), x)

    def want(x):
        with jax.enable_x64(True):
            for _ in range(3):
                run_program(calls, x, timings=Timings())

    threads = [threading.Thread(target=want, args=(jnp.full(3, float(k)),)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 9 and max(most) == 1
    # One that fails lets the others go on.
    with pytest.raises(Exception, match="no such thing"):
        run_program(fails, jnp.ones(3), timings=Timings())
    run_program(calls, jnp.ones(3), timings=Timings())


def fails(x):
    def on_host(x):
        raise RuntimeError("no such thing")

    return jax.pure_callback(on_host, jax.ShapeDtypeStruct((3,), x.dtype), x)


def bowl(x):
    return -0.5 * jnp.sum(x**2 * jnp.asarray([1.0, 2.0]))


KERNEL = from_blackjax(blackjax.mala(bowl, STEP), noise_scale=np.sqrt(2 * STEP))
TARGET = Target(bowl, lambda key: jax.random.normal(key, (2,)))
SOLVERS = {"fixed point": jacobi, "shooting": lambda: shooting(steps=16), "sequential": sequential}


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_chains_are_the_same_on_any_number_of_cores(solver, with_cores):
    def run(count):
        with_cores(count)
        return sample(
            jax.random.key(3),
            TARGET,
            KERNEL,
            num_samples=T,
            num_chains=C,
            solver=SOLVERS[solver](),
            schedule=Windows(48),
        )

    alone = exact_path(run(1))
    accepted = np.asarray(alone.info["accepted"])
    assert 0 < accepted.sum() < accepted.size, "some steps are rejected"
    for count in (2, 4):
        several = exact_path(run(count))
        np.testing.assert_allclose(several.positions, alone.positions, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(several.info["accepted"], accepted)
        assert several.report.evaluations_per_sample == pytest.approx(
            alone.report.evaluations_per_sample, rel=0.5
        )
        assert (
            several.state.num_steps == T
            and several.certificate.independent.shape == alone.certificate.independent.shape
        )


def test_one_program_serves_all_groups(with_cores, monkeypatch):
    with_cores(3)
    monkeypatch.setattr(compile_cache, "_PROGRAMS", OnceCache(128))
    sample(
        jax.random.key(4), TARGET, KERNEL, num_samples=64, num_chains=C, solver=shooting(steps=16)
    )
    solves = [
        entry for entry in compile_cache._PROGRAMS.kept() if type(entry[0]).__name__ == "_Solve"
    ]
    assert len(solves) == 1 and (C // 3, 2) in [shape for shape, *_ in solves[0][2]], (
        "two chains in each of three groups"
    )


def test_chains_that_fail_in_one_group_are_finished_there(with_cores):
    """A limit of two passes is too few for a fixed point: all chains go on sequentially, and are exact."""

    def run(count, **more):
        with_cores(count)
        return sample(
            jax.random.key(5),
            TARGET,
            KERNEL,
            num_samples=T,
            num_chains=C,
            schedule=Windows(48),
            **more,
        )

    exact = exact_path(run(1, solver=sequential()))
    for count in (1, 3):
        draws = run(count, solver=jacobi(), max_iterations=2)
        assert draws.report.fallbacks and draws.report.num_sequential.shape == (C,)
        assert (
            draws.report.status == (Status.CONVERGED,) * C
            and np.asarray(draws.certificate.certified).all()
        )
        np.testing.assert_allclose(draws.positions, exact.positions, rtol=0, atol=1e-9)


def test_seeds_are_a_tree():
    root = SeedTree.of(jax.random.key(7))
    nodes = [
        root,
        root.child(0),
        root.child(1),
        root.child(0).child(0),
        root.child(0).child(1),
        SeedTree.of(jax.random.key(8)),
    ]
    assert len({tuple(node.words) for node in nodes}) == len(nodes)
    np.testing.assert_array_equal(
        root.child(3).words, SeedTree.of(jax.random.key(7)).child(3).words
    )
    assert root.child(2).generator.integers(1 << 30) == root.child(2).generator.integers(1 << 30)
    words = np.stack([root.child(number).words for number in range(1024)])
    uniforms = np.asarray(jax.vmap(lambda one: jax.random.uniform(key_from(one)))(words))
    # Four standard errors of the mean, and of the mean square, of a uniform number.
    assert (
        abs(uniforms.mean() - 0.5) < 4 * 12**-0.5 / 32
        and abs(np.mean((uniforms - 0.5) ** 2) - 1 / 12) < 4 * 180**-0.5 / 32
    )
