"""What `benchmarks.reproduce` calls equal, and what it takes from a result."""

from typing import NamedTuple

import numpy as np
import pytest

from benchmarks.reproduce import arrays_of, compared, difference


@pytest.mark.parametrize(
    "before, now, words",
    [
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), ""),
        (np.array([1.0, 0.0]), np.array([1.0, -0.0]), "1 of 2 entries differ, by 0 at most"),
        (np.eye(2), np.eye(2) + 1e-16 * np.tri(2, k=-1), "by 1e-16 at most, first at (1, 0)"),
        (np.zeros(2), np.full(2, np.nan), "2 of 2 entries differ, by inf at most"),
        (np.zeros(2), np.zeros(2, np.float32), "float64(2,) before, float32(2,) now"),
        (np.zeros(2), np.zeros(3), "float64(2,) before, float64(3,) now"),
        (np.array(True), np.array(False), "first at ()"),
    ],
)
def test_every_bit_counts(before, now, words):
    found = difference(before, now)
    assert words in found and bool(words) == bool(found)


def test_what_is_gone_differs_and_what_is_new_does_not(capsys):
    assert compared({"a/x": np.zeros(2)}, {"a/x": np.zeros(2), "a/y": np.zeros(2)})
    assert not compared({"a/x": np.zeros(2), "a/y": np.zeros(2)}, {"a/x": np.zeros(2)})
    assert "NOT EQUAL y: recorded, and gone now" in capsys.readouterr().out


class Result(NamedTuple):
    draws: dict
    seconds_run: float
    fallbacks: tuple


def test_arrays_are_found_by_their_paths_without_times():
    found = arrays_of(Result({"x": np.ones(2), "lp": [1, 2.5]}, 3.0, ("why", "why")))
    assert {name: value.tolist() for name, value in found.items()} == {
        "draws.x": [1, 1],
        "draws.logdensity.0": 1,
        "draws.logdensity.1": 2.5,
        "fallbacks.count": 2,
    }
