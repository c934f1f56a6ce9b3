"""The memory that a solve takes per step is what the documentation says, by the compiler's own account."""

import json
from pathlib import Path

import pytest

from benchmarks.memory import copies

STATED = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "memory-cpu.json").read_text())["rows"]


@pytest.mark.parametrize("name", ["shooting", "Jacobi", "quasi-DEER, 1 probe", "DEER"])
def test_a_longer_path_takes_what_is_stated(name):
    # A tenth and one copy of the path, for what another version of the compiler may keep.
    assert 1 < copies(name, 4) <= 1.1 * STATED[name]["4"] + 1
