"""A fixed set of runs, drawn again to the last bit: for changes of the code that must not change a draw.

    python -m benchmarks.reproduce record FILE.npz [GROUP ...]      before the change
    python -m benchmarks.reproduce compare FILE.npz [GROUP ...]     after it, on the same machine with the same versions

`record` writes every array that the runs give: draws, what kernels record of each step, certificates, reports without
their times, warm-ups, the states that runs end in. `compare` draws all of them again and names for every run the arrays
that are equal and, with the largest difference and the first index, those that are not; its exit status is 1 if one
differs or is gone, or a run fails. Arrays that are new are named and count as no difference.

Every group of runs is a process of its own, or two for the hosts, with the package that `python` finds: to record with another
checkout, run this file with the root of that checkout as PYTHONPATH. `record` of some groups replaces these in FILE. Most of
the time is compilation, so compiled programs are kept in the folder FILE.npz.programs, where a program that has not
changed is found again; remove the folder to compile everything anew.

Left out: runs that choose their solver by pilot chains and a cost model, which measures the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import functools
import importlib
import importlib.util
import inspect
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# --- names that differ between versions: the first one that a version has is taken

MODULES = (
    "partime_mcmc.numpyro",
    "partime_mcmc.mcmc.numpyro",
    "partime_mcmc.kernels",
    "partime_mcmc",
)
NAMES = {
    "Windows": ("Windows", "Stretches"),
    "WhileRolling": ("CertifyWhileRolling", "Recorded"),
    "Independently": ("CertifyIndependently", "Independent"),
    "Plain": ("CommonRandomNumbers", "PlainDice"),
    "Coalescing": ("MultishiftCoupling", "CoalescingDice"),
}
SAME = (
    *("Target", "Store", "ParallelMCMC", "CoalescingHMC", "HMC", "NUTS", "MALA", "BlackJAXKernel"),
    *("mala", "hmc", "nuts", "random_walk", "coalescing_hmc", "from_blackjax", "from_numpyro"),
    *(
        "sample",
        "resume",
        "open_draws",
        "shooting",
        "quasi_deer",
        "deer",
        "sequential",
        "Whitening",
    ),
    *("hosts", "time_mesh"),
)
COUPLING = ("coupling", "dice")
# Where the settings of the compiler are, which the package gives for its programs.
SETTINGS = ("partime_mcmc.compile_cache", "partime_mcmc.mcmc.programs")
# One name for each thing, wherever it stands in the name of an array.
FIELDS = {
    "end": "state",
    "failed_running": "num_failed_windows",
    "stretch": "max_window",
    "sample_stats": "info",
    "n_steps": "num_steps",
    "lp": "logdensity",
}
# The writer of a run on several hosts; None where there is no choice.
FIRST_HOST = "FirstHost"


def names() -> SimpleNamespace:
    """Everything that the runs use of the package, whatever this version calls it."""
    modules = [importlib.import_module(name) for name in MODULES if _exists(name)]

    def find(*candidates: str, default: Any = None) -> Any:
        for candidate in candidates:
            for module in modules:
                if hasattr(module, candidate):
                    return getattr(module, candidate)
        return default

    found = {name: find(name) for name in SAME} | {
        name: find(*both) for name, both in NAMES.items()
    }
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ImportError(f"partime_mcmc has no {', '.join(missing)} in {MODULES}")
    arguments = inspect.signature(found["mala"]).parameters
    coupling = next(name for name in COUPLING if name in arguments)
    first_host = find(FIRST_HOST)
    found["coupled"] = lambda value: {coupling: value()}
    found["writers"] = {} if first_host is None else {"writers": first_host()}
    return SimpleNamespace(**found)


def compile_quickly() -> None:
    """Leave it to XLA_FLAGS how hard the compiler tries."""
    module = next(name for name in SETTINGS if _exists(name))
    importlib.import_module(module).CPU_OPTIONS.clear()


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# --- from a result to its arrays

_LEFT_OUT = ("seconds", "kernel", "notes")


def arrays_of(value: Any, name: str = "") -> dict[str, np.ndarray]:
    """All arrays and numbers of a result, by their paths; times, kernels and texts are left out.

    Args:
        value: Dataclasses, mappings, sequences, data sets and arrays, however nested.
        name: The path of the value itself.
    """
    if hasattr(value, "data_vars"):
        value = {key: one.values for key, one in value.data_vars.items()}
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    elif isinstance(value, (list, tuple)):
        if value and all(isinstance(one, str) for one in value):
            return {f"{name}.count": np.asarray(len(value))}
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        found = {}
        for key, one in value.items():
            if not str(key).startswith(_LEFT_OUT):
                key = FIELDS.get(key, key)
                found |= arrays_of(one, f"{name}.{key}" if name else str(key))
        return found
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, str) or callable(value):
        return {}
    import jax

    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return {name: np.asarray(value)}


def parts_of(value: Any, wanted: str) -> dict[str, np.ndarray]:
    """The arrays of those attributes, of the wanted ones, that a result has."""
    parts = {name: getattr(value, name) for name in wanted.split() if hasattr(value, name)}
    return arrays_of(parts)


def of_draws(draws: Any) -> dict[str, np.ndarray]:
    """The arrays of draws in memory."""
    return parts_of(draws, "positions constrained info certificate report warmup end state")


def of_stored(draws: Any) -> dict[str, np.ndarray]:
    """The arrays of draws on disk."""
    found = parts_of(draws, "posterior sample_stats info certificate report")
    rows = (draws if hasattr(draws, "summary") else draws.running).summary()
    columns = {name: np.asarray([row[name] for row in rows]) for name in rows[0] if name != "name"}
    return found | arrays_of(columns, "summary")


def of_mcmc(mcmc: Any) -> dict[str, np.ndarray]:
    """The arrays of a `ParallelMCMC`."""
    collected = {
        "samples": mcmc.get_samples(group_by_chain=True),
        "fields": mcmc.get_extra_fields(group_by_chain=True),
        "last_state": mcmc.last_state,
        "warmed": mcmc.warmed,
    }
    stored = hasattr(mcmc.draws, "thinning")
    kept = {
        f"draws.{name}": one
        for name, one in (of_stored if stored else of_draws)(mcmc.draws).items()
    }
    return arrays_of(collected) | kept


# --- what is sampled

Run = tuple[str, Callable[[], dict[str, np.ndarray]]]
_QUIET = {"progress": False}


def quartic(n: SimpleNamespace) -> Any:
    """A correlated, light-tailed density in three dimensions; a parameter is captured, and two values are reported."""
    import jax
    import jax.numpy as jnp

    precision = np.array([[1.5, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 2.0]])
    return n.Target(
        lambda x: -0.5 * x @ jnp.asarray(precision, x.dtype) @ x - 0.1 * jnp.sum(x**4),
        lambda key: jax.random.normal(key, (3,)),
        constrain=lambda x: {"place": jnp.exp(x), "size": x @ x},
    )


def banana(n: SimpleNamespace) -> Any:
    """A bent density on which long trajectories forget slowly."""
    import jax

    return n.Target(
        lambda x: -0.005 * x[0] ** 2 - 0.5 * (x[1] - 0.03 * (x[0] ** 2 - 100.0)) ** 2,
        lambda key: jax.random.uniform(key, (2,), minval=-2.0, maxval=2.0),
    )


_X = np.linspace(-1, 1, 12)
_Y = 1.0 + 2.0 * _X + 0.3 * np.cos(9 * _X)


def line(x, y=None):
    """A regression with a constrained and a deterministic site."""
    import numpyro
    import numpyro.distributions as dist

    slope = numpyro.sample("slope", dist.Normal(0, 5))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    level = numpyro.deterministic("level", 0.5 * slope + 1.0)
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Normal(level + slope * (x - 0.5), noise), obs=y)


# --- the runs, by group


def in_memory(n: SimpleNamespace, folder: Path) -> Iterator[Run]:
    """Every builder, warmed up with the default solver; tuned kernels with explicit ones; runs that fall back."""
    import blackjax
    import jax
    import jax.numpy as jnp

    target, bent = quartic(n), banana(n)
    solvers = {
        "shooting": n.shooting(num_segments=64),
        "quasi_deer": n.quasi_deer(),
        "deer": n.deer(),
        "sequential": n.sequential(),
    }
    rolling, apart = n.WhileRolling(), n.Independently()

    def drawn(target: Any, kernel: Any, **options: Any) -> Any:
        given = {"num_samples": 600, "num_warmup": 100, **_QUIET} | options
        return n.sample(jax.random.key(0), target, kernel, **given)

    def explicit(solver: str, target: Any, kernel: Any, **options: Any) -> dict[str, np.ndarray]:
        given = {"solver": solvers[solver], "schedule": n.Windows(512)} | options
        return of_draws(drawn(target, kernel, **given))

    for name in ("mala", "hmc", "nuts", "random_walk", "coalescing_hmc"):
        warmed = functools.cache(functools.partial(drawn, target, getattr(n, name)))
        yield f"{name} default", lambda warmed=warmed: of_draws(warmed())
    # The last of them goes on from its warm-up.
    yield "coalescing_hmc shooting", lambda: explicit("shooting", target, warmed().warmup)

    zero = jnp.zeros(3)
    unit = n.Whitening.of_covariance(zero, zero, jnp.eye(3))
    plain, coalescing = n.coupled(n.Plain), n.coupled(n.Coalescing)
    mala = n.mala(target.logdensity, 0.4, **plain)
    for solver in solvers:
        yield f"mala {solver}", functools.partial(explicit, solver, target, mala)
    yield "mala no draws", lambda: explicit("shooting", target, mala, num_samples=0)
    for name, kernel, options in (
        ("mala coalescing", n.mala(target.logdensity, 0.4, **coalescing), {}),
        ("hmc", n.hmc(target.logdensity, 0.4, unit, 3, **plain), {"certificate": apart}),
        ("hmc coalescing", n.hmc(target.logdensity, 0.4, unit, 3, **coalescing), {}),
        ("nuts", n.nuts(target.logdensity, 0.4, unit), {"num_chains": 1}),
        ("random_walk coalescing", n.random_walk(target.logdensity, 0.5, **coalescing), {}),
        ("from_blackjax", n.from_blackjax(blackjax.mala(target.logdensity, 0.3)), {}),
    ):
        yield f"{name} shooting", functools.partial(explicit, "shooting", target, kernel, **options)
    long = n.hmc(bent.logdensity, 0.9, jnp.ones(2), 20)
    yield "banana shooting", lambda: explicit("shooting", bent, long, certificate=rolling)
    yield "banana quasi_deer", lambda: explicit("quasi_deer", bent, long, max_iterations=3)

    def from_numpyro() -> dict[str, np.ndarray]:
        model = n.from_numpyro(line, _X, y=_Y, key=jax.random.key(6))
        return of_draws(drawn(model, n.coalescing_hmc, num_chains=1))

    yield "from_numpyro default", from_numpyro


def parallel_mcmc(n: SimpleNamespace, folder: Path) -> Iterator[Run]:
    """`ParallelMCMC`: default, warmed up apart, run twice, thinned, with fields, from given starts, one chain and four."""
    import blackjax
    import jax

    key = jax.random.key(1)
    fields = ("potential_energy", "num_steps", "accept_prob", "z.noise", "adapt_state.step_size")
    starts = {"slope": np.linspace(-1, 1, 4), "noise": np.linspace(0, 1, 4)}

    def chains(kernel: Any, num_chains: int = 4, **options: Any) -> Any:
        counts = {"num_warmup": 200, "num_samples": 200, "num_chains": num_chains}
        return n.ParallelMCMC(kernel, **counts, **options, progress_bar=False)

    def once(make: Callable, extra: tuple = (), init: Any = None, **options: Any) -> dict:
        mcmc = chains(make(), **options)
        mcmc.run(key, _X, y=_Y, extra_fields=extra, init_params=init)
        return of_mcmc(mcmc)

    def twice(make: Callable, **options: Any) -> dict[str, np.ndarray]:
        mcmc = chains(make(), **options)
        mcmc.warmup(key, _X, y=_Y)
        found = {f"warmup.{name}": one for name, one in arrays_of(mcmc.last_state).items()}
        for which in ("first", "second"):
            mcmc.run(mcmc.post_warmup_state.rng_key, _X, y=_Y, extra_fields=fields)
            found |= {f"{which}.{name}": one for name, one in of_mcmc(mcmc).items()}
            mcmc.post_warmup_state = mcmc.last_state
        return found

    def step(logdensity: Callable, step_size: Any) -> Any:
        return blackjax.mala(logdensity, step_size)

    ours = functools.partial(n.CoalescingHMC, line)
    mala = functools.partial(n.MALA, line)
    yield "CoalescingHMC twice", lambda: twice(ours)
    yield "NUTS twice", lambda: twice(lambda: n.NUTS(line, dense_mass=False))
    yield "CoalescingHMC", lambda: once(ours)
    yield "HMC starts", lambda: once(lambda: n.HMC(line), init=starts)
    yield "MALA one chain thinned", lambda: once(mala, fields, num_chains=1, thinning=3)
    walked = {"solver": n.sequential(), "certificate": n.Independently()}
    yield "BlackJAXKernel", lambda: once(lambda: n.BlackJAXKernel(step, line), **walked)


def _kept(n: SimpleNamespace, folder: Path) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """A function that draws a run on disk in chunks of 128 steps, and what it samples with which kernel."""
    import jax

    target = quartic(n)
    kernel = n.mala(target.logdensity, 0.4)

    def draw(name: str, num_samples: int = 900, **options: Any) -> Any:
        store = n.Store(folder / name, chunk=128)
        given = {"num_chains": 2, "solver": n.shooting(num_segments=16), "store": store, **_QUIET}
        key = jax.random.key(2)
        return n.sample(key, target, kernel, num_samples=num_samples, **given, **options)

    return draw, (target, kernel)


_LONG = {"num_samples": 128 * 100, "thinning": 7}


def to_be_killed(n: SimpleNamespace, folder: Path) -> Iterator[Run]:
    """What `stored` kills."""
    yield "long", lambda: of_stored(_kept(n, folder)[0]("killed", **_LONG))


def stored(n: SimpleNamespace, folder: Path) -> Iterator[Run]:
    """On disk: thinned or not, from a builder, killed and resumed, and by `ParallelMCMC`."""
    import jax

    kept, what = _kept(n, folder)
    yield "every draw", lambda: of_stored(kept("every"))
    yield "every third", lambda: of_stored(kept("third", thinning=3))

    def killed() -> dict[str, np.ndarray]:
        process = start(KILLED, folder, os.environ["JAX_COMPILATION_CACHE_DIR"])
        while _steps_in(n, folder / "killed") < 2 * 128:
            if process.poll() is not None:
                raise RuntimeError("the run to be killed ended before it had two chunks")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if _steps_in(n, folder / "killed") == _LONG["num_samples"]:
            raise RuntimeError("the run to be killed had ended before it was killed")
        return of_stored(n.resume(folder / "killed", *what, **_QUIET))

    def mcmc(name: str, make: Callable, thinning: int) -> dict[str, np.ndarray]:
        options = {"num_warmup": 200, "num_samples": 500, "num_chains": 2, "thinning": thinning}
        found = n.ParallelMCMC(make(line), **options, progress_bar=False)
        found.run(jax.random.key(4), _X, y=_Y, store=n.Store(folder / name, chunk=128))
        return of_mcmc(found)

    yield "killed", killed
    yield "MALA", lambda: mcmc("mala", n.MALA, 1)
    yield "CoalescingHMC thinned", lambda: mcmc("coalescing", n.CoalescingHMC, 3)


def _steps_in(n: SimpleNamespace, path: Path) -> int:
    """Steps of a stored run that are safe so far."""
    try:
        return n.open_draws(path).num_samples
    except (FileNotFoundError, ValueError, RuntimeError, OSError):
        # There is no run yet, or a file of it is being replaced.
        return 0


def _across(n: SimpleNamespace, folder: Path, mesh: Any, **store: Any) -> Iterator[Run]:
    """Chains in memory and on disk over a mesh."""
    import jax

    target = quartic(n)
    options = {"num_samples": 515, "num_chains": 2, "mesh": mesh, **_QUIET}
    name = "x".join(str(mesh.shape[axis]) for axis in ("chains", "time"))
    coalescing = n.mala(target.logdensity, 0.4, **n.coupled(n.Coalescing))
    plain = n.mala(target.logdensity, 0.4)
    key = jax.random.key(5)
    narrow = {"schedule": n.Windows(256), **options}
    yield f"{name} coalescing", lambda: of_draws(n.sample(key, target, coalescing, **narrow))
    kept = {"thinning": 3, "store": n.Store(folder / name, chunk=128, **store)}
    yield f"{name} stored", lambda: of_stored(n.sample(key, target, plain, **kept, **options))


def mesh(n: SimpleNamespace, folder: Path) -> Iterator[Run]:
    """Eight devices of one host: all of them along time, and four along time for each of two groups of chains."""
    yield from _across(n, folder, n.time_mesh(8, 1))
    yield from _across(n, folder, n.time_mesh(4, 2))


def two_hosts(n: SimpleNamespace, folder: Path) -> Iterator[Run]:
    """Two hosts with a device each."""
    yield from _across(n, folder, n.time_mesh(), **n.writers)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that share a process, or `num_hosts` of them.

    Attributes:
        runs: The runs, in the order in which they are drawn.
        double: Whether in float64.
        optimised: Whether machine code is optimised as it is for users; elsewhere it takes too long.
        some: The names of the runs, where not all of them are drawn.
        num_devices: Devices of the host's processor.
        num_hosts: Processes that make the runs together.
    """

    runs: Callable[[SimpleNamespace, Path], Iterator[Run]]
    double: bool = True
    optimised: bool = False
    some: tuple[str, ...] = ()
    num_devices: int = 1
    num_hosts: int = 1


