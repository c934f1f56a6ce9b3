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
arXiv:2007.04229 (batches of several chains about one mean); Gelman et al., Bayesian Data Analysis, 3rd ed., section
11.4 (R-hat). Left out: ranks and tails, for which draws are needed.
"""

from __future__ import annotations

import dataclasses

import numpy as np

MAX_BATCHES = 128
BLOCK = 2048
"""Steps that are looked at at once, so that they stay in the cache."""
_ENOUGH_BATCHES = 8
_LONG_ENOUGH = 16.0


def merge(
    n_1: int, mean_1: np.ndarray, m_1: np.ndarray, n_2: int, mean_2: np.ndarray, m_2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of squared deviations of two samples of `n_1` and `n_2` draws together; shapes as given."""
    if not n_2:
        return mean_1, m_1
    if not n_1:
        return mean_2, m_2
    n = n_1 + n_2
    delta = mean_2 - mean_1
    return mean_1 + delta * (n_2 / n), m_1 + m_2 + delta * delta * (n_1 * n_2 / n)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of squared deviations over the last axis, one entry of the first axis at a time to spare memory."""
    mean = x.mean(axis=-1)
    deviations = np.empty_like(mean)
    for j, row in enumerate(x):
        centred = row - mean[j, ..., None]
        deviations[j] = np.square(centred, out=centred).sum(axis=-1)
    return mean, deviations


@dataclasses.dataclass(frozen=True, eq=False)
class BatchMeans:
    """The batches of C chains of D coordinates.

    Attributes:
        size: a, draws in a batch.
        means: Shape `(D, C, b + 1)`; the last batch is the one being filled, zero when there is nothing in it.
        deviations: Sums of squared deviations, likewise.
        num_open: Draws in the last batch, fewer than `size`.
    """

    size: int
    means: np.ndarray
    deviations: np.ndarray
    num_open: int

    @classmethod
    def empty(cls, num_coordinates: int, num_chains: int) -> BatchMeans:
        """Nothing yet."""
        nothing = np.zeros((num_coordinates, num_chains, 1))
        return cls(1, nothing, nothing, 0)

    @property
    def num_full(self) -> int:
        """b."""
        return self.means.shape[2] - 1

    @property
    def num_draws(self) -> int:
        """n, draws per chain."""
        return self.num_full * self.size + self.num_open

    def add(self, x: np.ndarray) -> BatchMeans:
        """The batches with more draws, shape `(D, C, n)`."""
        n, batches = x.shape[2], self
        while (self.num_draws + n) // batches.size > MAX_BATCHES:
            batches = batches.paired()
        fill = min(n, batches.size - batches.num_open) if batches.num_open else 0
        mean, m = batches.means[..., -1], batches.deviations[..., -1]
        mean, m = (
            merge(batches.num_open, mean, m, fill, *moments(x[..., :fill])) if fill else (mean, m)
        )
        means, deviations, num_open = (
            [batches.means[..., :-1]],
            [batches.deviations[..., :-1]],
            batches.num_open + fill,
        )
        if num_open == batches.size:
            means, deviations, num_open = [*means, mean[..., None]], [*deviations, m[..., None]], 0
            mean, m = np.zeros_like(mean), np.zeros_like(m)
        full, rest = divmod(n - fill, batches.size)
        if full:
            found = moments(x[..., fill : n - rest].reshape(*x.shape[:2], full, batches.size))
            means, deviations = [*means, found[0]], [*deviations, found[1]]
        if rest:  # only after a batch was closed
            (mean, m), num_open = moments(x[..., n - rest :]), rest
        return BatchMeans(
            batches.size,
            np.concatenate([*means, mean[..., None]], axis=2),
            np.concatenate([*deviations, m[..., None]], axis=2),
            num_open,
        )

    def paired(self) -> BatchMeans:
        """Twice the size; of an odd number the last batch goes to the one being filled."""
        even = self.num_full // 2 * 2
        pairs = (
            self.size,
            self.means[..., 0:even:2],
            self.deviations[..., 0:even:2],
            self.size,
            self.means[..., 1:even:2],
            self.deviations[..., 1:even:2],
        )
        mean, m = self.means[..., -1], self.deviations[..., -1]
        num_open = self.num_open
        if even < self.num_full:
            mean, m = merge(
                self.size, self.means[..., even], self.deviations[..., even], num_open, mean, m
            )
            num_open += self.size
        means, deviations = merge(*pairs)
        return BatchMeans(
            2 * self.size,
            np.concatenate([means, mean[..., None]], axis=2),
            np.concatenate([deviations, m[..., None]], axis=2),
            num_open,
        )

    def per_chain(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sum of squared deviations of every chain, shapes `(D, C)`."""
        full = _together(self.size, self.means[..., :-1], self.deviations[..., :-1])
        return merge(
            self.size * self.num_full,
            *full,
            self.num_open,
            self.means[..., -1],
            self.deviations[..., -1],
        )

    def pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sum of squared deviations of all draws of all chains, shapes `(D,)`."""
        return _together(self.num_draws, *self.per_chain())

    def rhat(self) -> np.ndarray:
        """Split R-hat, shape `(D,)`: halves are whole batches, with the middle one and the one being filled left out if
        need be.

        NaN for one chain, fewer than four draws, draws that are not finite, or no variance within the halves.
        """
        half = self.num_full // 2
        n = half * self.size
        if self.means.shape[1] < 2 or n < 2:
            return np.full(self.means.shape[0], np.nan)
        stop = self.num_full
        parts = [
            _together(self.size, self.means[..., cut], self.deviations[..., cut])
            for cut in (slice(0, half), slice(stop - half, stop))
        ]
        means, deviations = (np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))
        with np.errstate(all="ignore"):
            within = deviations.mean(axis=1) / (n - 1)
            found = np.sqrt((n - 1) / n + means.var(axis=1, ddof=1) / within)
        return np.where((within > 0) & np.isfinite(found), found, np.nan)

    def effective(self) -> np.ndarray:
        """Effective sample size for the mean, shape `(D,)`; NaN as for `rhat`, but one chain will do."""
        num_draws = self.num_draws * self.means.shape[1]
        _, m = self.pooled()
        with np.errstate(all="ignore"):
            variance = m / (num_draws - 1)
            found = np.minimum(
                num_draws * variance / self._long_run(self.means[..., :-1], variance),
                num_draws * np.log10(num_draws),
            )
        return np.where(np.isfinite(found) & (variance > 0), found, np.nan)

    def mcse_mean(self) -> np.ndarray:
        """Monte Carlo standard error of the mean, shape `(D,)`; NaN as for `effective`."""
        num_draws = self.num_draws * self.means.shape[1]
        with np.errstate(all="ignore"):
            return np.sqrt(self.pooled()[1] / (num_draws - 1) / self.effective())

    def mcse_sd(self) -> np.ndarray:
        """Monte Carlo standard error of the standard deviation, shape `(D,)`, from batch means of squares; NaN as for
        `effective`.

        For the length of batches squares are taken to vary as those of a normal law.
        """
        num_draws = self.num_draws * self.means.shape[1]
        mean, m = self.pooled()
        with np.errstate(all="ignore"):
            variance = m / (num_draws - 1)
            squares = self.deviations[..., :-1] / self.size + np.square(
                self.means[..., :-1] - mean[:, None, None]
            )
            found = np.sqrt(self._long_run(squares, 2 * variance**2) / num_draws / (4 * variance))
        return np.where(np.isfinite(found) & (variance > 0), found, np.nan)

    def _long_run(self, means: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """σ², shape `(D,)`, of batch means `(D, C, b)` of something with this variance, by batches that are long enough
        for it."""
        found, size, settled = (
            np.full(means.shape[0], np.nan),
            self.size,
            np.zeros(means.shape[0], bool),
        )
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

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` takes."""
        return {
            "size": np.asarray(self.size),
            "means": self.means,
            "deviations": self.deviations,
            "num_open": np.asarray(self.num_open),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> BatchMeans:
        """The batches that gave these arrays."""
        means, deviations = (
            np.asarray(arrays[name], np.float64) for name in ("means", "deviations")
        )
        return cls(int(arrays["size"]), means, deviations, int(arrays["num_open"]))


def _together(
    size: int, means: np.ndarray, deviations: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of squared deviations of samples of one size, along the last axis."""
    if not means.shape[-1] or not size:
        return np.zeros(means.shape[:-1]), np.zeros(means.shape[:-1])
    mean = means.mean(axis=-1)
    return mean, deviations.sum(axis=-1) + size * np.square(means - mean[..., None]).sum(axis=-1)
