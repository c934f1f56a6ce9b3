"""What makes the first answer fast: programs that serve any number, compiled beside warm-up, once, and kept on disk."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import python

from partime_mcmc import compile_cache
from partime_mcmc.engine import Windows, sequential, shooting
from partime_mcmc.kernels import Whitening, coalescing_hmc, mala
from partime_mcmc.kernels.kernel_program import KernelProgram, density_of, parametrised_kernel
from partime_mcmc.kernels.traced_gradient import unoptimised_seconds
from partime_mcmc.sampling import ahead, plan
from partime_mcmc.sampling.local import _Certify, _Solve
from partime_mcmc.sampling.progress import quiet
from partime_mcmc.sampling.randomness import _Begin, _DrawTapes
from partime_mcmc.sampling.sample import sample
from partime_mcmc.sampling.target import Target
from partime_mcmc.tracing import OnceCache

pytestmark = pytest.mark.short_runs

DATA = jnp.array([1.0, -2.0, 0.5])
TARGET = Target(lambda x: -0.5 * jnp.sum((x - DATA) ** 2), jnp.zeros(3))
KERNEL_PROGRAMS = (_Begin, _DrawTapes, _Solve, _Certify)


@pytest.fixture
def makers(monkeypatch):
    """Programs by class, with the threads in which each was made; none was made before."""
    made = []
    monkeypatch.setattr(compile_cache, "_PROGRAMS", OnceCache(128))
    for one in KERNEL_PROGRAMS:
        original = one.__call__

        def traced(self, *args, _original=original, _kind=one):
            made.append((_kind, threading.current_thread().name))
            return _original(self, *args)

        monkeypatch.setattr(one, "__call__", traced)
    return made


def run(**options):
    # A density of its own, of which nothing is traced.
    return sample(
        jax.random.key(1),
        Target(lambda x: TARGET.logdensity(x), TARGET.initial),
        coalescing_hmc,
        num_samples=48,
        num_chains=2,
        num_warmup=100,
        progress=False,
        **options,
    )


def test_sampling_is_compiled_beside_warmup(makers, monkeypatch):
    monkeypatch.setattr(ahead, "num_cores", lambda: 2)
    draws = run()
    assert bool(np.all(draws.certificate.certified))
    large = [one for one in makers if one[0] in (_Solve, _Certify)]
    assert {thread for _, thread in large} == {"partime_mcmc compiles"}
    names = [entry[0].__name__ for entry in compile_cache._PROGRAMS.kept()]
    counts = [names.count(one) for one in ("Begin", "DrawTapes", "Solve", "Certify")]
    assert counts == [1, 1, 1, 1], "sampling found what was compiled"


def test_on_one_core_nothing_is_compiled_ahead(makers, monkeypatch):
    monkeypatch.setattr(ahead, "num_cores", lambda: 1)
    run()
    assert {thread for _, thread in makers} == {threading.current_thread().name}


def test_an_error_of_the_model_is_raised_once_and_as_without_the_thread(monkeypatch):
    monkeypatch.setattr(ahead, "num_cores", lambda: 2)
    with pytest.raises(ZeroDivisionError, match="the model's own"):
        sample(
            jax.random.key(1),
            Target(_broken, jnp.zeros(3)),
            coalescing_hmc,
            num_samples=48,
            progress=quiet,
        )


def _broken(x):
    raise ZeroDivisionError("the model's own")


def test_a_short_run_of_a_small_model_is_compiled_quickly_and_a_store_as_ever(
    makers, monkeypatch, tmp_path
):
    monkeypatch.setitem(compile_cache.CPU_OPTIONS, "xla_backend_optimization_level", 1)

    def options_of_solves():
        entries = compile_cache._PROGRAMS.kept()
        return [dict(entry[4]) for entry in entries if entry[0].__name__ == "Solve"]

    short = run()
    (quick,) = options_of_solves()
    assert quick["xla_backend_optimization_level"] == 0
    stored = run(store=tmp_path / "run")
    assert options_of_solves()[1:] == [compile_cache.CPU_OPTIONS]
    # The same chains; how they are rounded depends on the compiler.
    np.testing.assert_allclose(short.positions, stored.posterior["x"].values, rtol=0, atol=1e-3)
    assert short.certificate.certified.all()


def test_only_gradients_are_optimised_where_they_take_long_and_random_numbers_do_not(
    makers, monkeypatch
):
    monkeypatch.setitem(compile_cache.CPU_OPTIONS, "xla_backend_optimization_level", 1)
    monkeypatch.setattr(compile_cache, "_WORTH_OPTIMISING", 1e-3)
    large = Target(
        lambda x: TARGET.logdensity(x) - 1e-4 * jnp.sum(jnp.cosh(x[0] + jnp.zeros(10_000))),
        TARGET.initial,
    )
    options = {"num_samples": 48, "num_chains": 2, "num_warmup": 100, "progress": False}
    draws = sample(jax.random.key(1), large, coalescing_hmc, **options)
    assert draws.certificate.certified.all()
    levels = {
        entry[0].__name__: dict(entry[4])["xla_backend_optimization_level"]
        for entry in compile_cache._PROGRAMS.kept()
    }
    wanted = {"Solve": 1, "DrawTapes": 0, "Certify": 0}
    assert {name: levels[name] for name in wanted} == wanted


def test_a_short_run_is_a_loop_and_a_long_one_is_solved_in_parallel():
    short, parallel = run(), run(solver=shooting(steps=8))
    assert short.plan["solver"] == repr(sequential()) and short.report.depth == 48
    assert parallel.report.depth < 48
    np.testing.assert_allclose(short.positions, parallel.positions, rtol=0, atol=1e-3)
    assert "Shooting" in run(schedule=Windows(16)).plan["solver"], (
        "who cuts time wants it solved in parallel"
    )
    long = sample(
        jax.random.key(1),
        Target(lambda x: TARGET.logdensity(x) - 0.1 * jnp.sum(x**4), TARGET.initial),
        coalescing_hmc,
        num_samples=100_000,
        num_chains=2,
        num_warmup=100,
        progress=False,
    )
    assert "Shooting" in long.plan["solver"] and long.report.depth < 50_000
    assert (np.asarray(long.certificate.num_rejected) > 0).all()


def test_pilots_choose_a_coupling_only_for_a_parallel_solve(monkeypatch):
    options = {"num_samples": 1024, "num_chains": 2, "num_warmup": 64, "progress": False}
    loop = sample(jax.random.key(1), TARGET, mala, **options)
    assert "Sequential" in loop.plan["solver"] and "pilot" not in str(loop.warmup)
    monkeypatch.setattr(plan, "_SHORT_LOOP", 0.0)  # as in longer runs
    solved = sample(jax.random.key(1), TARGET, mala, **options)
    assert "Shooting" in solved.plan["solver"] and "pilot pairs met" in str(solved.warmup)


def test_what_costs_much_is_optimised(monkeypatch):
    monkeypatch.setitem(compile_cache.CPU_OPTIONS, "xla_backend_optimization_level", 1)
    assert compile_cache.compiler_options() == compile_cache.CPU_OPTIONS
    assert compile_cache.compiler_options(0) != compile_cache.CPU_OPTIONS
    large, _ = density_of(lambda x: -jnp.sum(jnp.cosh(x + jnp.zeros(10_000))), jnp.zeros(()))
    loop, _ = density_of(
        lambda x: -jax.lax.while_loop(lambda y: y < 1, lambda y: 2 * y, x), jnp.ones(())
    )
    small, _ = density_of(lambda x: -(x**2), jnp.zeros(()))
    seconds = [unoptimised_seconds(one, 1, 1000) for one in (small, large, loop)]
    assert seconds[0] < 1e-4 < seconds[1] < seconds[2] == np.inf


def test_numbers_of_leapfrog_steps_share_one_program(monkeypatch):
    # What other tests have left would make room for what is counted here.
    monkeypatch.setattr(compile_cache, "_PROGRAMS", OnceCache(128))
    density, data = density_of(TARGET.logdensity, jnp.zeros(3))
    whitening = Whitening.of_covariance(jnp.zeros(3), np.zeros(3), np.eye(3))
    means, counts = [], []
    for num_steps, step_size in ((2, 0.7), (5, 0.3)):
        settings = {
            "step_size": step_size,
            "num_integration_steps": num_steps,
            "mala_step_size": 0.5,
        }
        kernel = parametrised_kernel(
            KernelProgram(density, coalescing_hmc), data, whitening, settings
        )
        draws = sample(
            jax.random.key(2), TARGET, kernel, num_samples=200, num_chains=2, progress=False
        )
        means.append(np.asarray(draws.positions).mean((0, 1)))
        counts.append(len(compile_cache._PROGRAMS.kept()))
    assert counts[0] == counts[1] > 0
    assert not np.array_equal(*means), "the numbers count"


def test_a_value_that_two_threads_want_is_made_once():
    cache, made, found = OnceCache(4), [], []

    def make(old):
        made.append(old)
        time.sleep(0.1)
        return object()

    def want():
        found.append(cache.get("key", make))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(made) == 1 and len(set(map(id, found))) == 1
    with pytest.raises(ZeroDivisionError):
        cache.get("other", lambda old: 1 / 0)
    assert cache.get("other", lambda old: 2) == 2, "what failed is tried again"
    assert cache.get("unkept", lambda old: 3, keep=lambda value: False) == 3
    assert cache.get("unkept", lambda old: 4) == 4
    assert cache.get("unkept", lambda old: old + 1, holds=lambda value: False) == 5


SCRIPT = """
import jax, jax.monitoring
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
import jax.numpy as jnp
from partime_mcmc.compile_cache import keep_on_disk
jax.jit(lambda x: x - 1)(1.0)
print(keep_on_disk())
jax.jit(lambda x: jnp.sin(x) + 1)(1.0)
print(sum(name.endswith("cache_hits") for name in hits), jax.config.jax_compilation_cache_dir)
"""


def test_programs_are_kept_on_disk(tmp_path):
    def process(**environment):
        found = python(SCRIPT, HOME=str(tmp_path), **environment)
        assert not found.stderr, found.stderr
        return found.stdout.split()

    ours, users = tmp_path / "ours", tmp_path / "users"
    folder, hits, used = process(PARTIME_CACHE=str(ours))
    assert folder == used == str(ours) and hits == "0"
    assert int(process(PARTIME_CACHE=str(ours))[1]) >= 1
    assert process(PARTIME_CACHE="0") == ["None", "0", "None"]
    assert process(PARTIME_CACHE="1")[0] == process()[0] != "None", "on is no folder's name"
    assert process(JAX_COMPILATION_CACHE_DIR=str(users)) == ["None", "0", str(users)]
    assert process(PARTIME_CACHE="/proc/none")[0] == "None"


# Data of the second run far from the prior would make a triangular map worth learning, which is another program.
FIRST = """
import jax, jax.monitoring, numpy as np, numpyro, numpyro.distributions as dist
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
)
from partime_mcmc import CoalescingHMC, ParallelMCMC, compile_cache

