"""Draws on disk as one object, without the model that made them.

    draws = open_draws("runs/schools")        while the run goes on, after it was killed, or when it is done
    draws.posterior["theta"].isel(draw=slice(-1000, None)).values

What is small is read at once: what was asked for, the certificate of all draws (those that thinning left out as well),
running statistics. Draws are read when they are looked at. Where a whole set of draws is wanted in memory, `load` gives
`Draws`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from partime_mcmc.diagnostics.arviz import STAT_NAMES, tree_of
from partime_mcmc.kernels import Certificate
from partime_mcmc.sampling.draws import Draws, RunReport
from partime_mcmc.storage.streaming_statistics import Fold, StreamingStatistics
from partime_mcmc.storage.chunks import Chunk, StoreError, damaged, intact, kept_steps
from partime_mcmc.storage.formats import format_of
from partime_mcmc.storage.layout import Folder
from partime_mcmc.storage.plan import Settled, Start
from partime_mcmc.storage.state import Totals, unpack_state
from partime_mcmc.solution import Status


@dataclasses.dataclass(frozen=True, eq=False)
class StoredDraws:
    """The draws of a stored run.

    Attributes:
        folder: Where they are.
        run: What was asked for: plain values and hashes.
        settled: What warm-up and advice chose; None before that.
        chunks: The files of draws.
        totals: What is known of all draws; None before the first.
        running: Running statistics of all draws; None before the first.
    """

    folder: Folder
    run: dict[str, Any]
    settled: Settled | None
    chunks: tuple[Chunk, ...]
    totals: Totals | None
    running: StreamingStatistics | None

    @property
    def path(self) -> str:
        """The folder."""
        return str(self.folder.path)

    @property
    def num_samples(self) -> int:
        """Draws per chain that are done, thinned out ones included."""
        return 0 if self.totals is None else self.totals.num_steps

    @property
    def finished(self) -> bool:
        """Whether all draws that were asked for are there."""
        return self.num_samples == self.run["num_samples"]

    @property
    def status(self) -> tuple[Status, ...]:
        """One verdict per chain; INTERRUPTED for good chains of a run that is not finished."""
        if self.totals is None:
            return (Status.INTERRUPTED,) * self.run["num_chains"]
        found = self.totals.report.status
        return (
            found
            if self.finished
            else tuple(Status.INTERRUPTED if one == Status.CONVERGED else one for one in found)
        )

    @property
    def certificate(self) -> Certificate:
        """Of all draws, thinned out ones included; `accepted` and `residual` are in `sample_stats`, and here empty.

        Raises:
            StoreError: If there are no draws yet.
        """
        return self._begun().certificate

    @property
    def report(self) -> RunReport:
        """How the run went, however often it was resumed; statuses as in `status`.

        Raises:
            StoreError: If there are no draws yet.
        """
        return dataclasses.replace(self._begun().report, status=self.status)

    @property
    def plan(self) -> dict[str, Any]:
        """What gives these draws again, in plain values."""
        chosen = (
            {}
            if self.settled is None
            else {
                "solver": repr(self.settled.solver),
                "schedule": repr(self.settled.schedule),
                "chunk": self.settled.chunk,
                "dice": repr(self.settled.dice),
                "num_warmup": self.settled.num_warmup,
            }
        )
        wanted = ("num_chains", "thinning", "kernel", "key")
        return (
            {name: self.run[name] for name in wanted} | chosen | {"num_samples": self.num_samples}
        )

    @property
    def warmup(self) -> None:
        """Of a stored run only numbers and sentences are kept: `settled`."""
        return None

    @property
    def thinning(self) -> int:
        """Of so many draws the last is kept."""
        return self.run["thinning"]

    @property
    def names(self) -> tuple[str, ...] | None:
        """The values worth showing; None: all."""
        return None if self.run["names"] is None else tuple(self.run["names"])

    @property
    def dims(self) -> dict[str, tuple[str, ...]] | None:
        """Axis names of values."""
        return (
            None
            if self.run["dims"] is None
            else {name: tuple(dims) for name, dims in self.run["dims"].items()}
        )

    @property
    def posterior(self) -> Any:
        """Kept draws in the model's space, an `xarray.Dataset` that reads what is looked at."""
        return self._dataset("posterior")

    @property
    def sample_stats(self) -> Any:
        """What the kernel said of kept draws, and their residuals, likewise."""
        return self._dataset("sample_stats")

    def to_arviz(self) -> Any:
        """Kept draws as ArviZ knows them, still on the disk.

        Returns:
            `arviz.InferenceData` with ArviZ 0.23, `xarray.DataTree` with ArviZ 1.x.
        """
        return tree_of(
            {"posterior": self.posterior, "sample_stats": self.sample_stats}, self.attributes()
        )

    def load(self) -> Draws:
        """Kept draws in memory; `positions`, `warmup` and `end` are not among what is stored for reading.

        Raises:
            StoreError: If no draws are kept yet, or a chunk is damaged.
        """
        self.require_kept()
        names = {theirs: ours for ours, theirs in STAT_NAMES.items()}
        stats = {
            names.get(name, name): one.values for name, one in self.sample_stats.data_vars.items()
        }
        certificate = dataclasses.replace(
            self.certificate, accepted=stats["accepted"], residual=stats["residual"]
        )
        constrained = {name: one.values for name, one in self.posterior.data_vars.items()}
        return Draws(
            None,
            constrained,
            stats,
            certificate,
            self.report,
            self.plan,
            None,
            self.dims,
            self.names,
        )

    def require_kept(self) -> None:
        """Refuse to read draws before there are any.

        Raises:
            StoreError: If there are no draws yet, or thinning has left out all there are.
        """
        self._begun()
        if not kept_steps(0, self.num_samples, self.thinning, self.run["num_samples"]).size:
            raise StoreError(
                f"store: {self.path} has {self.num_samples:,} draws per chain, and with thinning="
                f"{self.thinning} none of them is kept: resume(path, target, kernel) goes on with the run"
            )

    @functools.cached_property
    def constrained(self) -> dict[str, np.ndarray]:
        """Kept draws by name, in memory, `(C, T', ...)`."""
        return self.load().constrained

    def or_raise(self) -> StoredDraws:
        """These draws, if the run is finished and every chain certified, finite and moving.

        Raises:
            SolveError: Naming the first chain that is not, and why.
            StoreError: If there are no draws yet.
        """
        Draws(None, {}, {}, self.certificate, self.report, self.plan, None).or_raise()
        return self

    def attributes(self) -> dict[str, str | int | float]:
        """What is known of the run in strings and numbers."""
        found = {
            "inference_library": "partime_mcmc",
            "inference_library_version": self.run["versions"]["partime_mcmc"],
            "model": self.run["model"],
            "data": self.run["data"],
            "thinning": self.thinning,
            "finished": int(self.finished),
            "plan": json.dumps(self.plan),
            "versions": json.dumps(self.run["versions"]),
        }
        if self.totals is not None:
            found |= {
                "certified": int(np.all(self.certificate.certified)),
                "max_residual": float(np.max(self.certificate.max_residual)),
                "status": json.dumps([one.name for one in self.status]),
                "sampling_time": self.report.seconds_run,
            }
        return found

    def _dataset(self, group: str) -> Any:
        from partime_mcmc.storage.lazy import Pieces, lazy_dataset

        draws = kept_steps(0, self.num_samples, self.thinning, self.run["num_samples"])
        pieces = Pieces(
            list(self.chunks), self.thinning, self.run["num_samples"], self.run["num_chains"]
        )
        return lazy_dataset(pieces, group, draws, self.attributes())

    def _begun(self) -> Totals:
        if self.totals is None:
            raise StoreError(
                f"store: {self.path} has no draws yet: resume(path, target, kernel) goes on with the run"
            )
        return self.totals

    def __str__(self) -> str:
        done = f"{self.num_samples:,} of {self.run['num_samples']:,} draws of {self.run['num_chains']} chains"
        thinned = f", every {self.thinning}th kept" if self.thinning > 1 else ""
        if self.totals is None:
            return f"{done} in {self.path}"
        certified = int(np.sum(self.certificate.certified))
        verdicts = ", ".join(sorted({one.name for one in self.status}))
        return (
            f"{done}{thinned} in {self.path}: {verdicts}; {certified} chains certified, largest residual "
            f"{float(np.max(self.certificate.max_residual)):.1e} noise units, {self.report.evaluations_per_sample:.2f} "
            f"evaluations per draw, {len(self.report.fallbacks)} fallbacks"
        )


