"""What a builder wants tuned, and the rules: step sizes and paths of kernels from trials on the pooled chains.

    hmc              the fewest gradients with which a quarter period (`path`) of leapfrogs that are exact on a standard
                     normal (`kernels.leapfrog`) is accepted ≥ 0.8, and ≥ 0.7 in the tails of every coordinate
    coalescing_hmc   the same, and the largest Langevin step h_m ≤ min(√2, 2.2 h) accepted ≥ 0.6; its ε is h_m²/2
    mala             the largest Langevin step accepted ≥ 0.8: where one of two chains rejects, their coupling is lost,
                     and passes and meeting times grow with the rate of rejections; 0.65 with coalescing noise
    nuts             the largest step size with which a quarter period is accepted ≥ 0.8
    others           the largest step size with which the kernel itself accepts ≥ 0.7 (random walks 0.3), by trials of
    its own

Settings fixed by the user (`functools.partial(hmc, num_integration_steps=4)`) stay and the others are chosen for them.

Longer paths where a metric does not fit. A path of angle θ turns a coordinate that is s times as wide as the metric has it by θ/s.
Accepted with probability a, draws, and the squares of draws, have the autocorrelations

    1 − a + a cos(θ/s),     1 − a + a cos²(θ/s),

and n draws of autocorrelation ρ are worth n (1 − ρ)/(1 + ρ). A quarter period, θ = π/2, is best where s = 1 throughout. The widest s is
read from the autocorrelations of a window's draws, and θ is taken by which draws per gradient are worth most, in the worst of the
widest coordinate, its square, and the square of one with s = 1.
"""

import dataclasses
import functools
import math
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.compile_cache import compiler_options
from partime_mcmc.kernels import (
    MultishiftCoupling,
    Whitening,
    coalescing_hmc,
    hmc,
    mala,
    nuts,
    random_walk,
)
from partime_mcmc.kernels.kernel_program import Builder, KernelParams, KernelProgram, unwrapped
from partime_mcmc.kernels.leapfrog import (
    check_drift_fraction,
    exact_drift,
    exact_step,
    step_for_angle,
    steps_for_angle,
    turned_angle,
)
from partime_mcmc.types import Key
from partime_mcmc.validation import check_count
from partime_mcmc.warmup.hmc_batch import STEPS, HMCBatchResult

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48)
# Where the search for a path begins; later ones begin at the path before.
_FIRST_TRIED = 3
_SHRINK_PATH, _MAX_SHRINKS = 1.5, 24
_SHRINK_STEP, _MAX_STEPS = 0.85, 60
# Leapfrog steps turn a standard normal by 2 arcsin(h / 2) each instead of h. By so much in all a fixed path may go too far: coarse
# steps would make 9.3 of 8, three half turns, after which a chain is as far from the middle as it was.
_TOO_FAR = 0.2
# No chain may be left where hardly anything is accepted.
_EVERY_CHAIN = 0.3
# Nor may a chain stand still for long where the mean is fine: in all but one state of fifty it must wait five steps at most.
# (Volatilities of a GARCH series: 85 rejections in a row at a mean of 0.8, 4 at 0.9.)
_SHARE_OF_STATES, _LEAST_RATE = 0.02, 0.2
# Nor may it be refused much oftener where a coordinate's variance comes from: by this factor.
_MORE_IN_TAILS = 1.5

# Beyond the longest of these angles the squares of coordinates that the metric fits would be worth less than half.
_ANGLES = np.linspace(math.pi / 2, 2.0, 10)
# An autocorrelation closer to 1 tells no more of how wide a coordinate is.
_MOST_CORRELATED = 0.99


class Path(NamedTuple):
    """A trajectory.

    Attributes:
        step_size: h.
        num_steps: L: leapfrog steps, a gradient each.
        drift_fraction: f, by which drifts are shorter than kicks (`kernels.leapfrog`).
        acceptance: The mean acceptance seen in the trials.
    """

    step_size: float
    num_steps: int
    drift_fraction: float = 1.0
    acceptance: float = math.nan

    @property
    def angle(self) -> float:
        """By how much it turns a standard normal."""
        return turned_angle(*self[:3])

    @property
    def settings(self) -> dict[str, Any]:
        """By the argument names of `hmc` and `coalescing_hmc`."""
        return {
            "step_size": self.step_size,
            "num_integration_steps": self.num_steps,
            "drift_fraction": self.drift_fraction,
        }


