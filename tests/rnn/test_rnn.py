"""`unroll` is `lax.scan`: carries, outputs and derivatives, whatever solver finds the path, and never a wrong result.

States are compared within 1e-5 in float32 and 1e-10 in float64, gradients relative to their largest entry within 1e-4 and
1e-8: the residual allowed per step (32 ulp: 4e-6 and 7e-15) times what a forgetful network remembers, some ten steps.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import QUICK
from jax import lax
from trained import trained

from partime_mcmc.engine.recipes import deer, elk, jacobi, sequential, shooting
from partime_mcmc.engine.solution import Status, Tolerance
from partime_mcmc.linearize import Clipped
from partime_mcmc.rnn import (
    ClosedForm,
    elman,
    elman_diagonal,
    elman_params,
    gru,
    gru_diagonal,
    gru_params,
    lstm,
    lstm_pairs,
    lstm_params,
    unroll,
    unroll_with_status,
)
from partime_mcmc.rnn.unroll import batch_around
from partime_mcmc.solvers import Newton

# The module, whose name the function hides.
unrolling = sys.modules[unroll.__module__]
# Long enough for a segmented scan; solvers that are given take a shorter sequence.
NUM_STEPS, SHORT, INPUTS, UNITS = 8192, 384, 3, 6
quick = functools.partial(jax.jit, compiler_options=QUICK)


@pytest.fixture
def batches_in_lanes(monkeypatch):
    """Batches go through a segmented scan, which on a CPU would leave them to `lax.scan`."""
    monkeypatch.setattr(unrolling, "_MOST_CHAINS_ON_CPU", None)


CELLS = {
    "elman": (elman, elman_params, lambda h: h),
    "gru": (gru, gru_params, lambda h: h),
    "lstm": (lstm, lstm_params, lambda h: (h, -h)),
}


def problem(name, dtype, num_steps=NUM_STEPS):
    """A cell, weights, a carry and inputs."""
    cell, make, carry = CELLS[name]
    params = make(jax.random.key(0), INPUTS, UNITS, dtype)
    inputs = np.random.default_rng(1).normal(size=(num_steps, INPUTS))
    return cell, params, carry(jnp.linspace(-1, 1, UNITS, dtype=dtype)), jnp.asarray(inputs, dtype)


def scan(cell, params, carry, inputs, mask=None, reverse=False):
    """The definition."""

    def advance(carry, xs):
        x, wanted = xs
        new, y = cell(params, carry, jnp.where(wanted, x, 0))
        frozen = jax.tree.map(lambda a, b: jnp.where(wanted, a, b), new, carry)
        return frozen, jax.tree.map(lambda leaf: jnp.where(wanted, leaf, 0), y)

    mask = jnp.ones(inputs.shape[0], bool) if mask is None else mask
    return lax.scan(advance, carry, (inputs, mask), reverse=reverse)


def assert_close(got, wanted, bound):
    """Within `bound` of the largest entry, or of 1."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1.0, np.abs(b).max(initial=0.0)))


def loss(run, *arguments):
    carry, ys = run(*arguments)
    return sum(
        jnp.sum(jnp.cos(jnp.arange(leaf.size)) * leaf.ravel() + 0.1 * leaf.ravel() ** 2)
        for leaf in jax.tree.leaves((carry, ys))
    )


@pytest.mark.parametrize(
    "name, kind",
    [
        ("gru", "float32"),
        ("gru", "float64"),
        ("lstm", "float64"),
        ("elman", "float32"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("lstm", "float32"), ("elman", "float64"))
        ),
    ],
)
def test_equals_scan_with_its_gradients(name, kind):
    with jax.enable_x64(kind == "float64"):
        check_against_scan(name, jnp.dtype(kind))


