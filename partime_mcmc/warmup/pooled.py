"""Warm-up in parallel time: pooled chains look for the typical set, then windows at frozen parameters learn the metric.

    search    plain HMC, 16 steps at a time: every chain has its own step size (log h += 1.5 (acceptance − 0.7)) and
              paths of 1 to 7 leapfrog steps, after 64 steps of 1 to 48; after each batch a Fisher metric from all
              chains. It ends once the median log density gains less than s = max(1, √(D/2)) over a batch and no chain
              lies 4 s below it, after 64 steps at the earliest and half of the steps allowed at the latest
    rescue    a chain whose log density is so far below the others' that it is lost goes on from the state of another
    learn     windows of 32, 64, 128, 256, ... steps with step size, path and metric frozen: ordinary chains, which can be
              solved in parallel time; after each new coordinates (`reparametrise`, `triangular_fit`), a new metric, and by trials
              (`tuning`) a new step size and path. They go on until what they learn has settled: after a window of 256
              steps at the earliest, once the pooled chains agree (split R-hat of every coordinate and of the log
              density) and the step size has changed by less than a quarter; or until no step is left

Chains are pooled, so that a metric is known after some hundred steps and hardly any step waits for another: the depth
is about a thousand gradients where a sequential adaptation has tens of thousands. How windows are run is a strategy:
all chains side by side, or parallel in time as well where lanes are many.
"""

import dataclasses
import functools
from typing import Callable, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from partime_mcmc.compile_cache import Timings, run_program
from partime_mcmc.diagnostics import mixing
from partime_mcmc.engine import CachedStep, Dynamics, Status, Tolerance, shooting
from partime_mcmc.engine.solve import solve
from partime_mcmc.kernels.coupling import normal_of
from partime_mcmc.kernels.metric_root import Root, largest_ratio, times, transposed_times
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Key
from partime_mcmc.warmup.hmc_batch import STEPS, HMCBatch, HMCBatchResult, SeedTree
from partime_mcmc.warmup.metric import (
    DiagonalMetric,
    Metric,
    MetricRule,
    diagonal_like,
    metric_for,
    root_of,
    unit_metric,
)
from partime_mcmc.warmup.reparametrise import carry_over, learn_map
from partime_mcmc.warmup.triangular_fit import (
    enter_map,
    learn_triangular_map,
    leave_map,
    split_maps,
)
from partime_mcmc.warmup.tuning import Path, TrajectoryRule, Trials, best_angle

_PIECE, _SEGMENT = 128, 32
# Adaptation asks for less than sampling: a millionth of the width of a posterior.
_TOLERANCE = 1e-6


