"""Runs on disk, whatever holds them: the folder of a stored run, or a NetCDF file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from partime_mcmc.diagnostics.arviz import summary_table
from partime_mcmc.diagnostics.reading import ReadDraws, draws_of, read_draws
from partime_mcmc.sampling.memory import default_max_bytes
from partime_mcmc.sampling.draws import Draws
from partime_mcmc.storage.stored_draws import StoredDraws, open_draws

_MOST_DRAWN = 10_000
# What a comparison, or a file that is written, makes of draws on its way.
_COPIES = 4


@dataclasses.dataclass(frozen=True)
class Run:
    """A run on disk.

    Attributes:
        title: What it is, in a sentence.
        rows: Its table, of all draws where statistics of all are there.
        totals: Totals of all draws, empty where nobody counted.
        certificate: Of all draws; None if there is none.
        report: How it went, as far as that is known.
        plan: What gives these draws again.
        names: The values worth showing; None: all.
        finished: Whether all draws that were asked for are there.
        load: Reads the draws that were kept.
        view: Reads as many of them as a picture can show, and says in a sentence which.
    """

    title: str
    rows: list[dict[str, Any]]
    totals: dict[str, Any]
    certificate: Any
    report: Any
    plan: dict[str, Any]
    names: tuple[str, ...] | None
    finished: bool
    load: Callable[[], Any]
    view: Callable[[], tuple[ReadDraws, list[str]]]

    @property
    def certified(self) -> bool:
        """Whether there is a certificate for every chain."""
        return self.certificate is not None and bool(np.all(self.certificate.certified))


def open_run(path: Path) -> Run:
    """A run in a folder or a file.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is no run, or a file too large to be read.
        StoreError: If it is a store without draws, or a damaged one.
    """
    if path.is_dir():
        return of_store(open_draws(path))
    if not path.exists():
        raise FileNotFoundError(f"there is neither a store nor a file at {path}")
    check_loading(str(path), path.stat().st_size)
    draws = read_draws(path)
    num_chains, num_draws = next(iter(draws.constrained.values())).shape[:2]
    title = f"{path}: {num_chains} chains of {num_draws:,} draws"
    return Run(
        title,
        summary_table(draws),
        {},
        draws.certificate,
        draws.report,
        draws.plan,
        None,
        True,
        lambda: draws,
        lambda: (draws, []),
    )


def of_store(stored: StoredDraws) -> Run:
    """A stored run; its draws stay where they are until they are asked for.

    Raises:
        StoreError: If it has no draws yet.
    """
    certificate, running = stored.certificate, stored.running
    rows = summary_table(_load(stored)) if running is None else running.summary()
    return Run(
        str(stored),
        rows,
        {} if running is None else running.totals(),
        certificate,
        stored.report,
        stored.plan,
        stored.names,
        stored.finished,
        lambda: _load(stored),
        lambda: _view(stored),
    )


def check_loading(name: str, num_bytes: int) -> None:
    """Refuse to read draws that memory cannot hold.

    Args:
        name: Of what holds them.
        num_bytes: All of them.

    Raises:
        ValueError: Naming what to change.
    """
    limit = default_max_bytes()
    if _COPIES * num_bytes > limit:
        raise ValueError(
            f"{name}: its kept draws are {num_bytes / 2**30:.3g} GiB, and comparing or writing them takes "
            f"{_COPIES} times as much; wanted at most {limit / 2**30:.3g} GiB: keep fewer with a larger "
            "thinning, or do without --compare and --out; `summary` needs no more memory than one chunk"
        )


def _load(stored: StoredDraws) -> Draws:
    check_loading(stored.path, stored.posterior.nbytes + stored.sample_stats.nbytes)
    return stored.load()


def _view(stored: StoredDraws) -> tuple[ReadDraws, list[str]]:
    stored.require_kept()
    kept = stored.posterior.sizes["draw"]
    step = max(1, -(-kept // _MOST_DRAWN))
    posterior, stats = (
        group.isel(draw=slice(None, None, step)).load()
        for group in (stored.posterior, stored.sample_stats)
    )
    draws = draws_of(posterior, dict(stats.data_vars), {})
    certificate = dataclasses.replace(stored.certificate, residual=draws.info["residual"])
    settled = stored.settled
    every = step * stored.thinning
    notes = (
        [f"Tables and certificate are of all draws, pictures of every {every}th."]
        if every > 1
        else []
    )
    notes += [] if stored.finished else ["The run is not finished."]
    return dataclasses.replace(
        draws,
        certificate=certificate,
        report=stored.report,
        plan=stored.plan,
        names=stored.names,
        warmup=settled.warmup or None,
        advice=settled.advice or None,
    ), notes
