"""Running statistics of draws that are scattered over hosts: each host sums up its own, the first one puts sums together.

Moments are kept by batch, and batch j holds the draws numbered ja to (j+1)a of a chain, wherever these are. So a host sums
up its own draws of every batch that it has some of, as (count, mean, M), and counts, means and M of one batch merge as in
`blocking`; histograms about the same centres add up; of totals, smallest and largest ones it does not matter who saw them.

    Sums.of(values, info, ...)      on every host, of its own draws, side by side with the others
    put_together(running, sums)     on the first host: the statistics with all of them

What comes out is what `StreamingStatistics.update` gives for the same draws in one piece: counts, extremes and steps are equal, moments
to rounding (sums are added up in another order; relative to the spread some 1e-15 times the logarithm of the number of
draws). Bins lie about the mean of the first chunk, which is that of one host to rounding: a draw within rounding of a bin's
edge may be counted in the next one.
Left out: folds, which see draws in order (`part_keeper` passes their carries from host to host).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from partime_mcmc.storage.batch_means import MAX_BATCHES, BatchMeans, comoments, moments
from partime_mcmc.storage.histogram import Histogram
from partime_mcmc.storage.streaming_statistics import MAX_COVARIANCE, StreamingStatistics, flat_values
from partime_mcmc.storage.sums import Total


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """What one host says of its draws of a chunk: c chains at n steps, D coordinates, in K batches.

    Attributes:
        layout: Name and shape of every value, in order.
        names: Of what the kernel says, in order.
        chains: Numbers of the chains, `(c,)`.
        batches: Numbers of the batches, `(K,)`.
        counts: Draws of a chain in each, `(K,)`.
        means: `(D, c, K)`.
        deviations: Sums of squared deviations, `(D, c, K)`.
        first: Number of the first bin.
        bins: Counts by bin, `(D, W)`.
        extremes: Smallest and largest, `(2, D, c)`.
        comoments: `(c, D, D)`; none, `(0,)`, with more than `MAX_COVARIANCE` coordinates.
        totals: By what the kernel says, `(I, 5, c)`.
    """

    layout: tuple
    names: tuple[str, ...]
    chains: np.ndarray
    batches: np.ndarray
    counts: np.ndarray
    means: np.ndarray
    deviations: np.ndarray
    first: np.ndarray
    bins: np.ndarray
    extremes: np.ndarray
    comoments: np.ndarray
    totals: np.ndarray

    @classmethod
    def of(
        cls,
        values: Mapping[str, np.ndarray],
        info: Mapping[str, np.ndarray],
        chains: np.ndarray,
        steps: np.ndarray,
        size: int,
        bins: Histogram,
    ) -> Sums:
        """Of some draws.

        Args:
            values: Name to array `(c, n, ...)`.
            info: Name to array `(c, n)`.
            chains: Numbers of the chains, `(c,)`.
            steps: Numbers of the steps since the first draw of the run, ascending, `(n,)`.
            size: a, draws in a batch.
            bins: Where the bins lie.
        """
        x, layout = flat_values(values)
        numbers, starts, counts = np.unique(steps // size, return_index=True, return_counts=True)
        with np.errstate(all="ignore"):
            pairs = [moments(x[..., start : start + count]) for start, count in zip(starts, counts)]
            empty = dataclasses.replace(bins, counts=np.zeros((len(x), 0), np.int64))
            found = empty.add(x.reshape(x.shape[0], -1))
            totals = []
            for one in info.values():
                total = Total.of(np.asarray(one), 0)
                totals.append(
                    dataclasses.replace(total, where_largest=steps[total.where_largest]).to_array()
                )
            means, deviations = (np.stack(of, axis=2) for of in zip(*pairs))
            squares = comoments(x)[1] if x.shape[0] <= MAX_COVARIANCE else np.zeros(0)
            extremes = np.stack([x.min(axis=2), x.max(axis=2)])
            return cls(
                layout,
                tuple(info),
                chains,
                numbers,
                counts,
                means,
                deviations,
                np.asarray(found.first),
                found.counts,
                extremes,
                squares,
                np.stack(totals),
            )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays from which `from_arrays` restores this."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        header = json.dumps({"layout": fields.pop("layout"), "names": fields.pop("names")})
        return {"header": np.frombuffer(header.encode(), np.uint8), **fields}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Sums:
        """The sums that gave these arrays."""
        arrays = dict(arrays)
        header = json.loads(arrays.pop("header").tobytes())
        layout = tuple((name, tuple(shape)) for name, shape in header["layout"])
        return cls(layout, tuple(header["names"]), **arrays)


def batch_size(num_draws: int) -> int:
    """a, draws in a batch once a chain has so many; as `BatchMeans.add` doubles it."""
    size = 1
    while num_draws // size > MAX_BATCHES:
        size *= 2
    return size


def spread_of(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Count, mean and sum of squared deviations of what is finite, of all chains together, shape `(3, D)`."""
    x = flat_values(values)[0]
    x = x.reshape(x.shape[0], -1)
    finite = np.isfinite(x)
    count = finite.sum(axis=1)
    with np.errstate(all="ignore"):
        mean = np.where(finite, x, 0).sum(axis=1) / np.maximum(count, 1)
        return np.stack(
            [count, mean, np.square(np.where(finite, x - mean[:, None], 0)).sum(axis=1)]
        )