_SINGLE = ("coalescing_hmc default", "mala shooting", "hmc coalescing shooting", "banana shooting")
_OPTIMISED = ("mala shooting", "hmc shooting", "mala coalescing shooting")
GROUPS = {
    "float64": Group(in_memory),
    "float32": Group(in_memory, double=False, some=_SINGLE),
    "optimised": Group(in_memory, optimised=True, some=_OPTIMISED),
    "numpyro": Group(parallel_mcmc),
    "stored": Group(stored),
    "mesh": Group(mesh, num_devices=8),
    "hosts": Group(two_hosts, num_hosts=2),
}
KILLED = "to be killed"


def _group(name: str) -> Group:
    return Group(to_be_killed) if name == KILLED else GROUPS[name]


# --- one process of a group


def draw(name: str, folder: Path, host: int, port: int) -> int:
    """Draw the runs of a group and write their arrays into a folder, as one of its hosts.

    Returns:
        The exit status: 1 if a run failed; the arrays of the others are there.
    """
    import jax

    group = _group(name)
    n, found, failed = names(), {}, False
    if not group.optimised:
        compile_quickly()
    together = contextlib.nullcontext()
    if group.num_hosts > 1:
        together = n.hosts(f"127.0.0.1:{port}", group.num_hosts, host)
    with together, jax.enable_x64(group.double):
        for run, make in group.runs(n, folder):
            if group.some and run not in group.some:
                continue
            begin = time.perf_counter()
            try:
                found |= {f"{run}/{array}": value for array, value in make().items()}
            except Exception:
                # A host that went on alone would wait for the others forever.
                if group.num_hosts > 1:
                    raise
                traceback.print_exc()
                failed = True
            if host == 0:
                print(f"{name}: {run}: {time.perf_counter() - begin:.1f} s", flush=True)
    np.savez(folder / f"arrays-{host}.npz", **found)
    return int(failed)


