"""What passes from one part of a run to the next: where chains stand, the draws of a chunk, how it went; and chunks as one.

    state_k  --executor-->  chunk_k (draws, certificate, report, state_{k+1})  --sink-->  memory or a store

A `ChainState` holds carries and counters to the last bit, so that a run that is taken up again from one is the run that
never stopped: step t of a chain always has the random numbers of its number t (`randomness`).

Of two chunks a and b, b after a: counts add up, bounds take the worse one, verdicts hold if both do. Only a run of
rejections that crosses the border between them is counted on either side and not as one, and of close decisions those
count that are known: a chunk without rejections does not tell. Of shards that devices have certified runs of rejections are
counted through their borders. Everything here is on the host.
"""

import dataclasses
import functools
from typing import Mapping, Sequence

import jax
import numpy as np

from partime_mcmc.certify.certificate import FEWEST_TO_FREEZE, Certificate
from partime_mcmc.engine import Status
from partime_mcmc.types import AnyArray, PyTree


@dataclasses.dataclass(frozen=True)
class RunReport:
    """How a run went.

    Attributes:
        status: One verdict per chain. A chain that was finished sequentially is CONVERGED: it is exact.
        iterations: Iterations of the solver per chain, over all windows, shape `(C,)`.
        evaluations_per_sample: Evaluations of the kernel's step per draw, averaged over chains, fallbacks included.
        jvps_per_sample: Jacobian-vector products of the step per draw.
        depth: Longest run of dependent steps over all windows, the worst chain.
        fallbacks: One sentence per window and chain that was finished sequentially, and why; and per chunk that was cut.
        num_sequential: Draws per chain that came from the sequential fallback, shape `(C,)`.
        residual_history: Largest residual by iteration in the first window, shape `(C, H)`, NaN beyond the last.
        seconds_compile: Tracing and compilation.
        seconds_run: The solve itself, its random numbers included, the certificate not.
        seconds_certify: The certifying pass.
        dtype: Type of the states.
        device: Where it ran.
        versions: Of the libraries that decide about bits.
        evaluations_by_part: In a run over a mesh, evaluations per draw by the device along time that made them; else empty.
        interrupted: Whether the user ended it early, whatever the verdicts: a chain that was lost before stays lost.
        memory: Steps after which all segments that were begun at a window's first state had met the chain, at most, over all
            windows; None where a window had no such segments, or was finished sequentially.
    """

    status: tuple[Status, ...]
    iterations: np.ndarray
    evaluations_per_sample: float
    jvps_per_sample: float
    depth: int
    fallbacks: tuple[str, ...]
    num_sequential: np.ndarray
    residual_history: np.ndarray
    seconds_compile: float
    seconds_run: float
    seconds_certify: float
    dtype: str
    device: str
    versions: dict[str, str]
    evaluations_by_part: tuple[float, ...] = ()
    interrupted: bool = False
    memory: int | None = None

    def __str__(self) -> str:
        verdicts = ", ".join(sorted({status.name for status in self.status}))
        return (
            f"solver {verdicts}; {self.seconds_run:.3f} s ({self.seconds_compile:.1f} s compilation apart), "
            f"{self.evaluations_per_sample:.2f} evaluations and {self.jvps_per_sample:.2f} JVPs per draw, depth "
            f"{self.depth}, {int(self.iterations.max())} iterations over all windows, {len(self.fallbacks)} fallbacks"
        )