class Trials(NamedTuple):
    """Trajectories of candidates from the same states and with the same random numbers.

    Attributes:
        accept: A path -> acceptance probabilities, shape `(S, C)`, column c from states of chain c.
        apart: (x_j − mean of x_j)² of these states x, shape `(S, C, J)`, of coordinates j that vary.
    """

    accept: Callable[[Path], np.ndarray]
    apart: np.ndarray

    def in_tails(self, rates: np.ndarray) -> float:
        """Mean acceptance of the coordinate where it is least, states counting by what they add to its variance."""
        mean = rates.mean()
        more = np.tensordot(rates - mean, self.apart, 2) / self.apart.sum(axis=(0, 1))
        return float(mean + more.min(initial=0.0))


def best_angle(draws: HMCBatchResult, path: Path) -> float:
    """The angle of paths by which draws per gradient are worth most in the worst direction.

    Args:
        draws: Of a window; a quarter period is answered where they are not finite.
        path: The path by which they were made.
    """
    rate = float(draws.acceptance.mean())
    if not (draws.is_finite() and rate > 0):
        return math.pi / 2
    apart = draws.positions - draws.positions.mean(axis=(0, 1))
    products, squares = (apart[1:] * apart[:-1]).sum(axis=(0, 1)), (apart**2).sum(axis=(0, 1))
    # A window has one pair of neighbours less than draws.
    scale = squares * (1 - 1 / len(apart))
    correlation = (products / np.where(scale > 0, scale, 1)).max(initial=0.0)
    turned = (min(correlation, 1.0) - (1 - rate)) / rate
    width = max(1.0, path.angle / math.acos(np.clip(turned, -1.0, _MOST_CORRELATED)))
    cosines = np.stack(
        [np.cos(_ANGLES / width), np.cos(_ANGLES / width) ** 2, np.cos(_ANGLES) ** 2]
    )
    correlations = 1 - rate + rate * cosines
    worth = ((1 - correlations) / (1 + correlations)).min(axis=0) / _ANGLES
    return float(_ANGLES[worth.argmax()])


@dataclasses.dataclass(frozen=True)
class TrajectoryRule:
    """What is wanted of a path.

    Attributes:
        target: Mean acceptance at least.
        step_size: Fixed h; None is chosen.
        num_steps: Fixed L; None is chosen.
        drift_fraction: Fixed f; None is chosen.
        length: Fixed path length in whitened units; None is `angle`.
        angle: By how much a path turns a standard normal.
    """

    target: float = 0.8
    step_size: float | None = None
    num_steps: int | None = None
    drift_fraction: float | None = None
    length: float | None = None
    angle: float = math.pi / 2

    def candidates(self) -> list[Path]:
        """Paths of the whole length or angle, the cheapest first."""
        if self.step_size is not None:
            fraction = self.drift_fraction or 1.0
            steps = self.num_steps or self._steps_for(self.step_size, fraction)
            return [Path(self.step_size, steps, fraction)]
        paths = list(map(self._path, LENGTHS if self.num_steps is None else [self.num_steps]))
        if self.length is None:
            return paths
        return [path for path in paths if path.angle - self.length <= _TOO_FAR] or paths[-1:]

    def choose(self, trials: Trials, near: int = _FIRST_TRIED) -> Path:
        """The cheapest path that is accepted often enough, or the one accepted most often.

        Shorter paths are tried only if none is accepted often enough in the mean.

        Args:
            trials: From the pooled states.
            near: Gradients of the candidate to begin with: longer paths are tried until one is accepted, or
                shorter ones until one is not.
        """
        paths = self.candidates()
        first = next((i for i, path in enumerate(paths) if path.num_steps >= near), len(paths) - 1)
        also = functools.partial(self._leaves, trials)
        path, tried = _first_accepted(trials.accept, paths, self.target, also, first)
        often = (1 + self.target) / 2
        if path is None:
            path = next((one for one, rates in tried if _is_enough(rates, often)), None)
        if path is None and self.step_size is None:
            last = paths[-1]
            sizes = [last.step_size / _SHRINK_PATH**power for power in range(_MAX_SHRINKS)]
            shorter = [last._replace(step_size=size) for size in sizes]
            path, more = _first_accepted(trials.accept, shorter, self.target)
            tried += more
        return _most_accepted(tried) if path is None else path

    def _leaves(self, trials: Trials, path: Path, rates: np.ndarray) -> bool:
        """Whether chains leave nearly all states soon, tails among them.

        From a funnel's neck no path leads: a quarter of the rejections must then do. A path of one gradient must leave the tails
        all the same, and do with half of the rejections: two gradients give more draws that are worth something, for a time
        that hardly anybody notices.
        """
        mean = float(rates.mean())
        if path.num_steps == 1 and mean < (1 + self.target) / 2:
            return False
        if path.num_steps > 1 and mean >= (3 + self.target) / 4:
            return True
        leaves = np.quantile(rates, _SHARE_OF_STATES) >= min(_LEAST_RATE, self.target)
        return bool(leaves) and 1 - trials.in_tails(rates) <= _MORE_IN_TAILS * (1 - self.target)

    def _path(self, steps: int) -> Path:
        """Of so many gradients and the fixed length, or such that turns a standard normal by the angle."""
        if self.length is not None:
            return Path(self.length / steps, steps, self.drift_fraction or 1.0)
        if self.drift_fraction is not None:
            step = step_for_angle(self.angle, steps, self.drift_fraction)
            return Path(step, steps, self.drift_fraction)
        step = exact_step(self.angle / steps)
        return Path(step, steps, exact_drift(step))

    def _steps_for(self, step: float, drift_fraction: float = 1.0) -> int:
        if self.length is not None:
            return max(1, round(self.length / step))
        return steps_for_angle(self.angle, step, drift_fraction)


