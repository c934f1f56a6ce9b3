"""Which dice: those with which chains of the tuned kernel meet sooner.

Plain and coalescing dice realise one law, so nothing but speed hangs on the choice (`kernels.dice`). It is made where it matters,
in runs long enough for advice: pilot pairs of the warm-up's draws are run under both, and the dice with the smaller median meeting
time are kept. Seeds and programs decide, no clock, and the choice is part of the warm-up and of the plan: running again from
`draws.warmup` throws the same dice.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import numpy as np

from partime_mcmc.contracts import kind
from partime_mcmc.forgetting.coalescence import meeting_times
from partime_mcmc.kernels import CoalescingDice, Kernel, PlainDice
from partime_mcmc.kernels.dice import Dice, check_dice
from partime_mcmc.mcmc.family import Builder, Tuned, tuned_kernel
from partime_mcmc.mcmc.tapes import throw
from partime_mcmc.mcmc.tuning import unwrapped
from partime_mcmc.mcmc.warmup import Warmup
from partime_mcmc.solution import Tolerance
from partime_mcmc.types import Key

_NUM_PAIRS, _HORIZON = 16, 512


@functools.cache
def with_dice(builder: Builder, dice: Dice) -> Builder:
    """A builder with its dice fixed; the same object each time, so that compiled code is found again."""
    return functools.partial(builder, dice=dice)


def takes_dice(builder: Any) -> bool:
    """Whether a builder has an argument `dice` that nobody has fixed."""
    builder, fixed = unwrapped(builder)
    try:
        return "dice" in inspect.signature(builder).parameters and "dice" not in fixed
    except (TypeError, ValueError):
        return False


def fixed_dice(kernel: Kernel | Builder | Warmup, dice: Dice) -> Builder:
    """The builder with the dice that were asked for.

    Raises:
        TypeError: If `dice` is no strategy for dice, or the kernel has no choice of dice left.
    """
    check_dice(dice)
    if isinstance(kernel, (Kernel, Warmup)) or not takes_dice(kernel):
        raise TypeError(
            f"dice: got {dice!r} with {kind(kernel)}, wanted a builder that takes dice (mala, hmc, random_walk): the dice "
            "of other kernels are fixed"
        )
    return with_dice(kernel, dice)


def sooner(warmup: Warmup, tolerance: Tolerance, key: Key) -> Warmup:
    """The warm-up with the dice of its kernel chosen by pilot pairs, and a sentence that says so.

    Args:
        warmup: Its kernel is of plain dice and belongs to a family.
        tolerance: What counts as a meeting.
        key: For the pilots' dice.

    Returns:
        The warm-up, unchanged if its kernel's builder has no dice to choose.
    """
    plain = warmup.kernel
    if not isinstance(plain, Tuned) or not takes_dice(plain.family.builder):
        return warmup
    family = dataclasses.replace(
        plain.family, builder=with_dice(plain.family.builder, CoalescingDice()), counts=()
    )
    other = tuned_kernel(family, plain.numbers.data, warmup.whitening, warmup.settings)
    medians = [_median_meeting(kernel, warmup, tolerance, key) for kernel in (plain, other)]
    said = ["never" if np.isinf(median) else f"after {median:.0f} steps" for median in medians]
    if medians[1] < medians[0]:
        note = (
            f"Coalescing dice: pilot pairs met {said[1]} in the median, with plain dice {said[0]}."
        )
        return dataclasses.replace(warmup, kernel=other, notes=(*warmup.notes, note))
    note = f"Plain dice: pilot pairs met {said[0]} in the median, with coalescing dice {said[1]}."
    return dataclasses.replace(warmup, notes=(*warmup.notes, note))


def dice_of(kernel: Kernel) -> str:
    """The dice of a tuned kernel in words, for plans."""
    if not isinstance(kernel, Tuned):
        return "the kernel's own"
    return repr(unwrapped(kernel.family.builder)[1].get("dice", PlainDice()))


def _median_meeting(kernel: Kernel, warmup: Warmup, tolerance: Tolerance, key: Key) -> float:
    """Steps until pairs of the warm-up's draws meet, in the median; infinity if most do not."""
    keys, count = jax.random.split(key, _NUM_PAIRS), jax.tree.leaves(warmup.pool)[0].shape[0]
    first = np.arange(_NUM_PAIRS) % count
    pairs = [
        jax.tree.map(lambda leaf: leaf[index % count], warmup.pool)
        for index in (first, first + count // 2)
    ]
    (dynamics, starts, tapes, _), (_, others, _, _) = (
        throw(kernel, positions, keys, _HORIZON) for positions in pairs
    )
    found = meeting_times(dynamics, starts, others, tapes, tolerance=tolerance)
    return float(np.median(np.where(np.asarray(found.met), np.asarray(found.steps), np.inf)))
