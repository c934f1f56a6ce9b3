"""Faults tried and what happened: `python -m benchmarks.faults --out DIR`.

Each fault is brought about anew, in a small run, and what should happen is known: a number that is certified, an error that names
its cause, or draws that are those of a run to which nothing happened, bit for bit. A row says what was tried, what happened
and whether that is what should have; the command ends with 1 if anything else did. Runs that are killed, that write to a
full disk or that stand still are processes of their own. Rows of earlier runs that are not tried again stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import OUT, keep
from partime_mcmc import (
    AllAtOnce,
    CertifyIndependently,
    CertifyWhileRolling,
    CoalescingHMC,
    Dynamics,
    ParallelMCMC,
    SlidingWindow,
    Status,
    Store,
    Target,
    Windows,
    certify,
    coalescing_hmc,
    deer,
    from_blackjax,
    jacobi,
    mala,
    open_draws,
    quasi_deer,
    random_walk,
    resume,
    rollout,
    sample,
    sequential,
    shooting,
    solve,
    time_mesh,
    to_arviz,
    unroll,
)
from partime_mcmc.diagnostics.arviz import read_draws, save_netcdf
from partime_mcmc.diagnostics.checks import NonDeterministicTarget, PrecisionWarning
from partime_mcmc.engine.solution import SolveError
from partime_mcmc.sampling import local
from partime_mcmc.storage.files import StoreError

_STEPS, _CHUNK = 480, 96
_LARGEST_FILE = 2**9
FAULTS: dict[str, Callable[[Path], tuple[bool, str]]] = {}


def fault(text: str) -> Callable:
    """Register what tries a fault in a folder: `(whether what should happen did, what happened)`."""

    def register(function):
        FAULTS[text] = function
        return function

    return register


def normal(x):
    """The log density of most runs here."""
    return -0.5 * jnp.sum(x**2)


TARGET, KERNEL = Target(normal, jnp.zeros(2)), mala(normal, 0.5)


def run(path: Path | None = None, **changes):
    """A small run, in memory or in a folder."""
    options = {"num_samples": _STEPS, "num_chains": 2, "solver": sequential(), "progress": False}
    store = None if path is None else Store(path, chunk=_CHUNK)
    return sample(jax.random.key(5), TARGET, KERNEL, store=store, **options | changes)


def refused(kind: type[BaseException], call: Callable) -> tuple[bool, str]:
    """Whether a call raises an error of this kind, and its first words."""
    try:
        value = call()
    except kind as error:
        return True, f"{type(error).__name__}: {str(error).splitlines()[0][:90]}…"
    return False, f"no error: {type(value).__name__}"


def drawn_again(path: Path) -> tuple[bool, str]:
    """Whether what happened to a finished run is noticed when it is read, and mended when it is resumed."""
    noticed, said = refused(StoreError, lambda: open_draws(path).load())
    draws = resume(path, TARGET, KERNEL, progress=False).or_raise()
    same = np.array_equal(draws.constrained["x"], run().constrained["x"])
    return noticed and same, f"{'noticed' if noticed else said}; resumed draws {_same(same)}"


def _same(same: bool) -> str:
    return "are the same, bit for bit" if same else "DIFFER"


# --- paths that are not right ---------------------------------------------------------------------------------------


@fault("states of size 1e-30, 1e-6, 1e12 and of mixed size, float32")
def _scales(folder):
    worst = 0.0
    drives = jax.random.normal(jax.random.key(0), (500, 2))
    for unit in (jnp.full(2, 1e-30), jnp.full(2, 1e-6), jnp.full(2, 1e12), jnp.array([1e-12, 1e6])):
        dynamics = Dynamics(lambda unit, x, u: 0.9 * x + unit * u, unit)
        # Squares of such numbers are none in float32.
        truth = np.asarray(rollout(dynamics, jnp.zeros(2), drives), float)
        for solver in (deer(), shooting()):
            found = solve(dynamics, jnp.zeros(2), drives, solver=solver).or_raise()
            apart = np.abs(np.asarray(found.states, float) - truth).max(axis=0)
            worst = max(worst, float((apart / truth.std(axis=0)).max()))
    return worst < 1e-4, f"largest error {worst:.0e} standard deviations of the path"


@fault("a log density that is random away from the start: 0.3, and 1e-5, at distance 1 and 2")
def _random(folder):
    certified = []
    for noise, distance in ((0.3, 1.0), (1e-5, 1.0), (0.3, 2.0)):
        logdensity = _on_host(noise, distance)
        target, kernel = Target(logdensity, jnp.zeros(2)), random_walk(logdensity, 0.7)
        options = {"num_samples": 300, "num_chains": 2, "progress": False}
        draws = sample(jax.random.key(1), target, kernel, solver=sequential(), **options)
        certified += list(np.asarray(draws.certificate.certified))
    honest = _on_host(0.0, 0.0)
    target, kernel = Target(honest, jnp.zeros(2)), random_walk(honest, 0.7)
    draws = sample(jax.random.key(1), target, kernel, solver=sequential(), **options)
    good = bool(np.all(draws.certificate.certified))
    return good and not any(certified), (
        f"{sum(certified)} of {len(certified)} chains certified; without the noise {'all' if good else 'NOT ALL'}"
    )


def _on_host(noise: float, distance: float) -> Callable:
    source = np.random.RandomState(0)

    def value(x):
        extra = noise * source.standard_normal() if np.abs(x).max() > distance else 0.0
        return np.asarray(-0.5 * np.sum(x**2) + extra, x.dtype)

    shape = lambda x: jax.ShapeDtypeStruct((), x.dtype)
    return lambda x: jax.pure_callback(value, shape(x), x, vmap_method="sequential")


@fault("a random number that tracing writes into the log density, for positions far away")
def _traced(folder):
    source = np.random.RandomState(0)

    def logdensity(x):
        return normal(x) + jnp.where(jnp.abs(x).max() > 9, source.standard_normal(), 0.0)

    target = Target(logdensity, jnp.zeros(2))
    call = lambda: sample(jax.random.key(0), target, KERNEL, num_samples=10, progress=False)
    return refused(NonDeterministicTarget, call)


@fault("a rejected step moved by 1e-9 standard deviations of the noise, float64")
def _moved(folder):
    with jax.enable_x64(True):
        kernel = mala(normal, 0.5)
        state = kernel.init(jnp.ones(3))
        tape = kernel.tape(jax.random.key(0), 500, state)
        path = solve(kernel.dynamics(), kernel.carry(state), tape).states
        right = certify(kernel, kernel.carry(state), path, tape)
        step = int(jnp.flatnonzero(~right.accepted)[3])
        wrong = certify(kernel, kernel.carry(state), path.at[step].add(1e-9), tape)
    good = bool(right.certified) and not bool(wrong.certified)
    return good, f"certified {bool(wrong.certified)}, untouched {bool(right.certified)}"


@fault("data that the log density reads are rebound between two runs")
def _rebound(folder):
    data = np.zeros(20, np.float32)
    target = Target(lambda x: -0.5 * jnp.sum((x - jnp.asarray(data)[:, None]) ** 2), jnp.zeros(2))
    means = []
    for centre in (0.0, 5.0):
        data = np.full(20, centre, np.float32)
        options = {"num_samples": 400, "num_warmup": 100, "progress": False}
        draws = sample(jax.random.key(0), target, mala, **options)
        means.append(float(np.mean(np.asarray(draws.positions))))
    good = abs(means[0]) < 0.2 and abs(means[1] - 5) < 0.2
    return good, f"posterior means {means[0]:.2f} and {means[1]:.2f}, wanted 0 and 5"


@fault("keys of the generator rbg")
def _generator(folder):
    key = jax.random.key(0, impl="rbg")
    return refused(ValueError, lambda: sample(key, TARGET, KERNEL, num_samples=10, progress=False))


@fault("float32 starts in a run in float64; a mixture of both")
def _types(folder):
    with jax.enable_x64(True):
        start = jnp.zeros(2, jnp.float32)
        draws = sample(jax.random.key(0), Target(normal, start), mala(normal, 0.5), num_samples=20, progress=False)  # fmt: skip
        kind = np.asarray(draws.positions).dtype
        mixed = Target(lambda x: normal(x["a"]) + normal(x["b"]), {"a": start, "b": jnp.zeros(1)})
        both = sample(jax.random.key(0), mixed, mala, num_samples=20, progress=False)
        kinds = {kind, *(np.asarray(leaf).dtype for leaf in both.positions.values())}
    return kinds == {np.dtype(np.float64)}, f"draws are {', '.join(map(str, kinds))}"


@fault("values named 'a/b', 'a%2Fb', '..', 'x_dim_0', through NetCDF")
def _names(folder):
    rng = np.random.default_rng(0)
    names = {"a/b": (2, 9, 3), "a%2Fb": (2, 9), "..": (2, 9), "x": (2, 9, 2), "x_dim_0": (2, 9)}
    values = {name: rng.normal(size=shape) for name, shape in names.items()}
    path = save_netcdf(SimpleNamespace(constrained=values), folder / "draws.nc")
    back = read_draws(path).constrained
    good = set(back) == set(values) and all(
        np.array_equal(back[name], values[name]) for name in values
    )
    return good, f"{len(back)} of {len(values)} came back{'' if good else ', NOT as they were'}"


@fault("JAX's search for NaN is on, and proposals fall outside the support")
def _nans(folder):
    jax.config.update("jax_debug_nans", True)
    try:
        box = lambda x: jnp.sum(jnp.log(1 - x**2))
        options = {"num_samples": 200, "progress": False}
        draws = sample(jax.random.key(0), Target(box, jnp.zeros(2)), mala(box, 0.4), **options)
    finally:
        jax.config.update("jax_debug_nans", False)
    certificate = draws.certificate
    count = int(np.sum(certificate.num_nonfinite_proposals))
    good = bool(np.all(certificate.certified)) and count > 0
    return good, f"certified {good}, {count} proposals outside"


@fault("subnormal states, and a path that shrinks to them")
def _subnormal(folder):
    dynamics = Dynamics(lambda w, x, u: 0.5 * x + w * u, jnp.float32(1e-41))
    drives = jax.random.normal(jax.random.key(0), (200,))
    truth = rollout(dynamics, jnp.float32(1.0), drives)
    found = solve(dynamics, jnp.float32(1.0), drives, solver=shooting()).or_raise()
    apart = float(jnp.abs(found.states - truth).max())
    return apart < 1e-6, f"{found.verdict.name}, largest difference {apart:.0e} of a start of 1"


@fault("300 dimensions, dense Jacobians")
def _dense(folder):
    return _wide(300, 64, deer())


@fault("10,000 dimensions, diagonal Jacobians from one probe")
def _diagonal(folder):
    return _wide(10_000, 64, quasi_deer(num_probes=1))


def _wide(width: int, num_steps: int, solver) -> tuple[bool, str]:
    decay = jnp.linspace(0.1, 0.9, width)
    dynamics = Dynamics(lambda decay, x, u: jnp.tanh(decay * x + u), decay)
    drives = jax.random.normal(jax.random.key(0), (num_steps, width))
    truth = rollout(dynamics, jnp.zeros(width), drives)
    found = solve(dynamics, jnp.zeros(width), drives, solver=solver).or_raise()
    apart = float(jnp.abs(found.states - truth).max())
    return (
        apart < 1e-4,
        f"{found.verdict.name} after {int(found.iterations)} passes, error {apart:.0e}",
    )


# --- derivatives, pieces of time and numbers of few digits --------------------------------------------------------------


def chain_of(kernel, num_steps: int, start=(0.3, -0.2), key: int = 0):
    """What `solve` and `certify` take of a chain of a kernel: recurrence, first carry, random numbers."""
    state = kernel.init(jnp.asarray(start))
    return (
        kernel.dynamics(),
        kernel.carry(state),
        kernel.tape(jax.random.key(key), num_steps, state),
    )


def distance(one, other) -> float:
    """The largest difference of two paths."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def certified(draws) -> bool:
    """Whether all chains are."""
    return bool(np.all(draws.certificate.certified))


