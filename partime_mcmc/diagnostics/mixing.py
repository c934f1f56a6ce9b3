"""How well chains mix, of many coordinates at once: split R-hat and effective sample sizes, in NumPy.

With M half-chains of n draws, variance W within and B/n of their means,

    R-hat² = ((n − 1)/n W + B/n) / W,            ESS = M n / (1 + 2 Σ ρ_t),

ρ_t = 1 − (W − mean autocovariance at lag t) / ((n − 1)/n W + B/n), summed in pairs while these are positive and made
monotone (Geyer 1992). Ranks replaced by normal quantiles make both robust, folding about the median shows scales (Vehtari,
Gelman, Simpson, Carpenter & Bürkner 2021, arXiv:1903.08008). ArviZ's numbers, sizes to a few percent; it works through one
coordinate at a time and takes seconds to import: a run judges itself with these.

Draws have shape `(C, T, D)`, at least four draws a chain; results have shape `(D,)`. A coordinate that never moves has R-hat
infinite and no effective draw.

Many chains of few draws have no halves to compare. If they come in *superchains* of M chains that share their start, a nested
R-hat compares the means of superchains instead: with the variance B of these and W, that between the chains of one superchain
plus that within chains,

    nested R-hat² = 1 + B / W

(Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari & Gelman 2024, arXiv:2110.13017): chains that have forgotten their common
start differ as much within a superchain as superchains do, up to 1/M. Without common starts it says nothing about them.
"""

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata


def split_rhat(draws: np.ndarray) -> np.ndarray:
    """Split R-hat of the means, as it is."""
    return _rhat(_halves(draws))


def nested_rhat(draws: np.ndarray, superchains: np.ndarray) -> np.ndarray:
    """Nested R-hat of the means, of many short chains.

    Args:
        draws: Shape `(C, T, D)`, at least one draw a chain; those before chains have forgotten their starts left out.
        superchains: The superchain of each chain, shape `(C,)`: equal numbers for chains from one start.

    Raises:
        ValueError: If there are fewer than two superchains, these differ in size, or have one chain each.
    """
    names, member, sizes = np.unique(superchains, return_inverse=True, return_counts=True)
    if len(names) < 2 or len(set(sizes)) > 1 or sizes[0] < 2 or len(member) != len(draws):
        raise ValueError(
            f"superchains: got {len(member)} chains in superchains of sizes {sizes.tolist()}, wanted those of {len(draws)} "
            "chains, at least two superchains of one size, two chains each at least"
        )
    grouped = draws[np.argsort(member, kind="stable")].astype(float)
    grouped = grouped.reshape(len(names), sizes[0], *draws.shape[1:])
    means = grouped.mean(axis=2)
    within_chains = grouped.var(axis=2, ddof=1).mean(axis=1) if draws.shape[1] > 1 else 0.0
    with np.errstate(all="ignore"):
        within = (means.var(axis=1, ddof=1) + within_chains).mean(axis=0)
        found = np.sqrt(1 + means.mean(axis=1).var(axis=0, ddof=1) / within)
    return np.where(_moves(draws), np.nan_to_num(found, nan=np.inf), np.inf)


def rank_rhat(draws: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat, the larger of locations and of scales."""
    halves = _halves(draws)
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    # Of two values as far from their median as each other the scale is known.
    scales = np.where(_moves(folded), _rhat(_normal_scores(folded)), 1.0)
    return np.maximum(_rhat(_normal_scores(halves)), scales)


def ess_mean(draws: np.ndarray) -> np.ndarray:
    """Effective sample size of the mean, of draws as they are."""
    return _ess(_halves(draws))


def ess_bulk(draws: np.ndarray) -> np.ndarray:
    """Effective sample size of rank-normalised draws."""
    return _ess(_normal_scores(_halves(draws)))


def ess_mean_and_square(draws: np.ndarray) -> np.ndarray:
    """The smaller of `ess_bulk` of values and of their squared deviations from the mean, where slow scales show."""
    squares = (draws - draws.mean(axis=(0, 1))) ** 2
    return np.minimum(ess_bulk(draws), ess_bulk(squares))


def ess_tail(draws: np.ndarray) -> np.ndarray:
    """The smaller effective sample size of the 5% and 95% quantiles; infinite where draws of a few values have no tails."""
    halves = _halves(draws)
    ends = np.quantile(halves, (0.05, 0.95), axis=(0, 1))
    below = [(halves <= end).astype(float) for end in ends]
    sizes = [np.where(_moves(one), _ess(one), np.inf) for one in below]
    return np.where(_moves(halves), np.minimum(*sizes), 0.0)


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
