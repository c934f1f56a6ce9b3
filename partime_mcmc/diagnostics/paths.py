"""Two runs step by step: do they share their random numbers, and are they the same path?

With states a, b of shape (C, T, D) and posterior sds s of shape (D,), all over coordinates j:

    distance[c, t] = max_j |a[c, t, j] - b[c, t, j]| / s[j]        an excursion: consecutive steps with distance > 1e-3.

Where rounding may flip accept decisions at a rate p a step (the mean difference of the two evaluators' acceptance
probabilities), n steps show a Poisson(p n) number of flips: more than its 99.9% quantile are no rounding. The paired
test wants means and sds to differ by at most 0.1 MCSE, which independent runs never achieve.

Left out: what follows from it (:mod:`partime_mcmc.diagnostics.compare`), and why a flip happened.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy import stats

from partime_mcmc.diagnostics import values as by_name
from partime_mcmc.diagnostics.report import PathComparison
from partime_mcmc.validation import describe

PATH_TOLERANCE = 1e-3  # posterior sd: how far a certified path may be from the exact one
# Ten times the largest |difference of acceptance probabilities| seen.
FLIPS_PER_STEP = {np.dtype(np.float64): 1e-11}
FLIPS_PER_STEP_ELSE = 5e-4  # the largest mean seen in healthy float32
MAX_PAIRED_SHIFT = 0.1  # MCSE
# Of a plan: what decides about random numbers and how they are used.
_NEEDED = ("key", "num_samples", "num_chains")
_ENTRIES = (*_NEEDED, "kernel", "coupling", "thinning", "num_warmup")


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two runs, ready for questions.

    Attributes:
        draws: the run itself.
        title: ``parallel`` or ``sequential``.
        leaves: states as drawn, (C, T, d) each: positions, or the constrained values where there are none.
        on_positions: whether they are positions.
        named: label -> scalar coordinate in the model's space, (C, T) float64.
        frozen: chains that never moved, (C,) bool.
        nonfinite: chains with a value that is not finite, (C,) bool.
    """

    draws: Any
    title: str
    leaves: list[np.ndarray]
    on_positions: bool
    named: dict[str, np.ndarray]
    frozen: np.ndarray
    nonfinite: np.ndarray

    @classmethod
    def of(cls, draws: Any, title: str) -> "Side":
        """Take in one run.

        Raises:
            TypeError: if it is no run.
            ValueError: if it holds no draws.
        """
        if not any(hasattr(draws, name) for name in ("constrained", "positions", "posterior")):
            raise TypeError(
                f"{title}: got {describe(draws)}, wanted the draws of a run, as sample returns them"
            )
        named = dict(by_name.coordinates(by_name.named_draws(draws)))
        positions = by_name.named_positions(draws)
        leaves = [
            leaf.reshape(*leaf.shape[:2], int(np.prod(leaf.shape[2:])))
            for leaf in (positions or by_name.named_draws(draws)).values()
        ]
        if not named or not next(iter(named.values())).size:
            raise ValueError(f"{title} holds no draws")
        values = [*leaves, *(x[..., None] for x in named.values())]
        nonfinite = np.any([~np.isfinite(value).all(axis=(1, 2)) for value in values], axis=0)
        return cls(
            draws, title, leaves, bool(positions), named, by_name.frozen_chains(draws), nonfinite
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.leaves[0].shape[:2]

    @property
    def states(self) -> np.ndarray:
        """(C, T, D) float64."""
        return np.concatenate([leaf.astype(np.float64) for leaf in self.leaves], axis=-1)

    def info(self, name: str) -> np.ndarray | None:
        """What the run recorded under ``name``, (C, T), or None; decisions may also lie in the certificate."""
        values = (getattr(self.draws, "info", None) or {}).get(name)
        if values is None and name == "accepted":
            values = getattr(getattr(self.draws, "certificate", None), name, None)
        return None if values is None or np.shape(values) != self.shape else np.asarray(values)


def plan_entry(side: Side, name: str) -> Any:
    """The plan's entry as a list of plain values, so that keys compare whatever holds them; None if there is none."""
    value = (getattr(side.draws, "plan", None) or {}).get(name)
    return None if value is None else np.asarray(value).ravel().tolist()


def _forms(side: Side) -> list[tuple[tuple[int, ...], np.dtype]]:
    return [(leaf.shape, leaf.dtype) for leaf in side.leaves]


def same_random_numbers(ours: Side, theirs: Side) -> bool:
    """Whether both plans name the same random numbers and the states have the same shapes and dtypes."""
    entries = {name: (plan_entry(ours, name), plan_entry(theirs, name)) for name in _ENTRIES}
    return _forms(ours) == _forms(theirs) and all(
        name not in _NEEDED if None in (a, b) else a == b for name, (a, b) in entries.items()
    )


def equal_bits(ours: Side, theirs: Side) -> np.ndarray:
    """Steps (C, T) whose states hold the same bits; none do in runs of different shapes or dtypes."""
    if _forms(ours) != _forms(theirs):
        return np.zeros(ours.shape, bool)
    same = np.ones(ours.shape, bool)
    for a, b in zip(ours.leaves, theirs.leaves, strict=True):
        bits = f"u{a.dtype.itemsize}"  # as integers, so that 0.0 is not -0.0
        same &= (np.ascontiguousarray(a).view(bits) == np.ascontiguousarray(b).view(bits)).all(
            axis=-1
        )
    return same


def compare_paths(ours: Side, theirs: Side, table: list[dict[str, Any]]) -> PathComparison:
    """Compare two runs that share their random numbers.

    Args:
        ours: the parallel run.
        theirs: the sequential run, of equal shapes and dtypes.
        table: rows with either side's ``mean`` and ``sd`` and the sequential run's MCSEs of both.
    """
    a, b, same = ours.states, theirs.states, equal_bits(ours, theirs)
    sd, size = b.std(axis=(0, 1)), np.abs(b).max(axis=(0, 1))
    # Magnitudes where there are too few draws for an sd.
    scale = np.where(sd > 0, sd, np.where(size > 0, size, 1.0))
    distance = (np.abs(a - b) / scale).max(axis=-1, initial=0.0)
    apart = distance > PATH_TOLERANCE
    starts = apart & ~np.pad(apart, ((0, 0), (1, 0)))[:, :-1]
    decisions = ours.info("accepted"), theirs.info("accepted")
    flips = None if decisions[0] is None or decisions[1] is None else decisions[0] != decisions[1]
    edges = int(starts.sum()) + (0 if flips is None else int((flips & ~apart).sum()))
    rate = FLIPS_PER_STEP.get(np.result_type(*ours.leaves), FLIPS_PER_STEP_ELSE)
    # The 99.9% quantile of a Poisson count.
    max_edges = int(stats.poisson.isf(1e-3, rate * apart.size))
    mean_shift, sd_shift = _shift(table, "mean", "mcse_mean"), _shift(table, "sd", "mcse_sd")
    paired_ok = max(mean_shift, sd_shift) <= MAX_PAIRED_SHIFT
    return PathComparison(
        tolerance=PATH_TOLERANCE,
        first_difference=np.where(same.all(axis=1), -1, (~same).argmax(axis=1)).tolist(),
        fraction_equal=same.mean(axis=1).tolist(),
        fraction_within=(~apart).mean(axis=1).tolist(),
        max_distance=distance.max(axis=1).tolist(),
        num_flips=[-1] * len(apart) if flips is None else flips.sum(axis=1).tolist(),
        num_excursions=starts.sum(axis=1).tolist(),
        longest_excursion=[_longest_run(chain) for chain in apart],
        num_unmerged=apart[:, -1].astype(int).tolist(),
        num_knife_edges=edges,
        max_knife_edges=max_edges,
        mean_shift=mean_shift,
        sd_shift=sd_shift,
        paired_ok=bool(paired_ok),
        ok=bool(paired_ok and edges <= max_edges and not apart[:, -1].any()),
    )


def _shift(table: list[dict[str, Any]], what: str, error: str) -> float:
    """Largest difference of ``what`` in the sequential run's MCSE; infinite where that is unknown and they differ."""
    worst = 0.0
    for row in table:
        difference = abs(row[f"{what}_parallel"] - row[f"{what}_sequential"])
        unit = row[f"{error}_sequential"]
        if unit > 0:
            worst = max(worst, difference / unit)
        # Less is nothing, however short the run.
        elif difference > PATH_TOLERANCE**2 * row["sd_sequential"]:
            worst = np.inf
    return float(worst)


def _longest_run(flags: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return int((edges[1::2] - edges[::2]).max(initial=0))
