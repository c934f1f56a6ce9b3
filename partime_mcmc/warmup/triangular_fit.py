"""A triangular map learned from pooled draws and their gradients; the model is not evaluated, and nothing is compiled.

Draws and gradients go through x_R = c + V h + exp(W h) ∘ y_R, h = x_H − m, by the chain rule:

    y_R = (x_R − c − V h) ∘ exp(−W h),     ∂_R = g_R ∘ exp(W h),     ∂_H = g_H + Vᵀ g_R + Wᵀ (1 + g_R ∘ (x_R − c − V h)),

and V, W and c minimise the divergence J of `reparametrise` plus 0.02 (|V|₁ + |W|₁) by L-BFGS-B (Byrd, Lu, Nocedal & Zhu 1995),
weights split into positive and negative parts. All is in units of standard deviations. Small weights become 0.

Which coordinates are scales is read off the slope S = dJ/dW at W = 0, for all of them at once: half of the chains give S¹, the
others S², and Σ_R S¹_Rk S²_Rk is, up to noise with mean 0, what coordinate k as a scale promises. Those that promise most
become scales; what depends on a scale by then cannot become one. More are looked for at the map thus found.

Half of the chains fit; a map is kept if J falls on the others as well, and so is V; and c unless effects about 0 do as well there.
What is kept is then fitted to the draws of all chains. Fitted again to every window, which are longer each time, from the weights
there are, c becomes as exact as the narrowest place that was reached is narrow, which the next draws need to get further.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

from partime_mcmc.kernels.coordinates import Centring, CoordinateMap, maps_of
from partime_mcmc.kernels.traced_gradient import WithTracedGradient
from partime_mcmc.kernels.triangular_map import TriangularMap
from partime_mcmc.types import PyTree
from partime_mcmc.warmup.hmc_batch import HMCBatchResult, usual_seconds
from partime_mcmc.warmup.metric import DenseMetric, root_of
from partime_mcmc.warmup.reparametrise import half_log_det

# Beyond, a map is not looked for: J needs a dense covariance, and more draws than a window has.
_MOST_DIMENSIONS = 300
# Draws that weights are fitted to, of so many chains at most with those that judge them, which are as many.
_NUM_DRAWS, _MOST_CHAINS = 512, 32
# What a scale must promise: so much, this share of what the best one does, and the two slopes be so correlated.
_LEAST_PROMISE, _SHARE, _CORRELATION = 1.0, 0.25, 0.4
# What changes its log width that much with a scale cannot become one.
_DEPENDENT = 0.25
# Scales of one round: what widens coordinates so similarly, by the cosine, is not chosen together.
_ALIKE = 0.5
_MOST_SCALES, _MAX_ROUNDS = 32, 6
# Where a descent ends: with a step that lowers J by so little for each coordinate, and after so many steps. The map that is chosen
# is fitted more exactly than those to choose from, for the sake of its origins.
_TO_CHOOSE, _TO_KEEP = 1e-4, 1e-6
_MAX_ITERATIONS = 30
_PENALTY, _SMALL = 0.02, 0.02
# Columns that a map has at least.
_LEAST_ROOM = 4
# What J must fall by: where scales are added, and on draws that did not take part.
_LEAST_GAIN = 0.5
_FLOAT = np.float32
# Seconds that gradients of a usual warm-up take, beside which those of a map are few.
_SLOW = 0.3
# What stands for J where it is not finite.
_FAR, _TINY = 1e10, 1e-30


def first_maps(
    density: WithTracedGradient, example: PyTree, centring: Centring | None
) -> tuple[CoordinateMap, ...]:
    """The maps that warm-up may learn, as yet without effect.

    Where gradients take long a triangular map is among them from the beginning, since one that comes later is another program;
    elsewhere it would make every gradient of the models that need none take notably longer.

    Args:
        density: `(data, position) -> log density`.
        example: A position.
        centring: Of the target: its location-scale sites.
    """
    flat = jax.eval_shape(lambda tree: ravel_pytree(tree)[0], example)
    maps = maps_of(centring, example)
    if not 2 <= flat.size <= _MOST_DIMENSIONS or usual_seconds(density, flat.size) < _SLOW:
        return maps
    # As many columns as cost half of what a dense metric does: with more scales than columns the map would be another program.
    room = 1 << max(flat.size // 4, 1).bit_length() - 1
    return without_effect(flat.size, flat.dtype, min(max(room, _LEAST_ROOM), _MOST_SCALES)), *maps


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
        The map to go on with: a new one, the old one, or one without effect, whichever is best on chains that took no part in
        the fit. None stands for no effect where there was no map, so that no program is compiled for it. The old one for more
        than 300 dimensions, or one chain.
    """
    x, g = (np.asarray(leaf, float) for leaf in (draws.positions, draws.gradients))
    num_chains, dimension = x.shape[1:]
    wide, steep = x.std(axis=(0, 1)), g.std(axis=(0, 1))
    if dimension > _MOST_DIMENSIONS or num_chains < 2 or not ((wide > 0) & (steep > 0)).all():
        return old
    middle = x.mean(axis=(0, 1))
    x, g = (x - middle) / wide, g * wide
    try:
        # In units of a metric correlations are small, and so is what shrinking them does.
        root = root_of(DenseMetric().fisher(x, g, np.eye(dimension)))
    except np.linalg.LinAlgError:
        return old
    fitting, judging = (_Part(x, g, root, slice(first, None, 2)) for first in (0, 1))
    # Weights for hardly more draws than coordinates would be those of noise.
    if len(fitting.x) < min(2 * dimension, _NUM_DRAWS):
        return old
    none = _without_effect(dimension)
    kept = none if old is None else _in_units(old, wide, middle)
    # From the beginning: scales that were found among few draws need not be the right ones.
    new, again = _fit(fitting, judging, middle / wide, kept)
    before, now, after = (judging.divergence(one) for one in (none, kept, new))
    # With the same scales the newer weights come from more draws, which were further.
    gain = 0 if set(new.scales) == set(kept.scales) else _LEAST_GAIN
    if after < min(before - _LEAST_GAIN, now - gain):
        both = again(_Part(x, g, root, slice(None)))
        return _in_model(both, wide, middle, draws.positions.dtype, old)
    if old is None or not len(kept.scales) or now < before - _LEAST_GAIN:
        return old
    return without_effect(dimension, draws.positions.dtype, len(old.scales))


