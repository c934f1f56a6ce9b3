"""Cells of Flax and Equinox through `unroll` give what their own libraries give, with one line changed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import QUICK
from trained import trained

from partime_mcmc.rnn import (
    RNN,
    from_equinox,
    from_flax_linen,
    from_flax_nnx,
    unroll,
    unroll_with_status,
)

nnx = pytest.importorskip("flax.nnx")
linen = pytest.importorskip("flax.linen")
equinox = pytest.importorskip("equinox")

# Long enough for a segmented scan.
NUM_STEPS, INPUTS, UNITS = 4096, 2, 4
# Flax starts with orthogonal weights, which take some hundred steps to forget to the last bit of float64.
LONG = np.random.default_rng(5).normal(size=(2 * NUM_STEPS, INPUTS))
INPUT = np.random.default_rng(0).normal(size=(3, NUM_STEPS, INPUTS)).astype(np.float32)
quick = functools.partial(jax.jit, compiler_options=QUICK)


def assert_close(got, wanted, bound=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1.0, np.abs(b).max(initial=0.0)))


def scan(function, params, carry, inputs):
    return jax.lax.scan(lambda carry, x: function(params, carry, x), carry, inputs)


def task(run, function, params, carry, inputs):
    """Squared error of a network that is to give a function of its last inputs, and what it gave.

    What has to remember longer learns to, and is then run one step after another.
    """
    final, ys = run(function, params, carry, inputs)
    wanted = jnp.sin(inputs.sum(axis=1))
    return jnp.mean((ys.sum(axis=1) - wanted) ** 2), (final, ys)


def nnx_cell(kind):
    cell = getattr(nnx, kind)(INPUTS, UNITS, rngs=nnx.Rngs(0))
    function, params = from_flax_nnx(cell)
    graph, state = nnx.split(cell)
    return (
        function,
        params,
        cell.initialize_carry((INPUTS,), nnx.Rngs(0)),
        lambda p, c, x: nnx.merge(graph, nnx.merge_state(state, p))(c, x),
    )


def linen_cell(kind):
    cell = getattr(linen, kind)(features=UNITS)
    carry = cell.initialize_carry(jax.random.key(0), (INPUTS,))
    variables = cell.init(jax.random.key(1), carry, INPUT[0, 0])
    return *from_flax_linen(cell, variables), carry, cell.apply


def equinox_cell(kind):
    cell = getattr(equinox.nn, kind)(INPUTS, UNITS, key=jax.random.key(2))
    function, params = from_equinox(cell)
    carry = jnp.zeros(UNITS) if kind == "GRUCell" else (jnp.zeros(UNITS), jnp.zeros(UNITS))
    static = equinox.filter(cell, equinox.is_array, inverse=True)

    def own(params, carry, x):
        new = equinox.combine(params, static)(x, carry)
        return new, jax.tree.leaves(new)[0]

    return function, params, carry, own


CELLS = {
    "nnx GRU": (nnx_cell, "GRUCell"),
    "nnx LSTM": (nnx_cell, "OptimizedLSTMCell"),
    "linen GRU": (linen_cell, "GRUCell"),
    "linen LSTM": (linen_cell, "OptimizedLSTMCell"),
    "equinox GRU": (equinox_cell, "GRUCell"),
    "equinox LSTM": (equinox_cell, "LSTMCell"),
}


# One type for each cell, and the other one in the slow tests.
TYPES = dict(zip(CELLS, ("float32", "float64", "float64", "float32", "float64", "float64")))


@pytest.mark.parametrize(
    "name, kind",
    [
        pytest.param(name, kind, marks=[] if TYPES[name] == kind else pytest.mark.slow)
        for name in CELLS
        for kind in ("float32", "float64")
    ],
)
def test_cells_give_what_their_library_gives(name, kind):
    with jax.enable_x64(kind == "float64"):
        check_against_library(*CELLS[name], jnp.dtype(kind))


def check_against_library(make, kind, precision):
    """Random and trained weights; states as they are, gradients relative to the largest of them."""
    function, params, carry, own = make(kind)
    params, carry, inputs = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, precision), (params, carry, LONG)
    )
    states, gradients = (1e-5, 1e-4) if precision == jnp.float32 else (1e-10, 1e-8)

    def with_status(params):
        final, ys, status = unroll_with_status(function, params, carry, inputs)
        value, result = task(lambda *_: (final, ys), function, params, carry, inputs)
        return value, (result, status)

    ours = quick(jax.grad(with_status, has_aux=True))
    theirs = quick(jax.grad(lambda params: task(scan, own, params, carry, inputs), has_aux=True))
    for weights in (params, trained(lambda params: theirs(params)[0], params)):
        grads, (result, status) = ours(weights)
        wanted_grads, wanted = theirs(weights)
        assert bool(status.parallel)
        assert {leaf.dtype for leaf in jax.tree.leaves((grads, result))} == {precision}
        assert_close(result, wanted, states)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted_grads))
        assert_close(
            jax.tree.map(lambda leaf: leaf / largest, grads),
            jax.tree.map(lambda leaf: leaf / largest, wanted_grads),
            gradients,
        )


def test_equinox_cells_may_hold_integers_and_booleans():
    class Gated(equinox.Module):
        """A cell whose units are wired by indices and switched by flags."""

        weights: jax.Array
        order: jax.Array
        live: jax.Array

        def __call__(self, x, carry):
            new = jnp.tanh(self.weights @ carry[self.order] + x.sum())
            return jnp.where(self.live, new, carry)

    cell = Gated(0.3 * jnp.eye(UNITS), jnp.arange(UNITS)[::-1], jnp.arange(UNITS) != 1)
    carry, inputs = jnp.full(UNITS, 0.5), jnp.asarray(INPUT[0, :50])
    function, params = from_equinox(cell)
    _, ys = unroll(function, params, carry, inputs)
    np.testing.assert_allclose(
        ys, scan(lambda _, h, x: (cell(x, h),) * 2, None, carry, inputs)[1], atol=1e-6
    )
    grads = jax.grad(
        lambda params: unroll(function, params, carry, inputs)[1].sum(), allow_int=True
    )(params)
    assert np.abs(grads.weights).max() > 0 and from_equinox(cell)[0] == function


def test_equal_cells_are_one_cell():
    cell = nnx.GRUCell(INPUTS, UNITS, rngs=nnx.Rngs(0))
    assert from_flax_nnx(cell)[0] == from_flax_nnx(cell)[0]
    assert hash(from_flax_nnx(cell)[0]) == hash(from_flax_nnx(cell)[0])
    module = linen.GRUCell(features=UNITS)
    assert from_flax_linen(module, {})[0] == from_flax_linen(linen.GRUCell(features=UNITS), {})[0]


@pytest.mark.parametrize(
    "keywords, lengths",
    [
        ({}, None),
        ({"time_major": True, "return_carry": True}, None),
        ({"return_carry": True, "reverse": True, "keep_order": True}, [NUM_STEPS, 1000, 3000]),
    ],
    ids=["plain", "time major", "lengths, backwards"],
)
def test_the_layer_takes_the_place_of_nnx_rnn(keywords, lengths):
    cell = nnx.OptimizedLSTMCell(INPUTS, UNITS, rngs=nnx.Rngs(0))
    inputs = jnp.asarray(np.moveaxis(INPUT, 0, 1) if keywords.get("time_major") else INPUT)
    lengths = None if lengths is None else jnp.asarray(lengths)
    got, wanted = (layer(cell, **keywords)(inputs, seq_lengths=lengths) for layer in (RNN, nnx.RNN))
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert_close(got, wanted)


def test_the_layer_trains():
    def gradient(layer):
        model = layer(nnx.GRUCell(INPUTS, UNITS, rngs=nnx.Rngs(0)))
        return nnx.grad(lambda model: jnp.sum(jnp.square(model(jnp.asarray(INPUT)))))(model)

    assert_close(gradient(RNN), gradient(nnx.RNN), 1e-4)