def check_against_scan(name, precision):
    """With random weights, and with weights that 20 steps of Adam have moved."""
    cell, *arguments = problem(name, precision)
    states, gradients = (1e-5, 1e-4) if precision == "float32" else (1e-10, 1e-8)

    @quick
    def both(*arguments):
        final, ys, status = unroll_with_status(cell, *arguments)
        grads = jax.grad(
            functools.partial(loss, functools.partial(unroll, cell)), argnums=(0, 1, 2)
        )(*arguments)
        return (final, ys), status, grads

    definition = functools.partial(scan, cell)
    wanted = quick(
        lambda *a: (
            definition(*a),
            jax.grad(functools.partial(loss, definition), argnums=(0, 1, 2))(*a),
        )
    )
    moved = trained(lambda params: wanted(params, *arguments[1:])[1][0], arguments[0], 0.01)
    for weights in (arguments[0], moved):
        got, status, grads = both(weights, *arguments[1:])
        assert bool(status.parallel) and Status(int(status.status)) is Status.CONVERGED
        assert float(status.residual) < states
        values, slopes = wanted(weights, *arguments[1:])
        assert_close(got, values, states)
        assert_close(grads, slopes, gradients)


@pytest.mark.parametrize("name", CELLS)
def test_closed_forms_are_parts_of_the_jacobian(name, double):
    cell, params, _, inputs = problem(name, double, 1)
    h, c = np.random.default_rng(4).normal(size=(2, UNITS))
    carry = (jnp.asarray(c), jnp.asarray(h)) if name == "lstm" else jnp.asarray(h)
    exact = jax.jacfwd(lambda carry: cell(params, carry, inputs[0])[0])(carry)
    parts = np.asarray([np.diagonal(block) for block in jax.tree.leaves(exact)])
    if name == "lstm":
        got, parts = lstm_pairs(params, carry, inputs[0]).blocks, parts.reshape(2, 2, UNITS)
    else:
        closed = {"gru": gru_diagonal, "elman": elman_diagonal}[name]
        got, parts = closed(params, carry, inputs[0]).diagonal, parts[0]
    assert (np.abs(parts) > 1e-3).all()
    np.testing.assert_allclose(got, parts, rtol=0, atol=1e-12)


def gradient_copies(num_steps, num_units):
    """Temporary memory of a compiled gradient, in copies of the path."""
    shapes = jax.eval_shape(
        lambda: (
            gru_params(jax.random.key(0), INPUTS, num_units),
            jnp.zeros(num_units),
            jnp.zeros((num_steps, INPUTS)),
        )
    )
    run = quick(
        jax.grad(functools.partial(loss, functools.partial(unroll, gru)), argnums=(0, 1, 2))
    )
    return run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes / (
        num_steps * num_units * 4
    )


def test_the_gradient_of_a_wide_network_keeps_states_and_no_jacobians(monkeypatch):
    assert gradient_copies(8192, 24) < 16
    # What the bound would see: full Jacobians are D more copies. Another length, or the program of before is found again.
    monkeypatch.setattr(unrolling, "_NARROW", 1000)
    assert gradient_copies(8448, 24) > 24


def solvers_for(name):
    closed = {"elman": (elman_diagonal, 1), "gru": (gru_diagonal, 1), "lstm": (lstm_pairs, 2)}[name]
    carry = problem(name, jnp.float32, 1)[2]
    newton = Newton(Clipped(ClosedForm(closed[0], carry, closed[1]), 1.0))
    return {
        "deer": deer(),
        "closed form": newton,
        "shooting": shooting(4),
        "jacobi": jacobi(),
        "elk": elk(),
    }


@pytest.mark.parametrize(
    "name, solver",
    [
        ("gru", "deer"),
        ("lstm", "closed form"),
        ("elman", "closed form"),
        ("gru", "closed form"),
        ("gru", "shooting"),
        ("lstm", "elk"),
    ],
)
def test_any_solver(name, solver, double):
    cell, *arguments = problem(name, double, SHORT)
    chosen = solvers_for(name)[solver]
    got = quick(lambda *a: unroll_with_status(cell, *a, solver=chosen))(*arguments)
    assert bool(got[2].parallel) and int(got[2].iterations) <= 40
    assert_close(got[:2], quick(functools.partial(scan, cell))(*arguments), 1e-10)


