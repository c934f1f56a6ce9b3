"""Certified chunks on their way to the disk: what a file of draws says, and the writing of whole ones.

A chunk is written by a thread of its own while the device computes the next one, so that the disk does not hold it up.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Callable

import jax
import numpy as np

from partime_mcmc.diagnostics.arviz import STAT_NAMES
from partime_mcmc.kernels import Kernel
from partime_mcmc.sampling.draws import Draws, End
from partime_mcmc.storage.streaming_statistics import Fold, StreamingStatistics
from partime_mcmc.storage import codec
from partime_mcmc.storage.chunks import Chunk, StoreError, kept_steps
from partime_mcmc.storage.formats import Format, Groups, Variable
from partime_mcmc.storage.layout import Folder
from partime_mcmc.storage.plan import Settled
from partime_mcmc.storage.state import Totals, pack_state, unpack_end
from partime_mcmc.storage.stored_draws import read_state, restored
from partime_mcmc.types import PyTree


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Where files of draws go, and what all of them say.

    Attributes:
        folder: Of the store.
        format: Of the files.
        folds: The user's own, by name.
        run: What was asked for.
        settled: What was chosen.
        first: The step at which the store begins: the keys may have been used before.
    """

    folder: Folder
    format: Format
    folds: Mapping[str, Fold] | None
    run: dict[str, Any]
    settled: Settled
    first: int

    def kept(self, start: int, stop: int) -> np.ndarray:
        """Which of some steps of the store are kept."""
        return kept_steps(start, stop, self.run["thinning"], self.run["num_samples"])

    def groups(
        self,
        chains: np.ndarray,
        kept: np.ndarray,
        at: np.ndarray,
        constrained: Mapping[str, np.ndarray],
        info: Mapping[str, np.ndarray],
    ) -> Groups:
        """Kept draws as groups of variables.

        Args:
            chains: Numbers of the chains, `(c,)`.
            kept: Numbers of the steps that are kept, `(k,)`; none at all make no groups.
            at: Where these are among the n steps of the arrays, `(k,)`.
            constrained: Name to array `(c, n, ...)`.
            info: Name to array `(c, n)`.
        """
        if not kept.size:
            return {}
        if kept.size > 1 and (np.diff(at) == at[1] - at[0]).all():
            # A view, where an array of places would copy all of it.
            at = slice(int(at[0]), int(at[-1]) + 1, int(at[1] - at[0]))
        coordinates = {"chain": Variable(("chain",), chains), "draw": Variable(("draw",), kept)}
        dims = self.run["dims"] or {}
        values = {
            name: _variable(name, value[:, at], dims.get(name, ()))
            for name, value in constrained.items()
        }
        stats = {
            STAT_NAMES.get(name, name): _variable(name, value[:, at], ())
            for name, value in info.items()
        }
        return {"posterior": coordinates | values, "sample_stats": coordinates | stats}

    def attributes(self, index: int, start: int, stop: int) -> dict[str, str | int | float]:
        """What a file of chunk `index`, which has the steps from `start` to `stop`, says of itself and the run."""
        run = self.run
        return {
            "inference_library": "partime_mcmc",
            "inference_library_version": run["versions"]["partime_mcmc"],
            "chunk": index,
            "first_step": start,
            "last_step": stop - 1,
            "thinning": run["thinning"],
            "model": run["model"],
            "data": run["data"],
            "kernel": run["kernel"],
            "key": json.dumps(run["key"]),
            "num_samples": run["num_samples"],
            "dtype": run["dtype"],
            "versions": json.dumps(run["versions"]),
            **{
                name: _as_text(getattr(self.settled, name))
                for name in ("solver", "schedule", "tolerance", "settings")
            },
        }


@dataclasses.dataclass(frozen=True)
class Standing:
    """How far a store has come.

    Attributes:
        index: Chunks that are written.
        step: Steps that are in them.
        totals: What is known of all draws; None before the first.
        running: Running statistics.
    """

    index: int
    step: int
    totals: Totals | None
    running: StreamingStatistics

    @classmethod
    def after(
        cls, chunks: list[Chunk], folds: Mapping[str, Fold] | None
    ) -> tuple[Standing, dict[str, np.ndarray]]:
        """What the last of some chunks says, and its arrays; before the first chunk there are none."""
        if not chunks:
            return cls(0, 0, None, StreamingStatistics.start(folds)), {}
        arrays, totals, running = read_state(chunks[-1])
        return cls(len(chunks), chunks[-1].stop, totals, restored(running, folds)), arrays


