"""Certified chunks on their way to the disk, and the run that they belong to: begun, gone on with, or finished.

    start      what is asked for is written; then the plan, once it is made; damage is dropped
    write      a thread writes a chunk while the device computes the next one: files of draws, then the checkpoint
    close      the draws, read from where they were written

A run goes on from what it has read back of its own plan, so one that was never killed and one that was are the same
programs on the same numbers.
"""

import concurrent.futures
import contextlib
import json
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np

from partime_mcmc.diagnostics.arviz import STAT_NAMES
from partime_mcmc.diagnostics.values import flat
from partime_mcmc.distributed.collectives import broadcast_bytes, wait_for_hosts
from partime_mcmc.extras import import_name
from partime_mcmc.sampling.arguments import SampleArguments
from partime_mcmc.sampling.chunk import (
    ChainState,
    Chunk,
    merge_certificates,
    merge_reports,
    without_steps,
)
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.storage.files import StoreError
from partime_mcmc.storage.saved_run import (
    chain_state_of,
    describe_run,
    pack_plan,
    require_same,
    unpack_plan,
    with_leaves,
)
from partime_mcmc.storage.serialize import decode, encode
from partime_mcmc.storage.store import Checkpoint, Folder, Store, draws_per_file, kept_steps
from partime_mcmc.storage.stored_draws import StoredDraws, open_draws
from partime_mcmc.storage.streaming_statistics import StreamingStatistics
from partime_mcmc.types import jax_config


class StoreSink:
    """Writes the chunks of a run into a folder, which nobody else writes to meanwhile.

    Args:
        store: Where.
        arguments: What is asked for.
        progress: Shown meanwhile.

    Attributes:
        folder: The files.
    """

    def __init__(self, store: Store, arguments: SampleArguments, progress: Progress):
        self._store, self._arguments, self._progress = store, arguments, progress
        self.folder, self._stack = Folder(store.path), contextlib.ExitStack()
        self._pending: concurrent.futures.Future | None = None

    def __enter__(self) -> Self:
        self._stack.enter_context(self.folder.locked())
        self._thread = self._stack.enter_context(
            concurrent.futures.ThreadPoolExecutor(1, "partime_mcmc store")
        )
        return self

    def __exit__(self, *error: Any) -> None:
        with self._stack:
            self._wait()

    def start(self, make_plan: Callable[[], tuple[Plan, ChainState]]) -> tuple[Plan, ChainState]:
        """The plan of the run and where its chains stand.

        Args:
            make_plan: Called where no plan is stored yet.

        Raises:
            NotStorable: If a strategy is not of this package: it could not be made again by `resume`.
            StoreMismatch: If the folder holds another run, naming what differs.
            StoreError: If it cannot be read or written.
        """
        asked, folder = self._arguments, self.folder
        run, begun = describe_run(asked, self._store), folder.read_plan() is not None
        if folder.holds_run:
            # Names are for readers only, and starts have done their part once warm-up is over.
            free = ("names", "dims", "max_bytes", *(["initial"] if begun else []))
            wanted = {
                name: value
                for name, value in json.loads(json.dumps(run)).items()
                if name not in free
            }
            require_same(folder.read_run(), wanted, str(folder.path))
        elif begun or folder.draws.exists():
            raise StoreError(
                f"store: {folder.path} holds draws but not what they are draws of (run.json): nothing is written over "
                "them; choose another folder"
            )
        if not begun:
            # Until chunks are chosen the latest limit of memory counts.
            folder.write_run(run)
            folder.write_plan(pack_plan(*make_plan(), folder.run_sum()))
        data, where = folder.read_plan() or b"", str(folder.path)
        plan, state = unpack_plan(data, asked.target, asked.kernel, where, folder.run_sum())
        last, warning = folder.recover()
        if warning:
            self._progress.warn(warning)
        self._plan, self._last = plan, last
        folds = dict(self._store.folds or {})
        self._statistics = StreamingStatistics.start(folds)
        if last is not None:
            self._statistics = StreamingStatistics.from_arrays(last.statistics, folds)
            state = chain_state_of(last.state, plan.kernel, asked.target.example())
        self._writer = import_name("a store", "storage.zarr_files", "DrawsWriter")(
            folder.draws,
            last,
            draws_per_file(plan.chunk, plan.thinning, plan.num_samples),
            run["dims"] or {},
            _attributes(run, plan),
        )
        return plan, state

    def write(self, chunk: Chunk) -> None:
        """Write a chunk, once the one before is written; half a chunk is none: a resumed run draws it again, in one piece.

        Raises:
            StoreError: If the chunk before could not be written.
        """
        if chunk.report.interrupted:
            self._progress.note("interrupted: what is certified is kept")
        else:
            self._wait()
            self._pending = self._thread.submit(self._write, chunk, bool(jax_config.jax_enable_x64))

    def interrupt(self) -> None:
        """Take note of an interrupt from the keyboard: what is written is kept."""
        self._progress.note("interrupted: what is certified is kept")

    def close(self) -> StoredDraws:
        """The draws: all, or those that were certified before an interrupt.

        Raises:
            StoreError: If the last chunk could not be written.
        """
        self._wait()
        return open_draws(self._store.path, folds=self._store.folds)

    def _wait(self) -> None:
        if self._pending is None:
            return
        try:
            self._pending.result()
        except OSError as error:
            safe = 0 if self._last is None else self._last.step
            raise StoreError(
                error.errno,
                f"{error.strerror or error}. {safe:,} draws per chain are safe in {self.folder.path}: make room, and "
                "resume(path, target, kernel) goes on from there",
            ) from error
        self._pending = None

    def _write(self, chunk: Chunk, x64: bool) -> None:
        plan, last = self._plan, self._last
        start, index, previous = (
            (last.step, last.index + 1, last.checksum) if last else (0, 0, self.folder.beginning())
        )
        stop = chunk.state.num_steps - plan.first_step
        constrained = flat(dict(chunk.constrained))
        steps = {name: getattr(chunk.certificate, name) for name in ("accepted", "residual")}
        info = {name: np.asarray(value) for name, value in {**steps, **chunk.info}.items()}
        # A thread does not inherit the caller's precision, and the user's folds may be written in JAX.
        with jax.enable_x64(x64):
            statistics = self._statistics.update(constrained, info)
        certificate, report = without_steps(chunk.certificate), chunk.report
        if last is not None:
            certificate = merge_certificates(last.certificate, certificate)
            report = merge_reports(last.report, report, (start, stop - start), certificate)
        kept = kept_steps(start, stop, plan.thinning, plan.num_samples)
        # A view, where an array of places would copy all of it.
        at = slice(kept[0] - start if kept.size else stop - start, None, plan.thinning)
        stats = {STAT_NAMES.get(name, name): value[:, at] for name, value in info.items()}
        posterior = {name: value[:, at] for name, value in constrained.items()}
        files = self._writer.append({"posterior": posterior, "sample_stats": stats}, kept)
        self._last = self.folder.write_checkpoint(
            Checkpoint(
                index=index,
                step=stop,
                previous=previous,
                state=with_leaves(chunk.state),
                certificate=certificate,
                report=report,
                statistics=statistics.to_arrays(),
                files=files,
                tail=self._writer.tail,
                metadata=self._writer.metadata,
            )
        )
        self._statistics = statistics
        self._writer.publish()


