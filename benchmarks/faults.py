"""Faults tried and what happened: `python -m benchmarks.faults --out DIR`.

Each fault is brought about anew, in a small run, and what should happen is known: a number that is certified, an error that names
its cause, or draws that are those of a run to which nothing happened, bit for bit. A row says what was tried, what happened
and whether that is what should have; the command ends with 1 if anything else did. Runs that are killed, that write to a
full disk or that stand still are processes of their own. Rows of earlier runs that are not tried again stay.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import OUT, keep
from partime_mcmc import (
    Dynamics,
    Store,
    Target,
    certify,
    deer,
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
)
from partime_mcmc.diagnostics.arviz import read_draws, save_netcdf
from partime_mcmc.diagnostics.checks import NonDeterministicTarget
from partime_mcmc.storage.files import StoreError
from partime_mcmc.validation import InvalidStart

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
        call = lambda: sample(jax.random.key(0), mixed, mala, num_samples=20, progress=False)
        good, said = refused(InvalidStart, call)
    return good and kind == np.float64, f"draws are {kind}; {said}"


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