@fault("derivatives that are NaN where a proposal leaves the support, dense Jacobians")
def _nan_derivative(folder):
    kernel = mala(lambda x: jnp.sum(jnp.log(jnp.sqrt(1 - x**2))), 0.3)
    dynamics, first, tape = chain_of(kernel, 300)
    found = solve(dynamics, first, tape, solver=deer()).or_raise()
    judged = certify(kernel, first, found.states, tape)
    apart = distance(found.states, rollout(dynamics, first, tape))
    outside = int(judged.num_nonfinite_proposals)
    return bool(judged.certified) and outside > 20 and apart < 1e-4, (
        f"{outside} such proposals in 300 steps, certified {bool(judged.certified)}, {apart:.0e} from the loop"
    )


@fault("one derivative that is NaN, at step 501 of 1,000")
def _one_nan_derivative(folder):
    # The square root of 0 squared: a value of 0, and a derivative of 0/0.
    step = lambda w, x, u: jnp.where(u[1] > 0, 0.0, w * jnp.sqrt(x**2) + u[0])
    noise = jax.random.normal(jax.random.key(0), (1000,))
    drives = jnp.stack([noise, jnp.arange(1000) == 499], axis=1)
    dynamics = Dynamics(step, jnp.float32(0.5))
    found = solve(dynamics, jnp.float32(1), drives, solver=deer()).or_raise()
    apart = distance(found.states, rollout(dynamics, jnp.float32(1), drives))
    count = int(found.stats.num_replaced_jacobians)
    return count > 0 and apart < 1e-5, f"{count} Jacobians replaced, path {apart:.0e} from the loop"


