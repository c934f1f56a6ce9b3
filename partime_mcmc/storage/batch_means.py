"""Batches of consecutive draws: moments, running R-hat and effective sample size of chains that are not kept.

A chain of n draws is cut into b batches of a draws, 64 < b <= 128 once n > 64, and a doubles as the chain grows (two
neighbours become one batch). Of each batch the mean and the sum of squared deviations M are kept; batches, and
everything else, merge by

    n = n_1 + n_2,   mean = mean_1 + δ n_2/n,   M = M_1 + M_2 + δ² n_1 n_2/n,   δ = mean_2 - mean_1.

Effective sample size N var/σ² of N = C n draws, with σ² = a Σ (batch mean - grand mean)²/(C b - 1) over the batches of
all chains, so that chains that disagree count for little. a is doubled further until a >= 16 max(1, σ²/var) with at
least 8 batches a chain; a chain that is too short for that has an estimate that is too large. R-hat is the classic one
of half chains, not rank-normalised.

Sources: Chan, Golub, LeVeque 1983 (merging); Flyvbjerg and Petersen 1989 (blocking); Gupta and Vats 2020,
arXiv:2007.04229 (batches of several chains about one mean); Gelman et al. 2013, section 11.4 (R-hat).
"""

import dataclasses
from typing import Self

import numpy as np

MAX_BATCHES = 128
BLOCK = 2048
"""Steps that are looked at at once, so that they stay in the cache."""
_ENOUGH_BATCHES = 8
_LONG_ENOUGH = 16.0


def merge(n_1: int, first: np.ndarray, n_2: int, second: np.ndarray) -> np.ndarray:
    """Mean and sum of squared deviations, `(2, ...)`, of two samples of `n_1` and `n_2` draws together."""
    if not n_2:
        return first
    (mean_1, m_1), (mean_2, m_2), n = first, second, n_1 + n_2
    delta = mean_2 - mean_1
    return np.stack([mean_1 + delta * (n_2 / n), m_1 + m_2 + delta * delta * (n_1 * n_2 / n)])


def moments_of(x: np.ndarray) -> np.ndarray:
    """Mean and sum of squared deviations over the last axis, one entry of the first axis at a time to spare memory."""
    mean = x.mean(axis=-1)
    deviations = np.empty_like(mean)
    for j, row in enumerate(x):
        centred = row - mean[j, ..., None]
        deviations[j] = np.square(centred, out=centred).sum(axis=-1)
    return np.stack([mean, deviations])