def start(name: str, folder: Path, programs: str, host: int = 0, port: int = 0) -> subprocess.Popen:
    """Start a process of a group, with the package that this one finds and a folder of compiled programs."""
    group = _group(name)
    root = Path(importlib.util.find_spec("partime_mcmc").origin).parents[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(root),
        # The folder of this file holds modules with common names.
        "PYTHONSAFEPATH": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={group.num_devices}"
        + ("" if group.optimised else " --xla_backend_optimization_level=0"),
    }
    command = [sys.executable, __file__, "draw", name, str(folder), str(host), str(port)]
    return subprocess.Popen(command, env=environment)


# --- recording and comparing


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def drawn(groups: list[str], programs: str) -> tuple[dict[str, np.ndarray], bool]:
    """The arrays of groups by `group/run/array`, and whether all runs went through.

    Args:
        groups: Their names.
        programs: A folder of compiled programs.
    """
    found, fine = {}, True
    for name in groups:
        num_hosts = GROUPS[name].num_hosts
        port = _free_port()
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                start(name, Path(folder), programs, host, port) for host in range(num_hosts)
            ]
            codes = [process.wait() for process in processes]
            fine &= not any(codes)
            for host in range(num_hosts):
                stored = Path(folder) / f"arrays-{host}.npz"
                group = name if num_hosts == 1 else f"{name} {host}"
                if stored.exists():
                    with np.load(stored) as arrays:
                        found |= {f"{group}/{array}": arrays[array] for array in arrays}
    return found, fine