def boldest_step(
    accept: Callable[[Path], np.ndarray],
    bold: float,
    target: float,
    steps_for: Callable[[float], int] = lambda step: 1,
) -> Path:
    """The largest step size from `bold` downwards whose trials are accepted often enough.

    Args:
        accept: As for `Trials`.
        bold: The first candidate.
        target: Mean acceptance at least.
        steps_for: Gradients that go with a step size; a Langevin step is one.
    """
    steps = [bold * _SHRINK_STEP**power for power in range(_MAX_STEPS)]
    paths = [Path(step, steps_for(step)) for step in steps]
    path, tried = _first_accepted(accept, paths, target)
    return _most_accepted(tried) if path is None else path


def _first_accepted(
    accept: Callable[[Path], np.ndarray],
    candidates: Sequence[Path],
    target: float,
    also: Callable[[Path, np.ndarray], bool] = lambda path, rates: True,
    begin: int = 0,
) -> tuple[Path | None, list[tuple[Path, np.ndarray]]]:
    """The first candidate accepted often enough, None if there is none; and all that were tried, with their rates.

    Args:
        accept: As for `Trials`.
        candidates: Later ones are accepted oftener.
        target: Mean acceptance at least.
        also: What else a path's rates must show.
        begin: Which candidate to try first.
    """
    tried: list[tuple[Path, np.ndarray]] = []

    def accepted(index: int) -> Path | None:
        rates = accept(candidates[index])
        path = candidates[index]._replace(acceptance=float(rates.mean()))
        tried.append((path, rates))
        return path if _is_enough(rates, target) and also(path, rates) else None

    path = accepted(begin)
    if path is None:
        later = map(accepted, range(begin + 1, len(candidates)))
        return next((path for path in later if path is not None), None), tried
    for index in reversed(range(begin)):
        cheaper = accepted(index)
        if cheaper is None:
            break
        path = cheaper
    return path, tried


def _is_enough(rates: np.ndarray, target: float) -> bool:
    """Whether the mean is, and no chain is stuck."""
    return bool(rates.mean() >= target and rates.mean(axis=0).min() >= min(_EVERY_CHAIN, target))


def _most_accepted(tried: Sequence[tuple[Path, np.ndarray]]) -> Path:
    return max((path for path, _ in tried), key=lambda path: path.acceptance)


_TARGETS = {hmc: 0.8, coalescing_hmc: 0.8, nuts: 0.8, mala: 0.8, random_walk: 0.3}
_COALESCING_MALA, _OTHERS = 0.65, 0.7
_LANDING, _LANDING_LIMIT, _LANDING_RATIO = 0.6, math.sqrt(2), 2.2


