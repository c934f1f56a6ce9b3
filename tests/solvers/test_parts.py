"""Parts of the solvers by themselves: what each promises, against a formula written out here."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import residual
from partime_mcmc.engine import Dynamics
from partime_mcmc.engine.adjoint import _in_blocks
from partime_mcmc.engine.dynamics import CachedStep, rollout_with_aux
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
from partime_mcmc.engine.solution import Bound, Status, Tolerance
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.time_axis import REMEMBERED, LocalTime, recent_sizes
from partime_mcmc.linearize import DenseJacobian, DiagonalJacobian
from partime_mcmc.scan import Dense, Diagonal
from partime_mcmc.solvers import ConstantDamping, RelaxingDamping
from partime_mcmc.solvers.base import replace_nonfinite_jacobians, replace_nonfinite_updates
from partime_mcmc.solvers.narrowing import widths
from partime_mcmc.solvers.segmented_scan import (
    SegmentedScanConfig,
    one_after_another,
    segmented_scan,
)
from partime_mcmc.solvers.sequential import finish_sequentially

pytestmark = pytest.mark.fast

T, D = 30, 3


def linear(diagonal: bool):
    """x' = A x + u, and the path by a loop."""
    rng = np.random.default_rng(0)
    matrix = np.diag([0.9, -0.7, 0.4]) if diagonal else 0.5 * rng.normal(size=(D, D))
    drives, path = rng.normal(size=(T, D)), [rng.normal(size=D)]
    for u in drives:
        path.append(matrix @ path[-1] + u)
    dynamics = Dynamics(lambda a, x, u: a @ x + u, jnp.asarray(matrix))
    return dynamics, jnp.asarray(path[0]), jnp.asarray(drives), np.stack(path[1:])


@pytest.mark.parametrize(
    "solver, diagonal, close",
    [
        (deer(), False, 1e-12),
        (quasi_deer(), True, 1e-12),
        (elk(policy=ConstantDamping(0.0)), False, 1e-12),
        (quasi_elk(policy=ConstantDamping(0.0)), True, 1e-12),
        # The first damping is 1e-4.
        (elk(), False, 1e-2),
        (quasi_elk(), True, 1e-2),
        (shooting(steps=5, correction=DenseJacobian()), False, 1e-12),
        (shooting(steps=5, correction=DiagonalJacobian()), True, 1e-12),
    ],
    ids=lambda one: type(one).__name__,
)
def test_newtons_method_solves_a_linear_system_in_one_step(solver, diagonal, close, double):
    dynamics, initial, drives, path = linear(diagonal)
    guess = jnp.asarray(10 * np.random.default_rng(1).normal(size=(T, D)))
    found = solve(dynamics, initial, drives, solver=solver, guess=guess, max_iterations=1)
    np.testing.assert_allclose(found.states, path, rtol=0, atol=close)


def test_a_damped_step_leaves_what_is_solved_alone(double):
    """A coordinate whose residual is 0 everywhere has no say in the damping of the others."""
    drives = jnp.asarray(np.random.default_rng(2).normal(size=(T, 2)))
    found = []
    for still in (1, 0):
        size = 2 + still
        dynamics = Dynamics(functools.partial(step_of, still))
        guess = jnp.zeros((T, size))
        found.append(
            solve(dynamics, jnp.zeros(size), drives, solver=elk(), guess=guess, max_iterations=3)
        )
    np.testing.assert_allclose(found[0].states[:, :2], found[1].states, rtol=1e-9)
    assert np.abs(found[1].states).max() > 0.1


def step_of(still, params, x, u):
    """Two coordinates that move, and one that does not if `still`."""
    moved = jnp.cos(2 * x[:2]) + u
    return jnp.concatenate([moved, x[2:]]) if still else moved


def test_quasi_deer_clips_at_one_unless_told_otherwise():
    assert quasi_deer() == quasi_deer(clip=1.0) != quasi_deer(clip=None)
    assert deer() == deer(clip=None)


def test_numbers_that_linear_maps_take():
    """Per step of five numbers; Kalman's smoother has three maps, and diagonals of a filter count as much as its states."""
    solvers = sequential(), shooting(), picard(), jacobi(), deer(), quasi_deer(), elk(), quasi_elk()
    assert [solver.map_size(5) for solver in solvers] == [0, 0, 0, 0, 25, 5, 75, 15]


