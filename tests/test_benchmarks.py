"""Every benchmark starts: its imports are there, and its options explain themselves."""

import importlib
from pathlib import Path

import pytest

NAMES = sorted(path.stem for path in (Path(__file__).parent.parent / "benchmarks").glob("[a-z]*.py")
               if "def main(" in path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert ended.value.code == 0
    assert "--out" in capsys.readouterr().out
