"""Whether a run's draws can be taken for the posterior's: CONVERGED, UNDECIDED or NOT CONVERGED, and on what grounds.

A certificate says that chains obey their kernel; it says nothing of whether they have reached the posterior. That is judged
here from all unconstrained coordinates and the log density:

    NOT CONVERGED   a chain is not certified or never moves; R-hat above 1.1 in some coordinate; or the pooled chains of
                    warm-up disagreed (R-hat above 1.2) and too few chains were kept to show that this is over
    CONVERGED       R-hat at most 1.01, at least 400 effective draws in bulk and tails of every coordinate, warm-up had settled,
                    E-BFMI at least 0.3, less than one divergence in a thousand draws
    UNDECIDED       everything between, and runs too short to say

The limits of R-hat and of effective draws are those of Vehtari et al. (2021, arXiv:1903.08008), that of the E-BFMI is Stan's
(Betancourt 2016, arXiv:1604.00695). No diagnostic sees a mode that no chain has visited.
"""

import dataclasses
import enum
import warnings
from typing import Any

import jax
import numpy as np

from partime_mcmc.diagnostics import mixing
from partime_mcmc.diagnostics.arviz import STAT_NAMES
from partime_mcmc.diagnostics.values import frozen_chains, named_positions, thinned_draws

RHAT_GOOD, RHAT_BAD, RHAT_WARMUP_BAD = 1.01, 1.1, 1.2
ESS_GOOD = 400
EBFMI_GOOD = 0.3
DIVERGENCES_GOOD = 1e-3
# Fewer draws per chain say nothing; of more, so many are looked at; of more coordinates, so many of the worst.
_FEWEST_DRAWS, _MOST_DRAWS, _MOST_COORDINATES = 40, 10_000, 256
# Of very many numbers in all fewer draws are looked at, but so many.
_MOST_NUMBERS, _FEWEST_OF_MANY = 20_000_000, 1000


class Outcome(enum.Enum):
    """What a verdict says."""

    CONVERGED = "CONVERGED"
    UNDECIDED = "UNDECIDED"
    NOT_CONVERGED = "NOT CONVERGED"


class NotConvergedWarning(UserWarning):
    """A run's draws are not the posterior's."""


class NotConverged(RuntimeError):
    """Draws were asked to be the posterior's, and are not."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether draws can be taken for the posterior's.

    Attributes:
        outcome: CONVERGED, UNDECIDED or NOT CONVERGED.
        grounds: Why, one sentence each; those that decide come first.
        rhat: The largest R-hat; NaN if none could be had.
        ess: The smallest effective sample size, bulk or tail; NaN likewise.
    """

    outcome: Outcome
    grounds: tuple[str, ...]
    rhat: float = np.nan
    ess: float = np.nan

    @property
    def name(self) -> str:
        """The outcome's name."""
        return self.outcome.name

    def or_raise(self) -> None:
        """Nothing, unless the run has not converged.

        Raises:
            NotConverged: With the grounds.
        """
        if self.outcome is Outcome.NOT_CONVERGED:
            raise NotConverged(str(self))

    def warn(self, stacklevel: int = 2) -> None:
        """Say so where a run has not converged.

        Args:
            stacklevel: Whose line the warning names, as for `warnings.warn`.

        Warns:
            NotConvergedWarning: With the grounds.
        """
        if self.outcome is Outcome.NOT_CONVERGED:
            warnings.warn(str(self), NotConvergedWarning, stacklevel=stacklevel + 1)

    def __str__(self) -> str:
        return f"{self.outcome.value}: {'; '.join(self.grounds)}"


def judge(draws: Any) -> Verdict:
    """The verdict on a run.

    Args:
        draws: In memory or on disk. Of a run on disk the stored values are judged, since positions are not stored.
    """
    named, info = _judged(draws)
    bad, doubts, good = [], [], []
    _judge_chains(draws, bad)
    rhat = ess = np.nan
    num_draws = min((value.shape[1] for value in named.values()), default=0)
    if num_draws < _FEWEST_DRAWS:
        doubts.append(f"{num_draws} draws per chain are too few to judge (wanted {_FEWEST_DRAWS})")
    else:
        rhat, ess = _judge_mixing(named, bad, doubts, good)
    _judge_warmup(getattr(draws, "warmup", None), draws.num_chains, bad, doubts, good)
    _judge_energy(info, doubts)
    outcome = Outcome.NOT_CONVERGED if bad else Outcome.UNDECIDED if doubts else Outcome.CONVERGED
    return Verdict(outcome, tuple(bad + doubts + good), rhat, ess)


