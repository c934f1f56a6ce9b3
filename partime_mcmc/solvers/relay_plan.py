"""How a relay is cut: how many segments, and when none.

Static facts only (chains, steps, arithmetic, platform), so that the choice is made while a program is traced, and a `vmap`
that adds chains to a relay makes it anew.
"""

from __future__ import annotations

import jax

from partime_mcmc.types import pytree


@pytree(static=("lanes", "most_chains"))
class RelayPlan:
    """How a relay is run; static, so that it is known when a program is traced.

    Attributes:
        lanes: Chains × segments wanted side by side.
        most_chains: The largest batch that gains from lanes; None where every batch does.
    """

    lanes: int
    most_chains: int | None = None

    def segments(self, num_chains: int, num_steps: int, backend: str) -> int:
        """C, segments per chain; 1 means one step after another.

        Args:
            num_chains: B, chains that are solved together.
            num_steps: T.
            backend: The platform, as `jax.default_backend()` says it.
        """
        if (
            num_steps < (_LEAST_ON_CPU if backend == "cpu" else _LEAST)
            or self.most_chains is not None
            and num_chains > self.most_chains
        ):
            return 1
        most = min(max(self.lanes // num_chains, 1), num_steps // SHORTEST)
        return _divisor(num_steps, most) if most >= 2 else 1


# Segments shorter than this meet too late to be worth their start.
SHORTEST = 128
# The pilot: so many pairs, after so many steps that make the second of each pair typical, for at most so large a share of
# the run; a run that would leave it less than `_PATIENCE` steps is too short for a relay.
PILOTS, PILOT_RUN, PILOT_SHARE, _PATIENCE = 4, 32, 32, 64
_LEAST = PILOT_SHARE * (PILOT_RUN + _PATIENCE)
# Whether `lax.scan` on a CPU keeps the products of a narrow step inside its loop, which makes it up to four times as fast.
LEAN_LOOPS = jax.__version_info__ >= (0, 12)
# Then the pilot and the mend cost more than a short run gains (32 units, 4,096 steps: 0.65 times the speed of `lax.scan`).
_LEAST_ON_CPU = 8192 if LEAN_LOOPS else _LEAST


def _divisor(num_steps: int, most: int) -> int:
    """The largest number of segments of at most `most` that leaves no rest, if one is near, else `most`."""
    for count in range(most, most // 2, -1):
        if num_steps % count == 0:
            return count
    return most
