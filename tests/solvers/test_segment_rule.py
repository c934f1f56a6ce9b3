"""The rule for the length of segments: enough of them to fill the device, each longer than it takes to meet."""

import jax
import pytest

from partime_mcmc.engine.recipes import shooting
from partime_mcmc.solvers.segmented_scan import SegmentedScanConfig
from partime_mcmc.solvers.segments import device_lanes, segment_length


@pytest.mark.parametrize("num_steps", [0, 1, 63, 1000, 16384, 65536, 10**7])
@pytest.mark.parametrize("num_chains", [1, 3, 4, 100, 1000])
@pytest.mark.parametrize("meeting_time", [0.0, 10.0, 300.5])
def test_segments_fill_the_device_and_are_long_enough(num_steps, num_chains, meeting_time):
    length = segment_length(num_steps, num_chains, meeting_time)
    fills = num_steps * num_chains / device_lanes()
    shortest = max(64, meeting_time, fills)
    assert length % 4 == 0 and shortest <= length < shortest + 4


def test_a_gpu_takes_more_segments(monkeypatch):
    here = segment_length(10**6)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert segment_length(10**6) < here


def test_fewer_lanes_make_longer_segments():
    assert segment_length(16384, 2, lanes=64) == 512 == 2 * segment_length(16384, 2)


def test_shooting_follows_the_rule_unless_segments_are_given():
    for num_steps in (100, 4096, 65_536):
        assert shooting().segment_steps(num_steps) == min(num_steps, segment_length(num_steps))
    assert shooting(8).segment_steps(4096) == 512


def test_the_largest_batch_that_gains_is_cut_and_a_larger_one_is_not():
    plan = SegmentedScanConfig(lanes=256, most_chains=4)
    assert plan.segments(4, 16384, "cpu") == 64 and plan.segments(5, 16384, "cpu") == 1
