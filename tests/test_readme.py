"""The README's examples run as they are written, and its table is the one that the benchmark wrote."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize(
    "number, printed",
    [
        (0, "CERTIFIED_PATH"),
        (1, "BITWISE|CERTIFIED PATH"),
        (2, "True"),
        (3, "e-0"),
        (4, "'draw': 5000.*True"),
    ],
)
def test_example(number, printed, capsys):
    exec(compile(BLOCKS[number], f"README example {number + 1}", "exec"), {})
    assert re.search(printed, capsys.readouterr().out, re.DOTALL)


def test_there_are_five_examples():
    assert len(BLOCKS) == 5


@pytest.mark.parametrize(
    "name", ["shooting-cpu", "posteriors-cpu", "dice-meetings", "dice-shooting", "verdict-cpu"]
)
def test_tables_are_the_benchmarks(name):
    table = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert table.strip() in TEXT