@pytest.mark.parametrize("reverse", [False, True])
def test_masked_steps_freeze_the_carry(reverse, double, batches_in_lanes):
    cell, params, carry, inputs = problem("gru", double)
    rng = np.random.default_rng(3)
    # Two masked sequences: gaps anywhere with NaN in them, and padding from the middle on.
    mask = jnp.stack([jnp.asarray(rng.uniform(size=NUM_STEPS) < 0.7), jnp.arange(NUM_STEPS) < 200])
    dirty = jnp.where(mask[..., None], inputs, jnp.nan)

    def run(params, carry, inputs):
        return unroll_with_status(
            cell, params, carry, inputs, mask=mask, reverse=reverse, batch_axes=1
        )

    def wanted(params, carry, inputs):
        return jax.vmap(functools.partial(scan, cell, params, reverse=reverse))(
            carry, inputs, mask=mask
        )

    carries = jnp.stack([carry, -carry])

    def both(function, inputs):
        # Backwards the derivatives add nothing new.
        value = functools.partial(loss, lambda *a: function(*a)[:2])
        slope = (lambda *a: ()) if reverse else jax.grad(value, argnums=(0, 1))
        return quick(lambda *a: (function(*a)[:2], slope(*a)))(params, carries, inputs)

    got, grads = both(run, dirty)
    clean, clean_grads = both(wanted, jnp.where(mask[..., None], inputs, 0))
    assert_close(got, clean, 1e-10)
    assert_close(grads, clean_grads, 1e-8)
    if not reverse:
        # Frozen is frozen, to the last bit.
        np.testing.assert_array_equal(np.asarray(got[0])[1], np.asarray(got[1])[1, 199])


def test_batches_by_axis_and_by_vmap(double, batches_in_lanes):
    cell, params, carry, inputs = problem("lstm", double)
    batch = jnp.stack([inputs, -inputs, 2 * inputs])
    carries = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 0 * leaf]), carry)
    wanted = quick(jax.vmap(functools.partial(scan, cell, params)))(carries, batch)

    def by_vmap(params, carry, inputs):
        return jax.vmap(lambda carry, x: unroll(cell, params, carry, x))(carry, inputs)

    by_axis = functools.partial(unroll, cell, batch_axes=1)
    grads = [
        quick(
            lambda *a, run=run: (
                run(*a),
                jax.grad(functools.partial(loss, run), argnums=(0, 1, 2))(*a),
            )
        )(params, carries, batch)
        for run in (by_axis, by_vmap)
    ]
    assert_close(grads[0][0], wanted, 1e-10)
    assert_close(grads[1], grads[0], 1e-8)


def test_second_derivatives(double):
    cell, params, carry, inputs = problem("gru", double)
    tangents = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=double)).reshape(leaf.shape), params
    )

    def second(run):
        gradient = jax.grad(lambda params: loss(run, params, carry, inputs))

        def along(params):
            return sum(
                jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient(params), tangents)))
            )

        return quick(
            lambda params: (jax.jvp(gradient, (params,), (tangents,))[1], jax.grad(along)(params))
        )(params)

    got = second(functools.partial(unroll, cell))
    assert_close(got, second(functools.partial(scan, cell)), 1e-8)
    # Inside jax.checkpoint the path is solved again on the way back.
    kept = quick(
        jax.grad(jax.checkpoint(lambda p: loss(functools.partial(unroll, cell), p, carry, inputs)))
    )(params)
    assert_close(
        kept,
        quick(jax.grad(lambda p: loss(functools.partial(scan, cell), p, carry, inputs)))(params),
        1e-8,
    )


def rotation(params, carry, x):
    """Weights that are 1.5 times a rotation: nothing is forgotten."""
    new = jnp.tanh(params @ carry + x)
    return new, new


def kinked(params, carry, x):
    new = jax.nn.relu(params @ carry + x)
    return new, new


def weights(scale, dtype):
    return jnp.asarray(
        scale * np.linalg.qr(np.random.default_rng(5).normal(size=(UNITS, UNITS)))[0], dtype
    )


@pytest.mark.parametrize("solver", [None, deer(), jacobi()], ids=["none", "deer", "jacobi"])
def test_what_does_not_forget_is_run_sequentially(solver, double):
    inputs = jnp.asarray(
        0.1 * np.random.default_rng(6).normal(size=(SHORT if solver else NUM_STEPS, UNITS))
    )
    carry = jnp.full(UNITS, 0.1)
    bound = {} if solver is None else {"max_iterations": 10}
    final, ys, status = quick(lambda *a: unroll_with_status(rotation, *a, solver=solver, **bound))(
        weights(1.5, double), carry, inputs
    )
    assert Status(int(status.status)) is Status.CONVERGED and not bool(status.parallel)
    assert Status(int(status.solver_status)) is not Status.CONVERGED
    if solver is None:
        assert float(status.evaluations) < 1.5  # the pilot's share
    # Chaos: another compilation of the same loop drifts away, so every step is compared with the image of the one before.
    previous = jnp.concatenate([carry[None], ys[:-1]])
    assert_close(
        jax.vmap(lambda h, x: rotation(weights(1.5, double), h, x)[1])(previous, inputs), ys, 1e-12
    )
    np.testing.assert_array_equal(final, ys[-1])