@dataclasses.dataclass(frozen=True, eq=False)
class BatchMeans:
    """The batches of C chains of D coordinates.

    Attributes:
        size: a, draws in a batch.
        moments: Means and sums of squared deviations, shape `(2, D, C, b + 1)`; the last batch is the one being filled, zero
            when there is nothing in it.
        num_open: Draws in the last batch, fewer than `size`.
    """

    size: int
    moments: np.ndarray
    num_open: int

    @classmethod
    def empty(cls, num_coordinates: int, num_chains: int) -> Self:
        """Nothing yet."""
        return cls(1, np.zeros((2, num_coordinates, num_chains, 1)), 0)

    @property
    def num_full(self) -> int:
        """b."""
        return self.moments.shape[3] - 1

    @property
    def num_draws(self) -> int:
        """n, draws per chain."""
        return self.num_full * self.size + self.num_open

    @property
    def num_chains(self) -> int:
        """C."""
        return self.moments.shape[2]

    def add(self, x: np.ndarray) -> Self:
        """The batches with more draws, shape `(D, C, n)`."""
        n = x.shape[2]
        if (self.num_draws + n) // self.size > MAX_BATCHES:
            return self.paired().add(x)
        closed, last, num_open = [self.moments[..., :-1]], self.moments[..., -1], self.num_open
        fill = min(n, self.size - num_open) if num_open else 0
        if fill:
            last = merge(num_open, last, fill, moments_of(x[..., :fill]))
            num_open += fill
        if num_open == self.size:
            closed.append(last[..., None])
            last, num_open = np.zeros_like(last), 0
        full, rest = divmod(n - fill, self.size)
        if full:
            batches = x[..., fill : n - rest].reshape(*x.shape[:2], full, self.size)
            closed.append(moments_of(batches))
        if rest:  # only after a batch was closed
            last, num_open = moments_of(x[..., n - rest :]), rest
        moments = np.concatenate([*closed, last[..., None]], axis=-1)
        return dataclasses.replace(self, moments=moments, num_open=num_open)

    def paired(self) -> Self:
        """Twice the size; of an odd number the last batch goes to the one being filled."""
        even = self.num_full // 2 * 2
        last, num_open = self.moments[..., -1], self.num_open
        if even < self.num_full:
            last = merge(self.size, self.moments[..., even], num_open, last)
            num_open += self.size
        pairs = merge(
            self.size, self.moments[..., 0:even:2], self.size, self.moments[..., 1:even:2]
        )
        moments = np.concatenate([pairs, last[..., None]], axis=-1)
        return dataclasses.replace(self, size=2 * self.size, moments=moments, num_open=num_open)

    def per_chain(self) -> np.ndarray:
        """Mean and sum of squared deviations of every chain, shape `(2, D, C)`."""
        full = _together(self.size, self.moments[..., :-1])
        return merge(self.size * self.num_full, full, self.num_open, self.moments[..., -1])

    def pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of all draws of all chains, shapes `(D,)`."""
        mean, m = _together(self.num_draws, self.per_chain())
        return mean, m / np.float64(self.num_draws * self.num_chains - 1)

    def rhat(self) -> np.ndarray:
        """Split R-hat, shape `(D,)`: halves are whole batches, with the middle one and the one being filled left out if
        need be.

        NaN for one chain, fewer than four draws, draws that are not finite, or no variance within the halves.
        """
        half, stop = self.num_full // 2, self.num_full
        n = half * self.size
        if self.num_chains < 2 or n < 2:
            return np.full(self.moments.shape[1], np.nan)
        halves = [self.moments[..., :half], self.moments[..., stop - half : stop]]
        means, deviations = np.concatenate([_together(self.size, one) for one in halves], axis=-1)
        with np.errstate(all="ignore"):
            within = deviations.mean(axis=1) / (n - 1)
            found = np.sqrt((n - 1) / n + means.var(axis=1, ddof=1) / within)
        return np.where((within > 0) & np.isfinite(found), found, np.nan)

    def effective(self) -> np.ndarray:
        """Effective sample size for the mean, shape `(D,)`; NaN as for `rhat`, but one chain will do."""
        num_draws = self.num_draws * self.num_chains
        with np.errstate(all="ignore"):
            _, variance = self.pooled()
            found = np.minimum(
                num_draws * variance / self._long_run(self.moments[0, ..., :-1], variance),
                num_draws * np.log10(num_draws),
            )
        return np.where(np.isfinite(found) & (variance > 0), found, np.nan)

    def mcse_sd(self) -> np.ndarray:
        """Monte Carlo standard error of the standard deviation, shape `(D,)`, from batch means of squares; NaN as for
        `effective`.

        For the length of batches squares are taken to vary as those of a normal law.
        """
        means, deviations = self.moments[..., :-1]
        with np.errstate(all="ignore"):
            mean, variance = self.pooled()
            squares = deviations / self.size + np.square(means - mean[:, None, None])
            found = np.sqrt(
                self._long_run(squares, 2 * variance**2)
                / (self.num_draws * self.num_chains)
                / (4 * variance)
            )
        return np.where(np.isfinite(found) & (variance > 0), found, np.nan)

    def _long_run(self, means: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """σ², shape `(D,)`, of batch means `(D, C, b)` of something with this variance, by batches that are long enough
        for it."""
        num_coordinates, size = len(means), self.size
        found, settled = np.full(num_coordinates, np.nan), np.zeros(num_coordinates, bool)
        while means.shape[1] * means.shape[2] > 1:
            per_batch = means - means.mean(axis=(1, 2), keepdims=True)
            now = (
                size * np.square(per_batch).sum(axis=(1, 2)) / (means.shape[1] * means.shape[2] - 1)
            )
            found = np.where(settled, found, now)
            settled |= size >= _LONG_ENOUGH * np.maximum(1.0, now / variance)
            if settled.all() or means.shape[2] < 2 * _ENOUGH_BATCHES:
                break
            even = means.shape[2] // 2 * 2
            means, size = (
                0.5 * (means[..., -even::2] + means[..., means.shape[2] - even + 1 :: 2]),
                2 * size,
            )
        return found


def _together(size: int, moments: np.ndarray) -> np.ndarray:
    """Mean and sum of squared deviations of samples of one size, along the last axis."""
    if not moments.shape[-1] or not size:
        return np.zeros(moments.shape[:-1])
    means, deviations = moments
    mean = means.mean(axis=-1)
    spread = size * np.square(means - mean[..., None]).sum(axis=-1)
    return np.stack([mean, deviations.sum(axis=-1) + spread])