class SharedStoreSink(StoreSink):
    """A store of several hosts: the first one plans, writes and reads, the others compute their shards of the same chunks.

    The plan and where the chains stand are broadcast. If a host is lost the run ends on all of them, and what was written stays:
    a store is resumed by any number of hosts, however many worked on it.

    Left out: runs that go on by themselves with the hosts that are left; a store whose hosts share no folder; several hosts that
    write one store. Hosts that should each keep their own chains make runs of their own, with a key and a store each, which
    `storage.stored_draws.concat_draws` opens together.
    """

    def __enter__(self) -> Self:
        return self if jax.process_index() else super().__enter__()

    def start(self, make_plan: Callable[[], tuple[Plan, ChainState]]) -> tuple[Plan, ChainState]:
        """As `StoreSink.start` on the first host; the others take plan and state from it."""
        asked = self._arguments
        if jax.process_index():
            plan, state = unpack_plan(broadcast_bytes(b""), asked.target, asked.kernel)
        else:
            plan, state = super().start(make_plan)
            broadcast_bytes(self.folder.read_plan() or b"")
        mine = json.dumps(encode(with_leaves(state), "state")).encode()
        leaves = decode(json.loads(broadcast_bytes(mine)))
        return plan, chain_state_of(leaves, plan.kernel, asked.target.example())

    def write(self, chunk: Chunk) -> None:
        """As `StoreSink.write`; the others keep nothing."""
        if not jax.process_index():
            super().write(chunk)

    def interrupt(self) -> None:
        """Raise the interrupt again: the other hosts wait inside a window, and the store resumes."""
        raise KeyboardInterrupt

    def close(self) -> StoredDraws:
        """The draws that the first host has written, on all of them."""
        self._wait()
        wait_for_hosts()
        return super().close()


def _attributes(run: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """What the group of draws has about itself, for those who read it alone."""
    return {
        "inference_library": "partime_mcmc",
        "inference_library_version": run["versions"]["partime_mcmc"],
        **{name: run[name] for name in ("model", "data", "kernel", "key_words", "num_samples")},
        **{name: run[name] for name in ("thinning", "dtype", "versions")},
        **{name: encode(getattr(plan, name), name) for name in ("solver", "schedule", "tolerance")},
    }
