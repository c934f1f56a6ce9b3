"""The memory that a solve takes per step is what the documentation says, by the compiler's own account."""

import json
from pathlib import Path

import pytest

from benchmarks.memory import SOLVERS, copies

STATED = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "memory-cpu.json").read_text()
)["rows"]


# These compile fast; the others are as much a promise, and are held by `-m slow`.
QUICK = {
    ("sequential", 4),
    ("shooting", 4),
    ("Jacobi", 4),
    ("quasi-DEER, 1 probe", 4),
    ("DEER", 4),
    ("shooting", 16),
}


@pytest.mark.parametrize(
    "name, width",
    [
        pytest.param(name, width, marks=() if (name, width) in QUICK else pytest.mark.slow)
        for name in SOLVERS
        for width in (4, 16)
    ],
)
def test_a_longer_path_takes_what_is_stated(name, width):
    # A tenth and one copy of the path, for what another version of the compiler may keep.
    assert 1 < copies(name, width) <= 1.1 * STATED[name][str(width)] + 1


def test_every_solver_is_stated():
    assert set(STATED) == set(SOLVERS)
