"""How fast a kernel's chains reach the posterior: bounds on the distance of their law from it, by lagged pairs of chains.

Two chains X and Y start independently from one law. X runs alone for L steps; from then on X's step s + L and Y's step s use
the same random numbers, until X_{s+L} = Y_s at s = m, to the last bit, after which the pair is one chain (coupling by common
random numbers; multishift noise makes exact meetings possible, `kernels.coupling`). X_t and Y_t have the same law π_t, so

    TV(π_t, π) ≤ Σ_{j ≥ 1} TV(π_{t+jL}, π_{t+(j−1)L}) ≤ E max(0, ⌈(m − t) / L⌉)
    W(π_t, π)  ≤ E Σ_{i ≥ 0} d(X_{t+(i+1)L}, Y_{t+iL})

(Biswas, Jacob & Vanetti 2019, arXiv:1905.09971, section 2, with τ = m + L). The distance d is the largest
difference over coordinates in standard deviations, so W bounds the error of every coordinate's mean in this unit.

What that rests on. The starts are independent and of one law; that of the target, never draws of a run. Where a kernel is a
cycle (`coalescing_hmc`), both chains must make the same transition of the cycle: L is a multiple of its length. Every pair must
meet: of a pair that has not met in the steps allowed the expectation is not known, and then nothing is bounded. That is the
most telling result: chains from independent starts that stay apart are in different modes or hang in a funnel.

L is the 90% quantile of the meeting times of pilot pairs. With a large L the first bound is the chance that a pair has not met
by t, the best that this coupling can show; with exponential tails this L adds a tenth to it, and X's first L steps cost no more
than meeting does. Pilots have random numbers of their own, so the choice leaves the bound unbiased.
"""

import dataclasses
import functools
import math
from typing import Any, Callable, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from scipy.stats import beta

from partime_mcmc.compile_cache import Timings, run_explicit
from partime_mcmc.diagnostics import plots
from partime_mcmc.kernels import Kernel
from partime_mcmc.kernels.kernel_program import program_and_params
from partime_mcmc.sampling.randomness import begin
from partime_mcmc.sampling.target import Target
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Array, Key, PyTree
from partime_mcmc.validation import check_count, check_key, describe
from partime_mcmc.warmup.warmup import Warmup

_PILOTS, _PILOT_QUANTILE = 32, 0.9
_LONGEST_CYCLE = 64
# One call of a program moves so many pairs, whatever their number, by so many steps at most.
_ROWS, _BLOCK = 32, 128


class FinishedRun(Protocol):
    """A run that knows what it sampled and with which kernel, such as `ParallelMCMC`."""

    def target_and_kernel(self) -> tuple[Target, Kernel]:
        """The target and the tuned kernel."""
        ...