@dataclasses.dataclass(frozen=True)
class ChainState:
    """What it takes to go on from the last draw to the last bit, leaves `(C, ...)`.

    Attributes:
        carries: Of all chains.
        discrete: Counters and other leaves of the kernel's state that are not floating point, by name.
        num_steps: Steps that the chains have behind them; the next one has the random numbers of this number.
        num_failed_windows: Windows in a row, just before, in which no chain converged; two of them make the rest
            sequential.
        max_window: Most steps that fit the device at once, once it has run out of memory; None: not known to be limited.
    """

    carries: PyTree
    discrete: PyTree
    num_steps: int = 0
    num_failed_windows: int = 0
    max_window: int | None = None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Certified draws of n consecutive steps of all C chains.

    Attributes:
        positions: Unconstrained, leaves `(C, n, ...)`; None on a host that keeps no draws.
        constrained: Named values in the model's space, `(C, n, ...)`.
        info: What the kernel reports of each step, and its residual, by name, `(C, n)`.
        certificate: One entry per chain, with `accepted` and `residual` of every step.
        report: How the chunk went.
        state: Where the chains stand after it.
    """

    positions: PyTree
    constrained: Mapping[str, AnyArray]
    info: Mapping[str, AnyArray]
    certificate: Certificate
    report: RunReport
    state: ChainState

    @property
    def num_steps(self) -> int:
        """n."""
        return np.shape(self.certificate.residual)[1]


# A run that falls back in every window must not fill the memory with sentences about it.
_MAX_SENTENCES = 200


def merge_certificates(first: Certificate, then: Certificate) -> Certificate:
    """The certificate of two consecutive chunks, fields `(C,)`; `accepted` and `residual`, `(C, T)`, one after the other.

    Args:
        first: Of the earlier chunk.
        then: Of the later one.
    """
    a, b = (jax.tree.map(np.asarray, one) for one in (first, then))
    # NaN is worse than any number.
    worse = ~(b.max_residual <= a.max_residual) & ~np.isnan(a.max_residual)
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
        num_ambiguous=np.select(
            # Of one chunk alone, where the other has no rejections that would tell.
            [(one.num_ambiguous < 0) & (one.num_rejected == 0) for one in (a, b)],
            [b.num_ambiguous, a.num_ambiguous],
            total("num_ambiguous"),
        ),
        min_margin=np.fmin(a.min_margin, b.min_margin),
        min_lattice_margin=np.fmin(a.min_lattice_margin, b.min_lattice_margin),
        discrete_consistent=a.discrete_consistent & b.discrete_consistent,
        independent=a.independent & b.independent,
        accepted=np.concatenate([a.accepted, b.accepted], axis=1),
        residual=np.concatenate([a.residual, b.residual], axis=1),
    )


def with_frozen(status: Sequence[Status], certificate: Certificate) -> tuple[Status, ...]:
    """Verdicts, FROZEN for good chains that stand still; a path that is not certified is not known to."""
    frozen = np.asarray(certificate.frozen) & np.asarray(certificate.certified)
    return tuple(
        Status.FROZEN if still and one == Status.CONVERGED else one
        for still, one in zip(frozen, status)
    )


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


def interrupted(status: Sequence[Status]) -> tuple[Status, ...]:
    """Verdicts of a run that the user ended: INTERRUPTED for the chains that had converged."""
    return tuple(Status.INTERRUPTED if one == Status.CONVERGED else one for one in status)


def longest_memory(memories: Sequence[int | None]) -> int | None:
    """`RunReport.memory` of all from that of each part; None if it is not known of every one."""
    known = [one for one in memories if one is not None]
    return max(known) if known and len(known) == len(memories) else None


def merge_reports(
    first: RunReport, then: RunReport, steps: tuple[int, int], certificate: Certificate
) -> RunReport:
    """The report of two consecutive chunks.

    Args:
        first: Of the earlier chunk.
        then: Of the later one.
        steps: Of either.
        certificate: Of both together.
    """
    share = steps[1] / max(sum(steps), 1)
    # Whether a chain stands still throughout is for the certificate of both to say.
    moving = [
        [Status.CONVERGED if one == Status.FROZEN else one for one in report.status]
        for report in (first, then)
    ]
    status = [b if a == Status.CONVERGED else a for a, b in zip(*moving)]
    fallbacks = (*first.fallbacks, *then.fallbacks)
    if len(fallbacks) > _MAX_SENTENCES:
        fallbacks = (
            *fallbacks[: _MAX_SENTENCES - 1],
            "... and more: num_sequential counts all steps that were finished sequentially",
        )
    sums = (
        "iterations",
        "depth",
        "num_sequential",
        "seconds_compile",
        "seconds_run",
        "seconds_certify",
    )
    return dataclasses.replace(
        first,
        status=with_frozen(status, certificate),
        fallbacks=fallbacks,
        evaluations_by_part=tuple(
            _between(a, b, share)
            for a, b in zip(first.evaluations_by_part, then.evaluations_by_part)
        ),
        interrupted=then.interrupted,
        memory=longest_memory([first.memory, then.memory]),
        evaluations_per_sample=_between(
            first.evaluations_per_sample, then.evaluations_per_sample, share
        ),
        jvps_per_sample=_between(first.jvps_per_sample, then.jvps_per_sample, share),
        **{name: getattr(first, name) + getattr(then, name) for name in sums},
    )


def merge_shard_certificates(steps: dict, shards: dict, num_samples: int) -> Certificate:
    """One certificate per chain from those of its shards along time.

    Args:
        steps: `accepted` and `residual` of every step, `(C, T)`.
        shards: The other fields, of all shards in the order of time, `(C, Q)`, and `runs`, `(C, Q, 2)`: the lengths of
            the runs without movement with which each shard begins and ends.
        num_samples: T.
    """
    num_chains, num_shards = shards["certified"].shape
    nothing = {name: np.zeros((num_chains, 0), value.dtype) for name, value in steps.items()}
    parts = [
        Certificate(
            **{name: value[:, shard] for name, value in shards.items() if name != "runs"}, **nothing
        )
        for shard in range(num_shards)
    ]
    longest = _longest_rejection(shards)
    return dataclasses.replace(
        functools.reduce(merge_certificates, parts),
        longest_rejection=longest,
        frozen=(longest == num_samples) & (num_samples >= FEWEST_TO_FREEZE),
        **steps,
    )


def _longest_rejection(shards: dict) -> np.ndarray:
    """The longest run without movement, through the borders of shards."""
    num_chains, num_shards, _ = shards["runs"].shape
    longest, running = np.zeros(num_chains, int), np.zeros(num_chains, int)
    for shard in range(num_shards):
        lead, trail = shards["runs"][:, shard, 0], shards["runs"][:, shard, 1]
        longest = np.maximum.reduce(
            [longest, running + lead, shards["longest_rejection"][:, shard]]
        )
        running = np.where(lead == shards["num_steps"][:, shard], running + lead, trail)
    return longest


def _between(a: float, b: float, share: float) -> float:
    return a + (b - a) * share
