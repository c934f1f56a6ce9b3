"""Programs on disk: what a name tells apart, what is kept, and that a process which loads draws what one that compiles does."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import kept_programs
from partime_mcmc.kept_programs import load, name_of, save
from partime_mcmc.kernels import hmc, mala
from partime_mcmc.sampling.local import _Solve
from partime_mcmc.solvers import Shooting
from partime_mcmc.tracing import HashableFunction, explicit
from partime_mcmc.warmup.hmc_batch import _Walk

NUMBERS = (np.ones(3, np.float32),)


def traced(function):
    return explicit(function, None, *NUMBERS)[0]


def density(data, x):
    return -jnp.sum((x - 1) ** 2)


def test_the_same_has_one_name():
    names = {
        name_of(_Walk(traced(lambda data, x: density(data, x)), 16), (1, {"a": 2.0}))
        for _ in range(2)
    }
    assert len(names) == 1 and None not in names


def test_what_differs_has_another_name():
    one, captured = traced(density), np.arange(2.0)
    others = [
        (one, 0),
        (one, 1),
        (one, True),
        (one, 1.0),
        (one, "1"),
        (one, (1,)),
        (one, ((1,),)),
        (one, jax.tree.structure(1)),
        (one, jax.tree.structure(())),
        (one, jax.tree.structure({"x": 1})),
        (one, jax.tree.structure({"y": 1})),
        (traced(lambda data, x: -jnp.sum((x - 1) ** 3)), 0),
        (traced(lambda data, x: -jnp.sum((x - 1.000001) ** 2)), 0),
        (traced(lambda data, x: (density(data, x),)), 0),
        (traced(lambda data, x: density(data, x) + jnp.sum(captured)), 0),
        (traced(lambda data, x: density(data, x) + jnp.sum(np.arange(3.0) + x[0])), 0),
        (_Walk(one, 16), 0),
        (_Walk(one, 32), 0),
        (_Walk(mala, 16), 0),
        (_Walk(functools.partial(hmc, num_integration_steps=3), 16), 0),
        (_Walk(functools.partial(hmc, num_integration_steps=4), 16), 0),
        (_Solve(None, Shooting(num_segments=4)), 0),
        (_Solve(None, Shooting(num_segments=8)), 0),
        (_Solve(8, Shooting(num_segments=4)), 0),
        (_Solve(None, 0), 0),
    ]
    names = [name_of(*other) for other in others]
    assert None not in names and len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["jax_enable_x64", "jax_threefry_partitionable"])
def test_other_settings_are_other_names(name):
    before = name_of(_Walk(mala, 16))
    value = getattr(jax.config, name)
    with getattr(jax, name.removeprefix("jax_"))(not value):
        assert name_of(_Walk(mala, 16)) != before


def test_another_source_or_processor_is_another_name(monkeypatch):
    before = name_of(_Walk(mala, 16))
    parts = kept_programs._process()
    assert parts == kept_programs._process.__wrapped__(), "the same in every process"
    for index in range(len(parts)):
        changed = (*parts[:index], "other", *parts[index + 1 :])
        monkeypatch.setattr(kept_programs, "_process", lambda changed=changed: changed)
        assert name_of(_Walk(mala, 16)) != before


@dataclasses.dataclass(frozen=True)
class OfTheUsers:
    number: int


@jax.custom_jvp
def own_rule(x):
    return x


own_rule.defjvp(lambda values, slopes: (values[0], 2 * slopes[0]))


def test_what_has_no_description_is_not_kept():
    def called(x):
        return jax.pure_callback(np.sin, x, x)

    @jax.custom_gradient
    def with_gradient(x):
        return x * 1, lambda slope: 2 * slope

    absolute, per_argument = jax.custom_jvp(jnp.abs), jax.custom_jvp(lambda x: x * 1)
    absolute.defjvp(lambda values, slopes: (jnp.abs(values[0]), 2 * slopes[0]))
    per_argument.defjvps(lambda slope, value, x: 2 * slope)

    def root(x):
        return jax.lax.custom_root(
            lambda y: y - x, x, lambda f, y: y - f(y), lambda g, y: y / g(jnp.ones_like(y))
        )

    unknown = [
        lambda x: x,
        density,
        OfTheUsers(3),
        np.ones(3),
        own_rule,
        jnp.sin,
        traced(lambda data, x: called(x)),
        traced(lambda data, x: own_rule(x)),
        traced(lambda data, x: with_gradient(x)),
        traced(lambda data, x: absolute(x)),
        traced(lambda data, x: per_argument(x)),
        traced(lambda data, x: root(x)),
        HashableFunction(lambda x: x),
        functools.partial(hmc, coupling=density),
    ]
    assert [name_of(_Walk(one, 16)) for one in unknown] == [None] * len(unknown)
    assert name_of(_Walk(hmc, 16)) is not None
    assert name_of(_Walk(traced(lambda data, x: jax.nn.relu(jax.nn.softplus(x))), 16)) is not None


@pytest.mark.parametrize("package, is_known", [("jax", True), ("numpyro", True), ("theirs", False)])
def test_derivatives_are_known_by_the_version_of_their_package(package, is_known, tmp_path):
    """A newer version may have another derivative of the same function."""
    file = tmp_path / "site-packages" / package / "rules.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import jax\n@jax.custom_jvp\ndef same(x):\n    return x * 1\n"
        "same.defjvp(lambda values, slopes: (values[0], 2 * slopes[0]))\n"
    )
    rules = {}
    exec(compile(file.read_text(), str(file), "exec"), rules)
    found = traced(lambda data, x: rules["same"](x))
    assert (name_of(_Walk(found, 16)) is not None) == is_known


def program(function=lambda x: {"a": (jnp.sin(x), x + 1)}):
    return jax.jit(function).lower(*NUMBERS).compile()


def test_a_program_comes_back(tmp_path):
    made = program()
    save(tmp_path / "name.program", made)
    again = load(tmp_path / "name.program", NUMBERS)
    for one, two in zip(jax.tree.leaves(again(*NUMBERS)), jax.tree.leaves(made(*NUMBERS))):
        np.testing.assert_array_equal(one, two)
    assert jax.tree.structure(again(*NUMBERS)) == jax.tree.structure(made(*NUMBERS))
    assert load(tmp_path / "other.program", NUMBERS) is None
    assert [path.name for path in tmp_path.iterdir()] == ["name.program"]


def test_a_damaged_file_goes(tmp_path):
    save(tmp_path / "name.program", program())
    path = tmp_path / "name.program"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        path.write_bytes(damaged)
        assert load(tmp_path / "name.program", NUMBERS) is None and not path.exists()


def test_what_cannot_be_written_is_no_error(tmp_path):
    class Result:
        """Of a class that no other process can find."""

        def __init__(self, x):
            self.x = x

    jax.tree_util.register_pytree_node(
        Result, lambda one: ((one.x,), None), lambda _, x: Result(*x)
    )
    save(tmp_path / "result.program", program(Result))
    file = tmp_path / "file"
    file.write_text("")
    save(file / "name.program", program())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_those_that_were_not_wanted_for_longest_make_room(tmp_path, monkeypatch):
    made, ours = program(), [tmp_path / f"{index:040x}.program" for index in range(4)]
    for index in range(3):
        save(ours[index], made)
        os.utime(ours[index], (index, index))
    size = ours[0].stat().st_size
    assert load(ours[0], NUMBERS) is not None, "wanted now"
    save(ours[3], made)
    first, beside, second = (
        f"jit_f-{name * 64}-{kind}"
        for name, kind in (("a", "cache"), ("a", "atime"), ("b", "cache"))
    )
    # Files of the user's with names of their own are older and larger than any program.
    users = ["notes.txt", "images-cache", "old.program"]
    for name, when in ((first, 0), (beside, 0), (second, 5), *((name, 0) for name in users)):
        (tmp_path / name).write_bytes(bytes(size // 4 if name not in users else 9 * size))
        os.utime(tmp_path / name, (when, when))
    (tmp_path / f"g-{'c' * 64}-cache").mkdir()
    monkeypatch.setattr(kept_programs, "_MOST_BYTES", 4 * size)
    kept_programs.make_room(tmp_path)
    kept = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert kept == {ours[0].name, ours[2].name, ours[3].name, second, *users}
    kept_programs.make_room(tmp_path / "none")


def test_a_program_that_cannot_be_loaded_here_stays(tmp_path, monkeypatch):
    """It may be somebody else's, for another device."""
    path = tmp_path / "name.program"
    save(path, program())

    def refuse(*args, **options):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert load(path, NUMBERS) is not None
    monkeypatch.setattr(
        kept_programs.serialize_executable, "deserialize_and_load", lambda *args, **options: 1 / 0
    )
    assert load(path, NUMBERS) is None and path.exists()


