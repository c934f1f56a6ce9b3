"""What is compiled, and how often: equal shapes once, data never as constants, and no program for another solver."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import compile_cache
from partime_mcmc.engine.dynamics import Dynamics, rollout
from partime_mcmc.engine.recipes import deer, jacobi, picard, quasi_deer, shooting
from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.windows import AllAtOnce, SlidingWindow, Windows
from partime_mcmc.kernels import hmc
from partime_mcmc.linearize import DenseJacobian, DiagonalJacobian, IdentityJacobian, ZeroJacobian
from partime_mcmc.models import MODELS
from partime_mcmc.sampling.local import _Solve
from partime_mcmc.sampling.sample import sample
from partime_mcmc.sampling.target import Target
from partime_mcmc.scan import Identity, Zero
from partime_mcmc.tracing import OnceCache
from partime_mcmc.types import pytree

NUM_STEPS = 12


class Counted:
    """A step that counts how often Python runs it, that is, how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, params, state, drive):
        self.traces += 1
        return jnp.tanh(params * state) + drive


def drives(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=NUM_STEPS), jnp.float32)


def test_equal_shapes_are_traced_once():
    step = Counted()
    first = solve(Dynamics(step, jnp.float32(0.5)), jnp.float32(1.0), drives(), solver=jacobi())
    traces = step.traces
    # Another path, other parameters, another tolerance and another key: the same program.
    second = solve(
        Dynamics(step, jnp.float32(0.6)),
        jnp.float32(2.0),
        drives(1),
        solver=jacobi(),
        key=jax.random.key(1),
        tolerance=Tolerance(),
        guess=drives(2),
    )
    assert 0 < traces == step.traces
    assert not np.array_equal(first.states, second.states)
    wanted = rollout(Dynamics(Counted(), jnp.float32(0.6)), jnp.float32(2.0), drives(1))
    np.testing.assert_allclose(second.states, wanted, atol=1e-4)


def test_new_shapes_and_new_types_are_traced_again():
    step = Counted()
    solve(Dynamics(step, jnp.float32(0.5)), jnp.float32(1.0), drives(), solver=jacobi())
    traces = step.traces
    pair = jnp.ones(2, jnp.float32)
    solve(Dynamics(step, pair), pair, drives()[:, None] * pair, solver=jacobi())
    assert step.traces > traces
    with jax.enable_x64(True):
        traces = step.traces
        solution = solve(
            Dynamics(step, jnp.asarray(0.5)),
            jnp.asarray(1.0),
            jnp.asarray(np.asarray(drives(), float)),
            solver=jacobi(),
        )
        assert step.traces > traces and solution.states.dtype == jnp.float64


def logistic_step(matrix, labels):
    """A step that captures 1,000 × 25 numbers, as the gradient of a log density does."""

    def step(params, state, drive):
        slope = matrix.T @ (labels - jax.nn.sigmoid(matrix @ state))
        return 0.9 * state + 1e-3 * slope + 0.1 * drive

    return step


def data(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(1000, 25)).astype(np.float32), (rng.uniform(size=1000) < 0.5).astype(
        np.float32
    )


def largest_constant(text):
    """Elements of the largest array written out as a constant in lowered or compiled program text."""
    shapes = re.findall(r"constant(?:\(| dense)[^\n]*?(?:tensor<|f32\[)([0-9x,]*)", text)
    shapes += re.findall(r"f32\[([0-9,]*)\][^\n=]*constant\(", text)
    return max(
        [
            int(np.prod([int(n) for n in re.split("[x,]", shape) if n], dtype=int))
            for shape in shapes
        ],
        default=0,
    )


def as_numpy(matrix, labels):
    return logistic_step(matrix, labels)


def as_arrays(matrix, labels):
    return logistic_step(jnp.asarray(matrix), jnp.asarray(labels))


def inside_a_jit(matrix, labels):
    return jax.jit(logistic_step(jnp.asarray(matrix), jnp.asarray(labels)))


def two_jits_deep(matrix, labels):
    inner = jax.jit(logistic_step(jnp.asarray(matrix), jnp.asarray(labels)))
    return jax.jit(lambda params, state, drive: inner(params, state, drive))


