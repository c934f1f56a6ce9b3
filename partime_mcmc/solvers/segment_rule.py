"""How many segments shooting gets: enough to fill the device, and each long enough to be worth its start.

    S    the largest power of two with    C S ≤ lanes    and    T / S ≥ max(64, m)

for C chains of T steps, m steps being how long the last of all segments takes to meet its stored path. With T / S ≥ m a
rerun takes no longer than the first pass, so that nearly the best depth costs at most twice the work. Lanes are what one
device can step side by side for little more than the price of a few.
"""

from __future__ import annotations

import math

import jax

# Measured by `python -m benchmarks.advised` on two CPU cores; a GPU takes thousands.
_LANES = {"cpu": 256}
_LANES_ELSEWHERE = 4096
# Shorter segments meet too late to be worth their start.
_SHORTEST = 64


def device_lanes() -> int:
    """How many chains × segments fill the default device."""
    return _LANES.get(jax.default_backend(), _LANES_ELSEWHERE)


def choose_segments(num_steps: int, num_chains: int = 1, meeting_time: float = 0.0) -> int:
    """The number of segments per chain; 1 where the sequential loop is as good.

    Args:
        num_steps: T, steps that are solved at once.
        num_chains: C, chains that are solved side by side.
        meeting_time: m, steps until the last segment has met its stored path; 0 if unknown.
    """
    shortest = max(_SHORTEST, meeting_time)
    most = min(device_lanes() / num_chains, num_steps / shortest)
    return 2 ** max(0, math.floor(math.log2(max(most, 1))))


def segment_length(num_steps: int, num_chains: int = 1, meeting_time: float = 0.0) -> int:
    """Steps per segment with that many segments, a multiple of four; arguments as for `choose_segments`.

    Kernels with a counter are then at the same point of it in all lanes.
    """
    num_segments = choose_segments(num_steps, num_chains, meeting_time)
    return 4 * max(1, math.ceil(num_steps / num_segments / 4))