def open_draws(path: str | os.PathLike, *, folds: Mapping[str, Fold] | None = None) -> StoredDraws:
    """The draws of a stored run, finished or not, without its model; nobody is kept from writing.

    Args:
        path: The folder.
        folds: Functions of your own that the run accumulates, if you want to see where they stand.

    Raises:
        FileNotFoundError: If there is no stored run.
        StoreError: If its description or its last chunk is damaged, or of another version of the format.
    """
    folder, run = Folder(path), read_run(path)
    start = folder.read_start()
    chunks = folder.chunks()
    settled = None if start is None else Start.read(start).settled
    if not chunks:
        return StoredDraws(folder, run, settled, (), None, None)
    _, totals, running = read_state(chunks[-1])
    return StoredDraws(folder, run, settled, tuple(chunks), totals, restored(running, folds))


def read_run(path: str | os.PathLike) -> dict[str, Any]:
    """What was asked for in a stored run.

    Raises:
        FileNotFoundError: If there is no stored run.
        StoreError: If the description is damaged, or of another version of the format.
    """
    return Folder(path).read_run()


def read_state(chunk: Chunk) -> tuple[dict[str, np.ndarray], Totals, dict[str, np.ndarray]]:
    """The state after a chunk: all its arrays, totals, and running statistics as arrays.

    Raises:
        StoreError: If the chunk is damaged.
    """
    if not intact(chunk):
        raise damaged(chunk)
    found = format_of(chunk.path.suffix.removeprefix("."))
    return unpack_state(found.read(chunk.path, "state", "state").tobytes())


def restored(arrays: dict[str, np.ndarray], folds: Mapping[str, Fold] | None) -> StreamingStatistics | None:
    """Running statistics from a state; without the functions behind them, folds are left out."""
    if "header" not in arrays:
        return None
    if not folds:
        header = json.loads(arrays["header"].tobytes())
        arrays = arrays | {
            "header": np.frombuffer(json.dumps(header | {"folds": []}).encode(), np.uint8)
        }
    return StreamingStatistics.from_arrays(arrays, folds)
