"""The rule for the number of segments: powers of two that fill the device, each longer than it takes to meet."""

import math

import jax
import pytest

from partime_mcmc.engine.recipes import shooting
from partime_mcmc.solvers.segments import choose_segments, device_lanes, segment_length


@pytest.mark.parametrize("num_steps", [0, 1, 63, 1000, 16384, 65536, 10**7])
@pytest.mark.parametrize("num_chains", [1, 3, 4, 100, 1000])
@pytest.mark.parametrize("meeting_time", [0.0, 10.0, 300.5])
def test_segments_fill_the_device_and_are_long_enough(num_steps, num_chains, meeting_time):
    found = choose_segments(num_steps, num_chains, meeting_time)
    length = segment_length(num_steps, num_chains, meeting_time)
    assert found == 2 ** round(math.log2(found)) and length % 4 == 0
    assert num_steps <= found * length < num_steps + 4 * found or num_steps == 0
    fits = [
        count
        for count in (found, 2 * found)
        if count * num_chains <= device_lanes() and num_steps >= count * max(64, meeting_time)
    ]
    # One segment is the sequential loop, which always fits; twice as many do not.
    assert fits == ([found] if found > 1 else fits[:1]) and 2 * found not in fits


def test_a_gpu_takes_more_segments(monkeypatch):
    here = choose_segments(10**6)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_segments(10**6) > here


def test_shooting_follows_the_rule_unless_segments_are_given():
    for num_steps in (100, 4096, 65_536):
        assert shooting().segment_steps(num_steps) == min(num_steps, segment_length(num_steps))
    assert shooting(8).segment_steps(4096) == 512