@fault("a recurrence that grows by 1.1 for 1,000 steps and then forgets: float32, float64")
def _burst(folder):
    growth = np.where(np.arange(2000) < 1000, 1.1, 0.5)
    said, good = [], True
    for x64 in (False, True):
        with jax.enable_x64(x64):
            drives = jnp.asarray(growth, float)
            dynamics = Dynamics(lambda w, x, a: w * a * x + 1, jnp.asarray(1.0))
            truth = np.asarray(rollout(dynamics, jnp.asarray(1.0), drives))
            left = int(np.argmin(np.isfinite(truth))) if not np.isfinite(truth).all() else None
            found = solve(dynamics, jnp.asarray(1.0), drives, solver=deer())
            wanted = Status.CONVERGED if left is None else Status.NONFINITE
            exact = int(found.num_exact)
            good &= found.verdict == wanted and exact == (2000 if left is None else left)
            apart = np.abs(np.asarray(found.states) - truth)[:exact] / np.abs(truth[:exact])
            good &= bool(apart.max() < (1e-12 if x64 else 1e-3))
            said.append(
                f"{found.verdict.name}, {exact:,} exact steps, {apart.max():.0e} from the loop"
            )
    return good, "; ".join(said)


@dataclasses.dataclass(frozen=True)
class _TwoCycle:
    """A solver whose proposals go to and fro between two paths, neither of them right."""

    def init(self, initial, states):
        return ()

    def step(self, dynamics, initial, states, drives, state, **context):
        proposal, state = jacobi().step(dynamics, initial, states, drives, state, **context)
        return dataclasses.replace(proposal, states=1.5 - states), state


