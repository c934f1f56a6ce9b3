"""A log density that reads other data than in the run before is sampled as it is now, and what is the same is not traced again."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import Target, compile_cache, mala, sample, sequential
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
}


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
    assert (second is first) == (name not in ("scalar rebound", "in a dict"))
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
