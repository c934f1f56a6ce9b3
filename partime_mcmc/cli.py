"""The command line: `partime-mcmc COMMAND`, or `python -m partime_mcmc COMMAND`.

Exit codes: 0, the chains are certified and, where two runs are compared, agree. 1, they are not, or do not. 2, arguments,
files or a model that cannot work: one sentence on standard error says why, and --traceback shows where. 3, the chains are
certified, and the verdict on them is NOT CONVERGED; or pairs of chains do not meet, so that nothing is bounded. As for other programs: 130 after an interrupt, which SIGTERM is, too. What is in a store is safe.

MODEL is a NumPyro model, a `Target`, or a function that returns a `Target` or `(logdensity, initial)`; data are its
keyword arguments by name. Loading a file runs it. JAX is switched to float64 when asked to, and for built-in models
that need it; nothing else in the package does that.
"""

import argparse
import contextlib
import inspect
import json
import os
import runpy
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import partime_mcmc
from partime_mcmc import StoredDraws, Target, hosts, open_draws, time_mesh
from partime_mcmc.diagnostics import describe, mixing, plots
from partime_mcmc.diagnostics.arviz import read_draws, save_netcdf
from partime_mcmc.diagnostics.report import Level, Report
from partime_mcmc.diagnostics.values import as_coordinates, flat
from partime_mcmc.diagnostics.verdict import Outcome
from partime_mcmc.models import MODELS
from partime_mcmc.numpyro.loop import nuts_positions
from partime_mcmc.numpyro.model import called
from partime_mcmc.sampling.memory import DEFAULT_WINDOW, default_max_bytes
from partime_mcmc.sampling.pilots import coupled_distances, solve_by_pass
from partime_mcmc.sampling.sample import termination_interrupts
from partime_mcmc.storage.store import Folder
from partime_mcmc.types import Key
from partime_mcmc.validation import check_count

_GOOD, _BAD, _WRONG_ARGUMENTS, _NOT_CONVERGED, _INTERRUPTED = 0, 1, 2, 3, 130
_KERNELS = ("coalescing_hmc", "hmc", "mala", "nuts", "random_walk")
_SOLVERS = ("sequential", "shooting", "deer", "quasi_deer", "elk", "quasi_elk", "picard", "jacobi")
_LEVELS = ("statistical", "certified-path", "bitwise")
_COPIES = 4  # a comparison, or a file that is written, copies draws on its way


def _path(text: str) -> Path:
    """A path, if the text can be one: Python takes an empty one for the folder in which the program runs."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a path")
    return Path(text)


def _seed(text: str) -> int:
    """A seed of JAX's: of larger numbers and negative ones it would keep 32 bits and say nothing."""
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(
            f"got {text[:40]!r}, wanted an integer from 0 to {2**32 - 1}"
        )
    return seed


