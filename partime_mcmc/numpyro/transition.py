"""One step of any NumPyro kernel as a recurrence with fixed random numbers, and its chain solved in parallel time.

A kernel's `sample(state) -> state` is pure, and the state holds all that the next step needs. By what its next value depends on, a leaf of
the state is

    constant    equal before and after every step: what was adapted, after warm-up;
    a clock     a key or a counter that goes on in the same way wherever the chain stands. Clocks are stepped through beforehand, and
                their values before step t are the drive u_t;
    carried     a draw, or what the next draws depend on: the state x_t of the recurrence;
    reported    the rest, of which only values are wanted: acceptance probabilities, energies.

    x_t = f(x_{t-1}, u_t),      solved as any recurrence (`engine.solve`).

Which leaf is what is found by trials: from two places, with two keys, and with other values of each leaf, of which draws may take no
notice. That leaves are what they seem is checked on the whole path, where every step is evaluated once more from the whole state
before it. The largest difference between a carried leaf and what a step makes of the one before is the residual.
Whole numbers and flags travel as floating-point numbers, which are exact for them up to 2^24 (float32).

Left out: kernels whose keys hang on where the chain stands, and ensembles; a running mean of acceptance probabilities, which has no end
to its memory, is made of those of the path.
"""

import dataclasses
import re
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.engine import Dynamics, LocalTime, Status
from partime_mcmc.engine.solve import solve
from partime_mcmc.kernels.kernel import raw
from partime_mcmc.solvers import Solver
from partime_mcmc.types import Array, PyTree, is_key

# Steps after which what has not changed is taken for constant; the whole path is looked at later.
_TRIAL_STEPS = 32
# By so many standard deviations of its path the value after a step may differ between two programs that compute it.
_ROUNDING = 1e-2
# Other values of a number, by which leaves are tried that may not matter.
_OTHER_VALUES = ((1.1, 0.1), (-1.0, -1.0), (10.0, 5.0))
# A running mean over the steps since warm-up, and what it is the mean of.
_RUNNING_MEAN, _OF = ".mean_accept_prob", ".accept_prob"


class NoParallelForm(Exception):
    """A chain could not be solved in parallel time; says why."""


@dataclasses.dataclass(frozen=True)
class Solved:
    """What solving a chain took.

    Attributes:
        passes: Passes over the path.
        evaluations_per_draw: Steps of the kernel that were evaluated, for each draw; two last looks at every step are among them.
        residual: The largest difference between a carried value and what the step makes of the state before it.
    """

    passes: int
    evaluations_per_draw: float
    residual: float


class _Roles(NamedTuple):
    """Indices of leaves by their part in a recurrence."""

    constant: tuple[int, ...]
    clock: tuple[int, ...]
    carried: tuple[int, ...]
    reported: tuple[int, ...]