jax.tree_util.register_pytree_node(
    _TwoCycle, lambda one: ((), None), lambda aux, leaves: _TwoCycle()
)


@fault("a solver that goes to and fro between two paths")
def _cycle(folder):
    dynamics = Dynamics(lambda w, x, u: jnp.tanh(w * x + u), jnp.float32(0.9))
    drives = jax.random.normal(jax.random.key(0), (17, 2))
    found = solve(dynamics, jnp.zeros(2), drives, solver=_TwoCycle())
    passes = int(found.iterations)
    return (
        found.verdict == Status.STALLED and passes < 10,
        f"{found.verdict.name} after {passes} passes of 200",
    )


@fault("decisions that hang on rounding: 40,000 steps in float32, segments against the loop")
def _flips(folder):
    options = {"num_samples": 10_000, "num_chains": 4, "progress": False}
    kernel = mala(normal, 0.9)
    both = [
        sample(jax.random.key(2), TARGET, kernel, solver=one, **options)
        for one in (shooting(32), sequential())
    ]
    decided = [np.asarray(draws.info["accepted"]) for draws in both]
    flips = int((decided[0] != decided[1]).sum())
    ambiguous = int(np.sum(both[0].certificate.num_ambiguous))
    good = all(map(certified, both)) and flips <= ambiguous and not decided[0].all()
    return good, f"{flips} of 40,000 decisions differ, {ambiguous} were called ambiguous, {'all' if good else 'NOT all'} certified"  # fmt: skip


@fault("products in 10 bits, as a GPU's TF32, in the solver only")
def _few_bits(folder):
    few = lambda x: jax.lax.reduce_precision(x, 8, 10)
    matrix = jnp.asarray([[1.0, 0.3], [0.3, 0.7]], jnp.float32)
    exact = mala(lambda x: -0.5 * x @ (matrix @ x), 0.5)
    coarse = mala(lambda x: -0.5 * x @ (few(matrix) @ few(x)), 0.5)
    _, first, tape = chain_of(exact, 2000)
    judged = [
        certify(exact, first, solve(one.dynamics(), first, tape, solver=shooting(16)).states, tape)
        for one in (coarse, exact)
    ]
    good = not bool(judged[0].certified) and bool(judged[1].certified)
    return good, f"certified {bool(judged[0].certified)}, residual {float(judged[0].max_residual):.0e}; without {bool(judged[1].certified)}, {float(judged[1].max_residual):.0e}"  # fmt: skip


@fault("a log density that loses its digits in float32")
def _digits(folder):
    cancels = lambda x: -jnp.sum((1e4 + x) ** 2 - 1e8 - 2e4 * x)
    told = []
    for one in (cancels, normal):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            target = Target(one, jnp.full(2, 0.7))
            sample(jax.random.key(0), target, mala(one, 0.1), num_samples=10, progress=False)
        told.append([str(one.message) for one in caught if one.category is PrecisionWarning])
    return bool(told[0]) and not told[1], f"{told[0][0][:80] if told[0] else 'no warning'}…; {len(told[1])} of an honest one"  # fmt: skip


@fault("windows of 4 steps, shorter than a row of rejections")
def _short_windows(folder):
    kernel = mala(normal, 2.2)
    dynamics, first, tape = chain_of(kernel, 400)
    truth = rollout(dynamics, first, tape)
    judged = certify(kernel, first, truth, tape)
    apart = max(
        distance(
            solve(dynamics, first, tape, solver=jacobi(), schedule=one).or_raise().states, truth
        )
        for one in (Windows(4), SlidingWindow(4))
    )
    longest, rate = int(judged.longest_rejection), 1 - int(judged.num_rejected) / 400
    return apart < 1e-5 and longest > 4, f"acceptance {rate:.2f}, {longest} rejections in a row, paths {apart:.0e} from the loop"  # fmt: skip