def test_kinks(double):
    inputs = jnp.asarray(np.random.default_rng(7).normal(size=(NUM_STEPS, UNITS)))
    arguments = weights(0.7, double), jnp.zeros(UNITS), inputs
    got = quick(
        lambda *a: (
            unroll_with_status(kinked, *a),
            jax.grad(functools.partial(loss, functools.partial(unroll, kinked)))(*a),
        )
    )(*arguments)
    assert bool(got[0][2].parallel)
    assert_close(
        (got[0][:2], got[1]),
        quick(
            lambda *a: (
                scan(kinked, *a),
                jax.grad(functools.partial(loss, functools.partial(scan, kinked)))(*a),
            )
        )(*arguments),
        1e-8,
    )


@pytest.mark.parametrize("solver", [None, deer()], ids=["none", "deer"])
def test_nan_inputs_are_reported_and_nothing_is_hidden(solver, double):
    cell, params, carry, inputs = problem("gru", double, SHORT if solver else NUM_STEPS)
    inputs = inputs.at[100].set(jnp.nan)
    _, ys, status = quick(lambda *a: unroll_with_status(cell, *a, solver=solver))(
        params, carry, inputs
    )
    assert Status(int(status.status)) is Status.NONFINITE and not bool(status.parallel)
    wanted = scan(cell, params, carry, inputs)[1]
    np.testing.assert_array_equal(np.isfinite(ys), np.isfinite(wanted))
    assert_close(ys[:100], wanted[:100], 1e-10)


@pytest.mark.parametrize("num_steps", [200, NUM_STEPS])
def test_an_output_that_is_not_finite_shows_whichever_way_was_taken(num_steps, double):
    """The carry stays finite; the output of one step does not."""

    def cell(params, carry, x):
        new, _ = gru(params, carry, x)
        return new, jnp.where(x[0] == 100.0, jnp.nan, new)

    _, params, carry, inputs = problem("gru", double, num_steps)
    statuses = [
        unroll_with_status(cell, params, carry, x)[2] for x in (inputs, inputs.at[50, 0].set(100.0))
    ]
    assert [bool(one.parallel) for one in statuses] == [num_steps == NUM_STEPS] * 2
    assert [Status(int(one.status)) for one in statuses] == [Status.CONVERGED, Status.NONFINITE]


@pytest.mark.parametrize("kind", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_numbers_too_coarse_to_be_judged_are_left_to_scan(kind):
    cell, params, carry, inputs = problem("gru", jnp.dtype(kind), 2 * NUM_STEPS)
    final, ys, status = quick(functools.partial(unroll_with_status, cell))(params, carry, inputs)
    assert not bool(status.parallel) and Status(int(status.status)) is Status.CONVERGED
    wanted = jax.lax.scan(functools.partial(cell, params), carry, inputs)
    np.testing.assert_array_equal(ys, wanted[1])
    np.testing.assert_array_equal(final, wanted[0])
    # A solver that is given answers for itself: each step is right to a few units in the last place.
    _, path, given = quick(functools.partial(unroll_with_status, cell, solver=shooting(4)))(
        params, carry, inputs[:SHORT]
    )
    previous = jnp.concatenate([carry[None], path[:-1]])
    image = jax.vmap(lambda h, x: cell(params, h, x)[1])(previous, inputs[:SHORT])
    assert float(jnp.abs(image - path).astype(jnp.float32).max()) <= 8 * float(jnp.finfo(kind).eps)
    assert Status(int(given.status)) is Status.CONVERGED


def loops(jaxpr):
    """Trip counts of all loops of a traced program; None for those that end when something holds."""
    found = []
    for equation in jaxpr.eqns:
        found += [equation.params["length"]] if equation.primitive.name == "scan" else []
        found += [None] if equation.primitive.name == "while" else []
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found += loops(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("through", ["vmap", "vmap of jit"])
@pytest.mark.parametrize("mapped", ["networks", "sequences", "both"])
def test_a_batch_by_vmap_is_one_loop_over_the_steps_on_a_cpu(mapped, through):
    cell, params, carry, inputs = problem("gru", jnp.float32)
    many = 3
    axes = {"networks": (0, None, None), "sequences": (None, 0, 0), "both": (0, 0, 0)}[mapped]
    arguments = [
        tree
        if axis is None
        else jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf, 0.8 * leaf]), tree)
        for axis, tree in zip(axes, (params, carry, inputs))
    ]
    one = functools.partial(unroll_with_status, cell)
    run = jax.vmap(one if through == "vmap" else jax.jit(one), in_axes=axes)
    traced = jax.make_jaxpr(run)(*arguments)
    # Nothing goes over the networks one after another, and nothing waits for a condition.
    assert loops(traced.jaxpr) == [NUM_STEPS]
    final, ys, status = run(*arguments)
    assert not status.parallel.any() and status.status.shape == (many,)
    wanted = jax.vmap(functools.partial(scan, cell), in_axes=axes)(*arguments)
    assert_close((final, ys), wanted, 1e-5)
    if mapped != "networks":
        return
    grads = [
        quick(jax.grad(functools.partial(loss, jax.vmap(lambda *a, f=f: f(*a)[:2], in_axes=axes))))(
            *arguments
        )
        for f in (one if through == "vmap" else jax.jit(one), functools.partial(scan, cell))
    ]
    assert_close(grads[0], grads[1], 1e-4)


