"""The catalogue: one row per solver, dynamics and kernel, and every row runs through the whole suite.

A row states what its subject promises; the tests check the promises of every row against every other. To add a solver
or a dynamics write one row here and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.engine.dynamics import Dynamics, rollout
from partime_mcmc.engine.recipes import (
    deer,
    elk,
    jacobi,
    picard,
    quasi_deer,
    quasi_elk,
    sequential,
    shooting,
)
from partime_mcmc.engine.solution import Solution
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.time_axis import LocalTime, TimeAxis
from partime_mcmc.engine.windows import AllAtOnce, Schedule, SlidingWindow, Windows
from partime_mcmc.linearize import Clipped, Damped, DenseJacobian
from partime_mcmc.scan import ChunkedScan
from partime_mcmc.solvers import ConstantDamping, Newton, Solver

# Many small programs run once: most of their time is the compiler's. Tests about bits or the compiler do without.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class SolverRow:
    """A solver, with how it is run and what it promises.

    Attributes:
        solver: The solver.
        newton_like: After k passes at least the first k states are exact, so T passes always suffice.
        variant: Another form of a row above: meets some of the dynamics only, unless the full catalogue is asked for.
        schedule: The schedule it runs under.
        axis: The time axis, where another scan is worth testing.
    """

    name: str
    solver: Solver
    newton_like: bool
    variant: bool = False
    schedule: Schedule = AllAtOnce()
    axis: TimeAxis = LocalTime()


SOLVERS = [
    SolverRow("sequential", sequential(), newton_like=False),
    SolverRow("deer", deer(), newton_like=True),
    SolverRow(
        "deer, tamed, chunked scan",
        Newton(Damped(Clipped(DenseJacobian(), 1.0), 0.1)),
        newton_like=True,
        variant=True,
        axis=LocalTime(ChunkedScan(6)),
    ),
    SolverRow("deer, sliding", deer(), newton_like=True, variant=True, schedule=SlidingWindow(40)),
    SolverRow("quasi-deer", quasi_deer(), newton_like=True),
    SolverRow(
        "quasi-deer, two probes",
        quasi_deer(num_probes=2, damping=0.2),
        newton_like=True,
        variant=True,
    ),
    SolverRow(
        "quasi-deer, windows",
        quasi_deer(clip=None),
        newton_like=True,
        variant=True,
        schedule=Windows(50),
    ),
    SolverRow("elk", elk(), newton_like=False),
    SolverRow("quasi-elk", quasi_elk(), newton_like=False, variant=True),
    SolverRow(
        "quasi-elk, constant damping",
        quasi_elk(policy=ConstantDamping(1e-2), clip=1.0),
        newton_like=False,
        variant=True,
    ),
    SolverRow("picard", picard(), newton_like=True),
    SolverRow("jacobi", jacobi(), newton_like=True),
    SolverRow("shooting", shooting(steps=48), newton_like=False),
]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A recurrence with its initial state and drives."""

    dynamics: Dynamics
    initial: Any
    drives: Any


@dataclasses.dataclass(frozen=True)
class DynamicsRow:
    """A family of problems, and what holds for it.

    Attributes:
        build: `(num_steps, dtype) -> Problem`, always with the same `step` object.
        forgets: Two starts with the same drives come together, so rounding does not grow along the path.
        rejects: A step can leave the state as it is, bit for bit, and among 17 steps some do and some do not.
    """

    name: str
    build: Callable[[int, Any], Problem]
    forgets: bool = True
    rejects: bool = False


def _network(params, state, drive):
    return jnp.tanh(params @ state) + drive


def _network_problem(num_steps, dtype):
    return Problem(
        Dynamics(_network, 0.5 * _normal(1, (4, 4), dtype)),
        _normal(2, (4,), dtype),
        _normal(3, (num_steps, 4), dtype),
    )


def _linear(params, state, drive):
    return params["matrix"] @ state + params["gain"] * drive


def _linear_problem(num_steps, dtype):
    # Stable and far from normal: norm above 1, spectral radius 0.8.
    matrix = np.array([[0.8, 0.7, 0.0], [0.0, -0.6, 0.5], [0.0, 0.0, 0.5]])
    return Problem(
        Dynamics(_linear, {"matrix": jnp.asarray(matrix, dtype), "gain": jnp.asarray(0.3, dtype)}),
        _normal(4, (3,), dtype),
        _normal(5, (num_steps, 3), dtype),
    )


