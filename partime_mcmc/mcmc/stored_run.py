"""Runs longer than memory: draws go to disk chunk by chunk, and a run that died goes on as if it had not.

    begin      what was asked for is written; warm-up; what it tuned and what was chosen is written
    chunk      solve and certify (`stream`), while another thread writes the chunk before: draws, totals, where the chains
               stand
    resume     drop what is damaged, and go on from the end of the last whole chunk

A run goes on from what it has read back of its own start, so one that was never killed and one that was are the same
programs on the same numbers. Two writers exclude each other by a lock.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Callable

import jax
import numpy as np
from jax.sharding import Mesh

from partime_mcmc.diagnostics.arviz import STAT_NAMES
from partime_mcmc.kernels import Kernel
from partime_mcmc.mcmc.draws import Draws, End
from partime_mcmc.mcmc.family import Builder
from partime_mcmc.mcmc.followers import course_of, meet, say, say_end, take_up
from partime_mcmc.mcmc.progress import Progress
from partime_mcmc.mcmc.running import Fold, Running
from partime_mcmc.mcmc.store import codec
from partime_mcmc.mcmc.store.fingerprint import example_of, require_same
from partime_mcmc.mcmc.store.formats import Format, NetCDF, Variable
from partime_mcmc.mcmc.store.layout import Folder, StoreError, kept_steps
from partime_mcmc.mcmc.store.plan import Settled
from partime_mcmc.mcmc.store.state import Totals, pack_state, unpack_end
from partime_mcmc.mcmc.store.stored import StoredDraws, open_draws, read_state, restored
from partime_mcmc.mcmc.stream import Course, Tell, stream
from partime_mcmc.mcmc.target import Target
from partime_mcmc.mcmc.warmup import Warmup
from partime_mcmc.types import PyTree


@dataclasses.dataclass(frozen=True)
class Store:
    """Where and how draws are kept.

    Attributes:
        path: A folder, made if need be.
        format: Of the files of draws: `NetCDF()` or `Zarr()`.
        chunk: Steps per chunk; None is as many as are worth their overhead and fit into memory.
        folds: Functions of your own, accumulated over all draws, by name; their carries are stored.
    """

    path: str | os.PathLike
    format: Format = NetCDF()
    chunk: int | None = None
    folds: Mapping[str, Fold] | None = None


def run_stored(store: Store, run: dict[str, Any], target: Target, given: Kernel | Builder | Warmup,
               max_iterations: int | None, make_start: Callable[[PyTree], bytes], progress: Progress,
               mesh: Mesh | None = None) -> StoredDraws:
    """Begin a stored run or go on with it.

    Args:
        store: Where.
        run: What is asked for: plain values and hashes.
        target: What is sampled.
        given: The kernel as the user gives it.
        max_iterations: Passes per stretch.
        make_start: `example position -> pack_start(...)`: warm-up and choices, if they have not been made.
        progress: What to tell.
        mesh: Devices to spread it over; the first of several hosts is this one, the others `follow`.

    Returns:
        The draws: all, or those that were certified before an interrupt from the keyboard.

    Raises:
        StoreMismatch: If the folder holds another run, naming what differs.
        StoreError: If another process writes there, or the disk is full; what was safe before is safe.
    """
    folder = Folder(store.path)
    with folder.locked():
        begun = folder.holds_run and folder.read_start() is not None
        if folder.holds_run:
            # Names are for readers only, and starts have done their part once warm-up is over.
            free = ("names", "dims", "max_bytes", *(["initial"] if begun else []))
            asked = {name: value for name, value in json.loads(json.dumps(run)).items() if name not in free}
            require_same(folder.read_run(), asked, str(store.path))
        if not begun:
            # Until chunks are chosen the latest limit of memory counts.
            folder.write_run(run)
        example = example_of(target)
        data = folder.read_start()
        if data is None:
            data = make_start(example)
            folder.write_start(data)
        start, kernel, end = take_up(data, target, given, example, store.path)
        chunks, damage = folder.drop_damaged()
        if damage:
            progress.warn(f"store: {store.path}: {damage}")
        if not chunks or chunks[-1].stop < run["num_samples"]:
            keeper = _Keeper(folder, store, run, start.settled, end.num_steps)
            # The keys may have been used before: steps of the store are counted from here.
            first, last = end.num_steps, end.num_steps + run["num_samples"]
            if chunks:
                end = keeper.go_on(chunks, kernel, example)
            if mesh is not None:
                say(data)
                end, first, last = say_end(end, first, last)
            course = course_of(start, target, kernel, run["num_samples"], max_iterations, run["key"], mesh)
            _sample_on(keeper, course, start.settled.chunk, end, first, last, progress)
        elif mesh is not None:
            say(b"")
    if mesh is not None:
        meet()
    return open_draws(store.path, folds=store.folds)


def _sample_on(keeper: _Keeper, course: Course, chunk: int, end: End, first: int, last: int, progress: Progress) -> None:
    with progress.stage("sampling", course.num_samples) as advance:
        tell = Tell(advance, course.keys.shape[0])
        tell.skip(end.num_steps - first)
        with keeper:
            try:
                for draws in stream(course, None, chunk, tell, end, last):
                    if draws.report.interrupted:
                        # Half a chunk is none: a resumed run draws it again, in one piece.
                        break
                    keeper.keep(draws)
            except KeyboardInterrupt:
                progress.note("interrupted: what is certified is kept")
                if course.mesh is not None and jax.process_count() > 1:
                    # The other hosts wait for this one inside a stretch: all of them end, and the store resumes.
                    raise


class _Keeper:
    """Writes certified chunks, one after another, in a thread of its own: the disk does not hold up the device."""

    def __init__(self, folder: Folder, store: Store, run: dict[str, Any], settled: Settled, first: int):
        self._first, self._settled = first, settled
        self._folder, self._format, self._run, self._folds = folder, store.format, run, store.folds
        self._index, self._step, self._totals, self._running = 0, 0, None, Running.start(store.folds)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "partime_mcmc store")
        self._pending: concurrent.futures.Future | None = None

    def go_on(self, chunks: list, kernel: Kernel, example: PyTree) -> End:
        """Take up what the last of some chunks says, and where the chains stand after it."""
        arrays, self._totals, running = read_state(chunks[-1])
        self._running = restored(running, self._folds)
        self._index, self._step = len(chunks), chunks[-1].stop
        return unpack_end(arrays, kernel, example)

    def keep(self, draws: Draws) -> None:
        """Write a chunk, once the one before is written."""
        self._wait()
        self._pending = self._thread.submit(self._write_as_here, draws, bool(jax.config.jax_enable_x64))

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._wait()
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        if self._pending is not None:
            try:
                self._pending.result()
                self._pending = None
            except OSError as error:
                said = (f"{error.strerror or error}. {self._step:,} draws per chain are safe in {self._folder.path}: make "
                        "room, and resume(path, target, kernel) goes on from there")
                raise StoreError(error.errno, said) from error

    def _write_as_here(self, draws: Draws, x64: bool) -> None:
        # A thread does not inherit the caller's precision, and the user's folds may be written in JAX.
        with jax.enable_x64(x64):
            self._write(draws)

    def _write(self, draws: Draws) -> None:
        constrained = {name: np.asarray(value) for name, value in draws.constrained.items()}
        info = {name: np.asarray(value) for name, value in draws.info.items()}
        certificate = draws.certificate
        info = {"accepted": np.asarray(certificate.accepted), "residual": np.asarray(certificate.residual)} | info
        totals = Totals.of(draws).after(self._totals)
        running = self._running.update(constrained, info)
        stop = draws.end.num_steps - self._first
        kept = kept_steps(self._step, stop, self._run["thinning"], self._run["num_samples"])
        local = slice(kept[0] - self._step, None, self._run["thinning"]) if kept.size else slice(0, 0)
        groups = {}
        if kept.size:
            chains = np.arange(self._run["num_chains"])
            coordinates = {"chain": Variable(("chain",), chains), "draw": Variable(("draw",), kept)}
            dims = self._run["dims"] or {}
            groups["posterior"] = coordinates | {name: _variable(name, value[:, local], dims.get(name, ()))
                                                 for name, value in constrained.items()}
            groups["sample_stats"] = coordinates | {STAT_NAMES.get(name, name): _variable(name, value[:, local], ())
                                                    for name, value in info.items()}
        state = np.frombuffer(pack_state(draws.end, totals, running.to_arrays()), np.uint8)
        groups["state"] = {"state": Variable(("byte",), state)}
        data = self._format.pack(groups, self._attributes(stop))
        self._folder.write_chunk(self._index, stop, self._format.suffix, data)
        self._index, self._step, self._totals, self._running = self._index + 1, stop, totals, running

    def _attributes(self, stop: int) -> dict[str, str | int | float]:
        run = self._run
        return {"inference_library": "partime_mcmc", "inference_library_version": run["versions"]["partime_mcmc"],
                "chunk": self._index, "first_step": self._step, "last_step": stop - 1, "thinning": run["thinning"],
                "model": run["model"], "data": run["data"], "kernel": run["kernel"], "key": json.dumps(run["key"]),
                "num_samples": run["num_samples"], "dtype": run["dtype"], "versions": json.dumps(run["versions"]),
                **{name: _as_text(getattr(self._settled, name)) for name in ("solver", "schedule", "tolerance", "settings")}}


# HDF5 takes attributes of up to 64 KiB.
_LONGEST = 30_000


def _as_text(value: Any) -> str:
    """A strategy or settings as JSON, for whoever reads one chunk alone; the run itself goes on from its start."""
    text = codec.to_json(value, "settled")
    return text if len(text) <= _LONGEST else json.dumps(f"{len(text)} characters, in the store's start")


def _variable(name: str, values: np.ndarray, dims: Any) -> Variable:
    own = values.ndim - 2
    given = tuple(dims)[:own]
    given = (*given, *(f"{name}_dim_{axis}" for axis in range(len(given), own)))
    return Variable(("chain", "draw", *given), np.ascontiguousarray(values))