def side_by_side(
    walker: HMCBatch, seed: SeedTree, positions: np.ndarray, root: Root, path: Path, size: int
) -> HMCBatchResult:
    """A window with all chains side by side, in as few calls as memory lets it be.

    Args:
        walker: The program for trajectories.
        seed: Of the random numbers.
        positions: Where the chains are, `(C, D)`.
        root: Of the metric.
        path: Of every transition.
        size: Steps; what is more than a multiple of 16 is left out.
    """
    pieces, longest, size = [], walker.longest, max(1, size // STEPS) * STEPS
    for start in range(0, size, longest):
        pieces.append(
            walker.walk(
                seed.child(start),
                positions,
                root,
                path.step_size,
                path.num_steps,
                path.drift_fraction,
                size=min(longest, size - start),
            )
        )
        positions = pieces[-1].positions[-1]
    return HMCBatchResult(
        *(np.concatenate(parts) for parts in list(zip(*pieces))[:4]),
        step_sizes=pieces[-1].step_sizes,
    )


def in_parallel_time(
    walker: HMCBatch, seed: SeedTree, positions: np.ndarray, root: Root, path: Path, size: int
) -> HMCBatchResult:
    """A window solved in parallel time, 128 steps a piece; short ones, and pieces that do not forget, side by side.

    Args and result as for `side_by_side`.
    """
    if size < _PIECE:
        return side_by_side(walker, seed, positions, root, path, size)
    dtype, pieces = walker.dtype, []
    numbers = (
        walker.params,
        walker.example,
        jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), root),
        jnp.asarray(path.step_size, dtype),
        jnp.asarray(path.num_steps, jnp.int32),
        jnp.asarray(path.drift_fraction, dtype),
    )
    for number in range(size // _PIECE):
        one = seed.child(number)
        found, depth, status, evaluations = run_program(
            _Piece(walker.density),
            numbers,
            jnp.asarray(positions, dtype),
            one.key,
            timings=Timings(),
        )
        if (np.asarray(status) != Status.CONVERGED).any():
            pieces.append(side_by_side(walker, one, positions, root, path, _PIECE))
        else:
            pieces.append(
                HMCBatchResult(
                    *(np.asarray(part) for part in found),
                    step_sizes=np.full(len(positions), path.step_size),
                )
            )
            walker.num_steps += _PIECE
            walker.depth += int(np.max(depth)) * path.num_steps
            walker.num_gradients += int(np.sum(evaluations) * _PIECE * path.num_steps)
        positions = pieces[-1].positions[-1]
    return HMCBatchResult(
        *(np.concatenate(parts) for parts in list(zip(*pieces))[:4]),
        step_sizes=pieces[-1].step_sizes,
    )


class _Piece(HashableFunction):
    """All chains over one piece: positions, gradients, log densities and acceptance, then depth, status and work."""

    def __call__(self, numbers, positions, key):
        (density,) = self.parts
        num_chains, dimension = positions.shape
        drives = jax.random.uniform(key, (num_chains, _PIECE, dimension + 1), positions.dtype)
        part = functools.partial(_Hamiltonian, density)
        cached = CachedStep(part("enter"), part("advance"), part("leave"), (numbers,) * 3)
        dynamics = Dynamics(part("step"), numbers, cached)
        found = jax.vmap(
            lambda first, drive: solve(
                dynamics,
                first,
                drive,
                solver=shooting(steps=_SEGMENT),
                tolerance=Tolerance(_TOLERANCE, _TOLERANCE),
            )
        )(positions, drives)
        before = jnp.concatenate([positions[:, None], found.states[:, :-1]], axis=1)
        move = jax.vmap(jax.vmap(functools.partial(_move, density, numbers)))
        evaluate = jax.vmap(jax.vmap(functools.partial(_evaluate, density, numbers)))
        rate = move(evaluate(before), drives)[1]
        x, value, gradient = evaluate(found.states)
        across = [jnp.swapaxes(leaf, 0, 1) for leaf in (x, gradient, value, rate)]
        return across, found.stats.depth, found.status, found.stats.evaluations


class _Hamiltonian(HashableFunction):
    """One HMC transition as a recurrence on flat positions, driven by D + 1 uniforms; parts: the density, a name."""

    def __call__(self, numbers, *args):
        density, name = self.parts
        if name == "enter":
            return _evaluate(density, numbers, args[0])
        if name == "advance":
            return _move(density, numbers, *args)[0]
        if name == "leave":
            return args[0][0]
        return _move(density, numbers, _evaluate(density, numbers, args[0]), args[1])[0][0]


def _evaluate(density, numbers, x):
    params, example = numbers[:2]
    unravel = ravel_pytree(example)[1]
    return x, *jax.value_and_grad(lambda flat: density(params, unravel(flat)))(x)


def _move(density, numbers, state, uniforms):
    """The next state and the acceptance probability."""
    _, _, root, step, num_steps, drift_fraction = numbers
    momentum = normal_of(uniforms[1:])

    def leap(index, moving):
        x, _, gradient, p = moving
        half = p + 0.5 * step * transposed_times(root, gradient)
        ended = _evaluate(density, numbers, x + drift_fraction * step * times(root, half))
        return *ended, half + 0.5 * step * transposed_times(root, ended[2])

    *end, last = lax.fori_loop(0, num_steps, leap, (*state, momentum))
    fall = 0.5 * jnp.sum(momentum**2) - state[1] - 0.5 * jnp.sum(last**2) + end[1]
    usable = jnp.isfinite(fall) & jnp.isfinite(end[2]).all()
    rate = jnp.where(usable, jnp.exp(jnp.minimum(fall, 0)), 0)
    return tuple(jnp.where(uniforms[0] < rate, new, old) for new, old in zip(end, state)), rate


_GAIN, _SEARCH_TARGET = 1.5, 0.7
_LONGEST_SEARCHED, _LONGEST_LATER = 7, 48
_MIN_SEARCH, _MAX_SEARCH = 64, 512
# How far below the others the last chain may be, in standard deviations of a normal's log density; and how many steps a chain
# has that lies so far below that it is lost.
_BEHIND, _PATIENCE = 4, 192
_COVARIANCE_FROM = 256
# What counts as settled.
_SAME_STEP, _SAME_WEIGHT = 0.25, 0.1
# The largest split R-hat of chains that agree is 1.03 and 8 / window size: that of short windows is noisy.
_AGREEING, _AGREEING_ROOM = 1.03, 8


@dataclasses.dataclass
class Pool:
    """Where the chains are and what is believed.

    Attributes:
        positions: Shape `(C, D)`.
        metric: What is believed of the covariance, `(D, D)`, `(D,)` or a `LowRank` root.
        center: Shape `(D,)`.
        draws: The last window.
        num_rescued: Chains that were lost and went on from another chain's state.
        notes: What a reader should know, in sentences.
        rhat: The largest split R-hat of the last window; infinite where there was none.
        settled: Whether the chains agreed in it.
        minima: Weights at which a map's last fit ended; none before the first.
    """

    positions: np.ndarray
    metric: Metric
    center: np.ndarray
    draws: HMCBatchResult
    num_rescued: int
    notes: list[str]
    rhat: float = np.inf
    settled: bool = False
    minima: tuple[np.ndarray, ...] = ()

    @classmethod
    def at(cls, starts: np.ndarray, metric: Metric) -> Self:
        """Chains that have not moved yet: their starts stand for draws."""
        states = np.broadcast_to(starts, (STEPS, *starts.shape))
        nothing = np.zeros(states.shape)
        draws = HMCBatchResult(
            states, nothing, nothing[..., 0], nothing[..., 0], np.ones(len(starts))
        )
        return cls(starts, metric, starts.mean(axis=0), draws, 0, [])

    def carry_over(self, draws: HMCBatchResult) -> None:
        """Go on from the last window's draws as they are in other coordinates."""
        self.draws, self.positions = draws, draws.positions[-1]
        # The metric of other coordinates says little of these.
        spread = DiagonalMetric().fisher(
            draws.positions, draws.gradients, np.ones(draws.positions.shape[-1])
        )
        self.metric = diagonal_like(self.metric, spread)

    def trials(self, walker: HMCBatch, seed: SeedTree) -> Trials:
        """One trajectory from each of 16 states of every chain, the same for all candidates."""
        draws, root = self.draws.positions, root_of(self.metric)
        states = draws[np.linspace(0, len(draws) - 1, STEPS).astype(int)]
        apart = (states - draws.mean(axis=(0, 1))) ** 2
        return Trials(
            lambda path: walker.walk(seed, states, root, *path[:3]).acceptance,
            apart[..., apart.sum(axis=(0, 1)) > 0],
        )


def window_sizes(num_steps: int, first: int) -> list[int]:
    """Steps of windows that double until they use all steps; a rest shorter than half a window joins the one before."""
    sizes, left = [], num_steps
    while left >= STEPS:
        size = min(left, first)
        size = left if left - size < size / 2 else size
        sizes.append(size)
        left, first = left - size, 2 * first
    return sizes


def recentre(walker: HMCBatch, pool: Pool) -> bool:
    """Learn how far to recentre the sites of the walker's map, and carry the chains over; whether anything changed.

    Does nothing for a target without location-scale sites.
    """
    if not walker.maps:
        return False
    (old,) = walker.maps
    learned = learn_map(old, pool.draws, root_of(pool.metric), pool.minima)
    pool.minima = learned.minima
    change = _largest_change(old.weights, learned.map.weights)
    if not change > 0:
        return False
    draws = carry_over(old, learned.map, pool.draws)
    if not draws.is_finite():
        return False
    walker.maps = (learned.map,)
    pool.carry_over(draws)
    return change > _SAME_WEIGHT


def learn_coordinates(walker: HMCBatch, pool: Pool, estimate: Callable) -> bool:
    """Recentre sites, since a site's law says more than draws do, then learn a triangular map of what is left.

    Does nothing where the draws or their gradients are not finite.

    Args:
        walker: Its maps are replaced.
        pool: Its draws are carried over.
        estimate: Of a metric, from draws in coordinates for which there is none yet.

    Returns:
        Whether anything changed.
    """
    if not pool.draws.is_finite():
        return False
    before, maps = dataclasses.replace(pool), walker.maps
    old, walker.maps = split_maps(maps)
    if old is not None:
        pool.carry_over(leave_map(old, pool.draws))
    if walker.maps:
        learn(pool, estimate)
    without = walker.maps
    moved = recentre(walker, pool)
    new = learn_triangular_map(old, pool.draws)
    if old is not None and new is old and walker.maps is without:
        walker.maps, pool.draws, pool.positions, pool.metric = (
            maps,
            before.draws,
            before.positions,
            before.metric,
        )
        return False
    if new is not None:
        draws = enter_map(new, pool.draws)
        if draws.is_finite():
            walker.maps = (new, *walker.maps)
            pool.carry_over(draws)
    return moved or new is not old


def _largest_change(old, new) -> float:
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0))
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new))
    )


