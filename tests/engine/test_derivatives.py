"""Derivatives of a solved path are those of the sequential loop: forward, reverse and second.

Both sides are compiled float64 programs that add up the same products in another order, over T = 9 steps: they differ
by some hundred roundings of 1e-16, and by the tolerance to which the path was solved (256 roundings), hence 1e-10.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import DYNAMICS, QUICK, by_name

from partime_mcmc.engine.adjoint import ImplicitSegmented
from partime_mcmc.engine.dynamics import Dynamics, rollout
from partime_mcmc.engine.recipes import deer, elk, jacobi
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.windows import Windows

NUM_STEPS = 9
quick = functools.partial(jax.jit, compiler_options=QUICK)


def assert_close(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if b.dtype == jax.dtypes.float0:
            assert a.dtype == b.dtype
        else:
            np.testing.assert_allclose(
                a, b, rtol=1e-10, atol=1e-10 * max(1.0, np.abs(b).max(initial=0.0))
            )


def solved(dynamics, initial, drives, **options):
    return solve(dynamics, initial, drives, **options).states


def total(states):
    """A scalar that weighs every number of a path differently and is not linear."""
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(states)])
    return jnp.sum(jnp.cos(jnp.arange(flat.size)) * flat + 0.1 * flat**2)


def floats(tree):
    """The floating-point leaves, and the function that puts them back."""
    leaves, structure = jax.tree.flatten(tree)
    smooth = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def rebuild(values):
        values = iter(values)
        return jax.tree.unflatten(
            structure, [next(values) if s else leaf for s, leaf in zip(smooth, leaves)]
        )

    return [leaf for s, leaf in zip(smooth, leaves) if s], rebuild


def directions(values, seed):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=value.shape)) for value in values]


@pytest.mark.parametrize("row", [row for row in DYNAMICS if row.forgets], ids=lambda row: row.name)
def test_first_derivatives_in_everything(row, double):
    problem = row.build(NUM_STEPS, double)
    values, rebuild = floats((problem.dynamics, problem.initial, problem.drives))
    tangents = directions(values, 0)

    def derivatives(path):
        states, pushed = jax.jvp(lambda values: path(*rebuild(values)), (values,), (tangents,))
        return states, pushed, jax.grad(lambda values: total(path(*rebuild(values))))(values)

    solver = jacobi() if row.rejects else deer()
    got = quick(lambda: derivatives(functools.partial(solved, solver=solver)))()
    wanted = quick(lambda: derivatives(rollout))()
    assert_close(got, wanted)
    # Parameters, initial state and drives all matter; the accept uniforms, last of all, only by a jump.
    matters = [float(jnp.abs(leaf).max()) > 1e-3 for leaf in wanted[2]]
    assert all(matters[:-1]) and matters[-1] != row.rejects


def test_second_derivatives(double):
    problem = by_name(DYNAMICS, "pytree").build(4, double)
    values, rebuild = floats((problem.dynamics, problem.initial, problem.drives))
    tangents = directions(values, 1)

    def second(path):
        gradient = jax.grad(lambda values: total(path(*rebuild(values))))
        forward_over_reverse = jax.jvp(gradient, (values,), (tangents,))[1]
        reverse_over_reverse = jax.grad(
            lambda values: sum(jnp.vdot(a, b) for a, b in zip(gradient(values), tangents))
        )(values)
        return forward_over_reverse, reverse_over_reverse

    got = quick(lambda: second(functools.partial(solved, solver=deer())))()
    wanted = quick(lambda: second(rollout))()
    assert_close(got, wanted)
    assert_close(got[0], got[1])  # the Hessian is symmetric


@pytest.mark.parametrize(
    "options",
    [
        {"solver": elk()},
        {"solver": deer(), "schedule": Windows(4)},
        {"solver": deer(), "adjoint": ImplicitSegmented()},
    ],
    ids=["elk", "windows", "segmented scan"],
)
def test_whatever_solved_it(options, double):
    problem = by_name(DYNAMICS, "GRU").build(NUM_STEPS, double)

    def gradient(path):
        return jax.grad(lambda dynamics: total(path(dynamics, problem.initial, problem.drives)))(
            problem.dynamics
        )

    assert_close(
        quick(lambda: gradient(functools.partial(solved, **options)))(),
        quick(lambda: gradient(rollout))(),
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda step, *examples: Dynamics(lambda params, x, u: step(x, u)),
        lambda step, *examples: Dynamics.closing_over(step, *examples),
    ],
    ids=["step", "closing_over"],
)
def test_captured_arrays_keep_their_derivatives(wrap, double):
    rng = np.random.default_rng(2)
    drives, fixed = (
        jnp.asarray(rng.normal(size=(NUM_STEPS, 2))),
        jnp.asarray(rng.normal(size=(2, 2))),
    )

    def loss(weights, path):
        # `weights` is a tracer that the step captures, also from inside a jit; `fixed` a concrete array.
        @jax.jit
        def inner(x):
            return jnp.tanh(weights @ x + fixed @ jnp.sin(x))

        dynamics = wrap(lambda x, u: inner(x) + weights[0] * u, jnp.zeros(2), jnp.zeros(2))
        return total(path(dynamics, jnp.ones(2), drives))

    weights = jnp.asarray(0.3 * rng.normal(size=(2, 2)))
    parallel = functools.partial(loss, path=functools.partial(solved, solver=deer()))
    reverse, forward = quick(
        lambda weights: (jax.grad(parallel)(weights), jax.jacfwd(parallel)(weights))
    )(weights)
    wanted = quick(jax.grad(functools.partial(loss, path=rollout)))(weights)
    assert_close((reverse, forward), (wanted, wanted))


def _with_keys(params, state, drive):
    key, count = drive
    noise = jax.random.normal(key, state.shape, state.dtype)
    return 0.5 * jnp.sin(params * state) + noise * params + count


def test_drives_that_have_no_derivative(double):
    keys = jax.random.split(jax.random.key(3), NUM_STEPS)
    drives = keys, jnp.arange(NUM_STEPS)

    def gradient(path, params, initial):
        return jax.value_and_grad(
            lambda params, initial: total(path(Dynamics(_with_keys, params), initial, drives)),
            argnums=(0, 1),
        )(params, initial)

    here = jnp.asarray(0.7), jnp.ones(3)
    got = quick(functools.partial(gradient, functools.partial(solved, solver=deer())))(*here)
    assert_close(got, quick(functools.partial(gradient, rollout))(*here))
    # And asked for the derivative in the integers and keys themselves, JAX's own answer for them: none.
    value, pull = jax.vjp(
        lambda drives: solved(Dynamics(_with_keys, here[0]), here[1], drives, solver=deer()), drives
    )
    none = pull(jnp.ones_like(value))[0]
    assert [leaf.dtype for leaf in jax.tree.leaves(none)] == [jax.dtypes.float0] * 2


def test_under_vmap(double):
    problem = by_name(DYNAMICS, "tanh network").build(NUM_STEPS, double)
    starts = jnp.stack([problem.initial, 2 * problem.initial, -problem.initial])

    def gradients(path):
        def one(start):
            return jax.grad(
                lambda params, start: total(
                    path(Dynamics(problem.dynamics.step, params), start, problem.drives)
                ),
                argnums=(0, 1),
            )(problem.dynamics.params, start)

        return jax.vmap(one)(starts)

    got = quick(lambda: gradients(functools.partial(solved, solver=deer())))()
    assert_close(got, quick(lambda: gradients(rollout))())


def test_an_empty_path_has_derivatives_too(double):
    problem = by_name(DYNAMICS, "tanh network").build(0, double)

    def loss(params):
        return jnp.sum(
            solved(Dynamics(problem.dynamics.step, params), problem.initial, problem.drives)
        )

    np.testing.assert_array_equal(jax.grad(loss)(problem.dynamics.params), jnp.zeros((4, 4)))
