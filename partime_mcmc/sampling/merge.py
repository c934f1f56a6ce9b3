"""Pieces of a run put together: certificates, reports and draws of consecutive stretches of the same chains.

Of two stretches a and b, b after a: counts add up, bounds take the worse one, verdicts hold if both do. Only a run of
rejections that crosses the border between them is counted on either side and not in one piece, and of close calls those
count that are known: a stretch without rejections does not tell. Of parts that devices have certified beside each other more
is known, and runs of rejections are counted through their borders. Everything here is on the host.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from partime_mcmc.kernels import Certificate
from partime_mcmc.kernels.certificate import FEWEST_TO_FREEZE
from partime_mcmc.sampling.draws import Draws, RunReport
from partime_mcmc.solution import Status

# A run that falls back in every stretch must not fill the memory with sentences about it.
_MOST_SENTENCES = 200


def join_certificates(first: Certificate, then: Certificate) -> Certificate:
    """The certificate of two consecutive stretches, fields `(C,)`; `accepted` and `residual`, `(C, T)`, one after the other.

    Args:
        first: Of the earlier stretch.
        then: Of the later one.
    """
    a, b = (jax.tree.map(np.asarray, one) for one in (first, then))
    worse = ~(b.max_residual <= a.max_residual) & ~np.isnan(
        a.max_residual
    )  # NaN is worse than any number
    steps = a.num_steps + b.num_steps
    still = (a.longest_rejection == a.num_steps) & (b.longest_rejection == b.num_steps)

    def total(name):
        """A sum of counts; −1 where one of them is not known."""
        one, other = getattr(a, name), getattr(b, name)
        return np.where((one < 0) | (other < 0), -1, one.astype(np.int64) + other)

    return Certificate(
        certified=a.certified & b.certified,
        max_residual=np.where(worse, b.max_residual, a.max_residual),
        worst_step=np.where(worse, a.num_steps + b.worst_step, a.worst_step),
        tolerance=np.maximum(a.tolerance, b.tolerance),
        num_steps=steps,
        finite=a.finite & b.finite,
        frozen=still & (steps >= FEWEST_TO_FREEZE),
        num_rejected=total("num_rejected"),
        longest_rejection=np.where(
            still, steps, np.maximum(a.longest_rejection, b.longest_rejection)
        ),
        num_nonfinite_proposals=total("num_nonfinite_proposals"),
        num_ambiguous=_close_calls(a, b, total("num_ambiguous")),
        min_margin=np.fmin(a.min_margin, b.min_margin),
        min_lattice_margin=np.fmin(a.min_lattice_margin, b.min_lattice_margin),
        discrete_consistent=a.discrete_consistent & b.discrete_consistent,
        independent=a.independent & b.independent,
        accepted=np.concatenate([a.accepted, b.accepted], axis=1),
        residual=np.concatenate([a.residual, b.residual], axis=1),
    )


def _close_calls(a: Certificate, b: Certificate, both: np.ndarray) -> np.ndarray:
    """`num_ambiguous` of two stretches: of one alone, where the other has no rejections that would tell."""
    silent, quiet = ((one.num_ambiguous < 0) & (one.num_rejected == 0) for one in (a, b))
    return np.where(silent, b.num_ambiguous, np.where(quiet, a.num_ambiguous, both))


def without_steps(certificate: Certificate) -> Certificate:
    """The certificate on the host without what it says of each step: `accepted` and `residual` have shape `(C, 0)`."""
    certificate = jax.tree.map(np.asarray, certificate)
    return dataclasses.replace(
        certificate,
        accepted=certificate.accepted[:, :0],
        residual=certificate.residual[:, :0],
        num_steps=certificate.num_steps.astype(np.int64),
        worst_step=certificate.worst_step.astype(np.int64),
    )


def join_reports(
    first: RunReport, then: RunReport, steps: tuple[int, int], certificate: Certificate
) -> RunReport:
    """The report of two consecutive stretches.

    Args:
        first: Of the earlier stretch.
        then: Of the later one.
        steps: Of either.
        certificate: Of both together.
    """
    share, frozen = steps[1] / max(sum(steps), 1), certificate.frozen & certificate.certified
    # Whether a chain stands still throughout is for the certificate of both to say.
    moving = [
        [Status.CONVERGED if one == Status.FROZEN else one for one in report.status]
        for report in (first, then)
    ]
    status = tuple(
        Status.FROZEN if still and s == Status.CONVERGED else s
        for still, s in zip(frozen, [b if a == Status.CONVERGED else a for a, b in zip(*moving)])
    )
    said = (*first.fallbacks, *then.fallbacks)
    if len(said) > _MOST_SENTENCES:
        said = (
            *said[: _MOST_SENTENCES - 1],
            "... and more: num_sequential counts all steps that were finished sequentially",
        )
    summed = {
        name: getattr(first, name) + getattr(then, name)
        for name in (
            "iterations",
            "depth",
            "num_sequential",
            "seconds_advise",
            "seconds_compile",
            "seconds_run",
            "seconds_certify",
        )
    }
    parts = tuple(
        _between(a, b, share) for a, b in zip(first.evaluations_by_part, then.evaluations_by_part)
    )
    return dataclasses.replace(
        first,
        status=status,
        fallbacks=said,
        evaluations_by_part=parts,
        interrupted=then.interrupted,
        evaluations_per_sample=_between(
            first.evaluations_per_sample, then.evaluations_per_sample, share
        ),
        jvps_per_sample=_between(first.jvps_per_sample, then.jvps_per_sample, share),
        **summed,
    )


def join_draws(pieces: list[Draws]) -> Draws:
    """The draws of consecutive stretches as one.

    Args:
        pieces: At least one, in order.
    """
    if len(pieces) == 1:
        return pieces[0]
    certificate, report = pieces[0].certificate, pieces[0].report
    for before, piece in zip(np.cumsum([_length(piece) for piece in pieces]), pieces[1:]):
        certificate = join_certificates(certificate, piece.certificate)
        report = join_reports(report, piece.report, (int(before), _length(piece)), certificate)

    def joined(*leaves: Any) -> np.ndarray:
        return np.concatenate([np.asarray(leaf) for leaf in leaves], axis=1)

    return dataclasses.replace(
        pieces[0],
        positions=jax.tree.map(joined, *[piece.positions for piece in pieces]),
        constrained=jax.tree.map(joined, *[piece.constrained for piece in pieces]),
        info=jax.tree.map(joined, *[piece.info for piece in pieces]),
        certificate=certificate,
        report=report,
        plan=pieces[0].plan | {"num_samples": sum(map(_length, pieces))},
        end=pieces[-1].end,
    )


def combined(steps: dict, parts: dict, num_samples: int) -> Certificate:
    """One certificate per chain from those of its parts.

    Args:
        steps: `accepted` and `residual` of every step, `(C, T)`, or of none, `(C, 0)`.
        parts: The other fields, of all parts in the order of time, `(C, Q)`, and `runs`, `(C, Q, 2)`: the lengths of
            the runs without movement with which each part begins and ends.
        num_samples: T.
    """
    largest = parts["max_residual"]
    ranked, dtype = np.where(np.isnan(largest), np.inf, largest), largest.dtype
    # The part with the first of the largest, and how many steps there are before it.
    where = np.arange(len(ranked)), ranked.argmax(axis=1)
    before = np.cumsum(parts["num_steps"], axis=1) - parts["num_steps"]
    total = lambda name: np.where(
        (parts[name] < 0).all(axis=1), -1, np.maximum(parts[name], 0).sum(axis=1)
    )  # noqa: E731
    smallest = {}
    for name in ("min_margin", "min_lattice_margin"):
        known = np.where(np.isnan(parts[name]), np.inf, parts[name]).min(axis=1)
        smallest[name] = np.where(np.isnan(parts[name]).all(axis=1), np.nan, known).astype(dtype)
    longest = _longest_rejection(parts)
    return Certificate(
        certified=parts["certified"].all(axis=1),
        max_residual=largest[where],
        worst_step=(before + parts["worst_step"])[where],
        tolerance=parts["tolerance"][:, 0],
        num_steps=np.full(len(ranked), num_samples),
        finite=parts["finite"].all(axis=1),
        frozen=(longest == num_samples) & (num_samples >= FEWEST_TO_FREEZE),
        num_rejected=total("num_rejected"),
        longest_rejection=longest,
        num_nonfinite_proposals=parts["num_nonfinite_proposals"].sum(axis=1),
        num_ambiguous=total("num_ambiguous"),
        **smallest,
        discrete_consistent=parts["discrete_consistent"].all(axis=1),
        independent=parts["independent"].all(axis=1),
        **steps,
    )


def _longest_rejection(parts: dict) -> np.ndarray:
    """The longest run without movement, through the borders of parts."""
    longest, running = np.zeros(parts["runs"].shape[0], int), np.zeros(parts["runs"].shape[0], int)
    for part in range(parts["runs"].shape[1]):
        lead, trail = parts["runs"][:, part, 0], parts["runs"][:, part, 1]
        longest = np.maximum.reduce([longest, running + lead, parts["longest_rejection"][:, part]])
        running = np.where(lead == parts["num_steps"][:, part], running + lead, trail)
    return longest


def _length(draws: Draws) -> int:
    return np.shape(draws.certificate.residual)[1]


def _between(a: float, b: float, share: float) -> float:
    return a + (b - a) * share