def end_after(arrays: dict[str, np.ndarray], kernel: Kernel, example: PyTree, end: End) -> End:
    """Where chains stand after the chunk with these arrays; without any it is `end`."""
    return unpack_end(arrays, kernel, example) if arrays else end


class Desk:
    """A thread that does one thing after another, and says on the main thread what went wrong.

    Args:
        folder: Where it writes, for messages.
    """

    def __init__(self, folder: Folder):
        self._folder, self._pending = folder, []
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "partime_mcmc store")

    def do(self, function: Callable[..., Any], *args: Any) -> None:
        """Have something done, after what was asked for before."""
        self._pending.append(
            self._thread.submit(_as_here, bool(jax.config.jax_enable_x64), function, args)
        )

    def wait(self, safe: Callable[[], int]) -> list[Any]:
        """Wait until all is done.

        Args:
            safe: How many draws per chain are written by then, for messages.

        Returns:
            What came of it, in order.

        Raises:
            StoreError: If something could not be written.
        """
        try:
            found = [pending.result() for pending in self._pending]
            self._pending = []
            return found
        except OSError as error:
            said = (
                f"{error.strerror or error}. {safe():,} draws per chain are safe in {self._folder.path}: make room, and "
                "resume(path, target, kernel) goes on from there"
            )
            raise StoreError(error.errno, said) from error

    def close(self) -> None:
        """Let the thread finish, and go."""
        self._thread.shutdown()


def _as_here(x64: bool, function: Callable[..., Any], args: tuple) -> Any:
    # A thread does not inherit the caller's precision, and the user's folds may be written in JAX.
    with jax.enable_x64(x64):
        return function(*args)


class Keeper:
    """Writes certified chunks whole, one after another.

    Args:
        shelf: Where.
        standing: How far the store has come.
    """

    def __init__(self, shelf: Shelf, standing: Standing):
        self._shelf, self._standing, self._desk = shelf, standing, Desk(shelf.folder)

    def keep(self, draws: Draws) -> None:
        """Write a chunk, once the one before is written."""
        self._wait()
        self._desk.do(self._write, draws)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._wait()
        finally:
            self._desk.close()

    def _wait(self) -> None:
        self._desk.wait(lambda: self._standing.step)

    def _write(self, draws: Draws) -> None:
        constrained = {name: np.asarray(value) for name, value in draws.constrained.items()}
        info = {name: np.asarray(value) for name, value in draws.info.items()}
        certificate, (shelf, before) = draws.certificate, (self._shelf, self._standing)
        info = {
            "accepted": np.asarray(certificate.accepted),
            "residual": np.asarray(certificate.residual),
        } | info
        totals = Totals.of(draws).after(before.totals)
        running = before.running.update(constrained, info)
        stop = draws.end.num_steps - shelf.first
        kept = shelf.kept(before.step, stop)
        groups = shelf.groups(
            np.arange(shelf.run["num_chains"]), kept, kept - before.step, constrained, info
        )
        groups["state"] = state_group(draws.end, totals, running)
        data = shelf.format.pack(groups, shelf.attributes(before.index, before.step, stop))
        shelf.folder.write_chunk(before.index, stop, shelf.format.suffix, data)
        self._standing = Standing(before.index + 1, stop, totals, running)


def state_group(end: End, totals: Totals, running: StreamingStatistics) -> dict[str, Variable]:
    """What it takes to go on after a chunk, as the group `state` of its file."""
    state = np.frombuffer(pack_state(end, totals, running.to_arrays()), np.uint8)
    return {"state": Variable(("byte",), state)}


# HDF5 takes attributes of up to 64 KiB.
_LONGEST = 30_000


def _as_text(value: Any) -> str:
    """A strategy or settings as JSON, for whoever reads one chunk alone; the run itself goes on from its start."""
    text = codec.to_json(value, "settled")
    return (
        text
        if len(text) <= _LONGEST
        else json.dumps(f"{len(text)} characters, in the store's start")
    )


def _variable(name: str, values: np.ndarray, dims: Any) -> Variable:
    own = values.ndim - 2
    given = tuple(dims)[:own]
    given = (*given, *(f"{name}_dim_{axis}" for axis in range(len(given), own)))
    return Variable(("chain", "draw", *given), np.ascontiguousarray(values))