class Transition:
    """The recurrence of a kernel.

    Args:
        sample: `state -> state`.
        state: Of one chain, after warm-up. Which leaf is what is found there, and checked for every chain that is solved.
        field: The name of the state's field that holds the draws.

    Raises:
        NoParallelForm: If keys depend on where the chain stands, or the state changes its structure.
    """

    def __init__(self, sample: Callable[[PyTree], PyTree], state: PyTree, field: str):
        with_paths, self._structure = jax.tree_util.tree_flatten_with_path(state)
        self._names = [jax.tree_util.keystr(path) for path, _ in with_paths]
        self._example = [leaf for _, leaf in with_paths]
        self._sample = sample

        # Once, for all chains of a run.
        self._try = jax.jit(jax.vmap(self._steps, (None, 0)))
        self._tick = jax.jit(self._ticks, static_argnums=2)
        self._evaluate = jax.jit(jax.vmap(self._after_parts, (None, 0, 0)))
        self._evaluate_whole = jax.jit(jax.vmap(self._after))
        self.roles = self._roles(state, field)
        carried = [self._example[k] for k in self.roles.carried]
        if any(is_key(leaf) for leaf in carried):
            raise NoParallelForm("its keys depend on where the chain stands")
        floats = [leaf.dtype for leaf in carried if jnp.issubdtype(leaf.dtype, jnp.floating)]
        self._dtype = jnp.result_type(*floats) if floats else jnp.result_type(float)

    def _roles(self, state: PyTree, field: str) -> _Roles:
        if jax.tree.structure(jax.eval_shape(self._sample, state)) != self._structure:
            raise NoParallelForm("a step changes the structure of its state")
        example, every = self._example, range(len(self._example))
        keys = {k for k in every if is_key(example[k])}
        floats = {k for k in every if jnp.issubdtype(example[k].dtype, jnp.floating)}
        draws = {k for k in every if re.match(rf"\.{field}(\W|$)", self._names[k])}

        first = self._trial(example)
        constant = {k for k in every if np.all(first[k] == _numbers(example[k]))}
        # From another place with the same keys, and from the same place with other keys.
        place = floats | draws
        elsewhere = self._trial(
            [_as_kind_of(example[k], first[k][-1]) if k in place else example[k] for k in every]
        )
        otherwise = self._trial(
            [jax.random.fold_in(leaf, 1) if k in keys else leaf for k, leaf in enumerate(example)]
        )
        free = set(every) - constant - place
        clock = {
            k for k in free if np.array_equal(first[k], (elsewhere if k in keys else otherwise)[k])
        }
        # With other values before every step, one leaf at a time: the draws of those that are only reported are the same. Constants are
        # tried, too: a flag that is seldom up is none.
        doubtful = sorted(set(every) - clock - draws - keys)
        reported = {
            k for k, same in zip(doubtful, self._unmoved(draws, [{k} for k in doubtful])) if same
        }
        if not all(self._unmoved(draws, [reported])):
            reported = set()
        carried = set(every) - constant - clock - reported
        parts = constant - reported, clock, carried, reported
        return _Roles(*(tuple(sorted(part)) for part in parts))

    def _trial(self, leaves: list) -> list[np.ndarray]:
        """Numbers of all leaves after each of some steps."""
        nothing = np.zeros((1, len(leaves)), np.int32)
        found = self._try(jax.tree.unflatten(self._structure, leaves), nothing)
        return [_numbers(leaf)[0] for leaf in jax.tree.leaves(found)]

    def _unmoved(self, draws: set[int], changed: list[set[int]]) -> list[bool]:
        """For each set of leaves, whether the draws of a trial are the same where these have other values before every step."""
        if not changed:
            return []
        rows = [
            [way * (k in one) for k in range(len(self._example))]
            for one in ({}, *changed)
            for way in range(1, len(_OTHER_VALUES) + 1)
        ]
        state = jax.tree.unflatten(self._structure, self._example)
        found = jax.tree.leaves(self._try(state, np.array(rows, np.int32)))
        found = [_numbers(found[k]) for k in draws]
        same = [
            all(np.array_equal(leaf[row], leaf[0]) for leaf in found) for row in range(len(rows))
        ]
        ways = len(_OTHER_VALUES)
        return [all(same[k * ways : (k + 1) * ways]) for k in range(1, len(changed) + 1)]

    def _steps(self, state: PyTree, ways: Array) -> PyTree:
        """States after each of some steps; before them leaves get other values, in the way that `ways` has for each, 0 for none."""

        def step(state, _):
            leaves = [
                leaf
                if is_key(leaf)
                else jnp.select(
                    [ways[k] == n for n in range(1, len(_OTHER_VALUES) + 1)],
                    [_other(leaf, n) for n in range(len(_OTHER_VALUES))],
                    leaf,
                )
                for k, leaf in enumerate(jax.tree.leaves(state))
            ]
            state = self._sample(jax.tree.unflatten(self._structure, leaves))
            return state, state

        return jax.lax.scan(step, state, None, _TRIAL_STEPS)[1]

    # --- the recurrence

    def _part(self, state: PyTree, indices: tuple[int, ...]) -> list[Array]:
        leaves = jax.tree.leaves(state)
        return [raw(leaves[k]) for k in indices]

    def _carried(self, state: PyTree) -> list[Array]:
        return [leaf.astype(self._dtype) for leaf in self._part(state, self.roles.carried)]

    def _after(self, leaves: list[Array]) -> PyTree:
        """The state after one whose leaves are given, keys as words and all numbers of any type."""
        leaves = [_as_kind_of(one, leaf) for one, leaf in zip(self._example, leaves)]
        return self._sample(jax.tree.unflatten(self._structure, leaves))

    def _after_parts(self, constants: list, carried: list, clocks: list) -> PyTree:
        """Likewise of one whose parts are given; what is only reported has any value."""
        leaves = [raw(leaf) for leaf in self._example]
        for indices, values in zip(self.roles, (constants, clocks, carried)):
            for k, value in zip(indices, values):
                leaves[k] = value
        return self._after(leaves)

    def step(self, constants: list, carried: list, clocks: list) -> list[Array]:
        """f: the carried leaves after a step."""
        return self._carried(self._after_parts(constants, carried, clocks))

    def solved(self, state: PyTree, num_steps: int, solver: Solver) -> tuple[PyTree, Solved]:
        """A chain of the kernel.

        Args:
            state: Where it begins.
            num_steps: T.
            solver: How it is solved.

        Returns:
            The states after each step, leaves `(T, ...)`, and what it took.

        Raises:
            NoParallelForm: If the solver did not find the path, or what was taken for constant changed.
        """
        constants, carried = self._part(state, self.roles.constant), self._carried(state)
        ticks = self._tick(constants, self._part(state, self.roles.clock), num_steps)
        found = solve(Dynamics(self.step, constants), carried, ticks, solver=solver)
        if found.verdict != Status.CONVERGED:
            raise NoParallelForm(
                f"its chain did not forget where it began: after {int(found.iterations)} passes "
                f"{int(found.num_exact):,} of {num_steps:,} steps were exact"
            )
        before = LocalTime().previous(carried, found.states)
        path = self._evaluate(constants, before, ticks)
        self._check(state, path, ticks)
        residual = max(
            (
                float(jnp.max(jnp.abs(a - b), initial=0))
                for a, b in zip(jax.vmap(self._carried)(path), found.states)
            ),
            default=0.0,
        )
        evaluations = float(found.stats.evaluations) + 2
        return self._with_running_mean(path), Solved(int(found.iterations), evaluations, residual)

    def _ticks(self, constants: list, clocks: list, num_steps: int) -> list[Array]:
        """The clocks before every step, leaves `(T, ...)`."""
        carried = self._carried(jax.tree.unflatten(self._structure, self._example))

        def tick(clocks, _):
            after = self._after_parts(constants, carried, clocks)
            return self._part(after, self.roles.clock), clocks

        return jax.lax.scan(tick, clocks, None, num_steps)[1]

    def _check(self, state: PyTree, path: PyTree, ticks: list[Array]) -> None:
        """That leaves are what trials took them for: every step once more, from whole states.

        Raises:
            NoParallelForm: If one is not.
        """
        first, rest = ([raw(leaf) for leaf in jax.tree.leaves(one)] for one in (state, path))
        before = LocalTime().previous(first, rest)
        begin, steps, same = (
            [_numbers(leaf) for leaf in jax.tree.leaves(tree)]
            for tree in (state, path, self._evaluate_whole(before))
        )
        roles = self.roles
        constants = all(np.all(steps[k] == begin[k]) for k in roles.constant)
        clocks = all(np.array_equal(steps[k][:-1], t[1:]) for k, t in zip(roles.clock, ticks))
        carried = all(_close(steps[k], same[k]) for k in roles.carried)
        if not (constants and clocks and carried):
            raise NoParallelForm(
                "what seemed to change by itself, or not to matter, hangs on the chain"
            )

    def _with_running_mean(self, path: PyTree) -> PyTree:
        leaves = jax.tree.leaves(path)
        for k, name in enumerate(self._names):
            of = name.removesuffix(_RUNNING_MEAN) + _OF
            if name.endswith(_RUNNING_MEAN) and of in self._names:
                values = leaves[self._names.index(of)]
                leaves[k] = jnp.cumsum(values) / jnp.arange(1, len(values) + 1, dtype=values.dtype)
        return jax.tree.unflatten(self._structure, leaves)


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two programs found the same of every step, in units of how far the values of a path spread: rounding apart."""
    if not np.issubdtype(one.dtype, np.floating):
        return np.array_equal(one, other)
    spread = one.std(axis=0) + np.abs(one).max(axis=0) * np.finfo(one.dtype).eps
    return bool(np.all(np.abs(one - other) <= _ROUNDING * spread + np.finfo(one.dtype).tiny))


def _other(leaf: Array, way: int) -> Array:
    """Another value of the same type."""
    if leaf.dtype == bool:
        return ~leaf
    factor, more = _OTHER_VALUES[way]
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf + jnp.asarray(way + 1, leaf.dtype)
    return (factor * leaf + more).astype(leaf.dtype)


def _numbers(leaf: Array) -> np.ndarray:
    return np.asarray(raw(leaf))


def _as_kind_of(example: Array, value: Array) -> Array:
    """A value as a leaf of the example's type."""
    if is_key(example):
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(example))
    if jnp.issubdtype(example.dtype, jnp.floating):
        return value.astype(example.dtype)
    return (
        jnp.round(value).astype(example.dtype)
        if jnp.issubdtype(value.dtype, jnp.floating)
        else value
    )
