"""A log density that reads other data than in the run before is sampled as it is now, and what is the same is not traced again."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import Target, captured_data, compile_cache, mala, sample, sequential
from partime_mcmc.tracing import WithoutParams, explicit

SIZE = 3
ARRAY = np.zeros(SIZE, np.float32)
SCALAR = 0.0
SETTINGS = {"centre": 0.0}
HOLDER = types.SimpleNamespace(centre=np.zeros(SIZE, np.float32))


def around(x, centre):
    return -0.5 * jnp.sum((x - centre) ** 2)


@jax.jit
def _compiled_by_user(x):
    return around(x, ARRAY)


class Density:
    """An object with data; how often it is called must not count as data."""

    def __init__(self):
        self.centre, self.calls = np.zeros(SIZE, np.float32), 0

    def __call__(self, x):
        self.calls += 1
        return around(x, self.centre)

    def method(self, x):
        return self(x)


def closure():
    centre = np.zeros(SIZE, np.float32)

    def change(value):
        nonlocal centre
        centre = np.full(SIZE, value, np.float32)

    return lambda x: around(x, centre), change


def in_place(array):
    def change(value):
        array[...] = value

    return change


def rebind(name):
    def change(value):
        globals()[name] = np.full(SIZE, value, np.float32) if name == "ARRAY" else value

    return change


class Setting:
    """Attributes of classes are data too."""

    centre: float | np.ndarray = 0.0


class Inherits(Setting):
    def logdensity(self, x):
        return around(x, self.centre)


class ReadsGlobal:
    def logdensity(self, x):
        return around(x, ARRAY)

    @functools.cached_property
    def late(self):
        return types.SimpleNamespace(factor=1.0)


LAZY = ReadsGlobal()


@jax.custom_jvp
def _with_rule(x):
    return around(x, ARRAY)


_with_rule.defjvp(lambda values, slopes: (_with_rule(values[0]), jnp.sum(slopes[0])))


def around_array(x):
    return around(x, ARRAY)


class Table:
    """As data frames of several types: arrays of objects, made anew."""

    def __init__(self):
        self.columns = {"group": ["a", "b", "c"], "centre": [0.0, 0.0, 0.0]}

    def __array__(self, dtype=None, copy=None):
        return np.array(list(self.columns.values()), object)


TABLE = Table()


def rebind_table(value):
    TABLE.columns["centre"] = [value] * SIZE


def module_inside():
    inner, outer = types.ModuleType("outer.inner"), types.ModuleType("outer")
    inner.__file__ = outer.__file__ = "outer/__init__.py"
    outer.inner, inner.centre = inner, 0.0
    globals()["OUTER"] = outer
    return lambda value: setattr(inner, "centre", np.full(SIZE, value, np.float32))


OBJECT, CAPTURED = Density(), np.zeros(SIZE, np.float32)
CASES = {
    "closure rebound": closure(),
    "closure in place": ((lambda array: lambda x: around(x, array))(CAPTURED), in_place(CAPTURED)),
    "global rebound": (lambda x: around(x, ARRAY), rebind("ARRAY")),
    "scalar rebound": (lambda x: around(x, SCALAR), rebind("SCALAR")),
    "in a dict": (lambda x: around(x, SETTINGS["centre"]), lambda v: SETTINGS.update(centre=v)),
    "attribute": (lambda x: around(x, HOLDER.centre), lambda v: in_place(HOLDER.centre)(v)),
    "object": (OBJECT, lambda v: setattr(OBJECT, "centre", np.full(SIZE, v, np.float32))),
    "method": (OBJECT.method, lambda v: in_place(OBJECT.centre)(v)),
    "partial": (functools.partial(around, centre=CAPTURED), in_place(CAPTURED)),
    "compiled by the user": (lambda x: _compiled_by_user(x), rebind("ARRAY")),
    "class": (
        lambda x: around(x, Setting.centre),
        lambda v: setattr(Setting, "centre", np.full(SIZE, v, np.float32)),
    ),
    "class inherited": (
        lambda x: Inherits().logdensity(x),
        lambda v: setattr(Setting, "centre", np.full(SIZE, v, np.float32)),
    ),
    "method reads a global": (lambda x: LAZY.logdensity(x), rebind("ARRAY")),
    "after something was made late": (
        lambda x: LAZY.late.factor * around_array(x),
        rebind("ARRAY"),
    ),
    "derivative of its own": (lambda x: _with_rule(x), rebind("ARRAY")),
    "in JAX's partial": (lambda x: jax.tree_util.Partial(around_array)(x), rebind("ARRAY")),
    "array of objects": (
        lambda x: around(x, jnp.asarray(TABLE.columns["centre"], jnp.float32)),
        rebind_table,
    ),
    "module in a module": (lambda x: around(x, OUTER.inner.centre), module_inside()),  # noqa: F821
}
# Numbers are part of programs, and what a rule of the user's captures is not known.
OTHER_PROGRAMS = ("scalar rebound", "in a dict", "derivative of its own")


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_now_is_what_is_traced(name):
    density, change = CASES[name]
    example, position = jnp.zeros(SIZE), jnp.ones(SIZE)

    def trace():
        function, data = explicit(WithoutParams(density), None, example)
        return function, float(function(data, position))

    change(0.0)
    first, value = trace()
    assert value == -0.5 * SIZE
    assert trace()[0] is first
    change(3.0)
    second, value = trace()
    assert value == -2.0 * SIZE
    # Other arrays of the same shape go into the same program; a number is part of it.
    assert (second is first) == (name not in OTHER_PROGRAMS)
    assert trace()[0] is second


def test_draws_are_of_the_data_of_today():
    data = np.zeros(SIZE, np.float32)
    target = Target(lambda x: around(x, data), initial=jnp.zeros(SIZE))

    def mean():
        draws = sample(
            jax.random.key(0),
            target,
            mala,
            num_samples=300,
            num_chains=2,
            num_warmup=100,
            solver=sequential(),
            progress=False,
        )
        return float(np.mean(draws.positions)), set(compile_cache._PROGRAMS.kept())

    before, programs = mean()
    again, same = mean()
    data[...] = 100.0
    after, _ = mean()
    assert abs(before) < 1 and again == before and abs(after - 100) < 1
    assert same == programs


def test_a_compiled_function_of_the_users_is_traced_again_inside_of_another_density():
    """JAX keeps its own trace, whoever calls it."""

    def value():
        function, data = explicit(
            WithoutParams(lambda x: _compiled_by_user(x)), None, jnp.zeros(SIZE)
        )
        return float(function(data, jnp.zeros(SIZE)))

    change = rebind("ARRAY")
    change(1.0)
    assert value() == -0.5 * SIZE
    change(2.0)
    assert value() == -2.0 * SIZE


def test_a_gradient_of_the_users_own_is_that_of_each_model():
    """`custom_gradient` captures data that no text of a program shows."""

    def density(centre):
        @jax.custom_gradient
        def line(x):
            return jnp.sum(x), lambda slope: (slope * centre,)

        line.origin = "one model"

        def called(x):
            return line(x)

        called.origin = "one model"
        return called

    slopes = []
    for centre in (1.0, 4.0):
        function, data = explicit(
            WithoutParams(density(np.full(SIZE, centre, np.float32))), None, jnp.zeros(SIZE)
        )
        slopes.append(jax.grad(function, argnums=1)(data, jnp.zeros(SIZE)))
    np.testing.assert_array_equal(slopes[1], 4 * slopes[0])


def test_settings_that_decide_about_results_are_part_of_a_trace():
    target = Target(lambda x: -jnp.sum(x**2), initial=lambda key: jax.random.normal(key, (SIZE,)))
    keys = jax.random.split(jax.random.key(0), 2)
    for counts in (True, False):
        with jax.threefry_partitionable(counts):
            np.testing.assert_array_equal(target.starts(keys), jax.vmap(target.initial)(keys))


def test_a_derivative_of_the_users_own_reads_the_data_of_today():
    settings = {"slope": np.ones(SIZE, np.float32)}

    def density(x):
        slope = settings["slope"]

        @jax.custom_jvp
        def line(x):
            return jnp.sum(x)

        line.defjvp(lambda primals, tangents: (line(primals[0]), jnp.sum(slope * tangents[0])))
        return line(x)

    def gradient():
        function, data = explicit(WithoutParams(density), None, jnp.zeros(SIZE))
        return np.asarray(jax.grad(function, argnums=1)(data, jnp.zeros(SIZE)))

    before = gradient()
    settings["slope"] = np.full(SIZE, 4.0, np.float32)
    np.testing.assert_array_equal(gradient(), 4 * before)


@pytest.mark.parametrize("folder", [captured_data._OWN_FOLDER, captured_data._STANDARD_FOLDER])
def test_a_folder_beside_a_library_is_the_users(folder):
    assert captured_data.is_library(f"{folder}module.py")
    assert not captured_data.is_library(f"{folder.rstrip('/')}_runs/module.py")
    assert not captured_data.has_version(f"{folder.rstrip('/')}_runs/module.py")


def test_data_are_told_apart_by_more_than_a_checksum():
    # Of these two CRC-32 is the same.
    centre = np.zeros(2, np.uint32)

    def density(x):
        return around(x, centre)

    before = captured_data.data_read_by(density).tokens
    assert captured_data.data_read_by(density).tokens == before
    centre[:] = 3681617473, 1
    assert captured_data.data_read_by(density).tokens != before