def without_effect(dimension: int, dtype: np.dtype, room: int = _LEAST_ROOM) -> TriangularMap:
    """The map that changes nothing, in the form of maps with so many scales: these are then no other program.

    Args:
        dimension: D.
        dtype: Of positions.
        room: Columns for scales.
    """
    nothing = np.zeros((dimension, room), dtype)
    scales = np.zeros(room, np.int32)
    return TriangularMap(scales, nothing[0], nothing[:, 0].copy(), nothing, nothing)


def enter_map(found: TriangularMap, draws: HMCBatchResult) -> HMCBatchResult:
    """Draws, gradients and log densities in a map's coordinates."""
    x, g = (leaf.reshape(-1, leaf.shape[-1]).astype(float) for leaf in draws[:2])
    return _like(draws, *_through(found, x, g))


def leave_map(found: TriangularMap, draws: HMCBatchResult) -> HMCBatchResult:
    """The inverse of `enter_map`."""
    y, g = (leaf.reshape(-1, leaf.shape[-1]).astype(float) for leaf in draws[:2])
    slopes, log_slopes = np.asarray(found.slopes, float), np.asarray(found.log_slopes, float)
    h = y[:, found.scales] - found.middle
    log_width = h @ log_slopes.T
    placed, gradients = np.exp(log_width) * y, g * np.exp(-log_width)
    by_scale = gradients @ slopes + (1 + gradients * placed) @ log_slopes
    x = placed + found.origin + h @ slopes.T
    # Columns of zeros may name a coordinate twice.
    np.subtract.at(gradients.T, np.asarray(found.scales), by_scale.T)
    return _like(draws, x, gradients, -log_width.sum(axis=1))


def _through(found: TriangularMap, x: np.ndarray, g: np.ndarray):
    """Rows of draws and of gradients in a map's coordinates, and log |det dx/dy|."""
    h = x[:, found.scales] - found.middle
    log_width = h @ np.asarray(found.log_slopes, float).T
    width, placed = np.exp(log_width), x - found.origin - h @ np.asarray(found.slopes, float).T
    gradients = g * width
    by_scale = g @ found.slopes + (1 + g * placed) @ found.log_slopes
    np.add.at(gradients.T, np.asarray(found.scales), by_scale.T)
    return placed / width, gradients, log_width.sum(axis=1)


def _like(draws: HMCBatchResult, x, g, log_jacobian) -> HMCBatchResult:
    shape, dtype = draws.positions.shape, draws.positions.dtype
    return draws._replace(
        positions=x.reshape(shape).astype(dtype),
        gradients=g.reshape(shape).astype(dtype),
        logdensity=draws.logdensity + log_jacobian.reshape(shape[:2]).astype(dtype),
    )


