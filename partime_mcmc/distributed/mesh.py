"""The mesh: which device holds which chains and which part of time.

Devices stand in a grid `(chains, time)`, or `(chains, time, data)` where a log density sums over data that no device
could hold alone. Neighbours along `time` talk in every pass and along `data` in every step, chains never: so the last
axis changes fastest, and devices of one host end up side by side.
"""

from __future__ import annotations

from typing import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

CHAINS, TIME, DATA = AXES = ("chains", "time", "data")


def time_mesh(
    num_time: int | None = None,
    num_chains: int = 1,
    num_data: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over chains, time and data.

    Args:
        num_time: Devices along time; None takes all that chains and data leave.
        num_chains: Devices along chains.
        num_data: Devices along data.
        devices: Which; None takes all of them, on all hosts.

    Returns:
        A mesh with the axes `chains`, `time` and `data`.

    Raises:
        ValueError: If a count is not positive, or does not fit the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    for name, count in (("num_time", num_time), ("num_chains", num_chains), ("num_data", num_data)):
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int) or count < 1
        ):
            raise ValueError(f"{name} must be a positive integer, got {count!r}")
    others = num_chains * num_data
    num_time = devices.size // others if num_time is None else num_time
    needed = num_time * others
    if not needed or needed > devices.size or (needed < devices.size and devices.size % others):
        raise ValueError(
            f"num_time, num_chains, num_data: got {num_time} x {num_chains} x {num_data}, wanted at most "
            f"{devices.size} devices, and num_chains x num_data to divide them"
        )
    return Mesh(devices[:needed].reshape(num_chains, num_time, num_data), AXES)
