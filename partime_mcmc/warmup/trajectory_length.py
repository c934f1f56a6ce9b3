"""Step sizes and path lengths by trial: from each of some hundred pooled states one trajectory, and its acceptance.

In whitened coordinates a path of a quarter period forgets its start, and of all ways to cut it into L leapfrog steps

    h = 2 sin(π / 4L),     L = 1, 2, 3, 4, 5, 6, 8, 10, 12, 16,

(Sexton & Weingarten 1992 for the period of leapfrog on a normal) the cheapest that is accepted often enough, and from
nearly everywhere, is taken; where none is, h shrinks at the largest L. A recursion on the acceptance would need hundreds of
steps for what some trials tell. A Langevin step of size h is a trajectory of one leapfrog step, so it is tried in the same
way. What the user has fixed stays.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Callable, Iterator, NamedTuple

import numpy as np

LEAPFROGS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_SHRINK_PATH, _MAX_SHRINKS = 1.5, 24
_SHRINK_STEP, _MAX_STEPS = 0.85, 60
# No chain may be left where hardly anything is accepted.
_EVERY_CHAIN = 0.3
# Nor may a chain stand still for long where the mean is fine: in all but one state of fifty it must wait five steps at most.
# (Volatilities of a GARCH series: 85 rejections in a row at a mean of 0.8, 4 at 0.9.)
_SHARE_OF_STATES, _LEAST_RATE = 0.02, 0.2

# (step size, leapfrog steps) -> acceptance probabilities of the trials, shape (S, C), column c from states of chain c.
Trial = Callable[[float, int], np.ndarray]


class Path(NamedTuple):
    """A step size, a number of leapfrog steps, and the mean acceptance seen in the trials."""

    step_size: float
    num_steps: int
    acceptance: float


@dataclasses.dataclass(frozen=True)
class TrajectoryRule:
    """What is wanted of a path.

    Attributes:
        target: Mean acceptance at least.
        step_size: Fixed h; None is chosen.
        num_steps: Fixed L; None is chosen.
        length: Fixed path length in whitened units; None is a quarter period.
    """

    target: float = 0.8
    step_size: float | None = None
    num_steps: int | None = None
    length: float | None = None

    def candidates(self) -> Iterator[tuple[float, int]]:
        """`(h, L)`, the cheapest first."""
        if self.step_size is not None:
            yield self.step_size, self.num_steps or self._steps_for(self.step_size)
            return
        choices = LEAPFROGS if self.num_steps is None else (self.num_steps,)
        for steps in choices:
            yield self._step_for(steps), steps
        for power in range(1, _MAX_SHRINKS):
            yield self._step_for(choices[-1]) / _SHRINK_PATH**power, choices[-1]

    def choose(self, trial: Trial) -> Path:
        """The cheapest path that is accepted often enough, or the one accepted most often."""
        best = Path(math.nan, 1, -1.0)
        for step, steps in self.candidates():
            rates = trial(step, steps)
            mean = float(rates.mean())
            if mean > best.acceptance:
                best = Path(step, steps, mean)
            if (
                mean >= self.target
                and rates.mean(axis=0).min() >= min(_EVERY_CHAIN, self.target)
                and self._leaves(rates)
            ):
                return Path(step, steps, mean)
        return best

    def _leaves(self, rates: np.ndarray) -> bool:
        """Whether chains leave nearly all states soon; in a funnel's neck none does: half the rejections must then do."""
        return (
            np.quantile(rates, _SHARE_OF_STATES) >= min(_LEAST_RATE, self.target)
            or rates.mean() >= (1 + self.target) / 2
        )

    def _step_for(self, steps: int) -> float:
        return 2 * math.sin(math.pi / (4 * steps)) if self.length is None else self.length / steps

    def _steps_for(self, step: float) -> int:
        if self.length is not None:
            return max(1, round(self.length / step))
        return max(1, round(math.pi / (4 * math.asin(min(step, math.sqrt(2)) / 2))))


def boldest_step(
    trial: Trial, bold: float, target: float, steps_for: Callable[[float], int] = lambda step: 1
) -> Path:
    """The largest step size from `bold` downwards whose trials are accepted often enough.

    Args:
        trial: As for `TrajectoryRule.choose`.
        bold: The first candidate.
        target: Mean acceptance at least.
        steps_for: Leapfrog steps that go with a step size; a Langevin step is one.
    """
    best = Path(bold, 1, -1.0)
    for power in range(_MAX_STEPS):
        step = bold * _SHRINK_STEP**power
        rates = trial(step, steps_for(step))
        mean = float(rates.mean())
        if mean > best.acceptance:
            best = Path(step, steps_for(step), mean)
        if mean >= target and rates.mean(axis=0).min() >= min(_EVERY_CHAIN, target):
            return Path(step, steps_for(step), mean)
    return best