# --- chains that do not sample ------------------------------------------------------------------------------------------


@fault("a step size of a million: no proposal is accepted")
def _frozen(folder):
    draws = run_kernel(mala(normal, 1e6))
    raised, said = refused(SolveError, draws.or_raise)
    good = (
        raised and set(draws.report.status) == {Status.FROZEN} and draws.verdict.name != "CONVERGED"
    )
    return good, f"{said}; verdict {draws.verdict.name}"


def run_kernel(kernel, num_samples: int = 200):
    """A small run of a kernel in memory."""
    target = Target(normal, jnp.ones(2))
    return sample(jax.random.key(0), target, kernel, num_samples=num_samples, num_chains=2, progress=False)  # fmt: skip


@fault("a posterior that cannot be normalised: a constant, and one that grows")
def _improper(folder):
    said, good = [], True
    for flat in (lambda x: 0.0 * jnp.sum(x), lambda x: 1e-3 * jnp.sum(x**2)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            target = Target(flat, lambda key: jax.random.normal(key, (2,)))
            options = {"num_samples": 400, "num_warmup": 200, "progress": False}
            draws = sample(jax.random.key(0), target, coalescing_hmc, **options)
        told = [str(one.message) for one in caught if "improper" in str(one.message)]
        good &= bool(told) or draws.verdict.name != "CONVERGED"
        said.append(f"{'warned of it' if told else 'no warning'}, verdict {draws.verdict.name}")
    return good, "; ".join(said)


@fault("the device runs out of memory twice")
def _exhausted(folder):
    whole, solve_windows, asked = run(), local.solve_windows, []

    def full(plan, state, num_steps, *rest):
        asked.append(num_steps)
        if len(asked) <= 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return solve_windows(plan, state, num_steps, *rest)

    local.solve_windows = full
    try:
        draws = run().or_raise()
    finally:
        local.solve_windows = solve_windows
    apart = distance(draws.positions, whole.positions)
    notes = sum("ran out of memory" in note for note in draws.report.fallbacks)
    return notes == 2 and apart < 1e-4 and certified(draws), f"steps at once {asked[:3]}, {notes} notes in the report, draws {apart:.0e} apart"  # fmt: skip


# --- repetitions and neighbours -----------------------------------------------------------------------------------------


@fault("one run ten times over")
def _again(folder):
    first, *others = (run(solver=shooting(8)).constrained["x"] for _ in range(10))
    same = all(np.array_equal(first, one) for one in others)
    return same, f"draws {_same(same)}, on {jax.devices()[0].device_kind}"


@fault("products of small matrices beyond 2^14 and 2^15 rows, which JAX 0.10.2 gets wrong")
def _compiler(folder):
    worst, rng = 0.0, np.random.default_rng(0)
    for x64, width, length in itertools.product((False, True), (3, 5, 7), (2**14 + 3, 2**15 + 3)):
        with jax.enable_x64(x64):
            matrix, rows = rng.normal(size=(width, width)), rng.normal(size=(length, width))
            form = jax.jit(
                jax.vmap(lambda x, matrix=matrix: jnp.sum((jnp.asarray(matrix) @ x) ** 2))
            )
            got, wanted = (
                np.asarray(form(jnp.asarray(rows)), float),
                ((rows @ matrix.T) ** 2).sum(1),
            )
            unit = np.finfo(np.float64 if x64 else np.float32).eps * np.maximum(wanted, 1)
            worst = max(worst, float((np.abs(got - wanted) / unit).max()))
    return worst < 200, f"largest error {worst:.0f} units in the last place, JAX {jax.__version__}"


@fault("one of eight paths is NaN from its start, or too large from step 20 on")
def _neighbours(folder):
    dynamics = Dynamics(
        lambda w, x, u: jnp.where(u > 9, jnp.inf, jnp.tanh(w * x) + u), jnp.float32(0.5)
    )
    starts = jax.random.normal(jax.random.key(1), (8, 2))
    drives = jax.random.normal(jax.random.key(0), (8, 60, 2))
    others, good = np.arange(8) != 3, True
    for solver in (deer(), shooting(4)):
        paths = jax.jit(jax.vmap(lambda start, u: solve(dynamics, start, u, solver=solver)))
        whole = paths(starts, drives)
        for sick in (
            paths(starts.at[3].set(jnp.nan), drives),
            paths(starts, drives.at[3, 20].set(10)),
        ):
            found = [Status(one) for one in np.asarray(sick.status)]
            good &= found[3] == Status.NONFINITE and found.count(Status.CONVERGED) == 7
            good &= np.array_equal(
                np.asarray(sick.states)[others], np.asarray(whole.states)[others]
            )
    return good, f"NONFINITE; the other seven {_same(good)}"


@fault(
    "a step with side effects, closures over tracers, jit in jit, vmap and grad around, tracer leaks looked for"
)
def _transformed(folder):
    with jax.enable_x64(True):
        return _in_transformations()


def _in_transformations() -> tuple[bool, str]:
    calls = []

    def step(w, x, u):
        calls.append(1)
        return jnp.tanh(w * x) + u

    drives = jax.random.normal(jax.random.key(0), (50, 2))
    plain = lambda w: rollout(Dynamics(step, w), jnp.zeros(2), drives)

    @jax.jit
    def captured(w):
        # The weight is a tracer of the function outside.
        dynamics = Dynamics(lambda params, x, u: step(w, x, u))
        found = jax.jit(lambda u: solve(dynamics, jnp.zeros(2), u, solver=shooting(4)).states)
        return found(drives)

    weights = jnp.asarray([0.3, 0.8])
    with jax.checking_leaks():
        paths = jax.vmap(captured)(weights)
        slope = jax.grad(lambda w: captured(w).sum())(weights[0])
    apart = distance(paths, jax.vmap(plain)(weights))
    off = float(jnp.abs(slope / jax.grad(lambda w: plain(w).sum())(weights[0]) - 1))
    inside = lambda key: sample(key, TARGET, KERNEL, num_samples=10, progress=False).positions
    good, said = refused(TypeError, lambda: jax.jit(inside)(jax.random.key(0)))
    good &= max(apart, off) < 1e-10
    return (
        good,
        f"paths {apart:.0e} and derivative {off:.0e} from the loop's; sampling inside jit {said}",
    )


@fault(
    "a network whose weights are 1.5 times orthogonal, with kinks, half of its inputs masked and NaN there"
)
def _network(folder):
    weights = 1.5 * jnp.linalg.qr(jax.random.normal(jax.random.key(0), (8, 8)))[0]
    inputs = jax.random.normal(jax.random.key(1), (4096, 8))
    mask = jnp.arange(4096) % 4 < 2

    def cell(w, x, u):
        x = jnp.clip(jax.nn.relu(w @ x + u), 0, 5)
        return x, x

    dirty = jnp.where(mask[:, None], inputs, jnp.nan)
    last, outputs = unroll(cell, weights, jnp.ones(8), dirty, mask=mask)
    # 32 units in the last place of states up to 5. Such a network forgets nothing: rounding grows, so that it is judged step by step.
    seen = outputs[mask]
    before = jnp.concatenate([jnp.ones((1, 8)), seen[:-1]])
    wanted = jax.vmap(lambda x, u: cell(weights, x, u)[0])(before, inputs[mask])
    apart = max(
        distance(seen, wanted), distance(last, seen[-1]), float(jnp.abs(outputs[~mask]).max())
    )
    bound = 32 * 5 * float(np.finfo(np.float32).eps)
    return apart < bound, f"every step within {apart:.0e} of the cell's, masked outputs 0"


@fault("windows of 50 steps after warm-up: does anything still adapt?")
def _adapts(folder):
    target = Target(normal, jnp.zeros(2))
    options = {"num_samples": 400, "num_chains": 2, "progress": False, "solver": sequential()}
    warmup = sample(jax.random.key(0), target, mala, num_warmup=100, **options).warmup
    before = jax.tree.map(np.array, warmup.settings)
    whole, cut, once = (
        sample(jax.random.key(1), target, warmup, certificate=how, schedule=one, **options)
        for how, one in (
            (CertifyIndependently(), Windows(400)),
            (CertifyIndependently(), Windows(50)),
            (CertifyWhileRolling(), AllAtOnce()),
        )
    )
    apart = max(distance(one.positions, whole.positions) for one in (cut, once))
    kept = all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(cut.warmup.settings)))
    good = kept and apart < 1e-5 and all(map(certified, (whole, cut, once)))
    size = float(np.max(warmup.settings["step_size"]))
    return (
        good,
        f"draws {apart:.0e} from those of one window; step size {size:.3f} before and after",
    )