def test_nothing_is_kept_where_the_source_was_changed_after_it_was_imported(monkeypatch):
    monkeypatch.setattr(kept_programs, "_IMPORTED", 0.0)
    kept_programs._process.cache_clear()
    try:
        assert name_of(1) is None
    finally:
        kept_programs._process.cache_clear()


RUNS = """
import hashlib, json, sys
import jax, jax.monitoring, jax.numpy as jnp, numpy as np
traced = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **about: traced.append(about.get("fun_name")) if name.endswith("jaxpr_trace_duration") else None
)
from partime_mcmc import Target, coalescing_hmc, sample

def shifted(data, power=2):
    return Target(lambda x: -0.5 * jnp.sum(jnp.abs(x - data) ** power), jnp.zeros(3))

said = []
for make in sys.argv[1:]:
    traced.clear()
    run = sample(jax.random.key(1), eval(make), coalescing_hmc, num_samples=48, num_chains=2, num_warmup=96, progress=False)
    digest = hashlib.sha256(np.asarray(run.positions).tobytes()).hexdigest()
    said.append((digest, [traced.count(name) for name in ("Solve", "Walk")]))
print(json.dumps(said))
"""
FIRST = "shifted(np.arange(3.0))"
OTHERS = ("shifted(np.arange(3.0) + 1)", "shifted(np.arange(3.0), 4)")