@dataclasses.dataclass(frozen=True)
class Convergence:
    """Bounds on the distance between the law of a chain after t steps and the posterior.

    Attributes:
        lag: L.
        steps: Steps of the later chain until its pair had met, shape `(K,)`; where it did not, the steps it was followed for.
        met: Whether the pair met, shape `(K,)`.
        gaps: Distance of each pair after s steps, in standard deviations, shape `(K, S)`, S the most steps that a pair made;
            0 once it has met.
        num_gradients: What that cost, pilots included.
        same_start: Whether all chains started at one point. Then the bounds hold for chains that start there, and nothing is
            seen of modes elsewhere.

    Examples:
        >>> import jax
        >>> from partime_mcmc import MultishiftCoupling, Target, convergence, mala
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jax.random.normal)
        >>> kernel = mala(target.logdensity, 0.5, coupling=MultishiftCoupling())
        >>> found = convergence(jax.random.key(0), target, kernel, num_pairs=16)
        >>> bool(found.steps_until(0.1) <= found.steps.max())
        True
    """

    lag: int
    steps: np.ndarray
    met: np.ndarray
    gaps: np.ndarray
    num_gradients: int
    same_start: bool

    @property
    def num_unmet(self) -> int:
        """Pairs that did not meet in the steps allowed. If there are any, nothing is bounded."""
        return int((~self.met).sum())

    @functools.cached_property
    def total_variation(self) -> np.ndarray:
        """The estimated bound on TV(π_t, π) for t = 0, 1, ..., until all pairs have met; infinite if some did not."""
        return self._lags_to_go().mean(axis=0)

    @functools.cached_property
    def total_variation_error(self) -> np.ndarray:
        """Its Monte Carlo standard error; 0 where no pair is left to tell (see `total_variation_limit`)."""
        return self._error(self._lags_to_go())

    @functools.cached_property
    def total_variation_limit(self) -> np.ndarray:
        """A one-sided 95% confidence limit of the bound.

        The larger of the estimate and 1.64 standard errors, and of Clopper & Pearson's limit for the share of pairs that have
        not met: where all K pairs have met the bound may still be 3/K.
        """
        share = self.survival
        count = len(self.met)
        most = beta.ppf(0.95, share * count + 1, np.maximum(count - share * count, 1e-9))
        return np.maximum(self.total_variation + 1.645 * self.total_variation_error, most)

    @functools.cached_property
    def wasserstein(self) -> np.ndarray:
        """The estimated bound on the Wasserstein distance of π_t and π, in standard deviations; infinite likewise."""
        return self._summed_gaps().mean(axis=0)

    @functools.cached_property
    def wasserstein_error(self) -> np.ndarray:
        """Its Monte Carlo standard error."""
        return self._error(self._summed_gaps())

    @functools.cached_property
    def survival(self) -> np.ndarray:
        """The share of pairs that have not met by t, for t = 0, 1, ...: known whether all have met or not."""
        open_until = np.where(self.met, self.steps, np.inf)
        return (open_until[:, None] > self._times()).mean(axis=0)

    def steps_until(self, level: float) -> float:
        """Steps after which the estimated bound on the total variation is at most `level`; infinite if a pair did not meet.

        Args:
            level: Between 0 and 1. Below 1/K it asks for more than K pairs can tell: see `total_variation_limit`.

        Raises:
            ValueError: If the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level: got {level!r}, wanted a number between 0 and 1")
        if self.num_unmet:
            return math.inf
        # The bound falls with t, and is 0 once all have met.
        return float(np.argmax(self.total_variation <= level))

    def plot(self) -> Any:
        """Both bounds against t, with two standard errors; or the share of pairs apart, if some did not meet.

        Returns:
            `matplotlib.figure.Figure`.

        Raises:
            NoPlots: If matplotlib is missing.
        """
        return plots.coupling_bounds(self)

    def __str__(self) -> str:
        count, median = len(self.met), np.median(np.where(self.met, self.steps, np.inf))
        half = "never" if np.isinf(median) else f"after {median:,.0f} steps"
        cost = f"Lag {self.lag}; {self.num_gradients:,} gradients."
        if self.same_start:
            cost += " All chains started at one point: nothing is seen of modes elsewhere."
        if self.num_unmet:
            return (
                f"{self.num_unmet} OF {count} PAIRS OF CHAINS DID NOT MEET in {self.steps.max():,} steps (median: {half}), so "
                "nothing is bounded: look for modes and funnels, or take a kernel whose chains forget, such as "
                f"coalescing_hmc. {cost}"
            )
        time = int(self.steps_until(0.01))
        return (
            f"Total variation at most {self.total_variation[time]:.3f} ± {self.total_variation_error[time]:.3f} "
            f"(95% limit {self.total_variation_limit[time]:.3f}) after {time:,} steps: all {count} pairs of chains met, "
            f"{half} in the median and {self.steps.max():,} at most. {cost}"
        )

    def _times(self) -> np.ndarray:
        return np.arange(int(self.steps.max()) + 1)

    def _lags_to_go(self) -> np.ndarray:
        to_go = np.ceil((self.steps[:, None] - self._times()) / self.lag)
        return np.where(self.met[:, None], np.maximum(to_go, 0), np.inf)

    def _summed_gaps(self) -> np.ndarray:
        """Σ_i gap(t + iL), shape `(K, T)`."""
        num_times = len(self._times())
        sums = np.zeros((len(self.met), num_times + self.lag))
        sums[:, : self.gaps.shape[1]] = self.gaps
        for time in range(num_times - 1, -1, -1):
            sums[:, time] += sums[:, time + self.lag]
        return np.where(self.met[:, None], sums[:, :num_times], np.inf)

    def _error(self, values: np.ndarray) -> np.ndarray:
        if self.num_unmet:
            return np.full(values.shape[1], np.inf)
        return values.std(axis=0, ddof=1) / math.sqrt(len(values))


def convergence(
    key: Key,
    target: Target | FinishedRun,
    kernel: Kernel | Warmup | None = None,
    *,
    num_pairs: int = 256,
    lag: int | None = None,
    max_steps: int = 10_000,
) -> Convergence:
    """Bound how far the law of a kernel's chain is from the posterior after t steps, for all t at once.

    Chains start as the target says (a NumPyro model's initialisation strategy), with the kernel as it was tuned. Kernels
    whose noise is coupled (`coalescing_hmc`, or `MultishiftCoupling()`) meet within some steps; with others chains approach
    each other and meet when rounding makes them equal, or never.

    Args:
        key: One key.
        target: What is sampled, for its starts; or a finished `ParallelMCMC`, which knows target and kernel.
        kernel: A tuned kernel of the target, or the warm-up of a run (`draws.warmup`); None with a finished run.
        num_pairs: K, at least 2.
        lag: L, a multiple of the length of the kernel's cycle; None is chosen by pilot pairs.
        max_steps: Steps until a pair is given up.

    Returns:
        The bounds.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a count is too small, the lag is no multiple of the kernel's cycle, or a cycle does not return.

    Examples:
        >>> import jax
        >>> from partime_mcmc import MultishiftCoupling, Target, convergence, mala
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jax.random.normal)
        >>> kernel = mala(target.logdensity, 0.5, coupling=MultishiftCoupling())
        >>> convergence(jax.random.key(0), target, kernel, num_pairs=16).num_unmet
        0
    """
    target, kernel = target_and_kernel(target, kernel)
    dimension = sum(leaf.size for leaf in jax.tree.leaves(target.example()))
    pairs, lag, cost = lagged_pairs(
        key,
        target,
        kernel,
        num_pairs,
        lag,
        max_steps,
        _gap,
        np.ones(dimension, jnp.result_type(float)),
    )
    alone = pairs.lead(lag)
    scale = _spread_of(pairs.kernel, alone.states)
    found = dataclasses.replace(pairs, numbers=scale).follow(alone.states, max_steps)
    num_gradients = cost + alone.num_gradients + found.num_gradients
    return Convergence(lag, found.steps, found.met, found.seen, num_gradients, pairs.same_start)


def lagged_pairs(
    key: Key,
    target: Target,
    kernel: Kernel,
    num_pairs: int,
    lag: int | None,
    max_steps: int,
    observe: Callable,
    numbers: PyTree,
) -> tuple["LaggedPairs", int, int]:
    """Pairs of chains that start independently, the lag that is asked for or that pilot pairs suggest, and their gradients.

    Arguments and errors as for `convergence`, and `observe` and `numbers` as `LaggedPairs` has them.
    """
    key = check_key(key)
    num_pairs = check_count(num_pairs, "num_pairs", 2)
    max_steps = check_count(max_steps, "max_steps", 1)
    # Pilots are among the chains in any case: the pairs are the same whether the lag is asked for or chosen.
    every = LaggedPairs.begin(key, target, kernel, num_pairs + _PILOTS, observe, numbers)
    pairs, pilots = every[:num_pairs], every[num_pairs:]
    cycle = pilots.cycle()
    if lag is not None:
        if check_count(lag, "lag", 1) % cycle:
            raise ValueError(
                f"lag: got {lag}, wanted a multiple of {cycle}, the length of the kernel's cycle"
            )
        return pairs, lag, 0
    alone = pilots.lead(cycle)
    found = pilots.follow(alone.states, max_steps)
    met = found.steps[found.met]
    typical = np.quantile(met, _PILOT_QUANTILE) if met.size else 1
    lag = cycle * max(1, math.ceil(typical / cycle))
    return pairs, lag, alone.num_gradients + found.num_gradients


class Moved(NamedTuple):
    """Chains after some steps.

    Attributes:
        states: Carries and discrete leaves at the end, `(K, S, ...)`.
        seen: What was observed before each step, `(K, T, ...)`.
        steps: Steps until pairs met, `(K,)`; where they did not, the steps that were made.
        met: Whether they met.
        num_gradients: Gradients computed.
    """

    states: tuple[PyTree, PyTree]
    seen: np.ndarray
    steps: np.ndarray
    met: np.ndarray
    num_gradients: int


@dataclasses.dataclass(frozen=True)
class LaggedPairs:
    """Pairs of chains before their first step.

    Attributes:
        kernel: The tuned kernel.
        leaders: Carries and discrete leaves of the chains X, `(K, 1, ...)`.
        followers: Of the chains Y.
        alone_words: Of the keys for the steps that X makes alone, `(K, ...)`.
        pair_words: Of the keys for the steps that both make.
        key_impl: The generator that these keys belong to.
        same_start: Whether all chains start at one point.
        observe: `(numbers, positions (S, ...)) -> an array`, looked at before each step: with S = 1 of X alone, with S = 2 of
            both.
        numbers: Its first argument.
    """

    kernel: Kernel
    leaders: tuple[PyTree, PyTree]
    followers: tuple[PyTree, PyTree]
    alone_words: np.ndarray
    pair_words: np.ndarray
    key_impl: str
    same_start: bool
    observe: Callable
    numbers: PyTree

    @classmethod
    def begin(
        cls,
        key: Key,
        target: Target,
        kernel: Kernel,
        num_pairs: int,
        observe: Callable,
        numbers: PyTree,
    ) -> Self:
        """So many pairs, of which each chain starts independently."""
        start_key, init_key, alone_key, pair_key = jax.random.split(key, 4)
        positions = target.starts(jax.random.split(start_key, 2 * num_pairs))
        state = begin(kernel, positions, jax.random.split(init_key, 2 * num_pairs), Timings())
        chains = jax.tree.map(np.asarray, (state.carries, state.discrete))
        leaders, followers = (
            jax.tree.map(lambda leaf: leaf[side::2, None], chains) for side in range(2)
        )
        alone, pair = (
            np.asarray(jax.random.key_data(jax.random.split(one, num_pairs)))
            for one in (alone_key, pair_key)
        )
        leaves = map(np.asarray, jax.tree.leaves(positions))
        same = all((leaf == leaf[:1]).all() for leaf in leaves)
        impl = str(jax.random.key_impl(key))
        return cls(kernel, leaders, followers, alone, pair, impl, same, observe, numbers)

    def __getitem__(self, pairs: slice) -> Self:
        """Some of the pairs."""
        chains = self.leaders, self.followers, self.alone_words, self.pair_words
        leaders, followers, alone, pair = jax.tree.map(lambda leaf: leaf[pairs], chains)
        return dataclasses.replace(
            self, leaders=leaders, followers=followers, alone_words=alone, pair_words=pair
        )

    def cycle(self) -> int:
        """After how many steps the kernel's counters are where they began.

        Raises:
            ValueError: If they are not within 64 steps.
        """
        states = began = self.leaders
        for step in range(_LONGEST_CYCLE if began[1] else 0):
            states = self._moved(states, self.alone_words, step, 1).states
            if all(map(np.array_equal, *map(jax.tree.leaves, (states[1], began[1])))):
                return step + 1
        if began[1]:
            raise ValueError(
                f"kernel: its counters {sorted(began[1])} did not return to where they began within {_LONGEST_CYCLE} "
                "steps; wanted a kernel without counters, or one that is a cycle: others cannot be lagged"
            )
        return 1

    def lead(self, num_steps: int) -> Moved:
        """The first steps of X, which it makes alone: L of them."""
        return self._moved(self.leaders, self.alone_words, 0, num_steps)

    def go_on(self, states: tuple[PyTree, PyTree], num_steps: int) -> Moved:
        """X from where `lead` left it, with the random numbers of its pair."""
        return self._moved(states, self.pair_words, 0, num_steps)

    def follow(self, states: tuple[PyTree, PyTree], max_steps: int) -> Moved:
        """X from where `lead` left it, and Y from its start, with the same random numbers until they meet.

        Args:
            states: Of X.
            max_steps: Steps until a pair is given up.

        Returns:
            The meetings; what is seen is 0 from a meeting on.
        """
        both = jax.tree.map(
            lambda x, y: np.concatenate([x, y], axis=1), tuple(states), self.followers
        )
        found = self._moved(both, self.pair_words, 0, max_steps)
        seen = found.seen[:, : found.steps.max()]
        apart = np.arange(seen.shape[1]) < found.steps[:, None]
        apart = apart.reshape(*apart.shape, *(1,) * (seen.ndim - 2))
        return found._replace(seen=np.where(apart, seen, 0))

    def _moved(
        self,
        states: tuple[PyTree, PyTree],
        words: np.ndarray,
        first: int,
        num_steps: int,
    ) -> Moved:
        """Steps first, first + 1, ... of chains `(K, S, ...)`, rows after rows; pairs until they meet."""
        rows = [np.arange(k, min(k + _ROWS, len(words))) for k in range(0, len(words), _ROWS)]
        parts = []
        for row in rows:
            # The last rows are filled up with copies: one program serves any number of pairs.
            own, keys = jax.tree.map(lambda leaf: leaf[np.resize(row, _ROWS)], (states, words))
            parts.append(self._move_rows(own, keys, first, num_steps, len(row)))
        longest = max(part.seen.shape[1] for part in parts)
        seen = np.concatenate([_padded(part.seen, longest) for part in parts])
        states = jax.tree.map(
            lambda *leaves: np.concatenate(leaves), *(part.states for part in parts)
        )
        steps, met = (
            np.concatenate(arrays) for arrays in zip(*((part.steps, part.met) for part in parts))
        )
        return Moved(states, seen, steps, met, sum(part.num_gradients for part in parts))

    def _move_rows(self, states, keys, first, num_steps, count) -> Moved:
        program, params = program_and_params(self.kernel)
        move = _Move(program, self.observe, self.key_impl)
        steps, met = np.full(_ROWS, num_steps), np.zeros(_ROWS, bool)
        seen, done, work = [], 0, 0
        while done < num_steps and not met[:count].all():
            size = min(_BLOCK, num_steps - done)
            counts = np.uint32(first + done), np.int32(size), np.int32(count)
            *states, look, met_at, gradients = jax.tree.map(
                np.asarray,
                run_explicit(move, params, self.numbers, *states, keys, *counts, timings=Timings()),
            )
            new = (met_at >= 0) & ~met
            steps[new], met[new] = done + met_at[new], True
            done, work = done + size, work + int(gradients)
            seen.append(look[:, :size])
        rows = tuple(states), np.concatenate(seen, axis=1), steps, met
        return Moved(*jax.tree.map(lambda leaf: leaf[:count], rows), num_gradients=work)


def _padded(seen: np.ndarray, longest: int) -> np.ndarray:
    return np.pad(seen, [(0, 0), (0, longest - seen.shape[1]), *[(0, 0)] * (seen.ndim - 2)])


def target_and_kernel(
    target: Target | FinishedRun, kernel: Kernel | Warmup | None
) -> tuple[Target, Kernel]:
    """A target and a tuned kernel, as `convergence` is given them.

    Raises:
        TypeError: If they are not what it wants.
    """
    if not isinstance(target, Target) and hasattr(target, "target_and_kernel"):
        if kernel is not None:
            raise TypeError(
                f"kernel: got {describe(kernel)}, wanted None: a finished run knows its own"
            )
        return target.target_and_kernel()
    if not isinstance(target, Target):
        raise TypeError(
            f"target: got {describe(target)}, wanted a Target or a finished ParallelMCMC"
        )
    if isinstance(kernel, Warmup):
        kernel = kernel.kernel
    if not isinstance(kernel, Kernel):
        raise TypeError(
            f"kernel: got {describe(kernel)}, wanted a tuned Kernel or the warm-up of a run, draws.warmup"
        )
    return target, kernel


def _gap(scale: Array, positions: PyTree) -> Array:
    """The largest difference of two positions over coordinates, in units of `scale` `(D,)`."""
    rows = jax.vmap(lambda position: ravel_pytree(position)[0])(positions)
    return jnp.max(jnp.abs(rows[0] - rows[-1]) / scale.astype(rows.dtype))


def _spread_of(kernel: Kernel, states: tuple[PyTree, PyTree]) -> np.ndarray:
    """Standard deviations of the coordinates of positions over chains `(K, 1, ...)`; 1 where they do not differ."""
    flat = jax.jit(jax.vmap(lambda carry: ravel_pytree(kernel.position(carry))[0]))
    first = jax.tree.map(lambda leaf: leaf[:, 0], states[0])
    scale = np.asarray(flat(first)).std(axis=0)
    return np.where(np.isfinite(scale) & (scale > 0), scale, 1.0).astype(jnp.result_type(float))


class _Move(HashableFunction):
    """Steps of chains `(K, S, ...)`, of which those in one row share their random numbers.

    Parts: the kernel's program, what is observed, and the keys' generator. Pairs move until those in the first `count` rows
    have all met. Returns carries and discrete leaves, what was seen before each step, the step at which each row met
    (−1: not yet), and the number of gradients.
    """

    def __call__(self, params, numbers, carries, discrete, words, first, num_steps, count):
        program, observe, impl = self.parts
        kernel = program.kernel(params)
        each = lambda function: jax.vmap(jax.vmap(function))
        row_keys = jax.random.wrap_key_data(words, impl=impl)
        states = each(kernel.state)(carries, discrete)
        is_pair = jax.tree.leaves(carries)[0].shape[1] > 1
        wanted = jnp.arange(words.shape[0]) < count

        def parts_of(states):
            return each(kernel.carry)(states), each(kernel.discrete)(states)

        def look(states):
            now = parts_of(states)
            seen = jax.vmap(functools.partial(observe, numbers))(each(kernel.position)(now[0]))
            return seen, _equal(now) & is_pair

        def one_step(carry):
            step, states, seen, met_at, work = carry
            now, met = look(states)
            seen = seen.at[:, step].set(now)
            met_at = jnp.where(met & (met_at < 0), step, met_at)
            keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, first + step)
            # The key has no axis of the pair: its random numbers are drawn once for both chains.
            row_step = lambda key, row: jax.vmap(lambda state: kernel.step(key, state))(row)
            states, info = jax.vmap(row_step)(keys, states)
            return step + 1, states, seen, met_at, work + _gradients(info, wanted, is_pair + 1)

        def apart(carry):
            step, _, _, met_at, _ = carry
            return (step < num_steps) & ((met_at < 0) & wanted).any()

        shape = jax.eval_shape(lambda states: look(states)[0], states)
        seen = jnp.zeros((shape.shape[0], _BLOCK, *shape.shape[1:]), shape.dtype)
        zero = jnp.zeros((), jnp.int32)
        start = zero, states, seen, jnp.full(wanted.shape, -1, jnp.int32), zero
        step, states, seen, met_at, work = lax.while_loop(apart, one_step, start)
        # Some may have met in the last step.
        met_at = jnp.where(look(states)[1] & (met_at < 0), step, met_at)
        return *parts_of(states), seen, met_at, work


def _equal(rows: PyTree) -> Array:
    """Whether the first and the last chain of each row are the same, shape `(K,)`."""
    same = [
        (leaf[:, 0] == leaf[:, -1]).reshape(len(leaf), -1).all(axis=1)
        for leaf in jax.tree.leaves(rows)
    ]
    return functools.reduce(jnp.logical_and, same)


def _gradients(info: Any, wanted: Array, chains_per_row: int) -> Array:
    """Gradients of one step in the rows that are wanted: leapfrog steps, or one; and one of each Langevin step of a cycle."""
    rate = getattr(info, "langevin_acceptance_rate", None)
    steps = jnp.asarray(getattr(info, "num_integration_steps", 1))
    more = 0 if rate is None else jnp.isfinite(rate)
    chains = wanted.shape[0], chains_per_row
    every = jnp.broadcast_to(steps + more, chains).astype(jnp.int32)
    return jnp.where(wanted[:, None], every, 0).sum().astype(jnp.int32)