@pytest.mark.parametrize("capture", [as_numpy, as_arrays, inside_a_jit, two_jits_deep])
def test_captured_data_travel_as_arguments(capture):
    # What jit sees of the engine: its jaxpr, with everything that was captured either an argument or a constant of it.
    step, inputs = capture(*data()), jnp.zeros((NUM_STEPS, 25), jnp.float32)

    def run(inputs):
        return solve(Dynamics(step), jnp.zeros(25, jnp.float32), inputs, solver=deer()).states

    closed = jax.make_jaxpr(run)(inputs)
    # The caller's own constants are unavoidable here (it captured the data); the engine's programs must have none.
    inner = [eqn.params["jaxpr"] for eqn in closed.jaxpr.eqns if eqn.params.get("name") == "_solve"]
    assert len(inner) == 1
    assert sum(np.size(const) for const in inner[0].consts) <= 16
    shapes = [variable.aval.shape for variable in inner[0].jaxpr.invars]
    assert (1000, 25) in shapes
    text = (
        jax.jit(lambda *args: jax.core.eval_jaxpr(inner[0].jaxpr, inner[0].consts, *args))
        .lower(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inner[0].jaxpr.invars))
        .as_text()
    )
    assert largest_constant(text) < 1000


def test_the_constant_finder_finds_constants():
    matrix = data()[0]
    lowered = jax.jit(lambda x: jnp.asarray(matrix) @ x).lower(jnp.zeros(25, jnp.float32))
    assert (
        largest_constant(lowered.as_text())
        == largest_constant(lowered.compile().as_text())
        == 25_000
    )


def test_the_same_function_with_the_same_shapes_is_not_compiled_again():
    matrix, labels = data()
    step = logistic_step(jnp.asarray(matrix), jnp.asarray(labels))
    inputs = jnp.ones((NUM_STEPS, 25), jnp.float32)
    counts = []
    for scale in (1.0, 2.0):
        with _counting() as count:
            solve(
                Dynamics(step), scale * jnp.ones(25, jnp.float32), scale * inputs, solver=jacobi()
            )
        counts.append(count[0])
    assert counts[0] > 0 == counts[1]


class _counting:
    """Counts programs handed to the compiler."""

    def __enter__(self):
        self.count = [0]
        self.active = True

        def listen(event, duration, **kwargs):
            del duration, kwargs
            if self.active and event == "/jax/core/compile/backend_compile_duration":
                self.count[0] += 1

        jax.monitoring.register_event_duration_secs_listener(listen)
        return self.count

    def __exit__(self, *error):
        self.active = False


def test_data_as_parameters_may_change_without_compiling_again():
    def step(params, state, drive):
        matrix, labels = params
        return logistic_step(matrix, labels)(None, state, drive)

    inputs, start, paths = jnp.ones((NUM_STEPS, 25), jnp.float32), jnp.ones(25, jnp.float32), []
    for seed in (0, 1):
        params = tuple(jnp.asarray(part) for part in data(seed))
        with _counting() as count:
            paths.append(solve(Dynamics(step, params), start, inputs, solver=jacobi()).states)
    assert count[0] == 0
    assert not np.array_equal(*paths)


@pytree()
class A:
    inner: object = None


@pytree()
class B:
    inner: object = None


