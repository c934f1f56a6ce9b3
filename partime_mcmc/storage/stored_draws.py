"""Draws on disk as one object with the attributes of draws in memory, without the model that made them.

    draws = open_draws("runs/schools")        while the run goes on, after it was killed, or when it is done
    draws.posterior["theta"].isel(draw=slice(-1000, None)).values

What is small is read at once: what was asked for, the certificate of all draws (those that thinning left out as well),
streaming statistics. Draws are read when they are looked at. Where all of them are wanted in memory, `load` gives `Draws`.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.diagnostics.arviz import by_own_names, tree_of
from partime_mcmc.diagnostics.verdict import Verdict, verdict_of
from partime_mcmc.engine import Status
from partime_mcmc.extras import import_name
from partime_mcmc.sampling.chunk import ChainState, RunReport
from partime_mcmc.sampling.draws import Draws, certified_sentence, raise_unless_good
from partime_mcmc.storage.files import StoreError
from partime_mcmc.storage.saved_run import read_choices
from partime_mcmc.storage.store import Checkpoint, Folder, kept_steps
from partime_mcmc.storage.streaming_statistics import Fold, StreamingStatistics


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StoredDraws:
    """The draws of a stored run, as far as they are committed.

    Attributes:
        folder: The files.
        path: Where they are.
        run: What was asked for: plain values and hashes.
        saved_plan: What was chosen (`saved_run.read_choices`); empty before that.
        checkpoint: The newest; None before the first draws.
        digests: Of files of draws, by key.
        statistics: Streaming statistics of all draws; None before the first.
        num_samples: Draws per chain that are done, thinned out ones included.
        num_chains: C.
        thinning: Of so many draws the last is kept.
        finished: Whether all draws that were asked for are there.
        plan: Plain values that, with the same target and versions, give these draws again.
        state: Where the chains stand, with lists of leaves; None before warm-up is over.
        warmup_notes: What the warm-up said of itself; empty if there was none, or it is not over.
        names: The values worth showing; None: all.
        dims: Axis names of values.
        positions: None: unconstrained draws are not stored.
        warmup: None: of a stored run's warm-up only numbers and sentences are kept, in `saved_plan`.
        advice: None: only a run in memory knows its kernel.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import Target, mala, sample
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> draws = sample(jax.random.key(0), target, kernel, num_samples=1000, store="runs/normal")
        >>> draws.num_chains, draws.num_samples, draws.finished
        (4, 1000, True)
    """

    folder: Folder
    path: str
    run: dict[str, Any]
    saved_plan: dict[str, Any]
    checkpoint: Checkpoint | None
    digests: dict[str, str]
    statistics: StreamingStatistics | None
    num_samples: int
    num_chains: int
    thinning: int
    finished: bool
    plan: dict[str, Any]
    state: ChainState | None
    warmup_notes: str
    names: tuple[str, ...] | None
    dims: dict[str, tuple[str, ...]] | None

    positions = warmup = advice = None

    @property
    def status(self) -> tuple[Status, ...]:
        """One verdict per chain; INTERRUPTED for good chains of a run that is not finished."""
        if self.checkpoint is None:
            return (Status.INTERRUPTED,) * self.num_chains
        ended = Status.CONVERGED if self.finished else Status.INTERRUPTED
        found = self.checkpoint.report.status
        return tuple(ended if one == Status.CONVERGED else one for one in found)

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
        self._begun()
        sums = self.statistics.info if self.statistics else {}
        return sums.get("acceptance_rate", sums["accepted"]) / self.num_samples

    @functools.cached_property
    def verdict(self) -> Verdict:
        """Whether these draws can be taken for the posterior's, and why: judged by the values that are stored."""
        return verdict_of(self)

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
        return {str(name): one.values for name, one in self._kept("posterior").data_vars.items()}

    @property
    def info(self) -> dict[str, np.ndarray]:
        """What the kernel reports of kept draws, and their residuals, in memory, `(C, T')`; errors as `constrained`."""
        return {name: one.values for name, one in by_own_names(self._kept("sample_stats")).items()}

    def summary(self) -> list[dict[str, Any]]:
        """A row per coordinate, of all draws, from streaming statistics (`StreamingStatistics.summary`)."""
        return [] if self.statistics is None else self.statistics.summary()

    def to_arviz(self) -> Any:
        """Kept draws as ArviZ knows them, still on the disk.

        Returns:
            `arviz.InferenceData` with ArviZ 0.23, `xarray.DataTree` with ArviZ 1.x.
        """
        return tree_of(
            {"posterior": self.posterior, "sample_stats": self.sample_stats}, self.attributes()
        )

    def load(self) -> Draws:
        """Kept draws in memory; `positions` and `warmup` are not stored.

        Raises:
            StoreError: If no draws are kept yet, or a file is damaged.
        """
        info = self.info
        return Draws(
            None,
            self.constrained,
            info,
            dataclasses.replace(
                self.certificate, accepted=info["accepted"], residual=info["residual"]
            ),
            self.report,
            self.plan,
            dims=self.dims,
            names=self.names,
            state=self.state,
        )

    def or_raise(self) -> Self:
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
        open_group = import_name("a store", "storage.zarr_files", "open_group")
        found = open_group(self.folder.draws, self._begun(), self.digests, group)
        return found.assign_attrs(self.attributes())

    def _kept(self, group: str) -> Any:
        self._begun()
        if not kept_steps(0, self.num_samples, self.thinning, self.run["num_samples"]).size:
            raise StoreError(
                f"store: {self.path} has {self.num_samples:,} draws per chain, and with thinning="
                f"{self.thinning} none of them is kept: resume(path, target, kernel) goes on with the run"
            )
        return getattr(self, group)

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
        return (
            f"{done}{thinned} in {self.path}: {verdicts}; "
            f"{certified_sentence(self.certificate, self.report)}"
        )

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

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import Target, mala, open_draws, sample
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> _ = sample(jax.random.key(0), target, kernel, num_samples=1000, store="runs/normal")
        >>> open_draws("runs/normal").posterior["x"].shape
        (4, 1000)
    """
    folder = Folder(path)
    run, plan = folder.read_run(), folder.read_plan()
    saved_plan = {} if plan is None else read_choices(plan, str(folder.path))
    checkpoint, digests = folder.newest()
    statistics = None
    if checkpoint is not None:
        statistics = StreamingStatistics.from_arrays(checkpoint.statistics, folds or None)
    num_samples = checkpoint.step if checkpoint else 0
    return StoredDraws(
        folder=folder,
        path=str(folder.path),
        run=run,
        saved_plan=saved_plan,
        checkpoint=checkpoint,
        digests=digests,
        statistics=statistics,
        num_samples=num_samples,
        num_chains=run["num_chains"],
        thinning=run["thinning"],
        finished=num_samples == run["num_samples"],
        plan=saved_plan.get("plan", {}) | {"num_samples": num_samples},
        state=checkpoint.state if checkpoint else saved_plan.get("state"),
        warmup_notes=saved_plan.get("choices", {}).get("warmup_notes", ""),
        names=run["names"] and tuple(run["names"]),
        dims=run["dims"] and {name: tuple(axes) for name, axes in run["dims"].items()},
    )


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