@fault("the installed BlackJAX, NumPyro and ArviZ: loop, kernels, containers")
def _libraries(folder):
    with jax.enable_x64(True):
        return _with_libraries()


def _with_libraries() -> tuple[bool, str]:
    import blackjax
    import numpyro

    algorithm = blackjax.mala(normal, 0.5)
    kernel = from_blackjax(algorithm)
    state, keys = algorithm.init(jnp.ones(2)), jax.random.split(jax.random.key(3), 200)
    loop = jax.lax.scan(lambda one, key: (algorithm.step(key, one)[0],) * 2, state, keys)[
        1
    ].position
    first = kernel.carry(kernel.init(jnp.ones(2)))
    tape = kernel.tape(jax.random.key(3), 200, kernel.init(jnp.ones(2)))
    path = solve(kernel.dynamics(), first, tape, solver=shooting(8)).or_raise().states
    apart = distance(jax.tree.leaves(path)[0], loop)
    mcmc = ParallelMCMC(
        CoalescingHMC(lambda: numpyro.sample("z", numpyro.distributions.Normal(0, 1))),
        num_warmup=50, num_samples=100, num_chains=2, progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(0))
    shape = to_arviz(mcmc.draws).posterior["z"].shape
    good = apart < 1e-10 and mcmc.get_samples()["z"].shape == (200,) and shape == (2, 100)
    names = ("blackjax", "numpyro", "arviz")
    return good, f"path {apart:.0e} from BlackJAX's loop; {', '.join(f'{name} {version(name)}' for name in names)}"  # fmt: skip