def bins_for(spreads: list[np.ndarray]) -> Histogram:
    """An empty histogram with bins that suit the draws of all hosts, from `spread_of` each."""
    count, mean, m = spreads[0]
    for more in spreads[1:]:
        (mean, m), count = _merged(count, mean, m, *more), count + more[0]
    known = count > 0
    return Histogram.about(
        np.where(known, mean, 0), np.where(known, np.sqrt(m / np.maximum(count, 1)), 1)
    )


def put_together(
    running: StreamingStatistics,
    sums: list[Sums],
    num_chains: int,
    num_draws: int,
    bins: Histogram,
    carries: Mapping[str, Any],
) -> StreamingStatistics:
    """The statistics with the draws of a chunk.

    Args:
        running: Those before.
        sums: Of all hosts, which together have every chain at every step of the chunk once.
        num_chains: C.
        num_draws: Per chain, with those of the chunk.
        bins: Where the bins lie.
        carries: Where folds stand after the chunk, by name.

    Raises:
        ValueError: If draws are missing, or are there twice.
    """
    one = sums[0]
    lead = len(one.bins), num_chains
    with np.errstate(all="ignore"):
        batches = _batches(running.batches, sums, lead, num_draws)
        histogram = bins if running.histogram is None else running.histogram
        smallest, largest = (
            running.extremes
            if running.extremes is not None
            else np.stack([np.full(lead, np.inf), np.full(lead, -np.inf)])
        ).copy()
        totals = {name: running.info.get(name, Total.nothing(num_chains)) for name in one.names}
        for some in sums:
            histogram = histogram.together(int(some.first), some.bins)
            smallest[:, some.chains] = np.minimum(smallest[:, some.chains], some.extremes[0])
            largest[:, some.chains] = np.maximum(largest[:, some.chains], some.extremes[1])
            for name, array in zip(some.names, some.totals):
                totals[name] = totals[name].beside(
                    Total.from_array(array).of_some(some.chains, num_chains)
                )
        squares = _comoments(running, sums, lead) if one.comoments.size else None
    return dataclasses.replace(
        running,
        layout=one.layout,
        batches=batches,
        histogram=histogram,
        extremes=np.stack([smallest, largest]),
        comoments=squares,
        info=totals,
        carries=dict(carries),
    )


def _batches(
    batches: BatchMeans | None, sums: list[Sums], lead: tuple[int, int], num_draws: int
) -> BatchMeans:
    size = batch_size(num_draws)
    full, num_open = divmod(num_draws, size)
    count, mean, m = (
        np.zeros((lead[1], full + 1)),
        np.zeros((*lead, full + 1)),
        np.zeros((*lead, full + 1)),
    )
    if batches is not None:
        while batches.size < size:
            batches = batches.paired()
        before = batches.num_full + 1
        mean[..., :before], m[..., :before] = batches.means, batches.deviations
        count[:, : before - 1], count[:, before - 1] = size, batches.num_open
    for some in sums:
        at = np.ix_(some.chains, some.batches)
        where = np.ix_(np.arange(lead[0]), some.chains, some.batches)
        mean[where], m[where] = _merged(
            count[at], mean[where], m[where], some.counts, some.means, some.deviations
        )
        count[at] += some.counts
    if (count[:, :full] != size).any() or (count[:, full] != num_open).any():
        raise ValueError(
            f"sums: got {count.sum(axis=1).astype(int).tolist()} draws of the chains, wanted {num_draws} of "
            "each, every step once"
        )
    return BatchMeans(size, mean, m, num_open)


def _comoments(running: StreamingStatistics, sums: list[Sums], lead: tuple[int, int]) -> np.ndarray:
    """Sums of products of deviations from the chain's mean, `(C, D, D)`."""
    count, mean = np.full(lead[1], float(running.num_draws)), np.zeros(lead)
    found = np.zeros((lead[1], lead[0], lead[0]))
    if running.num_draws:
        mean, found = running.batches.per_chain()[0].copy(), running.comoments.copy()
    for some in sums:
        n, here = some.counts.sum(), (some.means * some.counts).sum(axis=2) / some.counts.sum()
        before = count[some.chains]
        delta = (here - mean[:, some.chains]).T
        share = (n * before / (n + before))[:, None, None]
        found[some.chains] += some.comoments + delta[:, :, None] * delta[:, None, :] * share
        mean[:, some.chains] += delta.T * (n / (n + before))
        count[some.chains] += n
    return found


def _merged(n_1, mean_1, m_1, n_2, mean_2, m_2):
    """As `blocking.merge`, with numbers of draws that are arrays and may be 0."""
    n = np.maximum(n_1 + n_2, 1)
    delta = np.where(n_2 > 0, mean_2 - mean_1, 0)
    return mean_1 + delta * (n_2 / n), m_1 + m_2 + delta * delta * (n_1 * n_2 / n)