def _tree(params, state, drive):
    position, (scale, weights) = state["position"], state["rest"]
    return {
        "position": 0.5 * position + params["push"] * jnp.sin(weights.sum(axis=1)) + drive["noise"],
        "rest": (
            0.4 * jnp.cos(scale),
            0.6 * jnp.tanh(weights + scale) + drive["count"] * params["push"],
        ),
    }


def _tree_problem(num_steps, dtype):
    initial = {
        "position": _normal(6, (2,), dtype),
        "rest": (jnp.ones((), dtype), _normal(7, (2, 2), dtype)),
    }
    # Integer drives: what does not vary smoothly comes in from outside.
    drives = {"noise": _normal(8, (num_steps, 2), dtype), "count": jnp.arange(num_steps) % 3}
    return Problem(Dynamics(_tree, {"push": jnp.asarray(0.3, dtype)}), initial, drives)


def _langevin(params, state, drive):
    """A Metropolis-adjusted Langevin step on a correlated Gaussian with a quartic wall, written out."""
    noise, uniform = drive

    def logdensity(x):
        return -0.5 * jnp.vdot(x, params["precision"] @ x) - 0.05 * jnp.sum(x**4)

    def drift(x):
        return x + params["step_size"] * jax.grad(logdensity)(x)

    proposal = drift(state) + jnp.sqrt(2 * params["step_size"]) * noise
    forth, back = jnp.sum((proposal - drift(state)) ** 2), jnp.sum((state - drift(proposal)) ** 2)
    ratio = logdensity(proposal) - logdensity(state) + (forth - back) / (4 * params["step_size"])
    return jnp.where(jnp.log(uniform) < ratio, proposal, state)


def langevin_problem(num_steps, dtype, step_size=0.35):
    """The accept/reject problem with any step size: the larger, the longer it stays where it is."""
    precision = np.array([[1.5, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.8]])
    params = {
        "precision": jnp.asarray(precision, dtype),
        "step_size": jnp.asarray(step_size, dtype),
    }
    uniforms = np.random.default_rng(10).uniform(size=4096)[:num_steps]
    return Problem(
        Dynamics(_langevin, params),
        jnp.ones(3, dtype),
        (_normal(9, (num_steps, 3), dtype), jnp.asarray(uniforms, dtype)),
    )


def _gru(params, state, drive):
    def gate(name, squash, hidden):
        return squash(
            params[name]["in"] @ drive + params[name]["hidden"] @ hidden + params[name]["bias"]
        )

    update, reset = gate("update", jax.nn.sigmoid, state), gate("reset", jax.nn.sigmoid, state)
    return (1 - update) * gate("new", jnp.tanh, reset * state) + update * state


def _gru_problem(num_steps, dtype):
    params = {
        name: {
            "in": _normal(seed, (5, 2), dtype),
            "hidden": 0.5 * _normal(seed + 1, (5, 5), dtype),
            "bias": jnp.zeros(5, dtype),
        }
        for seed, name in ((20, "update"), (22, "reset"), (24, "new"))
    }
    return Problem(Dynamics(_gru, params), jnp.zeros(5, dtype), _normal(26, (num_steps, 2), dtype))


def _autoregression(params, state, drive):
    return params * state + drive


def _autoregression_problem(num_steps, dtype):
    return Problem(
        Dynamics(_autoregression, jnp.asarray(0.9, dtype)),
        jnp.asarray(2.0, dtype),
        _normal(27, (num_steps,), dtype),
    )


def _logistic(params, state, drive):
    del drive
    return params * state * (1 - state)


def _logistic_problem(num_steps, dtype):
    return Problem(
        Dynamics(_logistic, jnp.asarray(4.0, dtype)), jnp.asarray(0.3, dtype), jnp.arange(num_steps)
    )