@pytest.mark.parametrize(
    "one, other",
    [
        (A(), B()),
        (A(1.0), B(1.0)),
        (DenseJacobian(), DiagonalJacobian()),
        (IdentityJacobian(), ZeroJacobian()),
        (deer(), quasi_deer(clip=None)),
        (picard(), jacobi()),
        (Windows(5), SlidingWindow(5)),
        (AllAtOnce(), ZeroJacobian()),
        (Identity(1.0), Zero(1.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_structures_of_different_classes_differ(one, other):
    """With `register_dataclass` classes of equal fields had equal structures, and jit mixed up their programs."""
    first, second = jax.tree.structure(one), jax.tree.structure(other)
    assert first != second
    assert first == jax.tree.structure(jax.tree.map(lambda leaf: leaf, one)) and hash(
        first
    ) == hash(jax.tree.structure(jax.tree.map(lambda leaf: leaf, one)))


def test_recipes_do_not_share_programs():
    # One step object and one set of shapes: only the solver tells the programs apart, and its work shows which ran.
    step, seen = Counted(), {}
    for recipe in (jacobi, picard, deer):
        solution = solve(
            Dynamics(step, jnp.float32(0.9)), jnp.float32(1.0), drives(), solver=recipe()
        )
        seen[recipe.__name__] = np.nan_to_num(solution.stats.residual_history[1:4]).tolist()
    assert len({str(history) for history in seen.values()}) == len(seen), seen


def test_vmap_and_jit_and_eager_are_one_trace_each():
    step = Counted()
    run = jax.jit(functools.partial(_solved, step))
    run(jnp.float32(1.0))
    traces = step.traces
    run(jnp.float32(2.0))
    assert step.traces == traces


def _solved(step, start):
    return solve(Dynamics(step, jnp.float32(0.5)), start, drives(), solver=jacobi()).states


def _solves_compiled(num_samples):
    """Solves among the programs that a run in windows of 64 steps compiles."""
    compile_cache._PROGRAMS = OnceCache(128)
    target = Target(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2))
    kernel = hmc(target.logdensity, 0.5, jnp.ones(2), 2)
    draws = sample(
        jax.random.key(0),
        target,
        kernel,
        num_samples=num_samples,
        num_chains=2,
        solver=shooting(4),
        schedule=Windows(64),
        progress=False,
    )
    assert bool(np.all(draws.certificate.certified)) and draws.positions.shape == (
        2,
        num_samples,
        2,
    )
    return sum(isinstance(entry[0], _Solve) for entry in compile_cache._PROGRAMS.kept())


def test_windows_are_compiled_once():
    assert _solves_compiled(4 * 64) == 1
    # A last window of another length is another program, which shows that the count can rise.
    assert _solves_compiled(64 + 8) == 2


LANES, ROWS = 16, 944


@functools.cache
def _regression_program():
    """Shooting of a logistic regression chain, as handed to the compiler."""
    target = MODELS["logistic"]().make_target(jax.random.key(0))
    position = jax.tree.map(
        lambda leaf: leaf[0], target.starts(jax.random.split(jax.random.key(0), 1))
    )
    kernel = hmc(target.logdensity, 0.1, jnp.ones(25), 2)
    state = kernel.init(position)
    tape = kernel.tape(jax.random.key(1), 512, state)
    run = jax.jit(
        lambda initial, tape: solve(kernel.dynamics(), initial, tape, solver=shooting(LANES)).states
    )
    return run.lower(kernel.carry(state), tape).as_text()


def products(text):
    """Shapes of the operands and the result of every product of arrays."""
    shape = r"tensor<([0-9x]+)xf32>"
    found = re.findall(rf"stablehlo.dot_general.*?: \({shape}, {shape}\) -> {shape}", text)
    return [tuple(tuple(map(int, shape.split("x"))) for shape in one) for one in found]


def test_the_regression_of_all_lanes_is_one_product_of_matrices():
    shapes = products(_regression_program())
    # Data times positions: 944 × 25 with 25 numbers of each of 16 lanes; and back, for the gradient.
    assert any(
        {ROWS, 25} == set(left) and sorted(result) == [LANES, ROWS] for left, _, result in shapes
    ) or any(
        {ROWS, 25} == set(right) and sorted(result) == [LANES, ROWS] for _, right, result in shapes
    ), shapes
    assert any(
        sorted(result) == [LANES, 25] and ROWS in (*left, *right) for left, right, result in shapes
    ), shapes
    # None in the loop is batched over lanes, which would be a product of a matrix with a vector for each.
    assert not any(len(result) > 2 for *_, result in shapes), shapes


def calls_to_the_host(text):
    """What a program would interrupt itself for."""
    return re.findall(
        r"custom_call @(\w*callback\w*)|(stablehlo\.(?:infeed|outfeed|send|recv))", text
    )


def test_a_solve_never_calls_the_host():
    assert not calls_to_the_host(_regression_program())

    def talking(params, state, drive):
        jax.debug.callback(lambda: None)
        return state + drive

    program = jax.jit(
        lambda drives: solve(Dynamics(talking), jnp.float32(0), drives, solver=jacobi()).states
    )
    assert calls_to_the_host(program.lower(drives()).as_text())
