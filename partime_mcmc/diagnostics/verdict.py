"""Whether a run's draws can be taken for the posterior's: CONVERGED, UNDECIDED or NOT CONVERGED, and on what grounds.

A certificate says that chains obey their kernel; it says nothing of whether they have reached the posterior. That is judged
here from all unconstrained coordinates and the log density:

    NOT CONVERGED   a chain is not certified or never moves; R-hat above 1.1 in some coordinate; or the pooled chains of
                    warm-up disagreed (R-hat above 1.2) and too few chains were kept to show that this is over
    CONVERGED       R-hat at most 1.01, at least 400 effective draws in bulk and tails of every coordinate, warm-up had settled,
                    E-BFMI at least 0.3, less than one divergence in a thousand draws, proposals accepted in the tails of every
                    coordinate at least half as often as elsewhere, draws in accord with the density's gradient
    UNDECIDED       everything between, and runs too short to say

R-hat and effective sizes ask whether chains have settled, not on what: a kernel with a wrong acceptance ratio settles on another
law. For draws of a smooth density p on unconstrained space Stein's identity says, with g = ∇ log p and any m,

    E g_j = 0,      E [1 + (x_j − m_j) g_j] = 0,

which is looked at in some draws in memory, coordinate by coordinate and summed over coordinates, in Monte Carlo standard errors.
It fails, too, where the density has a jump or a border, which no transformation took away: hence a doubt, not a verdict.

The limits of R-hat and of effective draws are those of Vehtari et al. (2021, arXiv:1903.08008), that of the E-BFMI is Stan's
(Betancourt 2016, arXiv:1604.00695); Stein's identity as a test of samplers is from Gorham & Mackey (2015, arXiv:1506.03039).
No diagnostic sees a mode that no chain has visited; pairs of chains from far-apart starts that do not meet may show one
(`partime_mcmc.convergence`).
"""

import dataclasses
import enum
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from scipy.special import ndtri

from partime_mcmc.diagnostics import mixing
from partime_mcmc.diagnostics.arviz import by_own_names
from partime_mcmc.diagnostics.values import (
    as_coordinates,
    frozen_chains,
    named_positions,
    thinned_draws,
)

RHAT_GOOD, RHAT_BAD, RHAT_WARMUP_BAD = 1.01, 1.1, 1.2
ESS_GOOD = 400
NESTED_RHAT_GOOD = 1.01
_DISTANCE_GOOD = 0.01
# Chance that draws of the right law are doubted by Stein's identity, were its errors normal; and the share of a run's draws
# at which gradients are taken, with the fewest and the most.
_STEIN_LEVEL, _STEIN_SHARE, _STEIN_DRAWS = 1e-5, 4, (400, 4000)
EBFMI_GOOD = 0.3
DIVERGENCES_GOOD = 1e-3
# How often proposals from the tails of a coordinate must be accepted against all others; which share of the draws, and how many
# at least, a tail is; and by how many standard errors a lower rate must show.
TAIL_ACCEPTANCE_GOOD = 0.5
_TAIL_SHARE, _TAIL_DRAWS, _TAIL_ERRORS = 0.01, 40, 5
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


_NOTHING = Verdict(Outcome.UNDECIDED, ("there are no draws here to judge",))


def judge(draws: Any, superchains: Any = None, coupling: Any = None) -> Verdict:
    """The verdict on a run.

    Args:
        draws: In memory or on disk. Of a run on disk the stored values are judged, since positions are not stored.
        superchains: For many short chains of which several started at the same point: the number of the start of each chain,
            shape `(C,)`. Then a nested R-hat is judged as well, and of chains that are too short for the others alone.
            Where every chain has a start of its own, as after warm-up, there are no superchains: leave it None.
        coupling: What `convergence` found for the run's kernel, as a ground more: a doubt if pairs did not meet, or if their
            bound is still above 0.01 after as many steps as the run's chains made.

    Raises:
        ValueError: If there are fewer than two superchains, they differ in size, or have one chain each.
    """
    named, info = _judged(draws)
    bad, doubts, good = [], [], []
    _judge_chains(draws, bad)
    rhat = ess = np.nan
    num_draws = min((value.shape[1] for value in named.values()), default=0)
    if superchains is not None:
        _judge_superchains(named, np.asarray(superchains), bad, doubts, good)
    if superchains is None or num_draws >= _FEWEST_DRAWS:
        rhat, ess = _judge_mixing(named, bad, doubts, good)
    elif draws.num_chains < ESS_GOOD:
        doubts.append(
            f"{draws.num_chains} chains of {num_draws} draws count for one effective draw each (wanted {ESS_GOOD})"
        )
    _judge_warmup(getattr(draws, "warmup", None), draws.num_chains, bad, doubts, good)
    if coupling is not None:
        steps = coupling.steps_until(_DISTANCE_GOOD)
        (good if steps <= draws.num_samples else doubts).append(str(coupling).rstrip("."))
    _judge_energy(info, doubts)
    memory = getattr(getattr(draws, "report", None), "memory", None)
    if memory is not None:
        good.append(
            f"restarted from its first state at later times, each chain was back on its path within {memory} steps"
        )
    if num_draws >= _FEWEST_DRAWS and not bad:
        _judge_acceptance(draws, doubts)
        _judge_gradients(draws, doubts, good)
    return _verdict(bad, doubts, good, rhat, ess)