_FLAG, _DEFAULT = {"action": "store_true"}, "default: %(default)s"
_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"metavar": "FILE.py:MODEL", "help": f"or a built-in model: {', '.join(MODELS)}"},
    "run": {"type": _path, "metavar": "RUN", "help": "a store, or a NetCDF file"},
    "other": {"type": _path, "metavar": "OTHER", "help": "likewise; the sequential run"},
    "--model": {"choices": sorted(MODELS), "default": "eight_schools", "help": _DEFAULT},
    "--data": {"type": _path, "help": "a file .npz or .json with the model's arguments by name"},
    "--kernel": {"choices": _KERNELS, "default": "coalescing_hmc", "help": _DEFAULT},
    "--num-samples": {"type": int, "default": 4096, "help": f"per chain; {_DEFAULT}"},
    "--num-chains": {"type": int, "default": 4, "help": _DEFAULT},
    "--num-pairs": {"type": int, "default": 256, "help": f"pairs of chains; {_DEFAULT}"},
    "--num-warmup": {"type": int, "default": 1000, "help": f"at most; {_DEFAULT}"},
    "--solver": {"choices": _SOLVERS, "help": "default: the library's own choice"},
    "--seed": {"type": _seed, "default": 0, "help": _DEFAULT},
    "--float64": _FLAG | {"help": "sample in double precision"},
    "--independent": _FLAG | {"help": "certify by evaluating every step once more"},
    "--compare": _FLAG | {"help": "also sample one step after another, and compare"},
    "--store": {"type": _path, "help": "a folder for draws as they come; memory stays bounded"},
    "--thinning": {"type": int, "default": 1, "help": "keep every K-th draw in a store"},
    "--out": {"type": _path, "help": "write draws to this file .nc for ArviZ (demo: a folder)"},
    "--report": {"type": _path, "help": "write a page .html with table and figures"},
    "--quiet": _FLAG | {"help": "no progress"},
    "--json": _FLAG | {"help": "print JSON"},
    "--at-least": {"choices": _LEVELS, "help": "what counts as agreement"},
    "--traceback": _FLAG | {"help": "show where an error came from"},
    "--all-devices": _FLAG | {"help": "spread the chains over all devices of this machine"},
    "--coordinator": {"metavar": "HOST:PORT", "help": "of host 0; the same command on every host"},
    "--num-hosts": {"type": int, "help": "how many processes"},
    "--host-id": {"type": int, "help": "which of them this is, from 0"},
    "--cluster": _FLAG | {"help": "hosts of Slurm, Open MPI, Kubernetes, TPUs; srun needs no flag"},
    "--alone": _FLAG | {"help": "not one run with the other tasks of srun or mpirun"},
}
_CHAINS = "--num-samples --num-chains --num-warmup --solver --seed"
_MODEL = "model --data --kernel --float64 --quiet --report"
_DEVICES = "--all-devices --coordinator --num-hosts --host-id --cluster --alone"


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return _WRONG_ARGUMENTS
    try:
        with termination_interrupts(), warnings.catch_warnings():
            warnings.showwarning = lambda text, *rest: print(f"warning: {text}", file=sys.stderr)
            return arguments.command(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BaseException as error:  # a user's model may raise anything, and may end the program
        if arguments.traceback:
            raise
        print(f"partime_mcmc: {_sentence(error)}", file=sys.stderr)
        return _WRONG_ARGUMENTS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "partime-mcmc", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command=None, quiet=False, float64=False, thinning=1)
    commands = parser.add_subparsers(metavar="COMMAND")
    for command, options in {
        _demo: f"--model --kernel {_CHAINS} --out",
        _sample: f"{_MODEL} {_CHAINS} --store --thinning --independent --compare --out {_DEVICES}",
        _resume: f"run {_MODEL} {_DEVICES}",
        _summary: "run --json --report",
        _compare: "run other --at-least --json",
        _convergence: "model --data --kernel --float64 --quiet --num-warmup --num-pairs --seed",
    }.items():
        text = inspect.getdoc(command)
        added = commands.add_parser(command.__name__[1:], help=text, description=text)
        for name in [*options.split(), "--traceback"]:
            added.add_argument(name, **_OPTIONS[name])
        added.set_defaults(command=command)
    commands.choices["demo"].set_defaults(
        kernel="coalescing_hmc",
        data=None,
        store=None,
        out=Path("partime_demo"),
        independent=True,
        compare=True,
    )
    commands.choices["resume"].set_defaults(out=None, solver="shooting")
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    """Sample a built-in model both ways, prove that the chains are the same, and say what NUTS gives in its time."""
    key = jax.random.key(arguments.seed)
    target = _load_target(arguments, key)
    folder = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    draws = _draw(arguments, key, target)
    seconds = time.perf_counter() - begin
    print(describe.run_text(draws))
    sequential, report = _compare_ways(arguments, key, target, draws)
    _compare_with_nuts(arguments, key, target, draws, seconds)
    save_netcdf(draws, folder / "draws.nc")
    (folder / "report.json").write_text(report.to_json())
    try:
        plots.path_overlay(draws, sequential).savefig(folder / "demo.png", dpi=150)
    except plots.NoPlots as error:
        print(f"no figure: {error}")
    print("written:", *sorted(map(str, folder.iterdir())))
    return _GOOD if report.ok else _BAD


