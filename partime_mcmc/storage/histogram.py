"""Quantiles of draws that are not kept: a histogram of fixed, log-linear bins per coordinate, counted exactly.

    d = x - c,   |d| in bin i  iff  2^e (1 + m/64) <= |d| < 2^e (1 + (m+1)/64),  i = 64 (e - e_0) + m,   0 <= m < 64,

with centre c and octave e_0 = floor(log2 sd) - 10 taken from the first draws, 42 octaves to either side. The bin is
read off the bits of d. Counts are integers, so the result depends neither on how draws are divided into chunks nor on any
random bit.

Accuracy, stated and certain: a quantile lies in a bin that is known, at most 1/64 of its distance from c wide (narrower
bins towards c, and ends that are the smallest and largest draw); within the bin ranks are interpolated. `rank_errors`
is the share of all draws in that bin, which bounds the error in rank.

Source: relative-error sketches (Masson, Rim, Lee 2019, DDSketch, arXiv:1908.10693), here around a centre and without
collapsing. Not a KLL sketch: its compactions take random bits, so that no two runs give the same one.
"""

import dataclasses
from typing import Self

import numpy as np

_BITS = 6
_SHIFT = 52 - _BITS
_BELOW, _OCTAVES = 10, 42
_HALF = _OCTAVES << _BITS
_EXPONENT_OF_ONE = 1023
_FINEST, _COARSEST = _BELOW - 1000, 1000 + _BELOW - _OCTAVES


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of D coordinates.

    Attributes:
        centre: c, shape `(D,)`.
        octave: floor(log2 sd) of the first draws, shape `(D,)`, integers.
        first: Number of the first bin that is kept; bins left out hold nothing.
        counts: Draws by bin, shape `(D, W)`, integers.
        extremes: Smallest and largest draw by chain, shape `(2, D, C)`; NaN if there was a NaN.
    """

    centre: np.ndarray
    octave: np.ndarray
    first: int
    counts: np.ndarray
    extremes: np.ndarray

    @classmethod
    def around(cls, x: np.ndarray) -> Self:
        """An empty histogram with bins that suit the draws `x`, shape `(D, C, n)`, and others like them."""
        finite = np.where(np.isfinite(x), x, np.nan).reshape(len(x), -1)
        centre, sd = np.zeros(len(x)), np.ones(len(x))
        known = ~np.isnan(finite).all(axis=1)
        if known.any():
            centre[known], sd[known] = (
                np.nanmean(finite[known], axis=1),
                np.nanstd(finite[known], axis=1),
            )
        # Draws that are all one value, up to rounding, do not show a scale.
        sd = np.where(
            np.isfinite(sd) & (sd > 1e-12 * np.abs(centre)), sd, np.maximum(np.abs(centre), 1.0)
        )
        octave = np.clip(np.frexp(sd)[1] - 1, _FINEST, _COARSEST).astype(np.int64)
        nothing = np.stack([np.full(x.shape[:2], np.inf), np.full(x.shape[:2], -np.inf)])
        return cls(centre, octave, _HALF, np.zeros((len(x), 0), np.int64), nothing)

    def add(self, x: np.ndarray) -> Self:
        """The histogram with more draws, shape `(D, C, n)`, in it; NaN is counted beyond all others, and to be asked for
        apart."""
        if not x.size:
            return self
        rows = [
            np.bincount(self._bins(row.ravel(), coordinate), minlength=2 * _HALF)
            for coordinate, row in enumerate(x)
        ]
        used = np.flatnonzero(sum((row > 0).astype(np.int64) for row in rows))
        first, stop = int(used[0]), int(used[-1]) + 1
        if self.counts.shape[1]:
            first, stop = min(first, self.first), max(stop, self.first + self.counts.shape[1])
        counts = np.stack([row[first:stop] for row in rows])
        counts[:, self.first - first : self.first - first + self.counts.shape[1]] += self.counts
        low, high = self.extremes
        extremes = np.stack([np.minimum(low, x.min(axis=2)), np.maximum(high, x.max(axis=2))])
        return dataclasses.replace(self, first=first, counts=counts, extremes=extremes)

    def quantiles(self, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Quantiles and what their ranks may be wrong by.

        Args:
            probabilities: Shape `(Q,)`, between 0 and 1.

        Returns:
            Quantiles and bounds on the errors of their ranks as shares of all draws, each `(D, Q)`; NaN where there are
            no draws, or one of them is NaN.
        """
        smallest, largest = self.extremes[0].min(axis=1), self.extremes[1].max(axis=1)
        probabilities = np.asarray(probabilities, np.float64)
        values, errors = np.full((2, self.centre.size, probabilities.size), np.nan)
        for j, counts in enumerate(self.counts):
            total = counts.sum()
            if total == 0 or np.isnan(smallest[j]) or np.isnan(largest[j]):
                continue
            # As in NumPy's linear rule ranks run from 0 to N - 1; the draws of one bin are spread evenly over it.
            rank = probabilities * (total - 1)
            before = np.concatenate([[0], np.cumsum(counts)])
            bins = np.clip(np.searchsorted(before, rank, side="right") - 1, 0, counts.size - 1)
            lower, upper = (
                np.clip(edges, smallest[j], largest[j])
                for edges in self._edges(j, bins + self.first)
            )
            inside = (rank - before[bins] + 0.5) / np.maximum(counts[bins], 1)
            with np.errstate(invalid="ignore"):
                middle = lower + np.minimum(inside, 1.0) * (upper - lower)
            middle = np.where(
                rank <= 0, smallest[j], np.where(rank >= total - 1, largest[j], middle)
            )
            values[j] = np.where(
                np.isfinite(middle), middle, np.where(np.isfinite(lower), upper, lower)
            )
            errors[j] = np.where(lower == upper, 0.0, counts[bins] / total)
        return values, errors

    def _bins(self, x: np.ndarray, coordinate: int) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            d = x - self.centre[coordinate]
        index = np.abs(d).view(np.int64)
        index >>= _SHIFT
        index -= self._lowest(coordinate)
        np.clip(index, 0, _HALF - 1, out=index)
        # Bins left of the centre count downwards: flip their bits, -1 - i, before shifting both sides up.
        index ^= -(d < 0).astype(np.int64)
        index += _HALF
        return index

    def _lowest(self, coordinate: int) -> int:
        return (_EXPONENT_OF_ONE + int(self.octave[coordinate]) - _BELOW) << _BITS

    def _edges(self, coordinate: int, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends of bins, the outermost ones infinite, those at the centre touching it."""
        right = bins >= _HALF
        i = np.where(right, bins - _HALF, _HALF - 1 - bins)
        near, far = (
            ((i + step + self._lowest(coordinate)) << _SHIFT).view(np.float64) for step in (0, 1)
        )
        near, far = np.where(i == 0, 0.0, near), np.where(i == _HALF - 1, np.inf, far)
        centre = self.centre[coordinate]
        return np.where(right, centre + near, centre - far), np.where(
            right, centre + far, centre - near
        )