DYNAMICS = [
    DynamicsRow("tanh network", _network_problem),
    DynamicsRow("linear", _linear_problem),
    DynamicsRow("pytree", _tree_problem),
    DynamicsRow("accept or reject", langevin_problem, rejects=True),
    DynamicsRow("GRU", _gru_problem),
    DynamicsRow("AR(1)", _autoregression_problem),
    DynamicsRow("logistic map", _logistic_problem, forgets=False),
]


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """A Markov kernel.

    Attributes:
        name: For the test's name.
        build: `(logdensity, dimension, dtype) -> Kernel`, tuned by hand for a standard normal target.
        forgets: Chains with the same random numbers come together on that target.
        decides: A step accepts or rejects, and says so.
    """

    name: str
    build: Callable[[Callable, int, Any], Any]
    forgets: bool = True
    decides: bool = True


KERNELS: list[KernelRow] = []


def by_name(rows, name):
    """The row with this name."""
    return next(row for row in rows if row.name == name)


def run(
    row: SolverRow, problem: Problem, *, max_iterations=None, guess=None, tolerance=None
) -> Solution:
    """Solve a problem with a row's solver, compiled once per row and shapes."""
    return _program(row, max_iterations)(
        problem.dynamics,
        problem.initial,
        problem.drives,
        guess,
        {} if tolerance is None else {"tolerance": tolerance},
    )


@functools.cache
def _program(row: SolverRow, max_iterations):
    @functools.partial(jax.jit, compiler_options=QUICK)
    def program(dynamics, initial, drives, guess, options):
        return solve(
            dynamics,
            initial,
            drives,
            solver=row.solver,
            schedule=row.schedule,
            axis=row.axis,
            guess=guess,
            max_iterations=max_iterations,
            **options,
        )

    return program


_rollout = jax.jit(rollout, compiler_options=QUICK)


@functools.partial(jax.jit, compiler_options=QUICK)
def _images(dynamics, previous, drives):
    return jax.vmap(lambda state, drive: dynamics.step(dynamics.params, state, drive))(
        previous, drives
    )


def _padded(tree, num_steps, room=257):
    """Leaves with at least `room` steps, so that all lengths share one program."""

    def pad(leaf):
        leaf = np.asarray(leaf)
        last = leaf[-1:] if num_steps else np.zeros((1, *leaf.shape[1:]), leaf.dtype)
        return np.concatenate([leaf, np.repeat(last, max(room - num_steps, 0), axis=0)])

    return jax.tree.map(pad, tree)


def sequential_path(problem: Problem):
    """`x_1..x_T` by one loop, as NumPy arrays."""
    num_steps = jax.tree.leaves(problem.drives)[0].shape[0]
    path = _rollout(problem.dynamics, problem.initial, _padded(problem.drives, num_steps))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:num_steps], path)


def flat(tree, num_steps) -> np.ndarray:
    """A path as one NumPy array of shape `(T, D)`."""
    columns = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(
        [leaf.reshape(num_steps, int(np.prod(leaf.shape[1:]))) for leaf in columns], axis=1
    )


def measured_residual(problem: Problem, states) -> np.ndarray:
    """`f(x_{t-1}, u_t) − x_t`, shape `(T, D)`, by a program and NumPy code that share nothing with the library's."""
    previous = jax.tree.map(
        lambda first, rest: np.concatenate([np.asarray(first)[None], np.asarray(rest)])[:-1],
        problem.initial,
        states,
    )
    num_steps = jax.tree.leaves(states)[0].shape[0]
    images = _images(
        problem.dynamics, _padded(previous, num_steps), _padded(problem.drives, num_steps)
    )
    images = jax.tree.map(lambda leaf: np.asarray(leaf)[:num_steps], images)
    with np.errstate(invalid="ignore", over="ignore"):
        return flat(images, num_steps) - flat(states, num_steps)


def within(residual: np.ndarray, states: np.ndarray, ulps: float) -> np.ndarray:
    """Which steps have a residual of at most so many units in the last place of their sizes; NaN is not within.

    The sizes are |x_j| and the mean |x_j| of the step and the 15 before it.
    """
    sizes = np.abs(states).astype(np.float64)
    padded = np.concatenate([np.zeros((15, sizes.shape[1])), sizes])
    mean = sum(padded[shift : shift + len(sizes)] for shift in range(16)) / 16
    bound = ulps * np.finfo(states.dtype).eps * (mean + sizes)
    return (np.abs(residual) <= bound).all(axis=1)


def _normal(seed, shape, dtype):
    # Drawn in float64 by NumPy: both types see the same numbers, and longer drives begin like shorter ones.
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