def test_vmaps_within_vmaps_are_counted():
    seen = []
    leaves = jnp.ones((2, 3, 4)), jnp.ones((2, 5))

    def look(a, b):
        seen.append(batch_around((a, b)))
        return a.sum() + b.sum()

    look(*leaves)
    jax.vmap(look)(*leaves)
    jax.vmap(jax.vmap(look, in_axes=(0, None)))(*leaves)
    jax.vmap(jax.grad(look))(*leaves)
    jax.grad(lambda a, b: jax.jit(jax.vmap(look))(a, b).sum())(*leaves)
    assert seen == [1, 2, 6, 2, 2]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 130])
def test_short_sequences(num_steps, double):
    cell, *arguments = problem("lstm", double, num_steps)
    for solver in (None, sequential()):
        run = quick(functools.partial(unroll, cell, solver=solver))
        assert_close(run(*arguments), scan(cell, *arguments), 1e-10)


@pytest.mark.parametrize(
    "error, words, change",
    [
        (
            TypeError,
            r"returns a carry: an array with shape \(4,\)",
            {"cell": lambda p, h, x: (h[:4], h)},
        ),
        (TypeError, "wanted a pair", {"cell": lambda p, h, x: h}),
        (TypeError, "structure", {"cell": lambda p, h, x: ((h, h), h)}),
        (TypeError, "int32", {"carry": jnp.zeros(UNITS, jnp.int32)}),
        (ValueError, "no arrays", {"inputs": ()}),
        (ValueError, "leading axes", {"inputs": (jnp.zeros(3), jnp.zeros(4))}),
        (ValueError, "batch axes", {"batch_axes": 1}),
        (ValueError, "batch_axes", {"batch_axes": -1}),
        (TypeError, "solver: got 'deer', wanted a recipe", {"solver": "deer"}),
        (TypeError, "solver: got the function deer, wanted a recipe", {"solver": deer}),
        (TypeError, "tolerance: got 1e-06, wanted Tolerance", {"tolerance": 1e-6}),
        (ValueError, "tolerance: relative must be finite", {"tolerance": Tolerance(-1.0)}),
        (ValueError, "max_iterations: got 10 with solver=None", {"max_iterations": 10}),
        (ValueError, "max_iterations: got 0", {"max_iterations": 0, "solver": deer()}),
        (TypeError, "bool", {"mask": jnp.ones(NUM_STEPS)}),
        (ValueError, "mask: got shape", {"mask": jnp.ones(3, bool)}),
    ],
)
def test_what_is_refused(error, words, change):
    cell, params, carry, inputs = problem("gru", jnp.float32)
    given = {"cell": cell, "params": params, "carry": carry, "inputs": inputs} | change
    with pytest.raises(error, match=words):
        unroll(**given)