def difference(before: np.ndarray, now: np.ndarray) -> str:
    """How two arrays differ, in words; empty if every bit is the same."""
    if (before.dtype, before.shape) != (now.dtype, now.shape):
        return f"{before.dtype}{before.shape} before, {now.dtype}{now.shape} now"
    flat = [np.ascontiguousarray(one).reshape(-1) for one in (before, now)]
    bits = [one.view(np.uint8).reshape(one.size, one.itemsize) for one in flat]
    apart = np.flatnonzero((bits[0] != bits[1]).any(axis=1))
    if not apart.size:
        return ""
    a, b = (one[apart].astype(np.float64) for one in flat)
    largest = np.max(np.nan_to_num(np.abs(a - b), nan=np.inf))
    first = tuple(int(i) for i in np.unravel_index(apart[0], before.shape))
    return (
        f"{apart.size} of {before.size} entries differ, by {largest:.3g} at most, first at {first}: "
        f"{flat[0][apart[0]]!r} before, {flat[1][apart[0]]!r} now"
    )


def compared(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> bool:
    """Print run by run what is equal and what is not; whether all that was recorded is equal."""
    by_run: dict[str, list[str]] = {}
    for name in [*before, *(name for name in now if name not in before)]:
        run, _, array = name.rpartition("/")
        by_run.setdefault(run, []).append(array)
    num_different = 0
    for run, arrays in by_run.items():
        equal, lines = [], []
        for array in arrays:
            name = f"{run}/{array}"
            if name not in now:
                lines.append(f"  NOT EQUAL {array}: recorded, and gone now")
            elif name not in before:
                lines.append(f"  new {array}: not recorded")
            elif words := difference(before[name], now[name]):
                lines.append(f"  NOT EQUAL {array}: {words}")
            else:
                equal.append(array)
        different = sum("NOT EQUAL" in one for one in lines)
        num_different += different
        print(f"{run}: {'NOT EQUAL' if different else 'equal'}")
        print("\n".join([*lines, f"  equal ({len(equal)}): {', '.join(equal)}"]))
    print(f"{len(before)} arrays of {len(by_run)} runs: {num_different} not equal")
    return not num_different


def about() -> str:
    """What bits depend on besides the code."""
    from importlib.metadata import version

    versions = [
        f"{name} {version(name)}" for name in ("jax", "jaxlib", "numpy", "blackjax", "numpyro")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([f"Python {sys.version.split()[0]}", *versions, f"{cores} cores"])


def command_line(argv: list[str] | None = None) -> int:
    """Record or compare; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    given = parser.parse_args(argv)
    if unknown := set(given.groups) - set(GROUPS):
        parser.error(f"GROUP: got {sorted(unknown)}, wanted some of {list(GROUPS)}")
    groups = given.groups or list(GROUPS)
    print(f"partime_mcmc of {importlib.util.find_spec('partime_mcmc').origin}; {about()}")
    kept: dict[str, np.ndarray] = {}
    if given.action == "compare" or given.file.exists():
        with np.load(given.file) as arrays:
            kept = {name: arrays[name] for name in arrays}
    recorded_with = str(kept.pop("about", about()))
    if recorded_with != about():
        print(f"recorded with other versions or cores: {recorded_with}")
    mine = [name for name in kept if name.split("/")[0].split()[0] in groups]
    now, fine = drawn(groups, f"{given.file.absolute()}.programs")
    if given.action == "compare":
        return int(not (compared({name: kept[name] for name in mine}, now) and fine))
    kept = {name: one for name, one in kept.items() if name not in mine}
    np.savez_compressed(given.file, about=np.asarray(about()), **kept, **now)
    print(f"{len(now)} arrays recorded in {given.file}")
    return int(not fine)


if __name__ == "__main__":
    if sys.argv[1:2] == ["draw"]:
        name, folder, host, port = sys.argv[2:]
        sys.exit(draw(name, Path(folder), int(host), int(port)))
    sys.exit(command_line())