def judge_values(values: Mapping[str, np.ndarray], info: Mapping[str, np.ndarray]) -> Verdict:
    """The verdict on draws of another sampler, of which nothing is known but themselves.

    Args:
        values: Named values, `(C, T, ...)`, of any coordinates; integers too.
        info: Of `diverging` and `energy`, `(C, T)`, those that there are.

    Returns:
        A verdict from R-hat, effective sample sizes, divergences and E-BFMI.
    """
    if not values:
        return _NOTHING
    bad, doubts, good = [], [], []
    named = _thinned({name: np.asarray(value, float) for name, value in values.items()})
    rhat, ess = _judge_mixing(named, bad, doubts, good)
    _judge_energy(info, doubts)
    return _verdict(bad, doubts, good, rhat, ess)


def _verdict(
    bad: list[str], doubts: list[str], good: list[str], rhat: float, ess: float
) -> Verdict:
    outcome = Outcome.NOT_CONVERGED if bad else Outcome.UNDECIDED if doubts else Outcome.CONVERGED
    return Verdict(outcome, tuple(bad + doubts + good), rhat, ess)


def _thinned(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values `(C, T, ...)`, thinned if they are many."""
    num_chains, num_draws = next(iter(named.values())).shape[:2]
    size = sum(np.prod(value.shape[2:], dtype=int) for value in named.values())
    most = min(_MOST_DRAWS, max(_FEWEST_OF_MANY, _MOST_NUMBERS // max(1, num_chains * size)))
    step = max(1, -(-num_draws // most))
    return {name: value[:, ::step] for name, value in named.items()}


def _judged(draws: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values `(C, T, ...)` whose mixing is judged, thinned if they are many, and the last steps' energies and divergences.

    Of a run on disk nothing else is read.
    """
    named = named_positions(draws)
    if named:
        info = getattr(draws, "info", None) or {}
        density = info.get("logdensity")
        if density is not None:
            named["log density"] = np.asarray(density)
        named = _thinned(named)
    else:
        named, info = thinned_draws(draws, _MOST_DRAWS), by_own_names(draws.sample_stats)
        density = info.get("logdensity")
        if density is not None:
            step = max(1, -(-density.sizes["draw"] // _MOST_DRAWS))
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


def _judge_superchains(
    named: dict[str, np.ndarray],
    superchains: np.ndarray,
    bad: list[str],
    doubts: list[str],
    good: list[str],
) -> None:
    """Nested R-hat of the second half of each chain; its limit allows for the M chains of a superchain."""
    labels, x = as_coordinates(named)
    found = mixing.nested_rhat(x[:, x.shape[1] // 2 :], superchains)
    moving = np.isfinite(found) | (x != x[:1, :1]).any(axis=(0, 1))
    worst = np.flatnonzero(moving)[found[moving].argmax()] if moving.any() else 0
    num_superchains = len(np.unique(superchains))
    # Where starts are forgotten B/W is 1/M, with a relative error of √(2/(K−1)), of which two are allowed.
    per = len(superchains) // num_superchains
    limit = np.sqrt(NESTED_RHAT_GOOD**2 + (1 + 2 * np.sqrt(2 / (num_superchains - 1))) / per)
    text = f"nested R-hat {found[worst]:.3f} at {labels[worst]} (wanted at most {limit:.3f})"
    is_bad = found[worst] ** 2 > limit**2 + RHAT_BAD**2 - 1
    (bad if is_bad else doubts if found[worst] > limit else good).append(text)


def _judge_gradients(draws: Any, doubts: list[str], good: list[str]) -> None:
    """Whether draws and gradients obey Stein's identity.

    Says nothing where the density is not at hand (runs on disk), cannot be differentiated, or has too many coordinates.
    """
    scores = getattr(draws, "scores", None)
    if scores is None:
        return
    leaves = jax.tree.leaves(draws.positions)
    num_chains, num_draws = leaves[0].shape[:2]
    fewest, most = _STEIN_DRAWS
    if fewest * sum(np.prod(leaf.shape[2:], dtype=int) for leaf in leaves) > _MOST_NUMBERS:
        return
    wanted = max(fewest, min(most, num_chains * num_draws // _STEIN_SHARE))
    step = max(1, num_chains * num_draws // wanted)
    some = jax.tree.map(lambda leaf: np.concatenate(np.asarray(leaf)[:, ::step]), draws.positions)
    try:
        x, gradient = (
            np.asarray(part, float).reshape(num_chains, -1, part.shape[-1]) for part in scores(some)
        )
    except Exception:  # whatever a density raises that cannot be differentiated, or not at a batch
        return
    if not np.isfinite(gradient).all():
        return
    second = 1 + (x - x.mean(axis=(0, 1))) * gradient
    terms = np.concatenate([gradient, second, second.sum(axis=2, keepdims=True)], axis=2)
    size = x.shape[0] * x.shape[1]
    moving = np.ptp(terms, axis=(0, 1)) > 0
    terms = terms[..., moving]
    # Effective sizes above the number of draws are not believed here: they would make errors smaller.
    error = terms.std(axis=(0, 1)) / np.sqrt(np.minimum(mixing.ess_mean(terms), size))
    score = np.abs(terms.mean(axis=(0, 1))) / error
    limit = -ndtri(_STEIN_LEVEL / 2 / len(score))
    worst = int(score.argmax())
    names = as_coordinates(named_positions(draws))[0]
    names = [*names, *(f"the spread of {name}" for name in names), "the spread of all coordinates"]
    name = np.array(names, object)[moving][worst]
    text = (
        f"{score[worst]:.1f} standard errors off in Stein's identity at {name} (wanted {limit:.1f})"
    )
    if score[worst] > limit:
        text += ": a wrong acceptance ratio, or a density with a jump or border"
    (doubts if score[worst] > limit else good).append(text)


def _judge_mixing(
    named: dict[str, np.ndarray], bad: list[str], doubts: list[str], good: list[str]
) -> tuple[float, float]:
    """R-hat and effective sample sizes of the worst coordinates; NaN of too few draws."""
    num_draws = min((value.shape[1] for value in named.values()), default=0)
    if num_draws < _FEWEST_DRAWS:
        doubts.append(f"{num_draws} draws per chain are too few to judge (wanted {_FEWEST_DRAWS})")
        return np.nan, np.nan
    labels, x = as_coordinates(named)
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


def _judge_acceptance(draws: Any, doubts: list[str]) -> None:
    """Whether proposals are accepted in the tails of each coordinate as they are elsewhere.

    Where a posterior narrows, as a funnel does, steps that suit its wide part are refused; chains hardly enter, and what lies beyond
    is missing from draws that agree with each other. Says nothing of runs on disk, and of kernels that report no acceptance.
    """
    rates = (getattr(draws, "info", None) or {}).get("acceptance_rate")
    named = named_positions(draws)
    if rates is None or not named or sum(one.size for one in named.values()) > _MOST_NUMBERS:
        return
    labels, x = as_coordinates(named)
    rates = np.nan_to_num(np.asarray(rates, float))
    # A proposal belongs to the state that it was made from, the draw before.
    rates, before = rates[:, 1:].ravel(), x[:, :-1].reshape(-1, x.shape[2])
    count = max(_TAIL_DRAWS, int(_TAIL_SHARE * len(rates)))
    if len(rates) < 2 * count:
        return
    order = np.argpartition(before, [count - 1, len(before) - count], axis=0)
    tails = np.stack([rates[order[:count]].mean(axis=0), rates[order[-count:]].mean(axis=0)])
    side, worst = np.unravel_index(tails.argmin(), tails.shape)
    lowest, mean = float(tails[side, worst]), float(rates.mean())
    error = rates.std() / np.sqrt(count)
    if lowest < TAIL_ACCEPTANCE_GOOD * mean and mean - lowest > _TAIL_ERRORS * error:
        doubts.append(
            f"proposals are accepted with probability {lowest:.2f} where {labels[worst]} is {('lowest', 'highest')[side]}, "
            f"{mean:.2f} elsewhere: the posterior narrows there, and what lies beyond may be missing"
        )


def verdict_of(draws: Any) -> Verdict:
    """The verdict on draws; UNDECIDED where none is at hand: on another host, or before the first that thinning keeps."""
    on_disk = hasattr(draws, "thinning")
    if draws.num_samples < draws.thinning if on_disk else not jax.tree.leaves(draws.positions):
        return _NOTHING
    return judge(draws)
