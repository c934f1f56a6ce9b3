"""How well chains mix, of many coordinates at once: split R-hat and effective sample sizes, in NumPy.

With M half-chains of n draws, variance W within and B/n of their means,

    R-hat² = ((n − 1)/n W + B/n) / W,            ESS = M n / (1 + 2 Σ ρ_t),

ρ_t = 1 − (W − mean autocovariance at lag t) / ((n − 1)/n W + B/n), summed in pairs while these are positive and made
monotone (Geyer 1992). Ranks replaced by normal quantiles make both robust, folding about the median shows scales (Vehtari,
Gelman, Simpson, Carpenter & Bürkner 2021, arXiv:1903.08008). ArviZ's numbers, sizes to a few percent; it works through one
coordinate at a time and takes seconds to import: a run judges itself with these.

Draws have shape `(C, T, D)`, at least four draws a chain; results have shape `(D,)`. A coordinate that never moves has R-hat
infinite and no effective draw.
"""

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata


def split_rhat(draws: np.ndarray) -> np.ndarray:
    """Split R-hat of the means, as it is."""
    return _rhat(_halves(draws))


def rank_rhat(draws: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat, the larger of locations and of scales."""
    halves = _halves(draws)
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    return np.maximum(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))


def ess_bulk(draws: np.ndarray) -> np.ndarray:
    """Effective sample size of rank-normalised draws."""
    return _ess(_normal_scores(_halves(draws)))


def ess_tail(draws: np.ndarray) -> np.ndarray:
    """The smaller effective sample size of the 5% and 95% quantiles."""
    halves = _halves(draws)
    ends = np.quantile(halves, (0.05, 0.95), axis=(0, 1))
    return np.minimum(*(_ess((halves <= end).astype(float)) for end in ends))


def _halves(draws: np.ndarray) -> np.ndarray:
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, -half:]]).astype(float)


def _normal_scores(draws: np.ndarray) -> np.ndarray:
    flat = draws.reshape(-1, draws.shape[-1])
    return ndtri((rankdata(flat, axis=0) - 0.375) / (len(flat) + 0.25)).reshape(draws.shape)


def _moves(draws: np.ndarray) -> np.ndarray:
    return np.isfinite(draws).all(axis=(0, 1)) & (np.ptp(draws, axis=(0, 1)) > 0)


def _rhat(halves: np.ndarray) -> np.ndarray:
    num_draws = halves.shape[1]
    with np.errstate(all="ignore"):
        within = halves.var(axis=1, ddof=1).mean(axis=0)
        between = halves.mean(axis=1).var(axis=0, ddof=1)
        found = np.sqrt((num_draws - 1) / num_draws + between / within)
    return np.where(_moves(halves), np.nan_to_num(found, nan=np.inf), np.inf)


def _ess(halves: np.ndarray) -> np.ndarray:
    num_halves, num_draws, _ = halves.shape
    with np.errstate(all="ignore"):
        spectrum = np.fft.rfft(halves - halves.mean(axis=1, keepdims=True), 2 * num_draws, axis=1)
        covariance = np.fft.irfft(np.abs(spectrum) ** 2, axis=1)[:, :num_draws].mean(axis=0)
        covariance /= num_draws - 1
        within = covariance[0]
        total = within * (num_draws - 1) / num_draws + halves.mean(axis=1).var(axis=0, ddof=1)
        rho = 1 - (within - covariance) / total
    rho[0] = 1
    pairs = rho[: num_draws // 2 * 2].reshape(-1, 2, rho.shape[1]).sum(axis=1)
    positive = np.logical_and.accumulate(pairs > 0, axis=0)
    time = -1 + 2 * np.where(positive, np.minimum.accumulate(pairs, axis=0), 0).sum(axis=0)
    size = num_halves * num_draws
    found = size / np.maximum(time, 1 / np.log10(size))
    return np.where(_moves(halves), np.nan_to_num(found), 0.0)
