"""Draws on disk as one object with the attributes of draws in memory, without the model that made them.

    draws = open_draws("runs/schools")        while the run goes on, after it was killed, or when it is done
    draws.posterior["theta"].isel(draw=slice(-1000, None)).values

What is small is read at once: what was asked for, the certificate of all draws (those that thinning left out as well),
streaming statistics. Draws are read when they are looked at. Where all of them are wanted in memory, `load` gives `Draws`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.diagnostics.arviz import STAT_NAMES, tree_of
from partime_mcmc.engine import Status
from partime_mcmc.sampling.chunk import ChainState, RunReport
from partime_mcmc.sampling.draws import Draws, certified_sentence, raise_unless_good
from partime_mcmc.storage.checkpoint import Checkpoint
from partime_mcmc.storage.draws_group import kept_steps, open_group
from partime_mcmc.storage.files import StoreError
from partime_mcmc.storage.saved_plan import leaves_state, read_choices
from partime_mcmc.storage.store import Folder
from partime_mcmc.storage.streaming_statistics import Fold, StreamingStatistics, without_folds

_OUR_NAMES = {theirs: ours for ours, theirs in STAT_NAMES.items()}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StoredDraws:
    """The draws of a stored run, as far as they are committed.

    Attributes:
        folder: Where they are.
        run: What was asked for: plain values and hashes.
        saved_plan: What was chosen (`saved_plan.read_choices`); empty before that.
        checkpoint: The newest; None before the first draws.
        digests: Of files of draws, by key.
        statistics: Streaming statistics of all draws; None before the first.
    """

    folder: Folder
    run: dict[str, Any]
    saved_plan: dict[str, Any]
    checkpoint: Checkpoint | None
    digests: dict[str, str]
    statistics: StreamingStatistics | None

    positions = None
    """Unconstrained draws are not stored."""
    warmup = None
    """Of a stored run's warm-up only numbers and sentences are kept: `saved_plan`."""
    advice = None
    """Only a run in memory knows its kernel."""

    @property
    def path(self) -> str:
        """The folder."""
        return str(self.folder.path)

    @property
    def num_samples(self) -> int:
        """Draws per chain that are done, thinned out ones included."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def num_chains(self) -> int:
        """C."""
        return self.run["num_chains"]

    @property
    def thinning(self) -> int:
        """Of so many draws the last is kept."""
        return self.run["thinning"]

    @property
    def finished(self) -> bool:
        """Whether all draws that were asked for are there."""
        return self.num_samples == self.run["num_samples"]

    @property
    def status(self) -> tuple[Status, ...]:
        """One verdict per chain; INTERRUPTED for good chains of a run that is not finished."""
        if self.checkpoint is None:
            return (Status.INTERRUPTED,) * self.num_chains
        found = self.checkpoint.report.status
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
    def mean_acceptance(self) -> np.ndarray:
        """Mean acceptance probability of each chain, shape `(C,)`, or the share of steps accepted where that is all there is.

        Raises:
            StoreError: If there are no draws yet.
        """
        sums = self.statistics.info if self.statistics else {}
        return sums.get("acceptance_rate", sums["accepted"]).sum / self.num_samples

    @property
    def plan(self) -> dict[str, Any]:
        """Plain values that, with the same target and versions, give these draws again."""
        return self.saved_plan.get("plan", {}) | {"num_samples": self.num_samples}

    @property
    def state(self) -> ChainState | None:
        """Where the chains stand, with lists of leaves; None before warm-up is over."""
        if self.checkpoint is None:
            return self.saved_plan.get("state")
        return leaves_state(self.checkpoint.state, self.checkpoint.words)

    @property
    def warmup_notes(self) -> str:
        """What the warm-up said of itself; empty if there was none, or it is not over."""
        return self.saved_plan.get("choices", {}).get("warmup_notes", "")

    @property
    def names(self) -> tuple[str, ...] | None:
        """The values worth showing; None: all."""
        return None if self.run["names"] is None else tuple(self.run["names"])

    @property
    def dims(self) -> dict[str, tuple[str, ...]] | None:
        """Axis names of values."""
        dims = self.run["dims"]
        return None if dims is None else {name: tuple(axes) for name, axes in dims.items()}

    @functools.cached_property
    def posterior(self) -> Any:
        """Kept draws in the model's space, an `xarray.Dataset` that reads what is looked at.

        Raises:
            StoreError: If there are no draws yet; when draws are read, if a file is damaged.
        """
        return self._dataset("posterior")

    @functools.cached_property
    def sample_stats(self) -> Any:
        """What the kernel reports of kept draws, and their residuals, likewise, by ArviZ's names."""
        return self._dataset("sample_stats")

    @property
    def constrained(self) -> dict[str, np.ndarray]:
        """Kept draws by name, in memory, `(C, T', ...)`.

        Raises:
            StoreError: If no draws are kept yet, or a file is damaged.
        """
        self.require_kept()
        return {name: one.values for name, one in self.posterior.data_vars.items()}

    @property
    def info(self) -> dict[str, np.ndarray]:
        """What the kernel reports of kept draws, and their residuals, in memory, `(C, T')`; errors as `constrained`."""
        self.require_kept()
        stats = self.sample_stats.data_vars.items()
        return {_OUR_NAMES.get(name, str(name)): one.values for name, one in stats}

    def summary(self) -> list[dict[str, Any]]:
        """A row per coordinate, of all draws, from streaming statistics (`StreamingStatistics.summary`)."""
        return [] if self.statistics is None else self.statistics.summary()

    def to_arviz(self) -> Any:
        """Kept draws as ArviZ knows them, still on the disk.

        Returns:
            `arviz.InferenceData` with ArviZ 0.23, `xarray.DataTree` with ArviZ 1.x.
        """
        groups = {"posterior": self.posterior, "sample_stats": self.sample_stats}
        return tree_of(groups, self.attributes())

    def load(self) -> Draws:
        """Kept draws in memory; `positions` and `warmup` are not stored.

        Raises:
            StoreError: If no draws are kept yet, or a file is damaged.
        """
        info = self.info
        steps = {name: info[name] for name in ("accepted", "residual")}
        return Draws(
            None,
            self.constrained,
            info,
            dataclasses.replace(self.certificate, **steps),
            self.report,
            self.plan,
            dims=self.dims,
            names=self.names,
            state=self.state,
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

    def or_raise(self) -> StoredDraws:
        """These draws, if the run is finished and every chain certified, finite and moving.

        Raises:
            SolveError: Naming the first chain that is not, and why.
            StoreError: If there are no draws yet.
        """
        raise_unless_good(self.report.status, self.certificate)
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
        if self.checkpoint is not None:
            found |= {
                "certified": int(np.all(self.certificate.certified)),
                "max_residual": float(np.max(self.certificate.max_residual)),
                "status": json.dumps([one.name for one in self.status]),
                "sampling_time": self.report.seconds_run,
            }
        return found

    def _dataset(self, group: str) -> Any:
        found = open_group(self.folder.draws, self._begun(), self.digests, group)
        return found.assign_attrs(self.attributes())

    def _begun(self) -> Checkpoint:
        if self.checkpoint is None:
            raise StoreError(
                f"store: {self.path} has no draws yet: resume(path, target, kernel) goes on with the run"
            )
        return self.checkpoint

    def __str__(self) -> str:
        done = (
            f"{self.num_samples:,} of {self.run['num_samples']:,} draws of {self.num_chains} chains"
        )
        thinned = f", every {self.thinning}th kept" if self.thinning > 1 else ""
        if self.checkpoint is None:
            return f"{done} in {self.path}"
        verdicts = ", ".join(sorted({one.name for one in self.status}))
        sentence = certified_sentence(self.certificate, self.report)
        return f"{done}{thinned} in {self.path}: {verdicts}; {sentence}"

    def __repr__(self) -> str:
        return f"StoredDraws({self})"


def open_draws(path: str | os.PathLike, *, folds: Mapping[str, Fold] | None = None) -> StoredDraws:
    """The draws of a stored run, finished or not, without its model; nobody is kept from writing.

    Args:
        path: The folder.
        folds: Functions of your own that the run accumulates, if you want to see where they stand.

    Raises:
        FileNotFoundError: If there is no stored run.
        StoreError: If its description or its newest checkpoint is damaged, or of another version of the format.
    """
    folder = Folder(path)
    run, plan = folder.read_run(), folder.read_plan()
    saved_plan = {} if plan is None else read_choices(plan, str(folder.path))
    checkpoint, digests = folder.newest()
    statistics = None
    if checkpoint is not None:
        arrays = checkpoint.statistics if folds else without_folds(checkpoint.statistics)
        statistics = StreamingStatistics.from_arrays(arrays, folds)
    return StoredDraws(folder, run, saved_plan, checkpoint, digests, statistics)


def concat_draws(draws: Iterable[Any]) -> Any:
    """The chains of several runs of one model as one, numbered on: of hosts or sessions that each kept their own.

    Args:
        draws: In memory or stored (`map(open_draws, paths)`); all of them are read. Draws that only some of the runs have
            are left out.

    Returns:
        `arviz.InferenceData` with ArviZ 0.23, `xarray.DataTree` with ArviZ 1.x.

    Raises:
        ValueError: If there are none, or they hold different values.
    """
    import xarray

    draws = list(draws)
    if not draws:
        raise ValueError("draws: got none, wanted at least one run")
    groups = {}
    for name in ("posterior", "sample_stats"):
        parts = [getattr(one, name) for one in draws]
        if len({frozenset(part.data_vars) for part in parts}) > 1:
            raise ValueError(f"draws: the runs have different values in {name}, wanted the same")
        found = xarray.concat(
            parts,
            "chain",
            data_vars="all",
            coords="minimal",
            compat="override",
            join="inner",
            combine_attrs="drop_conflicts",
        )
        groups[name] = found.assign_coords(chain=np.arange(found.sizes["chain"]))
    return tree_of(groups, groups["posterior"].attrs)