def _sample(arguments: argparse.Namespace) -> int:
    """Sample a model of your own, in memory or to a store."""
    _check_files(arguments)
    if arguments.store is not None and arguments.compare:
        raise ValueError("--compare: got --store with it; `compare` takes two runs on disk")
    if arguments.store is not None and (arguments.store / "run.json").exists():
        raise ValueError(f"--store: {arguments.store} holds a run; `resume` goes on with it")
    with machines(arguments) as mesh:
        key = jax.random.key(arguments.seed)
        target = _load_target(arguments, key)
        draws = _draw(arguments, key, target, mesh)
        code = _finish(arguments, key, draws)
        if not arguments.compare or code == _INTERRUPTED:
            return code
        _, report = _compare_ways(arguments, key, target, draws, mesh)
        return code if report.ok else _BAD


def _resume(arguments: argparse.Namespace) -> int:
    """Go on with the run in a store; model, data, kernel and precision are those of its beginning."""
    _check_files(arguments)
    with machines(arguments) as mesh:
        run = Folder(arguments.run).read_run()
        key = jax.random.wrap_key_data(
            jax.numpy.asarray(run["key_words"], jax.numpy.uint32), impl=run["key_impl"]
        )
        target, kernel = _load_target(arguments, key), getattr(partime_mcmc, arguments.kernel)
        draws = partime_mcmc.resume(
            arguments.run, target, kernel, mesh=mesh, progress=not arguments.quiet
        )
        return _finish(arguments, key, draws)


def _summary(arguments: argparse.Namespace) -> int:
    """Show what a store or a file of draws holds; its model is not needed."""
    _check_files(arguments)
    run = _open_run(arguments.run)
    print(describe.run_json(run) if arguments.json else describe.run_text(run))
    if arguments.report is not None:
        describe.save_page(arguments.report, run, str(arguments.run))
    return _code_of(run)


def _compare(arguments: argparse.Namespace) -> int:
    """Compare two runs: as paths if they share their random numbers, in distribution otherwise."""
    first, second = (_loaded(_open_run(path)) for path in (arguments.run, arguments.other))
    report = partime_mcmc.compare(first, second)
    print(report.to_json() if arguments.json else report)
    default = "statistical" if report.path is None else "certified-path"
    wanted = Level[(arguments.at_least or default).upper().replace("-", "_")]
    return _GOOD if report.level >= wanted else _BAD


def _convergence(arguments: argparse.Namespace) -> int:
    """Bound how far a tuned kernel's chains are from the posterior after so many steps, by pairs of chains that meet."""
    key = jax.random.key(arguments.seed)
    target, builder = _load_target(arguments, key), getattr(partime_mcmc, arguments.kernel)
    warmup = partime_mcmc.sample(
        key,
        target,
        builder,
        num_samples=0,
        num_warmup=arguments.num_warmup,
        progress=not arguments.quiet,
    ).warmup
    print(warmup)
    bounds = partime_mcmc.convergence(
        jax.random.fold_in(key, 1), target, warmup, num_pairs=arguments.num_pairs
    )
    print(bounds)
    return _NOT_CONVERGED if bounds.num_unmet else _GOOD