def _judged(draws: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values `(C, T, ...)` whose mixing is judged, thinned if they are many, and the last steps' energies and divergences.

    Of a run on disk nothing else is read.
    """
    named = named_positions(draws)
    if named:
        info = getattr(draws, "info", None) or {}
        num_chains, num_draws = next(iter(named.values())).shape[:2]
        size = sum(value[0, 0].size for value in named.values())
        most = min(_MOST_DRAWS, max(_FEWEST_OF_MANY, _MOST_NUMBERS // max(1, num_chains * size)))
        step = max(1, -(-num_draws // most))
        named = {name: value[:, ::step] for name, value in named.items()}
        density = info.get("logdensity")
    else:
        named, stats = thinned_draws(draws, _MOST_DRAWS), draws.sample_stats
        names = {name: STAT_NAMES.get(name, name) for name in ("logdensity", "diverging", "energy")}
        info = {ours: stats[theirs] for ours, theirs in names.items() if theirs in stats}
        density, num_kept = info.get("logdensity"), stats.sizes["draw"]
        step = max(1, -(-num_kept // _MOST_DRAWS))
    if density is not None:
        named["log density"] = np.asarray(density[:, ::step])
    return named, {
        name: np.asarray(info[name][:, -_MOST_DRAWS:])
        for name in ("diverging", "energy")
        if name in info
    }


def _judge_chains(draws: Any, bad: list[str]) -> None:
    certified = np.atleast_1d(np.asarray(draws.certificate.certified))
    if not certified.all():
        chains = np.flatnonzero(~certified).tolist()
        bad.append(f"chains {chains} do not obey their kernel (see the certificate)")
    # Of a run on disk the certificate knows, without reading all of it.
    known = draws.certificate.frozen if draws.positions is None else frozen_chains(draws)
    frozen = np.flatnonzero(np.asarray(known))
    if len(frozen):
        bad.append(f"chains {list(map(int, frozen))} never move, or not in some coordinate")


def _judge_mixing(
    named: dict[str, np.ndarray], bad: list[str], doubts: list[str], good: list[str]
) -> tuple[float, float]:
    """R-hat and effective sample sizes of the worst coordinates."""
    labels = [
        name + (f"[{', '.join(map(str, index))}]" if index else "")
        for name, value in named.items()
        for index in np.ndindex(value.shape[2:])
    ]
    x = np.concatenate([value.reshape(*value.shape[:2], -1) for value in named.values()], axis=2)
    # What is constant in every chain, at one value, is no coordinate (a simplex of one category, say).
    moving = np.flatnonzero((x != x[:1, :1]).any(axis=(0, 1)))
    if not moving.size:
        return np.nan, np.nan
    if moving.size > _MOST_COORDINATES:
        order = np.argsort(mixing.split_rhat(x[..., moving]))
        moving = moving[order[-_MOST_COORDINATES:]]
    x = x[..., moving]
    rhats, sizes = mixing.rank_rhat(x), np.minimum(mixing.ess_bulk(x), mixing.ess_tail(x))
    rhat, ess = float(rhats.max()), float(sizes.min())
    text = f"R-hat {rhat:.3f} at {labels[moving[rhats.argmax()]]} (wanted at most {RHAT_GOOD})"
    (bad if rhat > RHAT_BAD else doubts if rhat > RHAT_GOOD else good).append(text)
    text = f"{ess:,.0f} effective draws of {labels[moving[sizes.argmin()]]} (wanted {ESS_GOOD})"
    (doubts if ess < ESS_GOOD else good).append(text)
    return rhat, ess


def _judge_warmup(
    warmup: Any, num_chains: int, bad: list[str], doubts: list[str], good: list[str]
) -> None:
    """What the pooled chains of warm-up say, of which there are at least eight, however few are kept."""
    if warmup is None or not np.isfinite(warmup.rhat):
        if warmup is not None:
            doubts.append("warm-up was too short to show whether its chains agree")
        return
    text = f"the pooled chains of warm-up had R-hat {warmup.rhat:.2f} in its last window"
    if warmup.settled:
        good.append(text)
    elif warmup.rhat > RHAT_WARMUP_BAD and num_chains < 4:
        bad.append(text + ": they had not settled")
    else:
        doubts.append(text + ": they had not settled; allow it more steps")


def _judge_energy(info: Any, doubts: list[str]) -> None:
    """Divergences, and how slowly the energy changes against how widely it varies."""
    if "diverging" in info:
        share = float(np.mean(np.asarray(info["diverging"])))
        if share > DIVERGENCES_GOOD:
            doubts.append(f"{share:.1%} of the trajectories diverged: the posterior has a neck")
    if "energy" in info:
        energy = np.asarray(info["energy"], float)
        if energy.shape[1] >= _FEWEST_DRAWS and np.isfinite(energy).all() and energy.std() > 0:
            moved = np.square(np.diff(energy, axis=1)).mean(axis=1)
            lowest = float((moved / energy.var(axis=1)).min())
            if lowest < EBFMI_GOOD:
                doubts.append(f"E-BFMI {lowest:.2f} (wanted {EBFMI_GOOD}): heavy tails or a funnel")


def verdict_of(draws: Any) -> Verdict:
    """The verdict on draws; UNDECIDED where none is at hand: on another host, or before the first that thinning keeps."""
    on_disk = hasattr(draws, "thinning")
    if draws.num_samples < draws.thinning if on_disk else not jax.tree.leaves(draws.positions):
        return Verdict(Outcome.UNDECIDED, ("there are no draws here to judge",))
    return judge(draws)