def test_relaxing_damping_is_bounded():
    policy = RelaxingDamping(initial=1e-4, cooling=1.0)

    def last(merits):
        memory = policy.init(jnp.zeros(()))
        for merit in merits:
            damping, memory = policy(jnp.asarray(merit), memory)
        return float(damping)

    assert last([5.0]) == pytest.approx(1e-4), "the first pass, whatever the residual"
    # g halves 60 times, but not below 1e-4; λ = 1e-4 g (residual / first residual).
    falling = 0.99 ** np.arange(60)
    assert last(falling) == pytest.approx(1e-4 * 1e-4 * falling[-1], rel=1e-5)
    # g grows fourfold, but not beyond 1e4, and λ not beyond its ceiling.
    assert last(np.ones(30)) == pytest.approx(1e-4 * 1e4, rel=1e-5)
    assert last([1.0, 0.5]) == pytest.approx(1e-4 * 0.5 * 0.5)
    assert last([1.0, 2.0]) == pytest.approx(1e-4 * 4 * 2)
    assert last([1.0, *[3.0] * 30]) == pytest.approx(1e4 * 1e-4)


@pytest.mark.parametrize("kind", [Dense, Diagonal])
def test_a_step_without_a_derivative_forgets_and_the_others_stay(kind):
    shape = (5, D, D) if kind is Dense else (5, D)
    linear_part = jnp.ones(shape).at[2, 1].set(jnp.nan).at[4, 0].set(jnp.inf)
    maps, count = replace_nonfinite_jacobians(kind(linear_part, jnp.ones((5, D))))
    assert count == 2
    kept = jax.tree.leaves(maps.with_shift(None))[0]
    np.testing.assert_array_equal(kept.reshape(5, -1)[:, 0], [1, 1, 0, 1, 0])
    assert set(np.unique(kept)) == {0, 1}
    np.testing.assert_array_equal(maps.shift, 1)


class TwoParts(NamedTuple):
    """A linear part that is kept in two arrays."""

    one: jax.Array
    two: jax.Array
    shift: jax.Array | None

    def with_shift(self, shift):
        return self._replace(shift=shift)


def test_a_derivative_that_is_finite_in_part_is_none():
    one, two = jnp.ones((4, D)).at[1, 0].set(jnp.nan), jnp.ones((4, 2)).at[3, 1].set(-jnp.inf)
    maps, count = replace_nonfinite_jacobians(TwoParts(one, two, jnp.ones((4, D))))
    assert count == 2
    for part in (maps.one, maps.two):
        np.testing.assert_array_equal(part, np.ones(part.shape) * [[1], [0], [1], [0]])


def test_updates_that_overflow_are_replaced():
    updated = jnp.array([[1.0, 2.0], [jnp.inf, 2.0], [jnp.nan, 1.0]])
    values = jnp.array([[5.0, 5.0], [6.0, 6.0], [jnp.nan, 7.0]])
    states, count = replace_nonfinite_updates(updated, values, -jnp.ones((3, 2)))
    np.testing.assert_array_equal(states, [[1, 2], [6, 6], [-1, -1]])
    assert count == 2


