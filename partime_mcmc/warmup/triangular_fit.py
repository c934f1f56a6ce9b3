"""A triangular map learned from pooled draws and their gradients; the model is not evaluated, and nothing is compiled.

Draws and gradients go through x_R = c + V h + exp(W h) ∘ y_R, h = x_H − m, by the chain rule:

    y_R = (x_R − c − V h) ∘ exp(−W h),     ∂_R = g_R ∘ exp(W h),     ∂_H = g_H + Vᵀ g_R + Wᵀ (1 + g_R ∘ (x_R − c − V h)),

and V, W and c minimise `reparametrise`'s divergence J of them plus 0.02 (|V|₁ + |W|₁) by L-BFGS-B (Byrd, Lu, Nocedal & Zhu
1995), weights split into positive and negative parts. All is in units in which draws and gradients are equally wide.

Which coordinates are scales is read off the slope S = dJ/dW at W = 0, for all of them at once: half of the chains give S¹, the
others S², and Σ_R S¹_Rk S²_Rk is how much J falls with coordinate k as a scale, up to a factor and to noise with mean 0. Those
that score best are scales; what depends on a scale already cannot become one. More are looked for at the map thus found.

Half of the chains fit; a map is kept if J falls on the others as well.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from partime_mcmc.kernels.coordinates import CoordinateMap
from partime_mcmc.kernels.triangular_map import TriangularMap
from partime_mcmc.warmup.hmc_batch import HMCBatchResult
from partime_mcmc.warmup.metric import DenseMetric, root_of
from partime_mcmc.warmup.reparametrise import half_log_det

MOST_DIMENSIONS = 300
"""Beyond, a map is not looked for: J needs a dense covariance, and more draws than a window has."""
_MOST_SCALES, _NUM_DRAWS, _MOST_CHAINS = 32, 512, 32
# A scale's score: at least this, this share of the best one's, and this correlation of the two slopes.
_LEAST_SCORE, _SHARE, _CORRELATION = 1.0, 0.25, 0.4
# What changes its log width that much by a scale's standard deviation cannot become one.
_DEPENDENT = 0.25
_ROUNDS, _ITERATIONS = 6, 20
_PENALTY, _SMALL = 0.02, 0.02
# What J must fall by on draws that did not take part.
_LEAST_GAIN = 0.5
_FAR = 1e10


class Map(NamedTuple):
    """A map in the units of a fit.

    Attributes:
        scales: Coordinates, K of them.
        origin: c, `(D,)`.
        slopes: V, `(D, K)`.
        log_slopes: W, `(D, K)`.
    """

    scales: list[int]
    origin: np.ndarray
    slopes: np.ndarray
    log_slopes: np.ndarray

    @classmethod
    def without_effect(cls, dimension: int) -> "Map":
        return cls([], np.zeros(dimension), np.zeros((dimension, 0)), np.zeros((dimension, 0)))

    def with_scales(self, more: list[int]) -> "Map":
        """The same map with room for more scales."""
        room = np.zeros((len(self.origin), len(more)))
        found = Map(
            self.scales + more,
            self.origin.copy(),
            np.hstack([self.slopes, room]),
            np.hstack([self.log_slopes, room]),
        )
        for part in found[1:]:
            part[more] = 0
        return found

    def pruned(self) -> "Map":
        """Without small weights, and without scales on which nothing depends."""
        log_slopes = np.where(np.abs(self.log_slopes) > _SMALL, self.log_slopes, 0)
        # Where no width changes the rest is affine, which the metric does as well.
        used = (log_slopes != 0).any(axis=1)
        slopes = np.where((np.abs(self.slopes) > _SMALL) & used[:, None], self.slopes, 0)
        kept = (log_slopes != 0).any(axis=0) | (slopes != 0).any(axis=0)
        return Map(
            [scale for scale, keep in zip(self.scales, kept) if keep],
            np.where(used, self.origin, 0),
            slopes[:, kept],
            log_slopes[:, kept],
        )


class Part(NamedTuple):
    """Draws of some chains with gradients, rows `(n, D)`; `shape` is that of draws by step and chain."""

    x: np.ndarray
    g: np.ndarray
    shape: tuple[int, ...]


class Divergence:
    """J of draws in the units of a fit.

    Args:
        draws: With gradients, `(S, C, D)`.
        gradients: The same shape.
    """

    def __init__(self, draws: np.ndarray, gradients: np.ndarray):
        unit = DenseMetric().fisher(draws, gradients, np.eye(draws.shape[-1]))
        # In units of a metric correlations are small, and so is what shrinking them does.
        self.root = root_of(unit)
        self.inverse = np.linalg.inv(self.root)

    def of(self, y: np.ndarray, g: np.ndarray, shape) -> tuple[float, np.ndarray, np.ndarray]:
        """J, and its derivatives with respect to draws and gradients."""
        one, dy = half_log_det((y @ self.inverse.T).reshape(shape))
        two, dg = half_log_det((g @ self.root).reshape(shape))
        return one + two, dy.reshape(y.shape) @ self.inverse, dg.reshape(g.shape) @ self.root.T

    def through(self, found: Map, part: Part) -> tuple[float, Map]:
        """J of the draws through a map, and its derivatives with respect to the map's weights."""
        scales, _, slopes, log_slopes = found
        with np.errstate(all="ignore"):
            h = part.x[:, scales]
            width = np.exp(h @ log_slopes.T)
            y, g = through(found, part.x, part.g)
        if not (np.isfinite(y).all() and np.isfinite(g).all()):
            return _FAR, found
        value, dy, dg = self.of(y, g, part.shape)
        if not np.isfinite(value):
            return _FAR, found
        dh, placed = dg[:, scales], y * width
        back = -dy / width - (dh @ log_slopes.T) * part.g
        return value, Map(
            scales,
            back.sum(axis=0),
            back.T @ h + part.g.T @ dh,
            (dg * g - dy * y).T @ h + (part.g * placed).T @ dh + dh.sum(axis=0),
        )

    def log_slopes_at_zero(self, y: np.ndarray, g: np.ndarray, shape) -> np.ndarray:
        """dJ/dW at W = 0 with every coordinate as a scale of every other, `(D, D)`."""
        _, dy, dg = self.of(y, g, shape)
        y = y - y.mean(axis=0)
        found = (dg * g - dy * y).T @ y + (g * y).T @ dg + dg.sum(axis=0)
        np.fill_diagonal(found, 0)
        return found


