"""Runs that go on: `sample(..., store=...)` from the beginning, `resume` from whatever there is.

    draws = sample(key, target, hmc, num_samples=10_000_000, store="runs/schools", thinning=10)
    draws = resume("runs/schools", target, hmc)         after a crash, an interrupt, a full disk; or when all is done

A model is code, and code cannot live in a store safely: target and kernel are given again, and refused if they are not
what the run was begun with. Everything else (key, counts, strategies, what warm-up tuned) comes from the store. The
draws are those of a run that was never interrupted: on the same machine and versions, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from partime_mcmc.contracts import kind
from partime_mcmc.diagnostics.checks import check_count
from partime_mcmc.kernels import Independent, Kernel
from partime_mcmc.sampling.memory import bytes_beside, check_strategies, chosen_progress, chunk_steps
from partime_mcmc.sampling.chains import DEFAULT_STRETCH, default_tolerance, given_choice
from partime_mcmc.sampling.chain_groups import first_group
from partime_mcmc.distributed.collectives import check_mesh, check_same
from partime_mcmc.kernels.kernel_program import Builder
from partime_mcmc.distributed.followers import follow
from partime_mcmc.compile_cache import Timings
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.sampling.plan import Ready, Request, make_ready
from partime_mcmc.storage.streaming_statistics import Fold
from partime_mcmc.storage import codec
from partime_mcmc.storage.fingerprint import (
    StoreMismatch,
    environment,
    example_of,
    fingerprint_of,
    name_of,
    program_of,
    tuned_digest,
)
from partime_mcmc.storage.formats import format_of
from partime_mcmc.storage.layout import FORMAT_VERSION, Folder
from partime_mcmc.storage.plan import pack_start, settled_for
from partime_mcmc.storage.stored_draws import StoredDraws, open_draws, read_run
from partime_mcmc.storage.stored_run import Store, run_stored
from partime_mcmc.sampling.randomness import MAX_STEPS, begin, throw
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.warmup import Warmup
from partime_mcmc.storage.writers import EveryHost, Writers
from partime_mcmc.recipes import sequential
from partime_mcmc.schedule import Schedule, Stretches
from partime_mcmc.types import Key, PyTree

# The arguments of `sample` that are data, and go into the store as they are.
_STRATEGIES = ("adaptation", "dice", "solver", "schedule", "tolerance", "certificate")
_COUNTS = ("num_samples", "num_chains", "num_warmup", "max_iterations", "thinning")


def sample_stored(
    store: Store,
    request: Request,
    progress: Progress,
    mesh: Mesh | None = None,
    known: Mapping[str, Any] | None = None,
) -> StoredDraws:
    """A run on disk, begun or gone on with.

    Args:
        store: Where.
        request: What is asked for.
        progress: What to tell.
        mesh: Devices to spread the run over, of one or several hosts.
        known: What is taken from the store's own description and not from what is given.

    Raises:
        ValueError: If no steps are asked for, or more than a key has dice for, or no draw would be kept, or a value is
            named as an axis of all values is.
        NotStorable: If a strategy is not of this package: it could not be made again by `resume`.
        StoreMismatch, StoreError: As `sample`.
    """
    if not 1 <= request.num_samples <= MAX_STEPS:
        raise ValueError(
            f"num_samples: got {request.num_samples} with a store, wanted 1 to {MAX_STEPS}: a key has dice for "
            "so many steps"
        )
    if request.thinning > request.num_samples:
        raise ValueError(
            f"thinning: got {request.thinning} with num_samples={request.num_samples}, wanted at most as many: "
            "no draw would be kept"
        )
    run = {
        "front": "sample",
        **described(store, request.target, request.kernel),
        "key": key_words(request.key),
        "key_impl": str(jax.random.key_impl(request.key)),
        **{name: getattr(request, name) for name in _COUNTS},
        "max_bytes": None
        if request.max_bytes is None
        else check_count(request.max_bytes, "max_bytes", 1),
        **{name: codec.encode(getattr(request, name), name) for name in _STRATEGIES},
        **(known or {}),
    }
    if mesh is not None and jax.process_index():
        follow(store, run, request.target, request.kernel, request.max_iterations, mesh)
        return open_draws(store.path, folds=store.folds)
    return run_stored(
        store,
        run,
        request.target,
        request.kernel,
        request.max_iterations,
        lambda example: _make_start(store, request, progress, mesh),
        progress,
        mesh,
    )


def resume(
    path: str | os.PathLike,
    target: Target,
    kernel: Kernel | Builder | Warmup,
    *,
    folds: Mapping[str, Fold] | None = None,
    mesh: Mesh | None = None,
    writers: Writers = EveryHost(),
    progress: Progress | bool = True,
) -> StoredDraws:
    """Go on with a stored run, to its end.

    A run that was killed during warm-up warms up again, with the stored key. A finished run is returned as it is.
    Chunks that are damaged are dropped with all that follow them, and drawn again; a warning says so.

    Args:
        path: The folder.
        target: What is sampled, as it was when the run was begun.
        kernel: The kernel, as it was, or its builder.
        folds: The functions of your own that the run accumulates.
        mesh: Devices to go on with, however many the run was begun with: the same draws to rounding. Of several hosts each
            calls this, with a folder that all of them see.
        writers: Of several hosts, who writes from here on, whoever did before; see `Store`.
        progress: As for `sample`.

    Returns:
        The draws.

    Raises:
        ValueError: If the chains cannot be laid on the mesh, or hosts ask for different things.
        FileNotFoundError: If there is no stored run.
        StoreMismatch: If model, data, kernel, floating-point type, device or versions are not those that the run was begun
            with, naming what differs.
        StoreError: If the store cannot be written or is damaged beyond its chunks, or another process writes there.
    """
    progress = chosen_progress(progress if mesh is None or jax.process_index() == 0 else False)
    check_strategies(target, kernel, None, None, None, None)
    run = read_run(path)
    if run["front"] != "sample":
        raise StoreMismatch(
            f"store: {path} was begun by {run['front']}: go on with it there, with the same arguments"
        )
    strategies = {name: codec.decode(run[name]) for name in _STRATEGIES}
    key = jax.random.wrap_key_data(np.asarray(run["key"], np.uint32), impl=run["key_impl"])
    counts = {name: run[name] for name in _COUNTS}
    request = Request(key, target, kernel, max_bytes=run.get("max_bytes"), **counts, **strategies)
    found = {"NetCDF": "nc", "Zarr": "zip"}
    # Once warm-up is over its numbers are in the store, and the builder will do.
    builder = not isinstance(kernel, (Kernel, Warmup)) and Folder(path).read_start() is not None
    known = {"tuned": run.get("tuned")} if builder else {}
    store = Store(path, format_of(found[run["format"]]), run["chunk"], folds, writers)
    if mesh is not None:
        # However time was cut on one device, over a mesh it is cut in stretches.
        check_mesh(mesh, request.num_chains, None)
        check_same(request, mesh, store)
    return sample_stored(store, request, progress, mesh, known)


def described(store: Store, target: Target, kernel: Any) -> dict[str, Any]:
    """What a store says of a run besides its front's own arguments.

    Args:
        store: Where.
        target: What is sampled.
        kernel: As the user gives it.

    Raises:
        ValueError: If a value is named as an axis of all values is.
    """
    example = example_of(target)
    values = {} if target.constrain is None else dict(jax.eval_shape(target.constrain, example))
    for name in ("chain", "draw"):
        if name in (values or example if isinstance(example, dict) else values):
            raise ValueError(
                f"target: a value is named {name!r}, which names an axis of every value in a store: rename it"
            )
    return {
        "format_version": FORMAT_VERSION,
        "format": type(store.format).__name__,
        "chunk": store.chunk,
        **fingerprint_of(target, example),
        **environment(example),
        "kernel": name_of(kernel),
        "tuned": tuned_digest(kernel),
        "folds": sorted(store.folds or {}),
        "names": list(target.names) if target.names else None,
        "dims": {name: list(dims) for name, dims in target.dims.items()} if target.dims else None,
    }


def as_store(store: Store | str | os.PathLike) -> Store:
    """A store from the argument `store`.

    Raises:
        TypeError: If it is neither a path nor a `Store`.
    """
    if isinstance(store, Store):
        return store
    if not isinstance(store, (str, os.PathLike)):
        raise TypeError(f"store: got {kind(store)}, wanted a folder's path or a Store(path, ...)")
    return Store(store)


def key_words(key: Key) -> list[int]:
    """The numbers of a key."""
    return [int(word) for word in np.ravel(jax.random.key_data(key))]


def _make_start(store: Store, request: Request, progress: Progress, mesh: Mesh | None) -> bytes:
    """Warm up, choose, and write down what came of it."""
    # Before warm-up: what cannot fit is refused at once.
    open_choice = request.solver is None or mesh is not None
    chunk_of(store, request, example_of(request.target), open_choice, mesh)
    ready = make_ready(request, progress)
    choose = ready.choice(request)
    if mesh is not None:
        choose = given_choice(
            request.solver, request.schedule, request.num_chains, request.num_samples, mesh
        )
    return start_of(store, ready, request, choose, progress, mesh=mesh)


def start_of(
    store: Store,
    ready: Ready,
    request: Request,
    choose: Any,
    progress: Progress,
    end: Any = None,
    mesh: Mesh | None = None,
) -> bytes:
    """What a run that is ready needs to go on: solver and schedule are chosen here.

    Args:
        store: Where.
        ready: Chains before their first step.
        request: What is asked for.
        choose: What asks for advice; None takes solver and schedule as they are given.
        progress: What to tell.
        end: Where the chains stand, if not before their first step.
        mesh: Devices that share a chunk; None is the default device alone.
    """
    example = jax.tree.map(lambda leaf: leaf[0], ready.positions)
    schedule, chunk = chunk_of(store, request, example, choose is not None, mesh)
    kernel, keys, clock = ready.kernel, ready.keys, Timings()
    end = begin(kernel, ready.positions, keys, clock) if end is None else end
    dtype = jax.tree.leaves(example)[0].dtype
    tolerance = default_tolerance(kernel, dtype) if request.tolerance is None else request.tolerance
    # Advice looks at dice; over a mesh none is asked, and a chunk's would not fit one device.
    looked_at = min(chunk, request.num_samples) if mesh is None else 1
    dynamics, initial, tape, _ = throw(kernel, None, keys, looked_at, end, clock)
    choose = choose or given_choice(request.solver, schedule, request.num_chains, chunk)
    # Over a mesh devices share the chains, not cores.
    groups, chains = 1, (initial, tape)
    if mesh is None:
        groups, chains = first_group(request.num_chains, dynamics, chains)
    solver, schedule, advice = choose(lambda: dynamics, *chains, groups)
    if advice is not None:
        progress.note(str(advice))
    settled = settled_for(
        kernel,
        ready.warmup,
        solver=solver,
        schedule=schedule,
        tolerance=tolerance,
        chunk=chunk,
        program=program_of(dynamics, kernel),
        advice=str(advice or ""),
        certificate=request.certificate,
        groups=groups,
    )
    return pack_start(settled, kernel, keys, end)


def chunk_of(
    store: Store, request: Request, example: PyTree, open_choice: bool, mesh: Mesh | None
) -> tuple[Schedule | None, int]:
    """The schedule, None while it is open, and steps per chunk.

    Raises:
        TooLarge: As `chunk_steps`.
    """
    schedule = request.schedule or (None if open_choice else Stretches(DEFAULT_STRETCH))
    leaves = jax.tree.leaves(example)
    chunk = chunk_steps(
        request.solver or sequential(),
        schedule,
        request.num_samples,
        request.num_chains,
        sum(leaf.size for leaf in leaves),
        leaves[0].dtype.itemsize,
        request.max_bytes,
        store.chunk,
        bytes_beside(
            request.target, example, request.certificate if mesh is None else Independent()
        ),
        mesh,
    )
    return schedule, chunk