@pytest.mark.parametrize("num_steps", [1, 5, 16, 40])
def test_recent_sizes_are_means_of_sixteen(num_steps, double):
    states = np.random.default_rng(3).normal(size=(num_steps, 2))
    before = np.concatenate([np.zeros((REMEMBERED - 1, 2)), np.abs(states)])
    wanted = [before[t : t + REMEMBERED].mean(axis=0) for t in range(num_steps)]
    found = recent_sizes(LocalTime(), jnp.asarray(states))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_recent_sizes_look_at_the_steps_of_the_device_before(num_steps, double):
    sent = []

    class Device(LocalTime):
        def previous(self, initial, states):
            sent.append(states)
            return sent[-2] if len(sent) > 1 else initial[None]

    states = np.random.default_rng(4).normal(size=(2, num_steps, 2))
    _, found = (recent_sizes(Device(), jnp.asarray(part)) for part in states)
    before = np.concatenate([np.zeros((REMEMBERED - 1, 2)), *np.abs(states)])
    wanted = [before[t : t + REMEMBERED].mean(axis=0) for t in range(num_steps, 2 * num_steps)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_residuals_by_hand():
    """T = 2 steps of D = 3 coordinates in two leaves: the largest gap of each step."""
    half = Dynamics(lambda params, x, u: jax.tree.map(lambda leaf: 0.5 * leaf, x))
    initial = {"a": jnp.array([2.0, 4.0]), "b": jnp.array(8.0)}
    states = {"a": jnp.array([[1.0, 2.25], [0.5, 1.125]]), "b": jnp.array([4.0, 5.0])}
    np.testing.assert_allclose(residual(half, initial, states, jnp.zeros((2, 1))), [0.25, 3.0])


def test_a_part_of_a_bound():
    part = Bound(jnp.array(4.0), jnp.array(2.0)).scaled(0.25)
    assert (part.absolute, part.relative) == (1.0, 0.5)
    part = Bound(None, jnp.array(2.0)).scaled(0.25)
    assert part.absolute is None and part.relative == 0.5


def test_every_status_is_one_of_its_own():
    assert [one.name for one in Status] == list(Status.__members__)
    assert len(Status.__members__) == 6


@pytest.mark.parametrize("exact", [0, 1, 2, 19, 20])
def test_a_path_is_finished_from_any_step(exact, double):
    dynamics, initial, drives, path = linear(False)
    spoiled = jnp.where((jnp.arange(T) < exact)[:, None], path, jnp.nan)
    found, _ = finish_sequentially(
        dynamics, initial[None], spoiled[None], drives[None], jnp.array([exact])
    )
    np.testing.assert_allclose(found[0], path, rtol=1e-12)


def test_lanes_are_narrowed_by_four_until_few_are_left():
    """The loops of all levels are compiled, so there are no more than four of them."""
    assert widths(10_000, 1) == (10_000, 2_500, 625, 157)
    assert widths(130, 1) == (130, 33, 9) and widths(31, 1) == (31,)
    assert widths(10_000, 2) == (10_000,), (
        "where chains share the lanes one would decide about another's last bits"
    )


def test_memory_and_further_results_of_every_step(double):
    """Parameters of the three parts are each its own: x' = a x + u, kept as 2x, reported as 3 a x."""
    cached = CachedStep(
        lambda two, x, u: two * x,
        lambda both, kept, u: both[0] * (both[1] * kept / both[0]) + both[0] * u,
        lambda half, kept: half * kept,
        (2.0, (2.0, 0.7), 0.5),
        lambda kept: 3 * kept,
    )
    drives = jnp.asarray(np.random.default_rng(0).normal(size=(T, 1)))
    dynamics = Dynamics(lambda a, x, u: a * x + u, 0.7, cached)
    states, notes = rollout_with_aux(dynamics, jnp.ones(1), drives)
    x, wanted = 1.0, []
    for u in np.asarray(drives)[:, 0]:
        x = 0.7 * x + u
        wanted.append(x)
    np.testing.assert_allclose(states[:, 0], wanted, rtol=1e-12)
    np.testing.assert_allclose(notes[:, 0], 6 * np.array(wanted), rtol=1e-12)
    for num_steps in (0, 1):
        some, of_some = rollout_with_aux(dynamics, jnp.ones(1), drives[:num_steps])
        np.testing.assert_array_equal(some, states[:num_steps])
        # Without steps there is nothing to report.
        assert of_some is None if num_steps == 0 else of_some == notes[0]


def test_what_a_derivative_keeps_is_cut_into_blocks_of_time():
    """131,072 numbers of state are evaluated at once: of 64 units 2,048 steps."""
    previous, drives = jnp.zeros((16_384, 64)), jnp.zeros((16_384, 1))
    traced = jax.make_jaxpr(
        functools.partial(_in_blocks, lambda a, x, u: jnp.tanh(a * x) + u, 0.5)
    )(previous, drives)
    (loop,) = [one for one in traced.jaxpr.eqns if one.primitive.name == "scan"]
    assert loop.params["length"] == 8


def test_a_step_that_is_not_finite_adds_nothing_to_the_next(double):
    """From the guess 0 all values but the third, which is infinite, are 1. Corrections δ_t = δ_{t-1} / 2 + 1, there δ_{t-1} / 2."""
    drives = jnp.zeros((6, 1)).at[2].set(jnp.inf)
    dynamics = Dynamics(lambda a, x, u: a * x + 1 + u, 0.5)
    one = functools.partial(
        deer().step, dynamics, jnp.zeros(1), jnp.zeros((6, 1)), drives, None, axis=LocalTime()
    )
    proposal, _ = one(key=jax.random.key(0), tolerance=Tolerance(1e-8))
    np.testing.assert_allclose(proposal.states[:2, 0], [1.0, 1.5])
    np.testing.assert_allclose(proposal.states[3:, 0], [1.375, 1.6875, 1.84375])


@pytest.mark.parametrize("direction", [1, -1])
def test_a_scan_in_one_segment_is_the_loop(direction, double):
    _, initial, drives, _ = linear(False)
    path, report = segmented_scan(
        lambda a, x, u: jnp.tanh(a * x + u),
        0.5,
        initial,
        drives,
        Bound(None, 1e-12),
        SegmentedScanConfig(1),
        direction=direction,
    )
    x, wanted = np.asarray(initial), []
    for u in np.asarray(drives)[::direction]:
        x = np.tanh(0.5 * x + u)
        wanted.append(x)
    np.testing.assert_allclose(path, wanted[::direction], rtol=1e-12)
    assert float(report.evaluations) == 1 and float(report.gap) == 0
    assert not report.parallel and int(report.corrected) == int(report.probe_steps) == 0


def test_a_path_that_is_not_right_is_rolled_from_its_first_step(double):
    _, initial, drives, _ = linear(False)
    step, zeros = lambda a, x, u: jnp.tanh(a * x + u), jnp.zeros((len(drives), D))
    path, right = one_after_another(step, 0.5, initial, drives, zeros, jnp.array(False))
    x, wanted = np.asarray(initial), []
    for u in np.asarray(drives):
        x = np.tanh(0.5 * x + u)
        wanted.append(x)
    np.testing.assert_allclose(path, wanted, rtol=1e-12)
    kept, still = one_after_another(step, 0.5, initial, drives, zeros, jnp.array(True))
    assert not right and still and not kept.any()


@pytest.mark.parametrize("direction", [1, -1])
def test_the_gap_where_segments_meet_is_the_largest_residual(direction, double):
    _, initial, _, _ = linear(False)
    drives = jnp.asarray(np.random.default_rng(1).normal(size=(8192, D)))
    step = lambda a, x, u: jnp.tanh(a * x + u)
    path, report = segmented_scan(
        step, 0.5, initial, drives, (1e-3, 0.0), SegmentedScanConfig(8), direction=direction
    )
    assert report.parallel
    path, drives = path[::direction], drives[::direction]
    previous = jnp.concatenate([initial[None], path[:-1]])
    residual = np.abs(step(0.5, previous, drives) - path).max()
    assert 0 < residual <= 1e-3
    np.testing.assert_allclose(report.gap, residual, rtol=1e-9)


@pytest.mark.parametrize("allowed, rolls", [(1.2e-3, 2), (1.15e-3, 3)])
def test_segments_agree_in_units_of_their_last_states(allowed, rolls, double):
    """x' = 0.9 x + 0.1 from 1 stays there; from the guess 0 a segment of 64 steps ends 0.9⁶⁴ = 0.00118 below, and then at 1.

    Half of what is allowed is in units of the last state, half in units of the last sixteen, where a segment meets its stored path and
    where it hands over its end: either is enough to be done.
    """
    dynamics = Dynamics(lambda params, x, u: 0.9 * x + 0.1 + u)
    found = solve(
        dynamics,
        jnp.ones(1),
        jnp.zeros((256, 1)),
        solver=shooting(steps=64),
        guess=jnp.zeros((256, 1)),
        tolerance=Tolerance(relative=allowed / 2),
    )
    assert rolls - 1 < float(found.stats.evaluations) <= rolls