def model(sigma, y):
    mean, spread = numpyro.sample("mean", dist.Normal(0, 5)), numpyro.sample("spread", dist.HalfNormal(5))
    with numpyro.plate("groups", 5):
        effect = numpyro.sample("effect", dist.Normal(mean, spread))
        numpyro.sample("y", dist.Normal(effect, sigma), obs=y)

mcmc = ParallelMCMC(CoalescingHMC(model), num_warmup=200, num_samples=100, num_chains=4, progress_bar=False)
for seed in (0, 1):
    compiled.clear()
    mcmc.run(jax.random.key(seed), np.ones(5), np.arange(5.0) + 3 * seed)
    print(len(compiled), float(mcmc.get_samples()["effect"].mean()), end=" ")
print(*{dict(entry[4])["xla_backend_optimization_level"] for entry in compile_cache._PROGRAMS.kept()})
"""


def test_a_first_answer_takes_few_programs_and_other_data_none():
    found = python(FIRST, "-W", "ignore", PARTIME_CACHE="0")
    first, mean, second, other, *levels = map(float, found.stdout.split())
    assert first <= 12 and second == 0, found.stdout
    assert abs(mean - 2) < 1 and abs(other - 5) < 1, "each run has its own data"
    assert levels == [0], "nothing of a run that takes a blink is worth optimising"
