"""Runs longer than memory: draws go to disk chunk by chunk, and a run that died goes on as if it had not.

    begin      what was asked for is written; warm-up; what it tuned and what was chosen is written
    chunk      solve and certify (`stream`), while another thread writes the chunk before: draws, totals, where the chains
               stand
    resume     drop what is damaged, and go on from the end of the last whole chunk

A run goes on from what it has read back of its own start, so one that was never killed and one that was are the same
programs on the same numbers. Two writers exclude each other by a lock. Several hosts are one writer, whichever of them write
(`writers`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Callable

import jax
from jax.sharding import Mesh

from partime_mcmc.kernels import Kernel
from partime_mcmc.sampling.draws import End
from partime_mcmc.kernels.kernel_program import Builder
from partime_mcmc.distributed.followers import course_of, meet, say, say_end, take_up
from partime_mcmc.storage.keeper import Shelf, Standing, end_after
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.storage.streaming_statistics import Fold
from partime_mcmc.storage.fingerprint import example_of, require_same
from partime_mcmc.storage.formats import Format, NetCDF
from partime_mcmc.storage.layout import Folder
from partime_mcmc.storage.stored_draws import StoredDraws, open_draws
from partime_mcmc.sampling.executor import Course, Tell
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.warmup import Warmup
from partime_mcmc.storage.writers import EveryHost, Writers
from partime_mcmc.types import PyTree


@dataclasses.dataclass(frozen=True)
class Store:
    """Where and how draws are kept.

    Attributes:
        path: A folder, made if need be.
        format: Of the files of draws: `NetCDF()` or `Zarr()`.
        chunk: Steps per chunk; None is as many as are worth their overhead and fit into memory.
        folds: Functions of your own, accumulated over all draws, by name; their carries are stored.
        writers: Of several hosts, who writes: `EveryHost()` its own draws, or `FirstHost()` all of them. Either way all
            hosts give a folder that they share.
    """

    path: str | os.PathLike
    format: Format = NetCDF()
    chunk: int | None = None
    folds: Mapping[str, Fold] | None = None
    writers: Writers = EveryHost()


def run_stored(
    store: Store,
    run: dict[str, Any],
    target: Target,
    given: Kernel | Builder | Warmup,
    max_iterations: int | None,
    make_start: Callable[[PyTree], bytes],
    progress: Progress,
    mesh: Mesh | None = None,
) -> StoredDraws:
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
    folder, writers = Folder(store.path), store.writers.among(mesh)
    with folder.locked():
        writers.check(store, mesh)
        begun = folder.holds_run and folder.read_start() is not None
        if folder.holds_run:
            # Names are for readers only, and starts have done their part once warm-up is over.
            free = ("names", "dims", "max_bytes", *(["initial"] if begun else []))
            asked = {
                name: value
                for name, value in json.loads(json.dumps(run)).items()
                if name not in free
            }
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
            # The keys may have been used before: steps of the store are counted from here.
            first, last = end.num_steps, end.num_steps + run["num_samples"]
            standing, arrays = Standing.after(chunks, store.folds)
            end = end_after(arrays, kernel, example, end)
            if mesh is not None:
                say(data)
                end, first, last = say_end(end, first, last)
            shelf = Shelf(folder, store.format, store.folds, run, start.settled, first)
            course = course_of(
                start, target, kernel, run["num_samples"], max_iterations, run["key"], mesh
            )
            _sample_on(writers, shelf, standing, course, end, last, progress)
        elif mesh is not None:
            say(b"")
    if mesh is not None:
        meet()
    return open_draws(store.path, folds=store.folds)


def _sample_on(
    writers: Writers,
    shelf: Shelf,
    standing: Standing,
    course: Course,
    end: End,
    last: int,
    progress: Progress,
) -> None:
    with progress.stage("sampling", course.num_samples) as advance:
        tell = Tell(advance, course.keys.shape[0])
        tell.skip(end.num_steps - shelf.first)
        try:
            writers.sample(shelf, standing, course, end, last, tell)
        except KeyboardInterrupt:
            progress.note("interrupted: what is certified is kept")
            if course.mesh is not None and jax.process_count() > 1:
                # The other hosts wait for this one inside a stretch: all of them end, and the store resumes.
                raise