def started_together(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks that `srun` or `mpirun` started with one command.

    Args:
        environment: Of the process. `SLURM_NTASKS` does not count: a batch script has it, too, and is one process.
    """
    counts = map(environment.get, ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(count is not None and count.isdigit() and int(count) > 1 for count in counts)


@contextlib.contextmanager
def machines(arguments: argparse.Namespace) -> Iterator[jax.sharding.Mesh | None]:
    """The devices that the options mean, hosts joined; None is the default device alone."""
    given = arguments.coordinator, arguments.num_hosts, arguments.host_id
    by_hand = given != (None, None, None)
    if arguments.alone + arguments.cluster + by_hand > 1:
        raise ValueError(
            "--alone, --cluster, --coordinator with --num-hosts and --host-id: got more than one of these three, wanted "
            "at most one"
        )
    if not (arguments.cluster or by_hand) and (arguments.alone or not started_together(os.environ)):
        yield time_mesh() if arguments.all_devices else None
        return
    with hosts(*given), contextlib.redirect_stdout(None if jax.process_index() else sys.stdout):
        yield time_mesh()


def _check_files(arguments: argparse.Namespace) -> None:
    """Refuse files to write before anything is loaded."""
    for option, suffix in (("out", ".nc"), ("report", ".html")):
        path = getattr(arguments, option, None)
        if path is not None and (path.suffix != suffix or not path.parent.is_dir()):
            raise ValueError(
                f"--{option}: got {path}, wanted a file that ends in {suffix}, in a folder that exists"
            )


def _draw(arguments: Any, key: Key, target: Target, mesh: Any = None, **options: Any) -> Any:
    print(
        f"{arguments.model}: {arguments.num_chains} chains of {arguments.num_samples} draws with {arguments.kernel}, "
        f"{jax.dtypes.canonicalize_dtype(float)}, on {1 if mesh is None else mesh.size} "
        f"{jax.devices()[0].platform} device(s)",
        flush=True,
    )
    given = {
        "num_samples": arguments.num_samples,
        "num_chains": arguments.num_chains,
        "num_warmup": arguments.num_warmup,
        "thinning": arguments.thinning,
        "store": arguments.store,
        "kernel": getattr(partime_mcmc, arguments.kernel),
        "solver": arguments.solver and getattr(partime_mcmc, arguments.solver)(),
        # The usual one; said where ways are compared, so that the library does not choose the loop.
        "schedule": partime_mcmc.Windows(DEFAULT_WINDOW) if arguments.compare else None,
        "mesh": mesh,
        "progress": not arguments.quiet,
        "certificate": partime_mcmc.CertifyIndependently()
        if arguments.independent
        else partime_mcmc.CertifyWhileRolling(),
    }
    return partime_mcmc.sample(key, target, **given | options)


def _compare_ways(
    arguments: Any, key: Key, target: Target, draws: Any, mesh: Any = None
) -> tuple[Any, Report]:
    """The same chains one step after another, and whether they are the same; prints both times."""
    sequential = _draw(
        arguments, key, target, mesh, kernel=draws.warmup, solver=partime_mcmc.sequential()
    )
    if draws.report.interrupted or sequential.report.interrupted:
        raise KeyboardInterrupt
    report = partime_mcmc.compare(draws, sequential)
    parallel_s, sequential_s = draws.report.seconds_run, sequential.report.seconds_run
    print(f"parallel {parallel_s:.3f} s, sequential {sequential_s:.3f} s")
    print(report.verdict, *report.reasons, sep="\n")
    return sequential, report


def _compare_with_nuts(
    arguments: Any, key: Key, target: Target, draws: Any, seconds: float
) -> None:
    """What a user waits for and gets, everything counted, beside NumPyro's NUTS; prints both."""
    counts = arguments.num_warmup, arguments.num_samples, arguments.num_chains
    begin = time.perf_counter()
    theirs = nuts_positions(target, key, *counts)
    theirs_seconds = time.perf_counter() - begin
    residual = float(np.max(np.asarray(draws.certificate.max_residual)))
    print(
        "from the model to draws, warm-up and compilation counted, worst coordinate, means and squares:"
    )
    for name, positions, took, more in (
        ("this", draws.positions, seconds, f"; residual {residual:.0e}"),
        ("NumPyro's NUTS, chains vectorized", theirs, theirs_seconds, ""),
    ):
        ess = mixing.ess_mean_and_square(as_coordinates(flat(positions))[1]).min()
        print(
            f"  {ess:8,.0f} effective draws in {took:5.1f} s: {ess / took:7,.0f} a second  ({name}{more})"
        )


def _finish(arguments: argparse.Namespace, key: Key, draws: Any) -> int:
    """Print and write what was sampled, all of it or what there was before an interrupt."""
    interrupted = not draws.finished
    if interrupted:
        hint = "; `resume` goes on with it" if isinstance(draws, StoredDraws) else ""
        print(f"interrupted{hint}", file=sys.stderr)
        if not draws.num_samples:
            return _INTERRUPTED
    print(describe.run_text(draws))
    if arguments.out is not None and not jax.process_index():
        print(f"written: {save_netcdf(_loaded(draws), arguments.out)}")
    if arguments.report is not None and not jax.process_index():
        solver = getattr(partime_mcmc, arguments.solver or "shooting")()
        figures = {
            "distances": coupled_distances(draws.warmup, jax.random.fold_in(key, 1)),
            "passes": solve_by_pass(draws.warmup, jax.random.fold_in(key, 2), solver),
        }
        print(f"written: {describe.save_page(arguments.report, draws, arguments.model, **figures)}")
    return _INTERRUPTED if interrupted else _code_of(draws)


def _code_of(draws: Any) -> int:
    """The exit code for a run: whether it is certified, and what its verdict is where it has one."""
    if not describe.is_certified(draws):
        return _BAD
    verdict = getattr(draws, "verdict", None)
    failed = verdict is not None and verdict.outcome is Outcome.NOT_CONVERGED
    return _NOT_CONVERGED if failed else _GOOD


def _sentence(error: BaseException) -> str:
    """An error in one sentence, on one line."""
    # JAX's note on what its traceback leaves out is of no use to those who see no traceback.
    notes = [note for note in getattr(error, "__notes__", ()) if "JAX_TRACEBACK" not in note]
    parts = [str(error).strip().split("\n\n")[0] or type(error).__name__, *notes]
    text = " ".join(". ".join(part.rstrip().removesuffix(".") for part in parts).split())
    if isinstance(error, SystemExit | GeneratorExit):
        return f"model: it ends the program ({error!r}), wanted one that can be evaluated"
    known = isinstance(error, ValueError | TypeError | OSError | ImportError)
    return text if known else f"{type(error).__name__}: {text}"


def _open_run(path: Path) -> Any:
    """The run in a folder or a file; that of a folder stays on the disk."""
    if path.is_dir():
        return open_draws(path)
    if not path.exists():
        raise FileNotFoundError(f"there is neither a store nor a file at {path}")
    return read_draws(path)


def _loaded(draws: Any) -> Any:
    """Draws in memory, if it can hold what comparing or writing them takes."""
    if not isinstance(draws, StoredDraws):
        return draws
    needed = _COPIES * (draws.posterior.nbytes + draws.sample_stats.nbytes) / 2**30
    limit = default_max_bytes() / 2**30
    if needed > limit:
        raise ValueError(
            f"{draws.path}: its draws take {needed:.3g} GiB in work, wanted at most {limit:.3g} GiB: keep fewer with a "
            "larger thinning"
        )
    return draws.load()


def _load_target(arguments: argparse.Namespace, key: Key) -> Target:
    """The target that the options mean: counts are checked first, then files, then the model runs."""
    counts = {"num_samples": 1, "num_chains": 1, "num_warmup": 20, "num_pairs": 2}
    for name, least in counts.items():
        check_count(getattr(arguments, name, least), "--" + name.replace("_", "-"), least)
    data, built_in = _load_data(arguments.data), MODELS.get(arguments.model, lambda: None)()
    if arguments.float64 or (built_in and built_in.needs_float64):
        jax.config.update("jax_enable_x64", True)
    model = built_in or _load_model(arguments.model)
    if data and (built_in or isinstance(model, Target)):
        raise ValueError(f"--data: {sorted(data)} given, but this model takes no data")
    # Stream 0 is for the model: starts, warm-up and chains split the key.
    key = jax.random.fold_in(key, 0)
    if built_in:
        return model.make_target(key)
    return model if isinstance(model, Target) else _call_model(model, data, key)


def _load_model(source: str) -> Any:
    """The object that `FILE.py:MODEL` names."""
    file, _, name = source.rpartition(":")
    if not file.endswith(".py") or "\0" in file:
        raise ValueError(
            f"model: got {source!r}, wanted FILE.py:MODEL, or one of {', '.join(MODELS)}"
        )
    sys.path.insert(0, str(Path(file).resolve().parent))  # as for `python FILE.py`
    try:
        found = runpy.run_path(file, run_name="model")
    except (Exception, SystemExit) as error:
        lines = [
            f" (line {one.lineno})"
            for one in traceback.extract_tb(error.__traceback__)
            if one.filename == file
        ]
        raise ValueError(
            f"model: running {file} failed: {type(error).__name__}: {error}{''.join(lines[-1:])}"
        ) from error
    models = [one for one in found if one[0] != "_" and isinstance(found[one], Callable | Target)]
    if name not in models:
        raise ValueError(f"model: {file} has no model {name!r}; it has {', '.join(models)}")
    return found[name]


def _call_model(model: Any, data: dict[str, Any], key: Key) -> Target:
    """The target of a function, given its data."""
    name = f"{getattr(model, '__name__', 'model')}{inspect.signature(model)}"
    try:
        inspect.signature(model).bind(**data)
    except TypeError as error:
        raise TypeError(f"--data: {name}: {error}") from error
    returned, is_numpyro = called(model, data, key)
    if is_numpyro:
        return partime_mcmc.from_numpyro(model, key=key, **data)
    if isinstance(returned, tuple) and len(returned) == 2 and callable(returned[0]):
        return Target(*returned)
    if isinstance(returned, Target):
        return returned
    raise ValueError(
        f"model: got {name}, which returns a {type(returned).__name__}; wanted a NumPyro model, or a function that "
        "returns a Target or (logdensity, initial)"
    )


def _load_data(path: Path | None) -> dict[str, Any]:
    """Data by name; pickled ones, which would run code of their own, are refused."""
    if path is None:
        return {}
    try:
        found = _read_json(path) if path.suffix == ".json" else _read_npz(path)
    except Exception as error:  # zip, text and JSON all have errors of their own
        raise ValueError(
            f"--data: {path} cannot be read ({error}); wanted .npz, or .json with an object of values by name"
        ) from error
    # A number may be a size, which NumPyro wants as Python's own.
    return {name: v.item() if getattr(v, "shape", None) == () else v for name, v in found.items()}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive of NumPy's, or only a part of one")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: _of_numbers(name, lambda: arrays[name]) for name in arrays.files}  # noqa: B023 (called at once)


def _read_json(path: Path) -> dict[str, Any]:
    def by_name(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"two values are named {max(names, key=names.count)!r}")
        return found

    found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=by_name)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    return {
        name: _of_numbers(name, lambda: np.asarray(value)) if isinstance(value, list) else value  # noqa: B023
        for name, value in found.items()
    }


def _of_numbers(name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that is read, if it is one of numbers: those of other things are pickled, or have rows of several lengths."""
    try:
        found = read()
    except ValueError:
        found = None
    # "biufc": flags, integers, floating-point numbers.
    if found is None or found.dtype.kind not in "biufc":
        raise ValueError(
            f"{name!r} is no array of numbers: it has text, gaps or other objects, or rows of different lengths"
        )
    return found