@fault("a log density that is random away from the start, on a mesh")
def _random_on_a_mesh(folder):
    found = []
    for noise in (0.3, 1e-5, 0.0):
        logdensity = _on_host(noise, 1.0)
        target, kernel = Target(logdensity, jnp.zeros(2)), random_walk(logdensity, 0.7)
        options = {"num_samples": 300, "num_chains": 2, "progress": False, "mesh": time_mesh()}
        draws = sample(jax.random.key(1), target, kernel, solver=sequential(), **options)
        found.append(list(np.asarray(draws.certificate.certified)))
    good = not any(found[0] + found[1]) and all(found[2])
    return (
        good,
        f"{sum(found[0] + found[1])} of 4 chains certified; without the noise {sum(found[2])} of 2",
    )


@fault("two threads that solve at once, with a Cholesky factor of 100 x 100 in every step")
def _threads(folder):
    def step(a, x, u):
        factor = jnp.linalg.cholesky(a + 0.01 * jnp.outer(x, x))
        return 0.5 * jax.scipy.linalg.solve_triangular(factor, x + u, lower=True)

    dynamics, drives = (
        Dynamics(step, 2 * jnp.eye(100)),
        jax.random.normal(jax.random.key(0), (64, 100)),
    )
    path = lambda: np.asarray(solve(dynamics, jnp.zeros(100), drives, solver=shooting(8)).states)
    truth, found = np.asarray(rollout(dynamics, jnp.zeros(100), drives)), []
    threads = [
        threading.Thread(target=lambda: found.extend(path() for _ in range(20)), daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    waits = any(thread.is_alive() for thread in threads)
    apart = max((float(np.abs(one - truth).max()) for one in found), default=np.inf)
    return not waits and len(found) == 40 and apart < 1e-4, f"{len(found)} of 40 solves ended, paths {apart:.0e} from the loop"  # fmt: skip


# --- stores -----------------------------------------------------------------------------------------------------------


def _chunks(path: Path) -> list[Path]:
    return sorted(path.glob("chunk-*.npz"))


def _swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@fault("two chunks of a store swapped")
def _swapped(folder):
    run(folder / "run")
    _swap(*_chunks(folder / "run")[1:3])
    return drawn_again(folder / "run")


@fault("a chunk of a store put in another's place, and an extra one")
def _duplicated(folder):
    run(folder / "run")
    chunks = _chunks(folder / "run")
    shutil.copy(chunks[1], chunks[2])
    shutil.copy(chunks[-1], folder / "run" / "chunk-000005-000000000576.npz")
    return drawn_again(folder / "run")


@fault("draws of a store swapped, one file cut short")
def _draws_swapped(folder):
    run(folder / "run")
    first, second, third, *_ = sorted((folder / "run/draws.zarr/posterior/x").glob("c.*"))
    _swap(first, second)
    third.write_bytes(third.read_bytes()[:-1])
    return drawn_again(folder / "run")


@fault("all draws and chunks of a store replaced by those of another run")
def _foreign(folder):
    run(folder / "run")
    sample(
        jax.random.key(6),
        TARGET,
        KERNEL,
        num_samples=_STEPS,
        num_chains=2,
        solver=sequential(),
        store=Store(folder / "other", chunk=_CHUNK),
        progress=False,
    )
    shutil.rmtree(folder / "run" / "draws.zarr")
    shutil.copytree(folder / "other" / "draws.zarr", folder / "run" / "draws.zarr")
    for chunk in _chunks(folder / "other"):
        shutil.copy(chunk, folder / "run")
    return drawn_again(folder / "run")


@fault("two runs in one store at once")
def _two(folder):
    from partime_mcmc.storage.store import Folder

    with Folder(folder / "run").locked():
        good, said = refused(StoreError, lambda: run(folder / "run"))
    return good and run(folder / "run").finished, said


@fault("a folder that may not be written")
def _read_only(folder):
    path = folder / "file"
    path.write_text("no folder")
    below = refused(StoreError, lambda: run(path / "run"))
    if os.geteuid() == 0:  # root writes everywhere but where there is no folder
        return below
    (folder / "closed").mkdir(mode=0o500)
    return refused(StoreError, lambda: run(folder / "closed" / "run"))


# --- processes ----------------------------------------------------------------------------------------------------------


def _process(path: Path, num_samples: int = _STEPS) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.faults", "--run", str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path])}
    return subprocess.Popen(
        [*command, str(num_samples)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


_ROOT = Path(__file__).resolve().parent.parent


def _begun(path: Path, process: subprocess.Popen) -> None:
    """Wait for the second chunk."""
    while len(_chunks(path)) < 2 and process.poll() is None:
        time.sleep(0.01)


def _ended_by(ending: int, folder: Path) -> tuple[bool, str]:
    process = _process(folder / "run", 200 * _CHUNK)
    _begun(folder / "run", process)
    process.send_signal(ending)
    process.communicate()
    left = open_draws(folder / "run").num_samples
    draws = resume(folder / "run", TARGET, KERNEL, progress=False).or_raise()
    whole = run(folder / "whole", num_samples=200 * _CHUNK)
    same = np.array_equal(draws.constrained["x"], whole.constrained["x"])
    good = same and 2 * _CHUNK <= left < 200 * _CHUNK
    return good, f"{left:,} draws kept; resumed draws {_same(same)}; exit code {process.returncode}"


@fault("SIGKILL while chunks are written")
def _killed(folder):
    return _ended_by(signal.SIGKILL, folder)


@fault("SIGTERM while chunks are written")
def _terminated(folder):
    good, said = _ended_by(signal.SIGTERM, folder)
    return good and said.endswith("exit code 0"), said


@fault("SIGSTOP for two seconds")
def _stopped(folder):
    process = _process(folder / "run")
    _begun(folder / "run", process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    process.communicate()
    same = np.array_equal(open_draws(folder / "run").constrained["x"], run().constrained["x"])
    return same, f"draws {_same(same)}"


@fault("the disk is full in the middle of a chunk")
def _full(folder):
    process = _process(folder / "run", 200 * _CHUNK)
    _begun(folder / "run", process)
    # As on a full disk a write stops short, here at a limit of the size of files (Linux).
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    text, _ = process.communicate()
    left = open_draws(folder / "run").num_samples
    draws = resume(folder / "run", TARGET, KERNEL, progress=False).or_raise()
    whole = run(folder / "whole", num_samples=200 * _CHUNK)
    same = np.array_equal(draws.constrained["x"], whole.constrained["x"])
    good = same and "StoreError" in text and 2 * _CHUNK <= left < 200 * _CHUNK
    return good, f"StoreError; {left:,} draws kept; resumed draws {_same(same)}"


@fault("ten times as many draws in a store: resident memory")
def _memory(folder):
    sizes = []
    for name, chunks in (("short", 50), ("long", 500)):
        text = str(_process(folder / name, chunks * _CHUNK).communicate()[0])
        sizes.append(int(text.split()[-1]) / 2**20)
    return sizes[1] < sizes[0] + 32, f"{sizes[0]:.0f} and {sizes[1]:.0f} MiB at most"


def tried(names: list[str]) -> list[dict]:
    """Try faults.

    Args:
        names: What to try.

    Returns:
        A row each: `fault`, `happened`, `good`, `seconds`.
    """
    rows = []
    for name in names:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            try:
                good, happened = FAULTS[name](Path(folder))
            except (
                Exception
            ) as error:  # an error that nobody expects is a fault that was not survived
                good, happened = (
                    False,
                    f"{type(error).__name__}: {str(error).splitlines()[0][:120]}",
                )
            happened = happened.replace(folder, "")
        seconds = time.perf_counter() - begin
        rows.append({"fault": name, "happened": happened, "good": good, "seconds": seconds})
        print(f"{'as it should be' if good else 'WRONG'} | {name} | {happened}", flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    lines = ["| fault tried | what happened | as it should be |", "|---|---|---|"]
    for row in rows:
        happened = row["happened"].replace("|", "\\|")
        lines.append(f"| {row['fault']} | {happened} | {'yes' if row['good'] else '**no**'} |")
    good = sum(row["good"] for row in rows)
    return "\n".join([*lines, "", f"{good} of {len(rows)} as it should be.", ""])


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if anything happened that should not have."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument(
        "--between", nargs=2, type=int, default=(0, len(FAULTS)), help="places in the table, from 0"
    )
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    if arguments.run:
        path, num_samples = arguments.run
        run(Path(path), num_samples=int(num_samples))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return 0
    stored = arguments.out / "faults-cpu.json"
    earlier = json.loads(stored.read_text())["rows"] if stored.exists() else []
    names = list(FAULTS)[slice(*arguments.between)]
    found = tried([name for name in names if arguments.only in name])
    by_name = {row["fault"]: row for row in (*earlier, *found)}
    rows = [by_name[name] for name in FAULTS if name in by_name]
    keep(stored, {"rows": rows}, table(rows))
    return int(not all(row["good"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