def through(found: Map, x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of draws, their scales less m, and of gradients in the map's coordinates."""
    scales, origin, slopes, log_slopes = found
    h = x[:, scales]
    width, placed = np.exp(h @ log_slopes.T), x - origin - h @ slopes.T
    gradients = g * width
    gradients[:, scales] += g @ slopes + (g * placed) @ log_slopes + log_slopes.sum(axis=0)
    return placed / width, gradients


def split_maps(
    maps: tuple[CoordinateMap, ...],
) -> tuple[TriangularMap | None, tuple[CoordinateMap, ...]]:
    """The triangular map among maps, which is the first one, and the rest."""
    if maps and isinstance(maps[0], TriangularMap):
        return maps[0], maps[1:]
    return None, maps


def learn_triangular_map(old: TriangularMap | None, draws: HMCBatchResult) -> TriangularMap | None:
    """A triangular map that makes the draws' law more normal.

    Args:
        old: The map there is.
        draws: A window with gradients, in the coordinates that the map leads to.

    Returns:
        The map to go on with: a new one, the old one, or None, whichever is best on chains that took no part in the fit.
    """
    x, g = (np.asarray(leaf, float) for leaf in (draws.positions, draws.gradients))
    num_steps, num_chains, dimension = x.shape
    wide, steep = x.std(axis=(0, 1)), g.std(axis=(0, 1))
    if dimension > MOST_DIMENSIONS or num_chains < 2 or not ((wide > 0) & (steep > 0)).all():
        return old
    unit = np.sqrt(wide / steep)
    x, g = x / unit, g * unit
    try:
        divergence = Divergence(x, g)
    except np.linalg.LinAlgError:
        return old
    middle = x.mean(axis=(0, 1))
    chains = min(num_chains, _MOST_CHAINS)
    steps = np.linspace(0, num_steps - 1, min(num_steps, 2 * _NUM_DRAWS // chains)).astype(int)
    parts = []
    for first in (0, 1):
        chosen = [leaf[steps][:, first:chains:2] for leaf in (x, g)]
        rows = [leaf.reshape(-1, dimension) for leaf in chosen]
        parts.append(Part(*rows, chosen[0].shape))
    none = Map.without_effect(dimension)
    kept = none if old is None else _in_units(old, unit, middle)
    # From the beginning: scales that were found among few draws need not be the right ones.
    found = _Fit(divergence, parts, middle).run()

    def judged(one: Map) -> float:
        return divergence.through(one, _about(parts[1], middle, one.scales))[0]

    before, now, after = judged(none), judged(kept), judged(found)
    if after < min(before, now) - _LEAST_GAIN:
        return _as_map(found, unit, middle, draws.positions.dtype, old)
    return old if now < before - _LEAST_GAIN else None


class _Fit:
    """Scales, round after round, and weights for them."""

    def __init__(self, divergence: Divergence, parts: list[Part], middle: np.ndarray):
        self.divergence, self.parts, self.middle = divergence, parts, middle
        self.dimension = len(middle)

    def run(self) -> Map:
        """The map; without effect where there are no scales."""
        found, reached = Map.without_effect(self.dimension), np.inf
        for _ in range(_ROUNDS):
            more = self.new_scales(found)
            if not more:
                break
            next_found, value = self.fitted(found.with_scales(more))
            if value > reached - _LEAST_GAIN:
                break
            found, reached = next_found, value
        return found.pruned()

    def new_scales(self, found: Map) -> list[int]:
        """Coordinates that should be scales as well."""
        one, two = (
            self.divergence.log_slopes_at_zero(
                *through(found, *_about(part, self.middle, found.scales)[:2]), part.shape
            )
            for part in self.parts
        )
        product, size = one * two, np.sqrt((one**2).sum(axis=0) * (two**2).sum(axis=0))
        # Scales depend on nothing; what depends on one cannot become one.
        change = np.abs(found.log_slopes) * self.parts[0].x[:, found.scales].std(axis=0)
        free = (change < _DEPENDENT).all(axis=1)
        free[found.scales], product[found.scales] = False, 0
        room = _MOST_SCALES - len(found.scales)
        return _best_columns(product, _CORRELATION * size, free, room)

    def fitted(self, start: Map) -> tuple[Map, float]:
        """Weights for a map's scales, and what they reach."""
        scales, num_scales = start.scales, len(start.scales)
        others = np.setdiff1d(np.arange(self.dimension), scales)
        part, count = _about(self.parts[0], self.middle, scales), len(others) * num_scales

        def unpacked(weights: np.ndarray) -> Map:
            split = weights[: 4 * count].reshape(4, len(others), num_scales)
            found = Map.without_effect(self.dimension).with_scales(scales)
            found.slopes[others], found.log_slopes[others] = (
                split[0] - split[1],
                split[2] - split[3],
            )
            found.origin[others] = weights[4 * count :]
            return found

        def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
            value, by = self.divergence.through(unpacked(weights), part)
            if value == _FAR:
                return _FAR, np.zeros_like(weights)
            slopes, log_slopes = by.slopes[others].ravel(), by.log_slopes[others].ravel()
            split = np.concatenate([slopes, -slopes, log_slopes, -log_slopes]) + _PENALTY
            penalty = _PENALTY * weights[: 4 * count].sum()
            return value + penalty, np.concatenate([split, by.origin[others]])

        # Effects lie about 0, parameters about their means: where scales are the first, both are tried.
        is_first = not start.log_slopes.any()
        origins = [start.origin[others]] + [self.middle[others]] * is_first
        signed = [
            sign * leaf[others] for leaf in (start.slopes, start.log_slopes) for sign in (1, -1)
        ]
        ends = [
            minimize(
                objective,
                np.concatenate([*(np.maximum(leaf, 0).ravel() for leaf in signed), origin]),
                jac=True,
                method="L-BFGS-B",
                bounds=[(0, None)] * (4 * count) + [(None, None)] * len(others),
                options={"maxiter": _ITERATIONS},
            )
            for origin in origins
        ]
        best = min(ends, key=lambda end: end.fun)
        return unpacked(best.x), best.fun


def _best_columns(product, least, allowed, room: int) -> list[int]:
    """Columns with the largest sums, one after another: a column that is chosen leaves the rows of the others."""
    found, product = [], product.copy()
    enough = _LEAST_SCORE
    while len(found) < room:
        score = product.sum(axis=0)
        score[~allowed | (score < least)] = 0
        score[found] = 0
        column = int(np.argmax(score))
        if score[column] < enough:
            break
        enough = max(enough, _SHARE * score[column])
        found.append(column)
        product[column] = 0
    return found


def _about(part: Part, middle: np.ndarray, scales: list[int]) -> Part:
    """Draws with scales less m."""
    x = part.x.copy()
    x[:, scales] -= middle[scales]
    return part._replace(x=x)


def _as_map(found: Map, unit, middle, dtype, old: TriangularMap | None) -> TriangularMap:
    """With columns of zeros up to a power of two, so that another number of scales seldom makes another program."""
    count = len(found.scales)
    width = max(4, 1 << (count - 1).bit_length(), 0 if old is None else len(old.scales))
    scales = np.array(found.scales + [0] * (width - count), np.int32)
    room = ((0, 0), (0, width - count))
    per_scale = unit[found.scales]
    return TriangularMap(
        scales,
        (unit * middle)[scales].astype(dtype),
        (unit * found.origin).astype(dtype),
        np.pad(unit[:, None] * found.slopes / per_scale, room).astype(dtype),
        np.pad(found.log_slopes / per_scale, room).astype(dtype),
    )


def _in_units(old: TriangularMap, unit: np.ndarray, middle: np.ndarray) -> Map:
    """A map in the units of a fit, about its middle: another middle changes origins, and widths by a factor."""
    used = ((old.log_slopes != 0) | (old.slopes != 0)).any(axis=0)
    scales = np.asarray(old.scales)[used]
    slopes, log_slopes = np.asarray(old.slopes)[:, used], np.asarray(old.log_slopes)[:, used]
    moved = (unit * middle)[scales] - np.asarray(old.middle)[used]
    return Map(
        scales.tolist(),
        (old.origin + slopes @ moved) / unit,
        slopes * unit[scales] / unit[:, None],
        log_slopes * unit[scales],
    )


def enter_map(found: TriangularMap, draws: HMCBatchResult) -> HMCBatchResult:
    """Draws, gradients and log densities in a map's coordinates."""
    rows = [leaf.reshape(-1, leaf.shape[-1]).astype(float) for leaf in draws[:2]]
    one = np.ones(rows[0].shape[1])
    middle = np.zeros_like(one)
    middle[found.scales] = found.middle
    plain = _in_units(found, one, middle)
    rows[0][:, plain.scales] -= middle[plain.scales]
    h = rows[0][:, plain.scales]
    y, g = through(plain, *rows)
    y[:, plain.scales] += middle[plain.scales]
    return _like(draws, y, g, (h @ plain.log_slopes.T).sum(axis=1))


def leave_map(found: TriangularMap, draws: HMCBatchResult) -> HMCBatchResult:
    """The inverse of `enter_map`."""
    y, g = (leaf.reshape(-1, leaf.shape[-1]).astype(float) for leaf in draws[:2])
    slopes, log_slopes = np.asarray(found.slopes, float), np.asarray(found.log_slopes, float)
    h = y[:, found.scales] - found.middle
    width = np.exp(h @ log_slopes.T)
    placed, gradients = width * y, g / width
    back = -(gradients @ slopes + (gradients * placed) @ log_slopes + log_slopes.sum(axis=0))
    # Columns of zeros may name a coordinate twice, and one that is no scale.
    np.add.at(gradients, (slice(None), found.scales), back * (log_slopes != 0).any(axis=0))
    return _like(
        draws, placed + found.origin + h @ slopes.T, gradients, -(h @ log_slopes.T).sum(axis=1)
    )


def _like(draws: HMCBatchResult, x, g, change) -> HMCBatchResult:
    shape, dtype = draws.positions.shape, draws.positions.dtype
    return draws._replace(
        positions=x.reshape(shape).astype(dtype),
        gradients=g.reshape(shape).astype(dtype),
        logdensity=draws.logdensity + change.reshape(shape[:2]).astype(dtype),
    )