class _Part:
    """J of some chains' draws, in the units of a fit; computed in float32, which is exact enough for weights.

    Args:
        x: Draws of all chains, `(S, C, D)`.
        g: Their gradients.
        root: Of a metric.
        which: Of the chains.
    """

    def __init__(self, x: np.ndarray, g: np.ndarray, root: np.ndarray, which: slice):
        chains = min(x.shape[1], _MOST_CHAINS)
        count = min(len(x), 2 * _NUM_DRAWS // chains)
        steps = np.linspace(0, len(x) - 1, count).astype(int)
        x, g = (leaf[steps, :chains][:, which] for leaf in (x, g))
        self.shape = x.shape
        self.x, self.g = (leaf.reshape(-1, leaf.shape[2]).astype(_FLOAT) for leaf in (x, g))
        self.of_draws, self.of_gradients = np.linalg.inv(root).astype(_FLOAT), root.T.astype(_FLOAT)

    def divergence(self, found: TriangularMap) -> float:
        """J of the draws through a map."""
        found = _in_single(found)
        with np.errstate(all="ignore"):
            y, g, _ = _through(found, self.x, self.g)
        return self._judged(y, g)[0]

    def slopes(self, found: TriangularMap) -> tuple[float, list[np.ndarray]]:
        """J of the draws through a map, and its derivatives by c, V and W."""
        found = _in_single(found)
        with np.errstate(all="ignore"):
            y, g, _ = _through(found, self.x, self.g)
            value, dy, dg = self._judged(y, g)
        if value == _FAR:
            return value, [np.zeros_like(found.origin), *[np.zeros_like(found.slopes)] * 2]
        h = self.x[:, found.scales]
        width, dh = np.exp(h @ found.log_slopes.T), dg[:, found.scales]
        back = -dy / width - (dh @ found.log_slopes.T) * self.g
        by_width = (dg * self.g * width - dy * y).T @ h + (self.g * width * y).T @ dh
        # The derivative by W has a term Σ dh too, which is 0: J does not change with the gradients' mean.
        return value, [back.sum(axis=0), back.T @ h + self.g.T @ dh, by_width]

    def slopes_of_all(self, found: TriangularMap) -> np.ndarray:
        """dJ/dW at W = 0, `(D, D)`, of another map before this one, with every coordinate as a scale of every other."""
        y, g, _ = _through(_in_single(found), self.x, self.g)
        y = y - y.mean(axis=0)
        _, dy, dg = self._judged(y, g)
        slopes = (dg * g - dy * y).T @ y + (g * y).T @ dg
        np.fill_diagonal(slopes, 0)
        return slopes

    def _judged(self, y: np.ndarray, g: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """J, and its derivatives by draws and gradients."""
        if np.isfinite(y).all() and np.isfinite(g).all():
            one, dy = half_log_det(y.reshape(self.shape), self.of_draws)
            two, dg = half_log_det(g.reshape(self.shape), self.of_gradients)
            if np.isfinite(one + two):
                return one + two, dy.reshape(y.shape), dg.reshape(g.shape)
        return _FAR, y, g


def _in_single(found: TriangularMap) -> TriangularMap:
    """A map with its numbers in the type that fits compute in."""
    names = ("middle", "origin", "slopes", "log_slopes")
    return dataclasses.replace(
        found, **{name: np.asarray(getattr(found, name), _FLOAT) for name in names}
    )


def _fit(
    fitting: _Part, judging: _Part, place: np.ndarray, old: TriangularMap
) -> tuple[TriangularMap, Callable[[_Part], TriangularMap]]:
    """Scales, round after round, and weights for them; without effect where there are no scales.

    Args:
        fitting: Draws that weights are fitted to.
        judging: Draws that have a say in what is a scale, and in what stays at 0.
        place: Where the draws' middle is, seen from 0, `(D,)`.
        old: The map there is, from whose weights those of the same scales are looked for.

    Returns:
        The map, and how to fit its weights to other draws.
    """
    found, reached = _without_effect(len(place)), np.inf
    for _ in range(_MAX_ROUNDS):
        more = _new_scales(found, fitting, judging)
        if not more:
            break
        begin = _with_scales(found, more)
        begins = [begin]
        if not len(found.scales):
            if np.isin(more, old.scales).any():
                begins = [_with_weights(begin, old)]
            else:
                # Parameters lie about their means, effects about 0.
                begins.append(dataclasses.replace(begin, origin=_about_zero(more, place)))
        ends = _side_by_side(functools.partial(_fitted, part=fitting), begins)
        end, value = min(ends, key=lambda one: one[1])
        if value > reached - _LEAST_GAIN:
            break
        found, reached = end, value
    if not len(found.scales):
        return found, lambda part: found
    # Slopes and origins that noise has made move the narrow part of a funnel by many of its widths: they must show on others.
    straight = dataclasses.replace(found, slopes=np.zeros_like(found.slopes))
    about_zero = dataclasses.replace(straight, origin=_about_zero(found.scales, place))
    # How large slopes may be and how far origins may move.
    kinds = [(np.inf, np.inf), (0.0, np.inf), (0.0, 0.0)]
    others = _side_by_side(
        lambda begin, kind: _fitted(begin, fitting, *kind)[0], [straight, about_zero], kinds[1:]
    )
    ends = [_pruned(end) for end in (found, *others)]
    values = np.array([judging.divergence(end) for end in ends]) + [_LEAST_GAIN, 0, 0]
    best = int(values.argmin())
    return ends[best], lambda part: _pruned(_fitted(ends[best], part, *kinds[best], _TO_KEEP)[0])


def _side_by_side(fit: Callable, *begins: list) -> list:
    """Fits that do not wait for each other: most of their time NumPy holds no lock."""
    with concurrent.futures.ThreadPoolExecutor(len(begins[0])) as threads:
        return list(threads.map(fit, *begins))


def _new_scales(found: TriangularMap, fitting: _Part, judging: _Part) -> list[int]:
    """Coordinates that should be scales as well."""
    one, two = (part.slopes_of_all(found) for part in (fitting, judging))
    promise, size = one * two, np.sqrt((one**2).sum(axis=0) * (two**2).sum(axis=0))
    free = np.asarray((np.abs(found.log_slopes) < _DEPENDENT).all(axis=1))
    free[found.scales], promise[found.scales] = False, 0
    direction = (one + two) / (np.linalg.norm(one + two, axis=0) + _TINY)
    more, enough = [], _LEAST_PROMISE
    while len(found.scales) + len(more) < _MOST_SCALES:
        total = promise.sum(axis=0)
        total[~free | (total < _CORRELATION * size)] = 0
        best = int(np.argmax(total))
        if total[best] < enough:
            break
        enough = max(enough, _SHARE * total[best])
        more.append(best)
        # Where another promises to widen the same coordinates it may stand for this one: it has to wait.
        free &= np.abs(direction[:, best] @ direction) < _ALIKE
        free[best], promise[best] = False, 0
    return more


def _about_zero(scales, place: np.ndarray) -> np.ndarray:
    """The origin c of a map by which all but the scales lie about 0, with draws' middle at `place`."""
    return np.where(np.isin(np.arange(len(place)), scales), 0, -place)


def _fitted(
    start: TriangularMap,
    part: _Part,
    largest_slope: float = np.inf,
    origin_range: float = np.inf,
    least_fall: float = _TO_CHOOSE,
) -> tuple[TriangularMap, float]:
    """Weights for a map's scales, those of V at most so large and c so near to where it was, and J with the penalty.

    The descent ends where a step lowers J by no more than `least_fall` for each coordinate.
    """
    others = np.setdiff1d(np.arange(len(start.origin)), start.scales)
    shape = 2, 2, len(others), len(start.scales)
    count = np.prod(shape)

    def unpacked(weights: np.ndarray) -> TriangularMap:
        origin, pair = np.zeros_like(start.origin), np.zeros((2, *start.slopes.shape))
        positive, negative = weights[:count].reshape(shape)
        pair[:, others], origin[others] = positive - negative, weights[count:]
        return dataclasses.replace(start, origin=origin, slopes=pair[0], log_slopes=pair[1])

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, (origin, *pair) = part.slopes(unpacked(weights))
        slope = np.stack(pair)[:, others]
        split = (np.stack([slope, -slope]) + _PENALTY).ravel()
        return value + _PENALTY * weights[:count].sum(), np.concatenate([split, origin[others]])

    pair = np.stack([start.slopes, start.log_slopes])[:, others]
    begin = np.maximum(np.stack([pair, -pair]), 0).ravel()
    begin = np.concatenate([begin, start.origin[others]])
    # What SciPy asks for first, too.
    at_begin = objective(begin)
    of_slopes, of_widths = ([(0, most)] * (count // 4) for most in (largest_slope, np.inf))
    of_origin = [(one - origin_range, one + origin_range) for one in start.origin[others]]
    bounds = [*(of_slopes + of_widths) * 2, *of_origin]
    found = minimize(
        lambda weights: at_begin if np.array_equal(weights, begin) else objective(weights),
        begin,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={
            "maxiter": _MAX_ITERATIONS,
            "ftol": least_fall * len(start.origin) / max(1.0, abs(at_begin[0])),
        },
    )
    return unpacked(found.x), found.fun


def _without_effect(dimension: int) -> TriangularMap:
    nothing = np.zeros((dimension, 0))
    return TriangularMap(np.zeros(0, int), np.zeros(0), np.zeros(dimension), nothing, nothing)


def _with_scales(found: TriangularMap, more: list[int]) -> TriangularMap:
    """The same map with more scales, on which nothing depends so far."""
    origin, slopes, log_slopes = (
        np.array(leaf) for leaf in (found.origin, found.slopes, found.log_slopes)
    )
    for leaf in (origin, slopes, log_slopes):
        leaf[more] = 0
    room = (0, 0), (0, len(more))
    return TriangularMap(
        np.append(found.scales, more),
        np.append(found.middle, np.zeros(len(more))),
        origin,
        np.pad(slopes, room),
        np.pad(log_slopes, room),
    )


def _with_weights(found: TriangularMap, old: TriangularMap) -> TriangularMap:
    """The map with the weights that its scales have in another one."""
    _, of_found, of_old = np.intersect1d(found.scales, old.scales, return_indices=True)
    slopes, log_slopes = found.slopes.copy(), found.log_slopes.copy()
    slopes[:, of_found], log_slopes[:, of_found] = old.slopes[:, of_old], old.log_slopes[:, of_old]
    # The other map's scales are counted from another middle.
    origin = old.origin - old.slopes @ old.middle
    return dataclasses.replace(found, origin=origin, slopes=slopes, log_slopes=log_slopes)


def _pruned(found: TriangularMap) -> TriangularMap:
    """Without small weights, and without scales on which nothing depends."""
    log_slopes = np.where(np.abs(found.log_slopes) > _SMALL, found.log_slopes, 0)
    # Where no width changes the rest is affine, which the metric does as well.
    used = (log_slopes != 0).any(axis=1)
    slopes = np.where((np.abs(found.slopes) > _SMALL) & used[:, None], found.slopes, 0)
    kept = ((log_slopes != 0) | (slopes != 0)).any(axis=0)
    return TriangularMap(
        found.scales[kept],
        found.middle[kept],
        np.where(used, found.origin, 0),
        slopes[:, kept],
        log_slopes[:, kept],
    )


def _in_model(found: TriangularMap, unit, middle, dtype, old: TriangularMap | None):
    """A map as the model's numbers have it, with columns of zeros up to a power of two: another number of scales is
    seldom another program."""
    count = len(found.scales)
    room = 0 if old is None else len(old.scales)
    width = max(_LEAST_ROOM, 1 << (count - 1).bit_length(), room)
    scales = np.pad(found.scales, (0, width - count)).astype(np.int32)
    per_scale, room = unit[found.scales], ((0, 0), (0, width - count))
    used = (found.log_slopes != 0).any(axis=1)
    return TriangularMap(
        scales,
        middle[scales].astype(dtype),
        np.where(used, middle + unit * found.origin, 0).astype(dtype),
        np.pad(unit[:, None] * found.slopes / per_scale, room).astype(dtype),
        np.pad(found.log_slopes / per_scale, room).astype(dtype),
    )


def _in_units(found: TriangularMap, unit: np.ndarray, middle: np.ndarray) -> TriangularMap:
    """The map of draws less `middle` in units `unit`, up to what is affine, which J does not see."""
    slopes, log_slopes = np.asarray(found.slopes, float), np.asarray(found.log_slopes, float)
    kept = ((log_slopes != 0) | (slopes != 0)).any(axis=0)
    scales, slopes, log_slopes = found.scales[kept], slopes[:, kept], log_slopes[:, kept]
    used = (log_slopes != 0).any(axis=1)
    per_scale = unit[scales]
    return TriangularMap(
        scales,
        (found.middle[kept] - middle[scales]) / per_scale,
        np.where(used, (found.origin - middle) / unit, 0),
        slopes * per_scale / unit[:, None],
        log_slopes * per_scale,
    )