def process(script, *words, cache):
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "PARTIME_CACHE": str(cache)},
    )
    return json.loads(found.stdout)


def test_another_process_loads_what_it_would_compile_and_draws_the_same(tmp_path):
    expected, _ = zip(*process(RUNS, FIRST, *OTHERS, cache=0))
    assert len(set(expected)) == 3, "each is another posterior"
    assert process(RUNS, FIRST, cache=tmp_path) == [[expected[0], [1, 1]]]
    found, traced = zip(*process(RUNS, FIRST, *OTHERS, cache=tmp_path))
    assert found == expected
    known, other_data, other_density = traced
    assert known == other_data == [0, 0], "nothing is traced that is on disk"
    assert min(other_density) >= 1


# What one process takes from the cache of JAX it must not write, and a program that calls a library nobody may load.
TWICE = """
import json, threading
import jax, jax.numpy as jnp, numpy as np
from partime_mcmc.compile_cache import Timings, keep_on_disk, run_program
from partime_mcmc.kept_programs import compiled_anew
from partime_mcmc.tracing import explicit

def anew():
    jax.clear_caches()
    return compiled_anew(jax.jit(lambda x: jnp.sin(x) * 2).lower(1.0), None)[1]

def kept(function):
    x = np.eye(3)
    run_program(explicit(function, None, x)[0], ([], None), x, timings=Timings())
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join()
    return len(list(folder.glob("*.program")))

folder = keep_on_disk()
print(json.dumps([anew(), anew(), kept(lambda data, x: jnp.linalg.cholesky(x)), kept(lambda data, x: jnp.sin(x))]))
"""


def test_what_would_not_work_is_not_written(tmp_path):
    assert process(TWICE, cache=tmp_path) == [True, False, 0, 1]
    for path in tmp_path.glob("*.program"):
        path.unlink()
    assert process(TWICE, cache=tmp_path) == [False, False, 0, 0], "JAX has them"