def target_of(builder: Builder) -> float:
    """The mean acceptance that a builder's kernels are tuned for."""
    base, fixed = unwrapped(builder)
    return (
        _COALESCING_MALA
        if base is mala and isinstance(fixed.get("coupling"), MultishiftCoupling)
        else _TARGETS.get(base, _OTHERS)
    )


def path_rule_of(builder: Builder, target: float, length: float | None) -> TrajectoryRule:
    """The rule for the HMC paths of warm-up's own windows, which are the kernel's own where it is HMC."""
    base, fixed = unwrapped(builder)
    if base not in (hmc, coalescing_hmc):
        return TrajectoryRule()
    num_steps = fixed.get("num_integration_steps")
    if num_steps is not None:
        check_count(num_steps, "num_integration_steps", 1)
    fraction = fixed.get("drift_fraction")
    if fraction is not None:
        check_drift_fraction(fraction)
    return TrajectoryRule(target, fixed.get("step_size"), num_steps, fraction, length)


def choose(
    builder: Builder, path: Path, trials: Trials, own: Callable[[dict], np.ndarray], target: float
) -> tuple[dict[str, Any], float]:
    """Settings for a builder.

    Args:
        builder: Possibly with fixed settings.
        path: Of the last window.
        trials: Of HMC, from pooled states.
        own: Trials of the builder's own kernel, settings to acceptance probabilities `(S, C)`.
        target: Mean acceptance wanted.

    Returns:
        The settings by the builder's argument names, without those that the user fixed, and the acceptance in the trials.
    """
    base, fixed = unwrapped(builder)
    if base in (hmc, coalescing_hmc):
        settings, rate = path.settings, path.acceptance
        if base is coalescing_hmc and "mala_step_size" not in fixed:
            bold = min(_LANDING_LIMIT, _LANDING_RATIO * path.step_size)
            settings["mala_step_size"] = (
                boldest_step(trials.accept, bold, _LANDING).step_size ** 2 / 2
            )
    elif "step_size" in fixed:
        settings, rate = {}, float(own({}).mean())
    elif base is mala:
        found = boldest_step(trials.accept, _LANDING_LIMIT, target)
        settings, rate = {"step_size": found.step_size**2 / 2}, found.acceptance
    elif base is nuts:
        found = boldest_step(trials.accept, _LANDING_LIMIT, target, TrajectoryRule()._steps_for)
        settings, rate = {"step_size": found.step_size}, found.acceptance
    else:
        found = boldest_step(
            lambda path: own({"step_size": path.step_size}),
            1.6 if base is random_walk else 1.0,
            target,
        )
        settings, rate = {"step_size": found.step_size}, found.acceptance
    return {name: value for name, value in settings.items() if name not in fixed}, rate


def any_settings(builder: Builder) -> dict[str, Any]:
    """Settings by the names and types that `choose` gives them, with arbitrary values."""
    base, fixed = unwrapped(builder)
    settings: dict[str, Any] = {"step_size": 0.1}
    if base in (hmc, coalescing_hmc):
        settings = Path(0.1, 1).settings
    if base is coalescing_hmc:
        settings["mala_step_size"] = 0.1
    return {name: value for name, value in settings.items() if name not in fixed}


def own_trials(
    family: KernelProgram, data, whitening: Whitening, draws: np.ndarray, key: Key
) -> Callable[[dict], np.ndarray]:
    """One step of the family's own kernel from each of 16 states of every chain; compiled once."""
    num_draws, num_chains, dimension = draws.shape
    states = draws[np.linspace(0, num_draws - 1, STEPS).astype(int)].reshape(-1, dimension)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def accept(numbers, states, key):
        kernel, keys = family.kernel(numbers), jax.random.split(key, len(states))
        unravel = ravel_pytree(whitening.example)[1]

        def one(flat, key):
            return kernel.step(key, kernel.init(unravel(flat)))[1].acceptance_rate

        rates = jax.vmap(one)(states, keys)
        return jnp.where(jnp.isfinite(rates), rates, 0)

    def trial(settings: dict) -> np.ndarray:
        sizes = {
            name: jnp.asarray(value, whitening.center.dtype) for name, value in settings.items()
        }
        found = accept(
            KernelParams(data, whitening, sizes), jnp.asarray(states, whitening.center.dtype), key
        )
        return np.asarray(found).reshape(STEPS, num_chains)

    return trial
