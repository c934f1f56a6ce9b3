"""A bad argument of the engine is refused before anything compiles: its name, what it got, what it wanted."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import partime_mcmc
from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.engine.recipes import deer, elk, jacobi, quasi_deer, quasi_elk
from partime_mcmc.engine.solution import Tolerance
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.time_axis import LocalTime
from partime_mcmc.engine.windows import AllAtOnce, SlidingWindow, Windows
from partime_mcmc.linearize import DenseJacobian, HutchinsonDiagonal
from partime_mcmc.scan import ChunkedScan
from partime_mcmc.solvers import Kalman
from partime_mcmc.types import pytree


def step(params, state, drive):
    return jax.tree.map(lambda leaf: 0.5 * leaf, state)


def count_error(number):
    """Which error a bad count raises: what is no integer has the wrong type."""
    return ValueError if type(number) is int else TypeError


START, DRIVES = np.ones(2, np.float32), np.zeros((5, 2), np.float32)


def refused(error, *words):
    """The error, with every word in its message."""
    return pytest.raises(error, match="".join(f"(?=.*{word})" for word in words))


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch):
    """The engine's loop is out of bounds: a refusal comes before it."""

    def reached(*args, **kwargs):
        raise AssertionError("the loop was reached")

    # By its module: the package's own attribute `solve` is the function.
    monkeypatch.setattr(sys.modules["partime_mcmc.engine.solve"], "run_jitted", reached)


@pytest.mark.parametrize(
    "initial, words",
    [
        (np.arange(2), ["initial", "int", "floating point", "drives"]),
        (3, ["initial", "int", "floating point"]),
        (np.array([True, False]), ["initial", "bool", "floating point"]),
        (np.ones(2, np.complex64), ["initial", "complex64", "floating point"]),
        (
            {"a": np.ones(2, np.float32), "n": np.arange(2)},
            ["initial", "n", "int", "floating point"],
        ),
        (
            {"a": np.ones(2, np.float32), "b": np.ones(2, np.float16)},
            ["initial", "mixed", "float16", "one"],
        ),
    ],
)
def test_initial_states_of_the_wrong_type(initial, words):
    with refused(TypeError, *words):
        solve(Dynamics(step), initial, DRIVES)


def test_keys_are_no_state():
    with refused(TypeError, "initial", "key", "floating point", "drives"):
        solve(Dynamics(step), jax.random.key(0), DRIVES)


def test_mixed_precision():
    with jax.enable_x64(True), refused(TypeError, "initial", "float32", "float64", "one"):
        solve(Dynamics(step), {"a": np.ones(2, np.float32), "b": np.ones(2)}, DRIVES)


@pytest.mark.parametrize(
    "initial", [{}, np.ones(0, np.float32), {"a": np.ones((2, 0), np.float32)}]
)
def test_states_without_elements(initial):
    with refused(ValueError, "initial", "no elements", "at least one"):
        solve(Dynamics(step), initial, DRIVES)


@pytest.mark.parametrize(
    "drives, words",
    [
        (None, ["drives", "no arrays", "leading axis T"]),
        ((), ["drives", "no arrays", "arange"]),
        (np.float32(1.0), ["drives", "None", "leading axes", "one common length"]),
        ((DRIVES, DRIVES[:3]), ["drives", "3", "5", "one common length"]),
    ],
)
def test_drives_without_a_common_length(drives, words):
    with refused(ValueError, *words):
        solve(Dynamics(step), START, drives)


@pytest.mark.parametrize(
    "bad_step, words",
    [
        (lambda params, state, drive: state[:1], ["step returns", r"\(1,\)", r"\(2,\)", "initial"]),
        (lambda params, state, drive: (state, state), ["step returns", "structure"]),
        (lambda params, state, drive: None, ["step returns", "structure"]),
        (
            lambda params, state, drive: state.astype(jnp.float16),
            ["step returns", "float16", "float32"],
        ),
        (
            lambda params, state, drive: jnp.round(state).astype(int),
            ["step returns", "int32", "float32"],
        ),
    ],
)
def test_steps_that_return_something_else(bad_step, words):
    with refused(TypeError, "dynamics", *words):
        solve(Dynamics(bad_step), START, DRIVES)


@pytest.mark.parametrize("number", [0, -1, 2.0, "many", True, np.inf])
def test_max_iterations(number):
    with refused(count_error(number), "max_iterations", "at least 1", str(number)):
        solve(Dynamics(step), START, DRIVES, max_iterations=number)


@pytest.mark.parametrize(
    "guess", [np.ones((4, 2), np.float32), np.ones(2, np.float32), np.ones((5, 3), np.float32)]
)
def test_guesses_of_the_wrong_shape(guess):
    with refused(
        ValueError, "guess", str(guess.shape).replace("(", r"\(").replace(")", r"\)"), r"\(5, 2\)"
    ):
        solve(Dynamics(step), START, DRIVES, guess=guess)


def test_guesses_of_the_wrong_structure():
    with refused((ValueError, TypeError), "guess"):
        solve(Dynamics(step), START, DRIVES, guess={"a": DRIVES, "b": DRIVES})
    with refused((ValueError, TypeError), "guess"):
        solve(Dynamics(step), {"a": START, "b": START}, DRIVES, guess={"a": DRIVES})


