"""The README's examples run as they are written, and its table is the one that the benchmark wrote."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number, words", [(0, "CERTIFIED PATH"), (1, "True"), (2, "e-0")])
def test_example(number, words, capsys):
    exec(compile(BLOCKS[number], f"README example {number + 1}", "exec"), {})
    assert words in capsys.readouterr().out


def test_there_are_three_examples():
    assert len(BLOCKS) == 3


def test_the_table_is_the_benchmarks():
    table = (ROOT / "benchmarks" / "results" / "shooting-cpu.md").read_text(encoding="utf-8")
    assert table.strip() in TEXT
