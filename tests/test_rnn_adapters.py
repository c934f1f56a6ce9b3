"""Cells of Flax and Equinox through `unroll` give what their own libraries give, with one line changed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import QUICK

from partime_mcmc.rnn import RNN, from_equinox, from_flax_linen, from_flax_nnx, unroll, unroll_with_status

nnx = pytest.importorskip("flax.nnx")
linen = pytest.importorskip("flax.linen")
equinox = pytest.importorskip("equinox")

# Long enough for a relay of segments.
NUM_STEPS, INPUTS, UNITS = 4096, 2, 4
INPUT = np.random.default_rng(0).normal(size=(3, NUM_STEPS, INPUTS)).astype(np.float32)
quick = functools.partial(jax.jit, compiler_options=QUICK)


def assert_close(got, wanted, bound=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1.0, np.abs(b).max(initial=0.0)))


def scan(function, params, carry, inputs):
    return jax.lax.scan(lambda carry, x: function(params, carry, x), carry, inputs)


def both(run, function, params, carry):
    """Result and gradients with respect to parameters of one sequence."""
    def loss(params):
        final, ys = run(function, params, carry, jnp.asarray(INPUT[0]))
        return jnp.sum(jnp.cos(jnp.arange(ys.size)) * ys.ravel()), (final, ys)

    return quick(jax.grad(loss, has_aux=True))(params)


def nnx_cell(kind):
    cell = getattr(nnx, kind)(INPUTS, UNITS, rngs=nnx.Rngs(0))
    function, params = from_flax_nnx(cell)
    graph, state = nnx.split(cell)
    return function, params, cell.initialize_carry((INPUTS,), nnx.Rngs(0)), lambda p, c, x: nnx.merge(graph, nnx.merge_state(
        state, p))(c, x)


def linen_cell(kind):
    cell = getattr(linen, kind)(features=UNITS)
    carry = cell.initialize_carry(jax.random.key(0), (INPUTS,))
    variables = cell.init(jax.random.key(1), carry, INPUT[0, 0])
    return *from_flax_linen(cell, variables), carry, cell.apply


def equinox_cell(kind):
    cell = getattr(equinox.nn, kind)(INPUTS, UNITS, key=jax.random.key(2))
    function, params = from_equinox(cell)
    carry = jnp.zeros(UNITS) if kind == "GRUCell" else (jnp.zeros(UNITS), jnp.zeros(UNITS))
    static = equinox.filter(cell, equinox.is_inexact_array, inverse=True)

    def own(params, carry, x):
        new = equinox.combine(params, static)(x, carry)
        return new, jax.tree.leaves(new)[0]

    return function, params, carry, own


@pytest.mark.parametrize("make, kind", [(nnx_cell, "GRUCell"), (nnx_cell, "OptimizedLSTMCell"), (linen_cell, "GRUCell"),
                                        (equinox_cell, "GRUCell"), (equinox_cell, "LSTMCell")],
                         ids=["nnx GRU", "nnx LSTM", "linen GRU", "equinox GRU", "equinox LSTM"])
def test_cells_give_what_their_library_gives(make, kind):
    function, params, carry, own = make(kind)
    status = unroll_with_status(function, params, carry, jnp.asarray(INPUT[0]))[2]
    assert bool(status.parallel)
    grads, result = both(unroll, function, params, carry)
    wanted_grads, wanted = both(lambda _, *rest: scan(own, *rest), own, params, carry)
    assert_close(result, wanted)
    assert_close(grads, wanted_grads, 1e-4)


def test_equal_cells_are_one_cell():
    cell = nnx.GRUCell(INPUTS, UNITS, rngs=nnx.Rngs(0))
    assert from_flax_nnx(cell)[0] == from_flax_nnx(cell)[0]
    assert hash(from_flax_nnx(cell)[0]) == hash(from_flax_nnx(cell)[0])
    module = linen.GRUCell(features=UNITS)
    assert from_flax_linen(module, {})[0] == from_flax_linen(linen.GRUCell(features=UNITS), {})[0]


@pytest.mark.parametrize("keywords, lengths", [
    ({}, None), ({"time_major": True, "return_carry": True}, None),
    ({"return_carry": True, "reverse": True, "keep_order": True}, [NUM_STEPS, 1000, 3000]),
], ids=["plain", "time major", "lengths, backwards"])
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