@pytest.mark.parametrize("schedule", [Windows, SlidingWindow])
@pytest.mark.parametrize("size", [0, -3, 2.0, None, True])
def test_schedules(schedule, size):
    with refused(count_error(size), "size", "at least 1", str(size)):
        schedule(size)


class TwoDevices(LocalTime):
    """As many steps on another device."""

    def length(self, num_steps):
        return 2 * num_steps


def test_windows_that_move_are_on_one_device():
    with refused(ValueError, "schedule", "Windows", "AllAtOnce"):
        solve(Dynamics(step), START, DRIVES, schedule=Windows(2), axis=TwoDevices())
    for schedule, axis in ((Windows(2), LocalTime()), (AllAtOnce(), TwoDevices())):
        with pytest.raises(AssertionError, match="the loop was reached"):
            solve(Dynamics(step), START, DRIVES, schedule=schedule, axis=axis)


@pytest.mark.parametrize("recipe", [deer, quasi_deer])
@pytest.mark.parametrize("damping", [-0.1, 1.1, float("nan")])
def test_damping(recipe, damping):
    with refused(ValueError, "damping", "between 0 and 1", str(damping)):
        recipe(damping=damping)
    for end in (0.0, 1.0):
        recipe(damping=end)


@pytest.mark.parametrize("recipe", [deer, quasi_deer, elk, quasi_elk])
@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_clip(recipe, clip):
    with refused(ValueError, "clip", "positive", str(clip)):
        recipe(clip=clip)


@pytest.mark.parametrize(
    "make",
    [HutchinsonDiagonal, lambda n: quasi_deer(num_probes=n), lambda n: quasi_elk(num_probes=n)],
)
@pytest.mark.parametrize("number", [0, -1, 1.5])
def test_num_probes(make, number):
    with refused(count_error(number), "num_probes", "at least 1", str(number)):
        make(number)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_chunks(size):
    with refused(count_error(size), "size", "at least 1", str(size)):
        ChunkedScan(size)


@pytest.mark.parametrize("name", ["relative", "absolute"])
@pytest.mark.parametrize("value", [-1e-6, float("nan"), float("inf")])
def test_tolerances_that_no_path_or_every_path_would_meet(name, value):
    with refused(ValueError, "tolerance", name, "finite and at least 0"):
        solve(Dynamics(step), START, DRIVES, tolerance=Tolerance(**{name: value}))


def test_tolerances_of_the_wrong_shape():
    with refused(ValueError, "tolerance", "absolute", r"\(3,\)", r"\(2,\)"):
        solve(Dynamics(step), START, DRIVES, tolerance=Tolerance(absolute=np.ones(3)))


def test_static_fields_that_are_no_fields():
    with refused(TypeError, "static", "speed", "size"):

        @pytree(static=("speed",))
        class Wrong:
            size: int


def test_maps_that_no_message_fits(monkeypatch):
    monkeypatch.undo()

    @pytree()
    class OddMap:
        shift: object

        def with_shift(self, shift):
            return OddMap(shift)

    @pytree()
    class Odd:
        def __call__(self, dynamics, previous, drives, key):
            values, maps = DenseJacobian()(dynamics, previous, drives, key)
            return values, OddMap(maps.shift)

        def jvps(self, dimension):
            return 0

    with refused(TypeError, "OddMap", "Dense or Diagonal"):
        solve(Dynamics(step), START, DRIVES, solver=Kalman(Odd()))


def test_good_arguments_reach_the_loop():
    with pytest.raises(AssertionError, match="the loop was reached"):
        solve(
            Dynamics(step),
            START,
            DRIVES,
            solver=jacobi(),
            max_iterations=1,
            guess=np.zeros((5, 2), np.float32),
            tolerance=Tolerance(1e-6, np.full(2, 1e-6)),
            schedule=Windows(2),
        )


@pytest.mark.parametrize(
    "old, new",
    [
        ("Whole", partime_mcmc.AllAtOnce),
        ("Stretches", partime_mcmc.Windows),
        ("Sliding", partime_mcmc.SlidingWindow),
        ("PlainDice", partime_mcmc.CommonRandomNumbers),
        ("CoalescingDice", partime_mcmc.MultishiftCoupling),
        ("Recorded", partime_mcmc.CertifyWhileRolling),
        ("Independent", partime_mcmc.CertifyIndependently),
        ("ImplicitRelay", partime_mcmc.engine.adjoint.ImplicitSegmented),
        ("loop", partime_mcmc.kernels.blackjax_loop),
    ],
)
def test_old_names_work_and_warn(old, new):
    with pytest.warns(
        DeprecationWarning, match=rf"{old} is now partime_mcmc\.[\w.]*\.{new.__name__};"
    ):
        assert getattr(partime_mcmc, old) is new
    assert old not in partime_mcmc.__all__


@pytest.mark.parametrize("old", sorted(partime_mcmc._MOVED))
def test_every_old_name_leads_somewhere(old):
    with pytest.warns(DeprecationWarning, match=f"partime_mcmc.{old} is now "):
        assert getattr(partime_mcmc, old) is not None


def test_a_name_that_never_was_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'Halves'"):
        _ = partime_mcmc.Halves