def split_rhat(draws: HMCBatchResult) -> float:
    """The largest split R-hat of a window's coordinates and log density."""
    x = np.concatenate([draws.positions, draws.logdensity[..., None]], axis=-1)
    return float(mixing.split_rhat(np.swapaxes(x, 0, 1)).max())


@dataclasses.dataclass(frozen=True)
class PooledAdaptation:
    """Search, then windows.

    Attributes:
        num_chains: Chains that take part at least; the first of them go on.
        target_acceptance: Mean acceptance that the kernel is tuned for; None is what suits it.
        path_length: Of HMC in whitened units; None is a quarter period.
        first_window: Steps of the first window; each further one is twice as long.
        coordinates: How coordinates are learned after each window; None keeps the model's own.
        metric: How the metric is estimated; None is dense up to 300 dimensions, low-rank beyond.
        guess: A first metric, `(D, D)`, `(D,)` or a `LowRank` root; None is the identity.
        run: How a window is run: `side_by_side` or `in_parallel_time`; None is what suits the device.
        first_step: The step size with which every chain begins its search.

    Examples:
        >>> from partime_mcmc import PooledAdaptation
        >>> careful = PooledAdaptation(num_chains=16, target_acceptance=0.9)
        >>> # draws = sample(key, target, hmc, num_samples=1000, adaptation=careful)
        >>> careful.first_window
        32
    """

    num_chains: int = 8
    target_acceptance: float | None = None
    path_length: float | None = None
    first_window: int = 32
    coordinates: Callable[[HMCBatch, Pool, Callable], bool] | None = learn_coordinates
    metric: MetricRule | None = None
    guess: Metric | None = None
    run: Callable[..., HMCBatchResult] | None = None
    first_step: float = 0.1

    def __call__(
        self,
        walker: HMCBatch,
        key: Key,
        starts: np.ndarray,
        num_steps: int,
        path_rule: TrajectoryRule,
        advance: Callable[[int], None],
    ) -> tuple[Pool, Path]:
        """From starts `(C, D)` to a pool and the HMC path of its last window."""
        rule = metric_for(walker.dimension) if self.metric is None else self.metric
        guess = unit_metric(rule, walker.dimension) if self.guess is None else self.guess
        seed = SeedTree.of(key)
        pool = search(
            walker,
            seed.child(0),
            starts,
            guess,
            rule,
            max(STEPS, num_steps // 2),
            advance,
            self.first_step,
        )
        return pool, self._windows(
            walker, seed.child(1), pool, rule, num_steps - walker.num_steps, path_rule, advance
        )

    def from_typical(
        self,
        walker: HMCBatch,
        key: Key,
        starts: np.ndarray,
        metric: Metric,
        num_steps: int,
        path_rule: TrajectoryRule,
        advance: Callable[[int], None],
    ) -> tuple[Pool, Path]:
        """The windows alone, from starts `(C, D)` in the typical set and a metric."""
        rule = metric_for(walker.dimension) if self.metric is None else self.metric
        pool = Pool.at(starts, metric)
        return pool, self._windows(
            walker, SeedTree.of(key), pool, rule, num_steps, path_rule, advance
        )

    def _windows(self, walker, seed, pool, rule, num_steps, path_rule, advance) -> Path:
        """Windows at frozen parameters, the metric and the path learned from each; returns the last path."""
        # Side by side on a CPU, where chains fill the lanes; parallel in time elsewhere.
        run = self.run or (side_by_side if jax.default_backend() == "cpu" else in_parallel_time)
        path = path_rule.choose(pool.trials(walker, seed.child(0)))
        for number, size in enumerate(window_sizes(num_steps, self.first_window)):
            one = seed.child(1 + number)
            pool.draws = run(walker, one.child(0), pool.positions, root_of(pool.metric), path, size)
            pool.positions = pool.draws.positions[-1]
            advance(size)
            rescue(pool, one.child(1))
            pool.rhat = split_rhat(pool.draws)
            moved = False
            if self.coordinates is not None:
                moved = self.coordinates(walker, pool, rule.fisher)
            pool.settled = pool.rhat < _AGREEING + _AGREEING_ROOM / size
            # The covariance of chains in different modes would be that of the modes.
            is_long = size >= _COVARIANCE_FROM and pool.settled
            learn(pool, rule.covariance if is_long else rule.fisher)
            rule_now = dataclasses.replace(path_rule, angle=best_angle(pool.draws, path))
            before, path = path, rule_now.choose(pool.trials(walker, one.child(2)), path.num_steps)
            same = abs(np.log(path.step_size / before.step_size)) < _SAME_STEP and not moved
            if is_long and same:
                break
        if not pool.settled:
            pool.notes.append(
                f"Warm-up had not settled: the {len(pool.positions)} pooled chains still disagreed in its last window "
                f"(split R-hat {pool.rhat:.2f}). Allow it more steps, or look for modes and funnels."
            )
        return path


def search(
    walker: HMCBatch,
    seed: SeedTree,
    starts: np.ndarray,
    metric: Metric,
    rule: MetricRule,
    max_steps: int,
    advance: Callable[[int], None],
    first_step: float,
) -> Pool:
    """From dispersed starts to the typical set.

    Args:
        walker: The program.
        seed: Of the random numbers.
        starts: Shape `(C, D)`.
        metric: A first guess.
        rule: How metrics are estimated.
        max_steps: Steps at most.
        advance: Told the number of steps done.
        first_step: The step size to begin with.
    """
    num_chains, dimension = starts.shape
    lengths = seed.generator.integers(
        1, _LONGEST_SEARCHED + 1, (_MAX_SEARCH // STEPS, STEPS, num_chains)
    )
    # Who has not arrived by then has a long way to go, along ridges that short paths walk at random.
    later = lengths[_MIN_SEARCH // STEPS :]
    later[:] = seed.child(0).generator.integers(1, _LONGEST_LATER + 1, later.shape)
    root, steps = root_of(metric), np.full(num_chains, first_step)
    pool = Pool.at(starts, metric)
    before = -np.inf
    for batch in range(max(1, min(max_steps, _MAX_SEARCH) // STEPS)):
        found = walker.walk(
            seed.child(batch),
            pool.positions,
            root,
            steps,
            lengths[batch],
            gain=_GAIN,
            target=_SEARCH_TARGET,
        )
        advance(STEPS)
        pool.positions, pool.draws = found.positions[-1], found
        num_done, lost = (batch + 1) * STEPS, _lost(found)
        now, width = float(np.median(found.logdensity)), max(1.0, np.sqrt(dimension / 2))
        behind = now - np.median(found.logdensity, axis=0)[~lost].min()
        arrived = now - before < width and behind < _BEHIND * width
        if arrived and num_done >= (_PATIENCE if lost.any() else _MIN_SEARCH):
            break
        before = now
        steps = np.clip(found.step_sizes, 1e-12, 1e3)
        # Chains that are lost have gradients of another order, which would spoil the metric for all.
        learned = _metric(rule.fisher, _only(found, ~lost), pool)
        if learned is not None:
            old, root = root, root_of(learned)
            pool.metric = learned
            # The old step was near the limit of stability in its worst direction: so shall the new one be.
            steps = np.clip(steps * largest_ratio(old, root), 1e-6, 1.0)
    else:
        pool.notes.append(
            f"the search ended after {max_steps} steps with the log density still rising"
        )
    rescue(pool, seed.child(_MAX_SEARCH))
    learn(pool, rule.fisher)
    return pool


def learn(pool: Pool, estimate: Callable) -> None:
    """A new metric and centre from the last draws; the old metric stays where they say nothing."""
    learned = _metric(estimate, pool.draws, pool)
    if learned is None:
        pool.notes.append("draws or gradients were not finite: the metric before was kept")
    else:
        pool.metric, pool.center = (
            learned,
            pool.draws.positions.reshape(-1, pool.positions.shape[1]).mean(axis=0),
        )


def rescue(pool: Pool, seed: SeedTree) -> None:
    """Chains far below the others go on from where a good chain is."""
    num_chains, lost = len(pool.positions), _lost(pool.draws)
    if lost.any():
        good = np.flatnonzero(~lost)
        chosen = seed.generator.choice(good, int(lost.sum()))
        pool.positions = pool.positions.copy()
        pool.positions[lost] = pool.positions[chosen]
        pool.num_rescued += int(lost.sum())
        keep = np.where(lost, good[0], np.arange(num_chains))
        keep[lost] = chosen
        pool.draws = _only(pool.draws, keep)


def _lost(draws: HMCBatchResult) -> np.ndarray:
    """Chains whose mean log density lies far below the median of the better half, shape `(C,)`; never all.

    Far is 20 and ten standard deviations, of the better half's log densities or of a normal's, √(D/2): states that are
    e^20 times less likely than any that the others visit. Where a density has a narrow neck, chains in its wide part lie
    lower; then the better half varies as much.
    """
    level = draws.logdensity.mean(axis=0)
    better = np.argsort(level)[len(level) // 2 :]
    width = draws.logdensity[:, better].std()
    width = max(width if np.isfinite(width) else np.inf, np.sqrt(draws.positions.shape[-1] / 2))
    return ~(level >= np.median(level[better]) - 20 - 10 * width) & np.isfinite(level[better]).any()


def _only(draws: HMCBatchResult, chains: np.ndarray) -> HMCBatchResult:
    return HMCBatchResult(
        *(part[:, chains] for part in draws[:4]), step_sizes=draws.step_sizes[chains]
    )


def _metric(estimate: Callable, draws: HMCBatchResult, pool: Pool) -> Metric | None:
    if not draws.is_finite():
        return None
    with np.errstate(all="ignore"):
        try:
            found = estimate(draws.positions, draws.gradients, pool.metric)
            root = root_of(found)
        except np.linalg.LinAlgError:
            return None
    is_finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(root))
    return found if is_finite else None
